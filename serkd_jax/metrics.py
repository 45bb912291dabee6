"""UA, WA and weighted F1 (Eqs. 14-15, Section 4.2), by scikit-learn."""

import warnings
from typing import Any

import numpy as np
from sklearn import metrics


def classification_metrics(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> dict[str, Any]:
    """Scores predicted classes.

    Args:
        labels: (n,) int, true classes.
        predictions: (n,) int.
        num_classes: C.

    Returns:
        ``ua``: mean recall over the classes that occur in ``labels`` (Eq. 14); ``wa``: accuracy
        (Eq. 15); ``wf1``: F1 weighted by class size; ``n``; ``confusion``: C x C counts, rows are
        true classes.
    """
    if len(labels) == 0:
        raise ValueError("no utterances to score: the split is empty")
    with warnings.catch_warnings():
        # scikit-learn warns of classes that are predicted but absent; they do not enter UA.
        warnings.simplefilter("ignore", UserWarning)
        ua = metrics.balanced_accuracy_score(labels, predictions)
    classes = list(range(num_classes))
    return {
        "ua": float(ua),
        "wa": float(metrics.accuracy_score(labels, predictions)),
        "wf1": float(metrics.f1_score(labels, predictions, average="weighted", zero_division=0)),
        "n": len(labels),
        "confusion": metrics.confusion_matrix(labels, predictions, labels=classes).tolist(),
    }


def bootstrap_interval(
    labels: np.ndarray, predictions: np.ndarray, metric: str, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a score, utterances drawn again within each class (Efron 1979).

    It takes utterances as independent; those of one speaker are not, so it is on the narrow side.

    Args:
        labels: (n,) int, true classes.
        predictions: (n,) int.
        metric: ``ua``, ``wa`` or ``wf1``.
        draws: how many samples of as many utterances.
        seed: of the draws.
    """
    rng, count = np.random.default_rng(seed), int(max(labels.max(), predictions.max())) + 1
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    scores = []
    for _ in range(draws):
        rows = np.concatenate([rng.choice(rows, len(rows)) for rows in members])
        scores.append(classification_metrics(labels[rows], predictions[rows], count)[metric])
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
