"""The log-mel front-end in pure NumPy, so that it also runs where nothing else is installed.

Frames are those of wav2vec 2.0: n samples at 16 kHz give (n - 400) // 320 + 1 frames, 50 a second.
"""

import functools

import numpy as np

from serkd_jax.audio.waveform import SAMPLE_RATE

WINDOW = 400  # samples, 25 ms
HOP = 320  # samples, 20 ms
FRAME_RATE = SAMPLE_RATE // HOP  # frames a second
FFT_LENGTH = 512
MIN_HZ = 20.0
LOG_FLOOR = -8.0
LOG_SCALE = 5.0
VERSION = 1


def num_frames(num_samples: int | np.ndarray) -> int | np.ndarray:
    """Returns the number of whole 25 ms frames, 20 ms apart, in `num_samples` samples at 16 kHz."""
    return (num_samples - WINDOW) // HOP + 1


def num_samples(num_frames: int) -> int:
    """Returns the number of samples at 16 kHz that `num_frames` frames span."""
    return (num_frames - 1) * HOP + WINDOW


def fingerprint(num_mels: int) -> str:
    """Returns everything on which the features depend."""
    return (
        f"logmel-v{VERSION}-{num_mels}-{WINDOW}-{HOP}-{FFT_LENGTH}"
        f"-{MIN_HZ:g}-{LOG_FLOOR:g}-{LOG_SCALE:g}"
    )


def log_mel(waveform: np.ndarray, num_mels: int) -> np.ndarray:
    """Computes the log-mel spectrogram: (log10(max(mel power, 1e-8)) + 8) / 5.

    It is exactly 0 for digital silence, so that zero padding means silence, and about 0.5 to 2 for
    speech. The mapping is fixed and uses no corpus statistics, so nothing leaks from test data.

    Args:
        waveform: float32 (num_samples,), 16 kHz, at least 400 samples.
        num_mels: number of mel bands, from 20 Hz to 8 kHz.

    Returns:
        float16 (num_frames, num_mels).
    """
    frames = np.lib.stride_tricks.sliding_window_view(waveform, WINDOW)[::HOP]
    hann = np.hanning(WINDOW + 1)[:-1]
    # Rounded to single precision, to give the same numbers as the library `transformers`.
    spectrum = np.fft.rfft(frames * hann, FFT_LENGTH).astype(np.complex64)
    power = np.abs(spectrum, dtype=np.float64) ** 2
    mel = np.maximum(power @ mel_filters(num_mels), 10**LOG_FLOOR)
    return ((np.log10(mel) - LOG_FLOOR) / LOG_SCALE).astype(np.float16)


@functools.cache
def mel_filters(
    num_mels: int, fft_length: int = FFT_LENGTH, min_hz: float = MIN_HZ, htk: bool = False
) -> np.ndarray:
    """Makes triangular filters of equal area up to 8 kHz, on Slaney's mel scale or that of HTK.

    Returns:
        float64 (fft_length // 2 + 1, num_mels).
    """
    to_mel, to_hertz = HTK if htk else SLANEY
    ends = to_mel(np.array([min_hz, SAMPLE_RATE / 2]))
    corners = to_hertz(np.linspace(*ends, num_mels + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, fft_length // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - bins) / np.diff(corners)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (corners[2:] - corners[:-2]))


def _hertz_to_mel(hertz: np.ndarray) -> np.ndarray:
    """Converts linearly up to 1000 Hz, which is 15 mel, and logarithmically above."""
    above = 15 + 27 / np.log(6.4) * np.log(np.maximum(hertz, 1000) / 1000)
    return np.where(hertz < 1000, 3 * hertz / 200, above)


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    above = 1000 * np.exp(np.log(6.4) / 27 * (mel - 15))
    return np.where(mel < 15, 200 * mel / 3, above)


SLANEY = _hertz_to_mel, _mel_to_hertz  # Slaney 1998
HTK = lambda hertz: 2595 * np.log10(1 + hertz / 700), lambda mel: 700 * (10 ** (mel / 2595) - 1)
