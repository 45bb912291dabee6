"""Reads audio files as 16 kHz mono waveforms."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from serkd_jax.audio.waveform import SAMPLE_RATE, AudioError, check_audio
from serkd_jax.errors import UserError

BLOCK = 2**16  # frames that are decoded at once
END_TOLERANCE = 0.25  # seconds by which a file may be shorter than its header or a manifest says

# Formats that libsndfile does not read.
FFMPEG_SUFFIXES = (".mp4", ".m4a", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".aac", ".amr")
FFMPEG_SUFFIXES += (".wma", ".wv")
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf")
SUFFIXES += (".snd", ".sph", ".w64", *FFMPEG_SUFFIXES)

# libsndfile reads the rest of a truncated WAV without an error; only its log shows it.
_SHORT_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7FFF_0000  # streaming writers (ffmpeg pipes) write sizes above this


def read_audio(
    path: str | os.PathLike,
    max_samples: int | None = None,
    *,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """Reads the audio of a file of any format, rate and channel count.

    libsndfile decodes the formats that it knows, and the channels are averaged. For videos and the
    other formats in `FFMPEG_SUFFIXES`, FFmpeg decodes the first audio track and mixes it down like
    `ffmpeg -ac 1`. Rates other than 16 kHz are resampled by soxr.

    Args:
        path: the file.
        max_samples: the most samples to return; only the beginning of a longer file is decoded.
        start: where to begin, in seconds.
        end: where to stop, in seconds; None means the end of the file.

    Returns:
        float32 (num_samples,), 16 kHz mono; full scale is 1.

    Raises:
        AudioError: the file is missing, unreadable, truncated, empty, shorter than 400 samples,
            silent, has no audio track, ends before `end`, or holds NaN or infinity.
    """
    path = check_file(path)
    if not 0 <= start < (math.inf if end is None else end):
        raise AudioError(f"{path}: cannot read from {start:g} s to {end} s; correct start and end")
    seconds = math.inf if end is None else end - start
    if max_samples is not None:
        # A tenth of a second more, since the resampler looks ahead.
        seconds = min(seconds, max_samples / SAMPLE_RATE + 0.1)
    decode = _decode_ffmpeg if path.suffix.lower() in FFMPEG_SUFFIXES else _decode_libsndfile
    try:
        audio, rate = decode(path, start, seconds)
        resampled = soxr.resample(audio, rate, SAMPLE_RATE, "HQ")
    except AudioError:
        raise
    except (soundfile.LibsndfileError, av.FFmpegError, RuntimeError, ValueError, OSError) as error:
        raise AudioError(
            f"{path}: unreadable or truncated audio ({str(error) or type(error).__name__}); "
            "copy it from the corpus again or convert it to WAV"
        ) from error
    if start and not len(audio):
        raise AudioError(f"{path}: ends before {start:g} s, the start of the utterance")
    missing = seconds - len(audio) / rate
    if end is not None and missing > END_TOLERANCE:
        raise AudioError(f"{path}: ends {missing:.2f} s before {start + seconds:g} s are reached")
    return check_audio(resampled[:max_samples], path)


def check_file(path: str | os.PathLike) -> Path:
    """Returns the path if there is a file that is not empty.

    Raises:
        AudioError: there is no file, or it is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file; check the corpus folder or the manifest")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); copy it from the corpus again")
    return path


def _decode_libsndfile(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Decodes a file to mono float32 audio; also returns its rate."""
    with soundfile.SoundFile(path) as file:
        log, rate = file.extra_info, file.samplerate
        if start:
            file.seek(min(round(start * rate), file.frames))
        left = seconds if math.isinf(seconds) else round(seconds * rate)
        # In blocks, since a header may claim more than there is, or than fits in memory.
        blocks = [np.zeros(0, np.float32)]
        while left > 0 and len(
            block := file.read(min(BLOCK, left), dtype="float32", always_2d=True)
        ):
            blocks.append(block.mean(axis=1))
            left -= len(block)
        audio = np.concatenate(blocks)
    if match := _SHORT_DATA_CHUNK.search(log):
        stated, there = int(match[1]), int(match[2])
        if there < 0.99 * stated and stated < _UNKNOWN_LENGTH:  # some headers are a little off
            raise AudioError(
                f"{path}: truncated, {there} of {stated} bytes of audio are there; "
                "copy it from the corpus again"
            )
    return audio, rate


def _frames(
    container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame]:
    """Yields the frames of a track; like ffmpeg, it drops packets that cannot be decoded."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.FFmpegError):
            yield from packet.decode()


def _decode_ffmpeg(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Decodes the first audio track of a file to mono float32 audio; also returns its rate."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise AudioError(f"{path}: has no audio track; fetch the file again or leave it out")
        stream = container.streams.audio[0]
        stated = float((stream.duration or 0) * (stream.time_base or 0))
        if container.format.name in ("aac", "amr"):  # without a header, FFmpeg guesses
            stated = 0.0
        mono = av.AudioResampler(format="s32", layout="mono")  # with floats it would mix louder
        chunks, count, rate = [np.zeros(0, np.int32)], 0, stream.rate
        for frame in itertools.chain(_frames(container, stream), [None]):  # None flushes the rest
            for mixed in mono.resample(frame):
                rate = mixed.sample_rate  # HE-AAC's is twice what its header says
                chunks.append(mixed.to_ndarray()[0])
                count += len(chunks[-1])
            if count >= (start + seconds) * rate:
                break
    audio = np.concatenate(chunks).astype(np.float32) / 2**31
    missing = min(stated, start + seconds) - count / rate
    if missing > max(END_TOLERANCE, 0.1 * stated):  # edited files state more than they hold
        raise AudioError(
            f"{path}: truncated, the last {missing:.2f} of {stated:.2f} s cannot be decoded; "
            "copy it from the corpus again"
        )
    first = round(start * rate)
    last = None if math.isinf(seconds) else round((start + seconds) * rate)
    return audio[first:last], rate


def find_audio(folder: Path) -> Iterator[Path]:
    """Yields the audio files below a folder, by their suffixes; each real folder is walked once.

    Raises:
        UserError: a folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error

    walked = set()  # a link may lead to a folder above it, or to one that is walked anyway
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in walked:
            folders.clear()
            continue
        walked.add(real)
        folders.sort()
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in SUFFIXES and not is_litter(path):
                yield path


def is_litter(path: Path) -> bool:
    """Returns whether macOS left this file: `._NAME` or something in `__MACOSX`, without audio."""
    return path.name.startswith("._") or "__MACOSX" in path.parts
