"""What test predictions say beyond the scores: classes, speakers, calibration, hard utterances."""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import precision_recall_fscore_support
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from serkd_jax.results.metrics import classification_metrics
from serkd_jax.results.predictions import Predictions, pooled

MOST_EMBEDDED = 3000  # beyond which t-SNE takes minutes
FEWEST_EMBEDDED = 30


class Calibration(NamedTuple):
    """How well a row's probabilities agree with how often it is right.

    Attributes:
        counts: (bins,) utterances by the probability of the predicted class (the confidence).
        confidence: (bins,) its mean, 0 where a bin is empty.
        accuracy: (bins,) the share that is right, 0 where a bin is empty.
        ece: the mean of |accuracy - confidence| over bins, weighted by their counts.
        brier: the mean squared distance of the probabilities from the one-hot true class.
        nll: the mean of -log p(true class), in nats.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    brier: float
    nll: float


def class_scores(label: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Returns `precision`, `recall`, `f1` and `n` of each class, each (C,); NaN if undefined."""
    names, classes = ("precision", "recall", "f1", "n"), range(num_classes)
    scores = precision_recall_fscore_support(label, predicted, labels=classes, zero_division=np.nan)
    return dict(zip(names, scores, strict=True))


def speaker_scores(predictions: Predictions, row: str) -> dict[str, dict[str, Any]]:
    """Scores a row for each speaker by `classification_metrics`; without speakers, empty."""
    speakers, label = pooled(predictions, "speaker"), pooled(predictions, "label")
    logits = pooled(predictions, row)
    return {
        str(name): classification_metrics(
            label[speakers == name], logits[speakers == name].argmax(-1), logits.shape[1]
        )
        for name in np.unique(speakers)
        if name
    }


def calibration(logits: np.ndarray, label: np.ndarray, bins: int = 10) -> Calibration:
    """Compares the confidence of logits (n, C) with their accuracy, in bins of equal width."""
    p = softmax(logits.astype(np.float64), -1)
    confidence, right = p.max(-1), p.argmax(-1) == label
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    size = np.maximum(counts, 1)
    mean = np.bincount(place, confidence, bins) / size
    accuracy = np.bincount(place, right, bins) / size
    true = np.eye(logits.shape[1])[label]
    return Calibration(
        counts,
        mean,
        accuracy,
        float((counts * np.abs(accuracy - mean)).sum() / counts.sum()),
        float(((p - true) ** 2).sum(-1).mean()),
        float(-log_softmax(logits.astype(np.float64), -1)[np.arange(len(label)), label].mean()),
    )


def true_class_probability(predictions: Predictions, row: str) -> np.ndarray:
    """Returns the probability (n,) that a row gives the true class of each test utterance."""
    label = pooled(predictions, "label")
    return softmax(pooled(predictions, row).astype(np.float64), -1)[np.arange(len(label)), label]


def hardest(predictions: Predictions, rows: list[str], count: int) -> np.ndarray:
    """Returns the places of the utterances to whose true class the rows give the least p.

    They are ordered by the mean over rows of the probability of the true class.
    """
    mean = np.mean([true_class_probability(predictions, row) for row in rows], axis=0)
    return np.argsort(mean, kind="stable")[:count]


def embeddable(vectors: np.ndarray) -> bool:
    """Whether there is something to see: several vectors, which differ, and all finite."""
    return bool(min(vectors.shape) > 2 and np.isfinite(vectors).all() and np.ptp(vectors) > 0)


def embed(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """Maps vectors (n, P) to points (n, 2) by t-SNE, or PCA for few or many; names the method."""
    vectors = np.asarray(vectors, np.float64)
    if FEWEST_EMBEDDED <= len(vectors) <= MOST_EMBEDDED:
        with threadpool_limits(1):  # threads that wait for a busy core take minutes
            tsne = TSNE(perplexity=min(30, len(vectors) / 4), init="pca", random_state=0)
            return tsne.fit_transform(vectors), "t-SNE"
    return PCA(2, svd_solver="full").fit_transform(vectors), "PCA"


def same_neighbour(vectors: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Returns how often the vector that is nearest to one is of its group, and by chance."""
    nearest = NearestNeighbors(n_neighbors=1).fit(vectors).kneighbors(return_distance=False)[:, 0]
    _, sizes = np.unique(groups, return_counts=True)
    n = len(groups)
    return float((groups[nearest] == groups).mean()), float(
        (sizes * (sizes - 1)).sum() / n / (n - 1)
    )
