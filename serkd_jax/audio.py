"""Audio files as 16 kHz mono waveforms."""

import os
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr

from serkd_jax.errors import UserError

SAMPLE_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # one 25 ms frame, the shortest signal that HuBERT or a log-mel frame can see
SILENCE_PEAK = 1e-4  # about three steps of 16-bit audio

# libsndfile reads what is left of a truncated WAV without complaint; only its log tells.
_SHORT_DATA_CHUNK = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0x7FFF_0000  # sizes above are what streaming writers (ffmpeg pipes) put down


class AudioError(UserError):
    """An audio file that cannot be used; the message names it, the problem and the remedy."""


def read_audio(path: str | os.PathLike, max_samples: int | None = None) -> np.ndarray:
    """Reads a file in any format, rate and channel count that libsndfile knows.

    Channels are averaged; other rates are resampled by soxr.

    Args:
      path: of the file.
      max_samples: of the audio returned; of a longer file, no more than the beginning is decoded.

    Returns:
      float32 (num_samples,), 16 kHz mono, full scale is 1.

    Raises:
      AudioError: the file is missing, unreadable, truncated, empty, shorter than 400 samples,
        silent, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file; check the corpus folder or the manifest")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes); copy it from the corpus again")
    try:
        with soundfile.SoundFile(path) as file:
            log, rate = file.extra_info, file.samplerate
            # A tenth of a second more: the resampler looks ahead.
            frames = -1 if max_samples is None else int((max_samples / SAMPLE_RATE + 0.1) * rate)
            audio = file.read(frames, dtype="float32", always_2d=True)
        resampled = soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE, "HQ")
    except (soundfile.LibsndfileError, RuntimeError, ValueError, OSError) as error:
        raise AudioError(
            f"{path}: unreadable or truncated audio ({str(error) or type(error).__name__}); "
            "copy it from the corpus again or convert it to WAV"
        ) from error
    if (match := _SHORT_DATA_CHUNK.search(log)) and (
        int(match[2]) < int(match[1]) < _UNKNOWN_LENGTH
    ):
        raise AudioError(
            f"{path}: truncated, {match[2]} of {match[1]} bytes of audio are there; "
            "copy it from the corpus again"
        )
    return check_audio(resampled[:max_samples], path)


def check_audio(audio: np.ndarray, name: object) -> np.ndarray:
    """Returns float (num_samples,) 16 kHz audio unchanged, or says why it cannot be used.

    Raises:
      AudioError: names the audio by `name`; see `read_audio`.
    """
    if len(audio) == 0:
        raise AudioError(f"{name}: holds no samples; remove it or copy it from the corpus again")
    if len(audio) < MIN_SAMPLES:
        raise AudioError(
            f"{name}: {len(audio)} samples at 16 kHz are less than one frame of {MIN_SAMPLES} "
            "(25 ms); remove it"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; convert it again from the source")
    if np.abs(audio).max() < SILENCE_PEAK:
        raise AudioError(
            f"{name}: silent, every sample is below {SILENCE_PEAK:g} of full scale; "
            "remove it or record it again"
        )
    return audio


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Float audio of full scale 1 as int16, clipped; exact for 16-bit sources at 16 kHz."""
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)


def to_float(audio: np.ndarray) -> np.ndarray:
    """The inverse of `to_int16`: int16 (num_samples,) as float32 of full scale 1."""
    return audio.astype(np.float32) / 32768
