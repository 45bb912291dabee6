"""The linear probe: an SVM on mean and deviation of the student's features, as a baseline."""

from collections.abc import Iterable

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from serkd_jax.data.splits import Fold

C = 0.001


def pool(features: np.ndarray) -> np.ndarray:
    """Maps (frames, N) to (2 N,): mean and standard deviation over time."""
    features = features.astype(np.float64)
    return np.concatenate([features.mean(0), features.std(0)])


def pool_all(chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pools all utterances, which come as from `Examples.chunks`, to (n, 2 N) in their order."""
    pooled = [
        pool(each[:frames])
        for _, features, lengths in chunks
        for each, frames in zip(features, lengths, strict=True)
    ]
    return np.stack(pooled)


def decide(
    vectors: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    c: float = C,
    num_classes: int | None = None,
) -> np.ndarray:
    """Trains a linear SVM on standardised vectors, one class against the rest.

    Args:
        vectors: (n, D) float.
        labels: (n,) int.
        train: rows to train on.
        test: rows to decide on.
        c: C of the SVM; a smaller value regularises more.
        num_classes: number of classes, if more than occur in `labels`.

    Returns:
        (rows to decide on, C) decision values, of which the greatest is that of the predicted
        class; those of a class that is not trained on are the least.
    """
    svm = make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0, max_iter=20_000))
    decided = svm.fit(vectors[train], labels[train]).decision_function(vectors[test])
    if decided.ndim == 1:  # two classes: it is positive for the second
        decided = np.stack([-decided, decided], axis=1)
    values = np.full((len(test), num_classes or labels.max() + 1), decided.min() - 1)
    values[:, svm.classes_] = decided
    return values


def probe_fold(vectors: np.ndarray, labels: np.ndarray, fold: Fold, num_classes: int) -> np.ndarray:
    """Returns the (n_test, C) decisions of a probe trained on all other parts of the fold."""
    train = np.sort(np.concatenate([rows for part, rows in fold.parts.items() if part != "test"]))
    return decide(vectors, labels, train, fold.test, num_classes=num_classes)
