"""The front-ends that need no model: how each is computed, and what its size is called."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from serkd_jax.audio import logmel, mfcc, spectra


class Spectral(NamedTuple):
    """A function from a waveform to frames 20 ms apart.

    Attributes:
        compute: (float32 (samples,) at 16 kHz, N) -> float16 (frames, N).
        fingerprint: N -> a string of all on which the frames depend.
        size: what N is called in a recipe.
        most: the greatest N.
        words: what the frames are called, after N.
        least: the least N.
    """

    compute: Callable[[np.ndarray, int], np.ndarray]
    fingerprint: Callable[[int], str]
    size: str
    most: int
    words: str
    least: int = 1


SPECTRAL = {
    "logmel": Spectral(
        logmel.log_mel, logmel.fingerprint, "num_mels", logmel.FFT_LENGTH // 2, "log-mel bands"
    ),
    "mfcc": Spectral(
        mfcc.mfcc,
        mfcc.fingerprint,
        "num_coefficients",
        mfcc.BANDS,
        "mel-frequency cepstral coefficients",
    ),
    "spectra": Spectral(
        spectra.spectra,
        spectra.fingerprint,
        "num_values",
        spectra.WIDTH,
        "values of spectra and cepstra",
        spectra.WIDTH,
    ),
}
