"""Mel-frequency cepstral coefficients in pure NumPy, on the grid of the log-mel frames.

Window, bands, decibels and transform are those that librosa takes by default at 22.05 kHz, and
TIM-Net with it, in seconds: a Hann window of 93 ms and 128 bands on Slaney's mel scale. The frames
are 20 ms apart, not 23 ms, and their centres are those of the log-mel frames.
"""

import functools

import numpy as np

from serkd_jax.audio import logmel

WINDOW = 1486  # samples, 2048 at 22.05 kHz
FFT_LENGTH = 2048
BANDS = 128
MIN_POWER = 1e-10
RANGE = 80.0  # dB below the loudest band of the recording, at which the levels are cut
VERSION = 1


def fingerprint(num_coefficients: int) -> str:
    """Returns everything on which the features depend."""
    return (
        f"mfcc-v{VERSION}-{num_coefficients}-{WINDOW}-{logmel.HOP}-{FFT_LENGTH}-{BANDS}-{RANGE:g}"
    )


def mfcc(waveform: np.ndarray, num_coefficients: int) -> np.ndarray:
    """Computes the first coefficients of the orthonormal DCT-II of the levels of mel bands in dB.

    Args:
        waveform: float32 (num_samples,), 16 kHz, at least 400 samples.
        num_coefficients: number of coefficients, at most `BANDS`.

    Returns:
        float16 (num_frames, num_coefficients).
    """
    before = (WINDOW - logmel.WINDOW) // 2  # so that the centres are those of the log-mel frames
    padded = np.pad(waveform, (before, WINDOW - logmel.WINDOW - before))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:: logmel.HOP]
    return cepstra(frames, num_coefficients).astype(np.float16)


def cepstra(frames: np.ndarray, num_coefficients: int, htk: bool = False) -> np.ndarray:
    """Computes (n, num_coefficients) of windows (n, length), at most `FFT_LENGTH` samples long.

    The levels are cut at `RANGE` below the greatest of all; `htk` chooses the mel scale.
    """
    hann = np.hanning(frames.shape[1] + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * hann, FFT_LENGTH)) ** 2
    mel = power @ logmel.mel_filters(BANDS, FFT_LENGTH, 0.0, htk)
    levels = 10 * np.log10(np.maximum(mel, MIN_POWER))
    return np.maximum(levels, levels.max() - RANGE) @ cosines(num_coefficients)


@functools.cache
def cosines(num_coefficients: int) -> np.ndarray:
    """Makes the matrix (BANDS, num_coefficients) of the orthonormal DCT-II."""
    k, n = np.arange(num_coefficients), np.arange(BANDS)[:, None]
    matrix = np.sqrt(2 / BANDS) * np.cos(np.pi * k * (2 * n + 1) / (2 * BANDS))
    matrix[:, 0] /= np.sqrt(2)
    return matrix
