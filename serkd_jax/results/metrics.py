"""UA, WA and weighted F1 (Eqs. 14-15, Section 4.2), computed by scikit-learn."""

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
        predictions: (n,) int, predicted classes.
        num_classes: C.

    Returns:
        `ua`: mean recall over the classes that occur in `labels` (Eq. 14); `wa`: accuracy (Eq. 15);
        `wf1`: F1 weighted by class size; `n`: number of utterances; `confusion`: C x C counts,
        whose rows are true classes.
    """
    if len(labels) == 0:
        raise ValueError("no utterances to score: the split is empty")
    with warnings.catch_warnings():
        # scikit-learn warns of classes that are predicted but do not occur; UA ignores them.
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


def bootstrap_intervals(
    confusion: np.ndarray, draws: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns 95 % percentile intervals of the scores, by resampling within each class (Efron).

    The intervals are too narrow, since they take utterances as independent, which those of the same
    speaker are not.

    Args:
        confusion: C x C counts, whose rows are true classes. Resampling the utterances of a class
            means drawing its row from a multinomial distribution.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        The intervals of `ua`, `wa` and `wf1`, each (low, high).
    """
    rng, rows = np.random.default_rng(seed), [row for row in confusion if sum(row)]
    present = [c for c, row in enumerate(confusion) if sum(row)]
    drawn = np.stack(
        [rng.multinomial(sum(row), np.array(row) / sum(row), draws) for row in rows], axis=1
    )  # (draws, classes that occur, C)
    hits = drawn[:, range(len(present)), present]
    size, guessed = drawn.sum(axis=2), drawn.sum(axis=1)[:, present]
    scores = {
        "ua": (hits / size).mean(axis=1),
        "wa": hits.sum(axis=1) / size.sum(axis=1),
        "wf1": (2 * hits / (size + guessed) * size).sum(axis=1) / size.sum(axis=1),
    }
    return {name: tuple(np.percentile(each, [2.5, 97.5]).tolist()) for name, each in scores.items()}
