"""Which examples a step sees: a function of (seed, step), so that a resumed run sees the same."""

from collections.abc import Sequence

import numpy as np


def stream_rows(rows: np.ndarray, batch_size: int, step: int, seed: Sequence[int]) -> np.ndarray:
    """The batch of ``step`` from an endless stream of shuffled passes over ``rows``.

    Every pass holds each row once; a batch may end one pass and begin the next, so that no row
    is left out and any number of rows is enough.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    passes = positions // len(rows)
    order = {p: np.random.default_rng([*seed, p]).permutation(rows) for p in np.unique(passes)}
    return np.array([order[p][i % len(rows)] for p, i in zip(passes, positions, strict=True)])


def sample_rows(rows: np.ndarray, batch_size: int, step: int, seed: Sequence[int]) -> np.ndarray:
    """A batch drawn anew at ``step``, each row at most once more often than any other."""
    rng = np.random.default_rng([*seed, step])
    passes = -(-batch_size // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[:batch_size]
