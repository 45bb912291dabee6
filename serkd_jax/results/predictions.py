"""The test predictions of a run: what its scores, comparisons and pictures are made from."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from serkd_jax.errors import UserError
from serkd_jax.files import read_arrays, write_file
from serkd_jax.results.metrics import classification_metrics

NAME = "predictions.npz"
PROBE, PROBE_NAME = "linear_probe", "probe.npz"
REMEDY = "delete it, and start the run again, which computes it again"
ABOUT = ("ids", "speaker", "label", "classes")  # what every file has
NO_ROWS = (*ABOUT, "vectors")  # everything else is the logits of a row of the results

Predictions = Mapping[str, Mapping[str, np.ndarray]]
"""Fold name -> the arrays of its `predictions.npz`: `ids` (n,) and `speaker` (n,) strings, `label`
(n,) int, `classes` (C,) strings, `vectors` (n, P) float32 (see `principal_components`; only if a
student is trained), and for each row of the results its logits (n, C); of the row `linear_probe`,
its decision values."""


def read_predictions(workdir: Path, probe: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """Reads the predictions of the folds that a run has finished, in their order.

    Args:
        workdir: the run's workdir.
        probe: whether to add the decisions of the linear probe, as the row `linear_probe`, where
            there are any; these are no logits.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    paths = [p for p in workdir.glob(f"fold_*/{NAME}") if p.parent.name[5:].isdecimal()]
    paths.sort(key=lambda path: int(path.parent.name[5:]))
    if not paths:
        raise UserError(f"{workdir} has no fold_*/{NAME}: name the workdir of a finished run")
    folds = {path.parent.name[5:]: read_arrays(path, REMEDY) for path in paths}
    for path, arrays in zip(paths, folds.values(), strict=True):
        beside = path.with_name(PROBE_NAME)
        if probe and beside.exists():
            decided = read_arrays(beside, REMEDY)
            if PROBE not in decided or not np.array_equal(decided["ids"], arrays.get("ids")):
                raise UserError(f"{beside} does not belong to {path}: {REMEDY}")
            arrays[PROBE] = decided[PROBE]
    return folds


def principal_components(vectors: np.ndarray, count: int = 16) -> np.ndarray:
    """Returns the leading principal components of vectors (n, D), (n, at most `count`) float32."""
    centred = vectors.astype(np.float64) - vectors.mean(0)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    return (left * spread)[:, :count].astype(np.float32)


def rows_of(predictions: Predictions) -> list[str]:
    """Returns the rows of the results that all folds have, in the order of training."""
    first, *others = predictions.values()
    return [row for row in first if row not in NO_ROWS and all(row in other for other in others)]


def pooled(predictions: Predictions, name: str) -> np.ndarray:
    """Joins an array of all folds."""
    return np.concatenate([arrays[name] for arrays in predictions.values()])


def count_speakers(predictions: Predictions) -> int:
    """Returns the number of known test speakers."""
    return len({name for name in pooled(predictions, "speaker").tolist() if name})


def score(predictions: Predictions) -> dict[str, Any]:
    """Scores every row.

    Returns:
        `folds`: fold -> row -> the scores of `classification_metrics`; `overall`: row -> the scores
        of the pooled predictions, for rows that all folds have.
    """

    def of(arrays: Mapping[str, np.ndarray], row: str) -> dict[str, Any]:
        predicted = arrays[row].argmax(-1)
        return classification_metrics(arrays["label"], predicted, arrays[row].shape[1])

    folds = {
        fold: {row: of(arrays, row) for row in arrays if row not in NO_ROWS}
        for fold, arrays in predictions.items()
    }
    together = {name: pooled(predictions, name) for name in ("label", *rows_of(predictions))}
    overall = {row: of(together, row) for row in rows_of(predictions)}
    return {"folds": folds, "overall": overall}


def write_table(path: Path, predictions: Predictions) -> None:
    """Writes a CSV file with a line for each test utterance and row of the results but the probe.

    Its columns are `fold`, `id`, `speaker`, `row`, `label`, `prediction`, and the probability of
    each class, `p(CLASS)`.
    """
    text = io.StringIO()
    table = csv.writer(text)
    classes = next(iter(predictions.values()))["classes"]
    probabilities = [f"p({name})" for name in classes]
    table.writerow(["fold", "id", "speaker", "row", "label", "prediction", *probabilities])
    for fold, arrays in predictions.items():
        about = [*zip(arrays["ids"], arrays["speaker"], classes[arrays["label"]], strict=True)]
        for row in (name for name in arrays if name not in (*NO_ROWS, PROBE)):
            for (key, speaker, label), p in zip(about, softmax(arrays[row], -1), strict=True):
                numbers = [f"{x:.6f}" for x in p]
                table.writerow([fold, key, speaker, row, label, classes[p.argmax()], *numbers])
    write_file(path, text.getvalue())
