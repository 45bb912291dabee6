"""UA, WA and weighted F1 (Eqs. 14-15, Section 4.2), computed by scikit-learn."""

import warnings
from typing import Any

import numpy as np
from sklearn import metrics

TITLES = {"ua": "UA", "wa": "WA", "wf1": "wF1"}


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
