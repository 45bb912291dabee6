"""What audio files say about their own length, and what files are that are no audio at all.

Decoders read what is left of a truncated file without complaint. Every container states its length
somewhere: as the size of a chunk, a box or a segment, or by frames that end where the next begins.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

HEAD = 1 << 16  # bytes of a file in which its headers are
# Sizes above this are what streaming writers (ffmpeg pipes) put down before they know.
UNKNOWN_LENGTH = 0x7FFF_0000
_WAV = (b"RIFF", b"RIFX", b"RF64", b"BW64")
# Some headers of WAV, MP3 and SPHERE files are a little off.
TOLERANCE = 0.01


_OTHERS = {  # what files of other kinds begin with, in lower case
    "an archive: unpack it first": (b"pk\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"rar!", b"bzh"),
    "a document, not audio; fetch the recording itself": (b"%pdf", b"\xd0\xcf\x11\xe0"),
    "a picture, not audio; fetch the recording itself": (b"\x89png", b"\xff\xd8\xff", b"gif8"),
}


def what_else(path: Path) -> str:
    """Says what a file is that is not audio, by its first bytes, and the remedy; or nothing."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not any(head) and not any(path.read_bytes()):
        return "nothing but zeros: copy it from the corpus again"
    if head.startswith(b"NIST_1A"):  # its header is text
        return ""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` where it is from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file itself: the download failed; fetch it again"
    for what, beginnings in _OTHERS.items():
        if start.startswith(beginnings):
            return what
    text = head.decode("utf-8", "replace").strip("\ufeff\ufffd \t\r\n")  # cut within a letter
    words = " ".join(text.split())
    if words and words.isprintable() and "\ufffd" not in words:
        return f"unreadable, a text that begins with {words[:40]!r}; fetch the recording itself"
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


def audio_bytes(path: Path) -> tuple[int, int] | None:
    """How many bytes of audio the header of a WAV or AU file states, and how many are there.

    Returns:
        None if the file is of another kind, or its header does not know.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(36)
        if not (found := _find_audio(file, head, size)):
            return None
        start, length = found
        end = start + length + length % 2
        if end == size or (end < size and head[:4] in _WAV and _are_chunks(file, end, size)):
            return length, length
    return length, size - start


def corrected(path: Path) -> io.BytesIO | None:
    """A WAV or AU file whose header states that the audio ends where the file does, in memory.

    Recorders write the sizes when they stop, so a crash leaves 0 or what was last written.
    """
    size = path.stat().st_size
    if size > UNKNOWN_LENGTH:
        return None
    with path.open("rb") as file:
        start, _ = _find_audio(file, file.read(36), size) or (0, 0)
        file.seek(0)
        content = bytearray(file.read())
    if content[:4] == b".snd":
        content[8:12] = struct.pack(">I", size - start)
    else:
        order = ">" if content[:4] == b"RIFX" else "<"
        content[:4] = b"RIFX" if order == ">" else b"RIFF"
        content[4:8] = struct.pack(f"{order}I", size - 8)
        content[start - 4 : start] = struct.pack(f"{order}I", size - start)
    return io.BytesIO(bytes(content))


def _find_audio(file: io.BufferedReader, head: bytes, size: int) -> tuple[int, int] | None:
    """Returns where the audio of a WAV or AU file starts, and its length if that is known."""
    if head[:4] == b".snd" and len(head) >= 24:
        start, length = struct.unpack(">II", head[4:12])
        return (start, length) if length < UNKNOWN_LENGTH else None
    if head[:4] not in _WAV or head[8:12] != b"WAVE":
        return None
    for name, start, length in _chunks(file, 12, size, ">" if head[:4] == b"RIFX" else "<"):
        if name == b"data":
            if length == 0xFFFFFFFF and head[12:16] == b"ds64":  # RF64 states it there
                return start, struct.unpack("<Q", head[28:36])[0]
            return (start, length) if length < UNKNOWN_LENGTH else None
    return None


def _chunks(
    file: io.BufferedReader, place: int, size: int, order: str = "<"
) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name, start and stated length of each chunk of a RIFF file."""
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack(f"{order}4sI", file.read(8))
        yield name, place + 8, length
        place += 8 + length + length % 2


def _are_chunks(file: io.BufferedReader, place: int, size: int) -> bool:
    """Whether the rest of a file is chunks, of printable names and with lengths that fit."""
    for name, start, length in _chunks(file, place, size):
        if not all(32 <= letter < 127 for letter in name) or start + length > size + 1:
            return False
    return True


def _end_of_avi(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    length = struct.unpack("<I", head[4:8])[0]
    return 8 + length if 0 < length < UNKNOWN_LENGTH else 0


def _end_of_aiff(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    return 8 + struct.unpack(">I", head[4:8])[0]


def _end_of_w64(file: io.BufferedReader, head: bytes, size: int) -> int:
    del file, size
    return struct.unpack("<Q", head[16:24])[0]


def _end_of_caf(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of the last chunk of a CAF file; that of the audio may be unknown, -1."""
    del head
    place = 8
    while place + 12 <= size:
        file.seek(place)
        name, length = struct.unpack(">4sq", file.read(12))
        if length < 0 or not name.isalnum():  # unknown, or audio of which its chunk does not know
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
    """Returns the end of the last element of a WebM or Matroska file.

    Live recordings do not state the lengths of the segment and its clusters, but of all in them.
    """
    del head
    place = 0
    while place + 12 <= size:
        file.seek(place)
        header = file.read(12)
        name, start = _number(header, 0)
        length, start = _number(header, start)
        known = length < (1 << 7 * (start - _number(header, 0)[1])) - 1
        holder = header[:4] in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75")
        if not name or not (known or holder):
            return size
        if known and place + start + length > size:
            return place + start + length
        place += start + (length if known else 0)
    return max(place, size)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """Returns a number of variable length, and where it ends."""
    width = 9 - data[place].bit_length()
    value = int.from_bytes(data[place : place + width], "big")
    return value & ((1 << 7 * width) - 1), place + width


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


def _end_of_sphere(file: io.BufferedReader, head: bytes, size: int) -> int:
    """Returns the end of a NIST SPHERE file, whose header is text; it may be compressed."""
    del file
    fields = dict(re.findall(rb"^(\w+) -\S+ (\S+)", head[:4096], re.MULTILINE))
    if b"," in fields.get(b"sample_coding", b""):
        return 0
    names = (b"sample_count", b"sample_n_bytes", b"channel_count")
    try:
        start, count = int(head[8:16]), int(fields[names[0]])
        length = count * int(fields[names[1]]) * int(fields.get(names[2], 1))
    except (KeyError, ValueError):
        return 0
    return start + length if size - start < (1 - TOLERANCE) * length else 0


def _end_of_frames(
    length: Callable[[bytes], int], least: int, stated: Callable[[bytes], int] = lambda _: 0
) -> Callable:
    """Makes a function that walks over frames that state their length, to where the last ends.

    Args:
        length: the first bytes of a frame -> its length; 0 if it is none.
        least: how many bytes `length` needs.
        stated: the first frame -> what it says of the length of all; 0 if it says nothing.
    """

    def end(file: io.BufferedReader, head: bytes, size: int) -> int:
        del head
        file.seek(0)
        content = file.read()
        place = first = _first_frame(content)
        while place + least <= size:
            if (step := length(content[place : place + least])) == 0:
                break  # a tag, or what no decoder would read either
            place += step
        whole = stated(content[first : first + 200])
        if size - first < (1 - TOLERANCE) * whole:
            return first + whole
        return max(place, size)

    return end


def _first_frame(content: bytes) -> int:
    """Returns where the frames begin: after AMR's magic, or tags, whose size has 7 bits a byte."""
    if content.startswith(b"#!AMR"):
        return content.index(b"\n") + 1
    place = 0
    while content[place : place + 3] == b"ID3":
        length = 0
        for byte in content[place + 6 : place + 10]:
            length = length << 7 | byte & 127
        place += 10 + length
    return place


def _xing_bytes(frame: bytes) -> int:
    """Returns the bytes of all frames of an MP3 file, if its first frame states them."""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0 or not frame[place + 7] & 2:
        return 0
    place += 8 + 4 * (frame[place + 7] & 1)
    return int.from_bytes(frame[place : place + 4], "big")


def _amr_frame(sizes: tuple[int, ...]) -> Callable[[bytes], int]:
    """Makes a function that returns the length of an AMR frame, by its mode."""
    return lambda header: 1 + sizes[header[0] >> 3 & 15] if header[0] & 0x83 == 0 else 0


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


# Bytes of a frame after its first, by its mode.
_AMR = (12, 13, 15, 17, 19, 20, 26, 31, 5, 6, 5, 5, 0, 0, 0, 0)
_AMR_WB = (17, 23, 32, 36, 40, 46, 50, 58, 60, 5, 0, 0, 0, 0, 0, 0)


def _begins(head: bytes, frame: Callable[[bytes], int], least: int) -> bool:
    place = _first_frame(head)
    first = head[place : place + least]
    return len(first) == least and frame(first) > 0


# What a kind of file begins with, and the end of the file as it states it; 0 if it does not.
_KINDS: list[tuple[Callable[[bytes], bool], Callable]] = [
    (lambda head: head[:7] == b"NIST_1A", _end_of_sphere),
    (lambda head: head[:4] == b"FORM" and head[8:11] in (b"AIF", b"8SV", b"16S"), _end_of_aiff),
    (lambda head: head[:4] == b"riff" and len(head) >= 40, _end_of_w64),
    (lambda head: head[:4] == b"caff", _end_of_caf),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _end_of_avi),
    (lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat"), _end_of_boxes),
    (lambda head: head[:4] == b"\x1a\x45\xdf\xa3", _end_of_segment),
    (lambda head: head[:4] == b"\x30\x26\xb2\x75", _end_of_asf),
    (lambda head: head[:4] == b"OggS", _end_of_ogg),
    (lambda head: head[:6] == b"#!AMR\n", _end_of_frames(_amr_frame(_AMR), 1)),
    (lambda head: head[:9] == b"#!AMR-WB\n", _end_of_frames(_amr_frame(_AMR_WB), 1)),
    (lambda head: _begins(head, _mp3_frame, 4), _end_of_frames(_mp3_frame, 4, _xing_bytes)),
    (lambda head: _begins(head, _adts_frame, 7), _end_of_frames(_adts_frame, 7)),
]
