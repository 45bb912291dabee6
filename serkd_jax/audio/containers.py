"""What audio files say about their own length, and what files are that are no audio at all.

Decoders read what is left of a truncated file without complaint. Every container states its length
somewhere: as the size of a chunk, a box or a segment, or by frames that end where the next begins.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

HEAD = 1 << 16  # bytes of a file in which its headers are
# Sizes above this are what streaming writers (ffmpeg pipes) put down before they know.
UNKNOWN_LENGTH = 0x7FFF_0000


def what_else(path: Path) -> str:
    """Says what a file is that is not audio, by its first bytes, and the remedy; or nothing."""
    with path.open("rb") as file:
        head = file.read(1024)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` where it is from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file itself: the download failed; fetch it again"
    if start.startswith((b"pk\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf\x27\x1c", b"rar!")):
        return "an archive: unpack it first"
    return ""


def missing_bytes(path: Path) -> int:
    """Returns how many bytes at the end of a file are missing, as far as its container says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
        for is_kind, stated_end in _KINDS:
            if is_kind(head):
                try:
                    return max(0, stated_end(file, head, size) - size)
                except (IndexError, struct.error):  # it ends within its head
                    return 1
    return 0


def unfinished_wav(path: Path) -> tuple[io.BytesIO, int, int] | None:
    """A WAV file whose header states less audio than follows, with the header corrected.

    Recorders write the sizes when they stop, so a crash leaves 0 or what was last written.

    Returns:
        The file in memory, and the bytes of audio that were stated and that are there; None if
        what follows the stated audio is other chunks, or the file is not WAV.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if not (head.startswith(b"RIFF") and head[8:12] == b"WAVE") or size > UNKNOWN_LENGTH:
            return None
        chunks = _chunks(file, 12, size)
        found = next((chunk for chunk in chunks if chunk[0] == b"data"), None)
        if found is None:
            return None
        _, start, length = found
        end = start + length + length % 2
        if end >= size or _are_chunks(file, end, size):
            return None
        file.seek(0)
        content = bytearray(file.read())
    there = size - start
    content[4:8] = struct.pack("<I", size - 8)
    content[start - 4 : start] = struct.pack("<I", there)
    return io.BytesIO(bytes(content)), length, there


def _chunks(file: io.BufferedReader, place: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name, start and stated length of each chunk of a RIFF file."""
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        yield name, place + 8, length
        place += 8 + length + length % 2


def _are_chunks(file: io.BufferedReader, place: int, size: int) -> bool:
    """Whether the rest of a file is chunks, of printable names and with lengths that fit."""
    for name, start, length in _chunks(file, place, size):
        if not all(32 <= letter < 127 for letter in name) or start + length > size + 1:
            return False
    return True


