"""Standardises features to mean 0 and spread 1 per dimension, over a training part's frames."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from serkd_jax.models.frames import valid_frames

FLOOR = 1e-3  # share of the median spread; smaller variation is rounding, not to be amplified


class Statistics(struct.PyTreeNode):
    """The mean and spread by which features are standardised.

    Attributes:
        mean: (N,) float32.
        spread: (N,) float32, the standard deviation; positive, since it has a lower bound.
    """

    mean: jax.Array | np.ndarray
    spread: jax.Array | np.ndarray


def no_statistics(width: int) -> Statistics:
    """Returns statistics that leave features of N = `width` dimensions unchanged."""
    return Statistics(np.zeros(width, np.float32), np.ones(width, np.float32))


def standardize(features: jax.Array, num_frames: jax.Array, statistics: Statistics) -> jax.Array:
    """Standardises every dimension; padding stays 0.

    Args:
        features: (B, T, N) features of any float dtype.
        num_frames: (B,) int, the numbers of valid frames.
        statistics: mean and spread over the fold's training part.

    Returns:
        (B, T, N) float32, or float64 if the features or the statistics are.
    """
    valid = valid_frames(features, num_frames)
    precise = jnp.promote_types(features.dtype, jnp.float32)
    standard = (features.astype(precise) - statistics.mean) / statistics.spread
    # Not 0 alone, which the converter to ONNX takes for a float64.
    return jnp.where(valid[..., None], standard, jnp.zeros_like(standard))


def measure_statistics(
    chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], members: np.ndarray
) -> list[Statistics]:
    """Measures mean and spread over the valid frames of several sets of utterances, in one pass.

    The sums are in float64, in which sums of float16 values and of their squares are almost exact.

    Args:
        chunks: all utterances, some at a time, as (row numbers (m,), features (m, T, N) that are
            0 after the valid frames, numbers of valid frames (m,)).
        members: (F, n) bool, which of the n utterances are in each set.

    Returns:
        The statistics of the F sets. Each spread is at least `FLOOR` times the median over the
        dimensions.
    """
    count, total, squares = np.zeros((len(members), 1)), 0.0, 0.0
    for rows, features, num_frames in chunks:
        weights = members[:, rows].astype(np.float64)
        features = features.astype(np.float64)
        count += (weights @ num_frames)[:, None]
        total = total + weights @ features.sum(1)
        squares = squares + weights @ np.square(features).sum(1)
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    floor = np.maximum(FLOOR * np.median(spread, axis=1, keepdims=True), 1e-6)
    spread = np.maximum(spread, floor)
    return [
        Statistics(m.astype(np.float32), s.astype(np.float32))
        for m, s in zip(mean, spread, strict=True)
    ]
