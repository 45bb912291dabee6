"""16 kHz mono waveforms in memory: checks, and conversion for 16-bit storage, in pure NumPy."""

import numpy as np

from serkd_jax.errors import UserError

SAMPLE_RATE = 16_000  # Hz
FULL_SCALE = 32_768  # of 16-bit samples
MIN_SAMPLES = 400  # one 25 ms frame, the shortest input of encoders and of the log-mel front-end
SILENCE_PEAK = 1e-4  # about three steps of 16-bit audio
LOUDEST_PEAK = 10  # decoders may overshoot full scale a little; more means another scale


class AudioError(UserError):
    """An audio file cannot be used; the message names it, the problem and the remedy."""


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
    if np.abs(audio).max() > LOUDEST_PEAK:
        raise AudioError(
            f"{name}: samples of {np.abs(audio).max():g}, where full scale is 1; divide them by it"
        )
    if np.abs(audio).max() < SILENCE_PEAK:
        raise AudioError(
            f"{name}: silent, every sample is below {SILENCE_PEAK:g} of full scale; "
            "remove it or record it again"
        )
    return audio


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Converts float audio of full scale 1 to int16, clipped; exact for 16-bit 16 kHz sources."""
    return np.clip(np.rint(audio * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def to_float(audio: np.ndarray) -> np.ndarray:
    """Converts int16 (num_samples,) to float32 of full scale 1, the inverse of `to_int16`."""
    return audio.astype(np.float32) / FULL_SCALE
