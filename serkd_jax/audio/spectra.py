"""What CA-MSER reads beside an encoder's frames: spectra and cepstra, in pure NumPy.

Both are those of librosa with the public code's settings, 10 ms apart, so that a frame of the grid
has two of each, at equal distances from its centre.
"""

import numpy as np

from serkd_jax.audio import logmel, mfcc

HOP = logmel.HOP // 2
PRE_EMPHASIS = 0.97
SPECTRUM_WINDOW, SPECTRUM_FFT = 640, 800  # samples, 40 ms and 50 ms
CEPSTRUM_WINDOW = 2048
BINS, COEFFICIENTS = 200, 40  # the lowest bins of 20 Hz, and the first coefficients
WIDTH = 2 * (BINS + COEFFICIENTS)
MIN_AMPLITUDE = 1e-5
VERSION = 1


def fingerprint(width: int) -> str:
    """Returns everything on which the features depend."""
    return (
        f"spectra-v{VERSION}-{width}-{HOP}-{PRE_EMPHASIS}-{SPECTRUM_WINDOW}-{SPECTRUM_FFT}"
        f"-{CEPSTRUM_WINDOW}-{BINS}-{COEFFICIENTS}-{mfcc.BANDS}-{mfcc.RANGE:g}"
    )


def spectra(waveform: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Computes two spectra, in dB below the recording's loudest bin, and two cepstra per frame.

    Args:
        waveform: float32 (num_samples,), 16 kHz, at least 400 samples.
        width: `WIDTH`, the only one that there is.

    Returns:
        float16 (num_frames, WIDTH): twice `BINS` levels of -80 to 0, and twice `COEFFICIENTS`.
    """
    before = np.append(waveform[:1], waveform[:-1])
    emphasized = waveform - PRE_EMPHASIS * before
    hamming = np.hamming(SPECTRUM_WINDOW + 1)[:-1]
    amplitude = np.abs(np.fft.rfft(_frames(emphasized, SPECTRUM_WINDOW) * hamming, SPECTRUM_FFT))
    levels = 20 * np.log10(np.maximum(amplitude, MIN_AMPLITUDE))
    levels = np.maximum(levels - levels.max(), -mfcc.RANGE)[:, :BINS]

    cepstra = mfcc.cepstra(_frames(emphasized, CEPSTRUM_WINDOW), COEFFICIENTS, htk=True)
    pairs = [each.reshape(len(each) // 2, -1) for each in (levels, cepstra)]
    return np.concatenate(pairs, axis=1).astype(np.float16)


def _frames(waveform: np.ndarray, length: int) -> np.ndarray:
    """Returns windows (2 * num_frames, length) around the centres, with 0 outside the recording."""
    before = length // 2 - (logmel.WINDOW - HOP) // 2  # the first centre
    padded = np.pad(waveform, (before, length))
    windows = np.lib.stride_tricks.sliding_window_view(padded, length)[::HOP]
    return windows[: 2 * logmel.num_frames(len(waveform))]
