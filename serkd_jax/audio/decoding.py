"""Reads audio files as 16 kHz mono waveforms."""

import contextlib
import io
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from serkd_jax.audio.containers import TOLERANCE, audio_bytes, corrected, missing_bytes, what_else
from serkd_jax.audio.waveform import (
    SAMPLE_RATE,
    AudioError,
    check_audio,
    check_rate,
    downmix,
    to_full_scale,
)
from serkd_jax.errors import UserError

BLOCK = 2**16  # frames that are decoded at once
UNKNOWN_FRAMES = 1 << 62
END_TOLERANCE = 0.25  # seconds by which a file may be shorter than its header or a manifest says

# Formats that libsndfile does not read.
FFMPEG_SUFFIXES = (".mp4", ".m4a", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".aac", ".amr")
FFMPEG_SUFFIXES += (".wma", ".wv")
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf")
SUFFIXES += (".snd", ".sph", ".w64", *FFMPEG_SUFFIXES)

_UNREADABLE = (soundfile.LibsndfileError, av.FFmpegError, RuntimeError, ValueError, OSError)


def read_audio(
    path: str | os.PathLike,
    max_samples: int | None = None,
    *,
    start: float = 0.0,
    end: float | None = None,
    notices: list[str] | None = None,
) -> np.ndarray:
    """Reads the audio of a file of any format, rate and channel count.

    libsndfile decodes the formats that it knows and FFmpeg the others (in a video, the first audio
    track), whatever the file's name. `serkd_jax.audio.waveform.downmix` mixes the channels. Rates
    other than 16 kHz are resampled by soxr. Samples beyond full scale are scaled down, not clipped.

    Args:
        path: the file.
        max_samples: the most samples to return; only the beginning of a longer file is decoded.
        start: where to begin, in seconds.
        end: where to stop, in seconds; None means the end of the file.
        notices: a list that gets a sentence for each thing that the file's owner should know.

    Returns:
        float32 (num_samples,), 16 kHz mono; full scale is 1.

    Raises:
        AudioError: the file is missing, unreadable, truncated, empty, shorter than 400 samples,
            silent, has no audio track, ends before `end`, or holds NaN or infinity.
    """
    path = check_file(path)
    if what := what_else(path):  # first, since FFmpeg would follow the paths in a playlist
        raise AudioError(f"{path}: {what}")
    if not 0 <= start < (math.inf if end is None else end):
        raise AudioError(f"{path}: cannot read from {start:g} s to {end} s; correct start and end")
    seconds = math.inf if end is None else end - start
    if max_samples is not None:
        # A tenth of a second more, since the resampler looks ahead.
        seconds = min(seconds, max_samples / SAMPLE_RATE + 0.1)
    try:
        channels, rate = _decode(path, start, seconds, notices)
        check_rate(rate, path)
        mono = downmix(channels, notices)
        resampled = soxr.resample(mono, rate, SAMPLE_RATE, "HQ")
    except AudioError:
        raise
    except _UNREADABLE as error:
        reasons = (getattr(error, name, "") for name in ("error_string", "strerror"))
        reason = next(filter(None, reasons), str(error)) or type(error).__name__
        raise AudioError(
            f"{path}: unreadable or truncated audio ({reason}); copy it from the corpus again or "
            "convert it to WAV"
        ) from error
    if start and not len(mono):
        raise AudioError(f"{path}: ends before {start:g} s, the start of the utterance")
    missing = seconds - len(mono) / rate
    if end is not None and missing > END_TOLERANCE:
        raise AudioError(f"{path}: ends {missing:.2f} s before {start + seconds:g} s are reached")
    return check_audio(to_full_scale(resampled[:max_samples], notices), path)