def _end_of_wav(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of the audio of a WAV or RF64 file; some headers are a little off."""
    del head
    large = 0
    for name, start, length in _chunks(file, 12, size):
        if name == b"ds64":
            file.seek(start + 8)
            (large,) = struct.unpack("<Q", file.read(8))
        elif name == b"data":
            length = large if length == 0xFFFF_FFFF else length * (length < UNKNOWN_LENGTH)
            return start + length if size - start < 0.99 * length else 0
    return 0


def _end_of_nist(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of a NIST SPHERE file; its audio follows a header of text."""
    del file, size
    fields = dict(re.findall(rb"^(\w+) -i (\d+)$", head[:1024], re.MULTILINE))
    length = math.prod(
        int(fields.get(name, 0)) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")
    )
    return 1024 + length if length else 0


def _end_of_avi(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    length = struct.unpack("<I", head[4:8])[0]
    return 8 + length if 0 < length < UNKNOWN_LENGTH else 0


def _end_of_aiff(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    return 8 + struct.unpack(">I", head[4:8])[0]


def _end_of_au(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    start, length = struct.unpack(">II", head[4:12])
    return start + length if length < UNKNOWN_LENGTH else 0


def _end_of_w64(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    return struct.unpack("<Q", head[16:24])[0]


def _end_of_caf(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of the last chunk of a CAF file; that of the audio may be unknown, -1."""
    del head
    place = 8
    while place + 12 <= size:
        file.seek(place + 4)
        length = struct.unpack(">q", file.read(8))[0]
        if length < 0:
            return size
        place += 12 + length
    return place


def _end_of_boxes(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of the last box of an MP4 file."""
    del head
    place = 0
    while place + 8 <= size:
        file.seek(place)
        header = file.read(16)
        length = struct.unpack(">I", header[:4])[0]
        if length == 1 and len(header) == 16:
            length = struct.unpack(">Q", header[8:])[0]
        if length < 8:  # 0 is a box up to the end
            return size
        place += length
    return place


def _end_of_segment(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of a WebM or Matroska file's segment, or of its last part, if it is known.

    Browsers write segments and clusters of unknown length, as they record; their parts have one.
    """
    del head
    place = 0
    while place + 2 <= size:
        file.seek(place)
        header = file.read(12)
        width = 9 - header[0].bit_length()  # of the element's name
        digits = 9 - header[width].bit_length()
        length = int.from_bytes(header[width : width + digits], "big") & (1 << 7 * digits) - 1
        place += width + digits
        if length == (1 << 7 * digits) - 1:
            continue
        place += length
        if header[:width] == b"\x18\x53\x80\x67":
            break
    return place


def _end_of_asf(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the size of a WMA file that its file properties state."""
    del file, size
    place = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    return struct.unpack("<Q", head[place + 40 : place + 48])[0] if place >= 0 else 0


def _end_of_ogg(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the file's size if its last page is whole and says that it is the last."""
    del head
    file.seek(max(0, size - 2 * HEAD))
    tail = file.read()
    place = tail.rfind(b"OggS")
    if place < 0 or len(tail) < place + 27:
        return size + 1
    segments = tail[place + 27 : place + 27 + tail[place + 26]]
    whole = len(segments) == tail[place + 26]
    whole &= len(tail) >= place + 27 + len(segments) + sum(segments)
    return size if whole and tail[place + 5] & 4 else size + 1


def _end_of_frames(length: Callable[[bytes], int], least: int, begin: int = 0) -> Callable:
    """Makes a function that walks over frames that state their length, to where the last ends."""

    def end(file: io.BufferedReader, head: bytes, size: int) -> int:
        del head
        file.seek(0)
        content = file.read()
        place = begin or _after_id3(content)
        while place + least <= size:
            if (step := length(content[place : place + least])) == 0:
                return size  # a tag, or what no decoder would read either
            place += step
        return place if place > size else size

    return end


def _after_id3(content: bytes) -> int:
    """Returns where the frames begin, after tags, whose size has 7 bits a byte."""
    place = 0
    while content[place : place + 3] == b"ID3":
        length = 0
        for byte in content[place + 6 : place + 10]:
            length = length << 7 | byte & 127
        place += 10 + length
    return place


_BITRATES = {  # kbit/s of layer III, by whether it is MPEG 1
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}


def _mp3_frame(header: bytes) -> int:
    """Returns the length of an MPEG layer III frame by its header of 4 bytes; 0 if it is none."""
    if header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bitrate = _BITRATES[version == 3][header[2] >> 4]
    if version == 1 or not bitrate or header[2] >> 2 & 3 == 3:
        return 0
    rate = (44_100, 48_000, 32_000)[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * bitrate * 1000 // rate + (header[2] >> 1 & 1)


def _adts_frame(header: bytes) -> int:
    """Returns the length of an AAC frame by its ADTS header; 0 if it is none."""
    if header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
        return 0
    return (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5


def _amr_frame(lengths: tuple[int, ...]) -> Callable[[bytes], int]:
    """Makes a function from the first byte of an AMR frame to its length, by the frame's type."""
    return lambda header: (*lengths, *[1] * 16)[header[0] >> 3 & 15]


def _begins(head: bytes, frame: Callable[[bytes], int], least: int) -> bool:
    place = _after_id3(head)
    first = head[place : place + least]
    return len(first) == least and frame(first) > 0


# What a kind of file begins with, and the end of the file as it states it; 0 if it does not.
_KINDS: list[tuple[Callable[[bytes], bool], Callable]] = [
    (lambda head: head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE", _end_of_wav),
    (lambda head: head[:7] == b"NIST_1A", _end_of_nist),
    (lambda head: head[:4] == b"FORM" and head[8:11] == b"AIF", _end_of_aiff),
    (lambda head: head[:4] == b".snd" and len(head) >= 24, _end_of_au),
    (lambda head: head[:4] == b"riff" and len(head) >= 40, _end_of_w64),
    (lambda head: head[:4] == b"caff", _end_of_caf),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _end_of_avi),
    (lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat"), _end_of_boxes),
    (lambda head: head[:4] == b"\x1a\x45\xdf\xa3", _end_of_segment),
    (lambda head: head[:4] == b"\x30\x26\xb2\x75", _end_of_asf),
    (lambda head: head[:4] == b"OggS", _end_of_ogg),
    (
        lambda head: head[:6] == b"#!AMR\n",
        _end_of_frames(_amr_frame((13, 14, 16, 18, 20, 21, 27, 32, 6)), 1, 6),
    ),
    (
        lambda head: head[:9] == b"#!AMR-WB\n",
        _end_of_frames(_amr_frame((18, 24, 33, 37, 41, 47, 51, 59, 61, 6)), 1, 9),
    ),
    (lambda head: _begins(head, _mp3_frame, 4), _end_of_frames(_mp3_frame, 4)),
    (lambda head: _begins(head, _adts_frame, 7), _end_of_frames(_adts_frame, 7)),
]