def check_file(path: str | os.PathLike) -> Path:
    """Returns the path if there is a file that is not empty.

    Raises:
        AudioError: there is no file, or it is empty.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = " but a folder" if path.is_dir() else ""
            raise AudioError(
                f"{path}: no such audio file{what}; check the corpus folder or the manifest"
            )
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror}; rename it, or allow reading it") from error
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); copy it from the corpus again")
    return path


def _decode(
    path: Path, start: float, seconds: float, notices: list[str] | None
) -> tuple[np.ndarray, int]:
    """Returns (n, channels) float32 audio and its rate, from the decoder that knows the file."""
    stated, there = audio_bytes(path) or (0, 0)
    if there < (1 - TOLERANCE) * stated:
        raise AudioError(
            f"{path}: truncated, {there} of {stated} bytes of audio are there; "
            "copy it from the corpus again"
        )
    if missing := missing_bytes(path):
        raise AudioError(
            f"{path}: truncated, at least {missing} bytes are missing at its end; "
            "copy it from the corpus again"
        )
    with path.open("rb") as file:
        source: int | io.BytesIO = file.fileno()  # by its name, libsndfile takes a .au for noise
        if there > stated and (whole := corrected(path)):
            source = whole
            if notices is not None:
                notices.append(
                    f"its header states {stated} bytes of audio, but all {there} are read"
                )
        try:
            sound = soundfile.SoundFile(source, closefd=False)
        except soundfile.LibsndfileError:
            return _decode_ffmpeg(path, start, seconds)
        if sound.frames > UNKNOWN_FRAMES:  # of a FLAC file from a pipe, in which it cannot seek
            sound.close()
            return _decode_ffmpeg(path, start, seconds)
        with sound:
            return _decode_libsndfile(sound, start, seconds, path)


def _decode_libsndfile(
    file: soundfile.SoundFile, start: float, seconds: float, path: Path
) -> tuple[np.ndarray, int]:
    """Returns (n, channels) float32 audio and its rate; errors name the `path`."""
    rate = file.samplerate
    first = min(round(start * rate), file.frames)
    if first:
        file.seek(first)
    left = seconds if math.isinf(seconds) else round(seconds * rate)
    stated = min(left, file.frames - first)
    # In blocks, since a header may promise more than there is, or than there is memory for.
    blocks, count = [np.zeros((0, file.channels), np.float32)], 0
    while left > count and len(
        block := file.read(min(BLOCK, left - count), dtype="float32", always_2d=True)
    ):
        blocks.append(block)
        count += len(block)
    # MP3 and Ogg files are not exact in the number of samples that they state.
    if count < stated and file.format not in ("MP3", "OGG"):
        raise AudioError(
            f"{path}: truncated, {count} of {stated} samples can be decoded; "
            "copy it from the corpus again"
        )
    return np.concatenate(blocks), rate


def _frames(
    container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame]:
    """Yields the frames of a track, without packets that cannot be decoded, as ffmpeg does."""
    for packet in container.demux(stream):
        with contextlib.suppress(av.FFmpegError):
            yield from packet.decode()


def _decode_ffmpeg(path: Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """Returns (n, channels) float32 audio of the first audio track, and its rate."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("rb"))
        # By its descriptor, since a name need not be UTF-8; no other file may be opened.
        only = {"fd": str(file.fileno()), "protocol_whitelist": "fd"}
        container = opened.enter_context(av.open("fd:", options=only))
        if not container.streams.audio:
            raise AudioError(f"{path}: has no audio track; fetch the file again or leave it out")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise AudioError(f"{path}: no decoder knows its audio; convert it to WAV")
        stated = float((stream.duration or 0) * (stream.time_base or 0))
        if container.format.name in ("aac", "amr"):  # without a header, so FFmpeg guesses
            stated = 0.0
        # Interleaved, since PyAV reads beyond the last of 8 or more separate channels.
        floats = av.AudioResampler(format="flt")
        # A track that cannot be decoded may have neither channels nor a rate.
        chunks, count, rate = [np.zeros((0, 1), np.float32)], 0, stream.rate or SAMPLE_RATE
        for frame in itertools.chain(_frames(container, stream), [None]):  # None: what is left
            for block in floats.resample(frame):
                rate = block.sample_rate  # that of HE-AAC is twice what its header says
                chunks.append(block.to_ndarray().reshape(-1, block.layout.nb_channels))
                count += block.samples
            if count >= (start + seconds) * rate:
                break
    if not rate:
        raise AudioError(f"{path}: no audio in it can be decoded; copy it from the corpus again")
    missing = min(stated, start + seconds) - count / rate
    # FLAC states its exact length, and edited files more than they hold.
    tolerance = 1e-3 if container.format.name == "flac" else max(END_TOLERANCE, 0.1 * stated)
    if missing > tolerance:
        raise AudioError(
            f"{path}: truncated, the last {missing:.2f} of {stated:.2f} s cannot be decoded; "
            "copy it from the corpus again"
        )
    # The header of HE-AAC may state one channel where there are two.
    channels = np.concatenate([x for x in chunks if x.shape[1] == chunks[-1].shape[1]])
    first = round(start * rate)
    return channels[first : None if math.isinf(seconds) else round((start + seconds) * rate)], rate


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
        # Links last, so that a file's name is that of its real folder.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in SUFFIXES and not is_litter(path):
                yield path


def is_litter(path: Path) -> bool:
    """Returns whether macOS left this file: `._NAME` or something in `__MACOSX`, without audio."""
    return path.name.startswith("._") or "__MACOSX" in path.parts
