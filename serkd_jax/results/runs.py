"""What a workdir tells about a run, as far as it is there: the material of its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.config import leaves
from serkd_jax.errors import UserError
from serkd_jax.files import read_json
from serkd_jax.results import costs, provenance
from serkd_jax.results.intervals import LEAST_SPEAKERS
from serkd_jax.results.predictions import (
    PROBE,
    Predictions,
    count_speakers,
    pooled,
    read_predictions,
    rows_of,
    score,
)

STAGES = ("teacher", "student", "distill", "curriculum")  # in the order of training

History = Mapping[str, list[dict[str, Any]]]
"""Fold name -> the lines of a stage's `metrics.jsonl`, one for each epoch."""


class Run(NamedTuple):
    """What a workdir holds; whatever is missing or damaged, save predictions, is empty.

    Attributes:
        workdir: its folder.
        predictions: the test predictions of the finished folds.
        scores: see `results.predictions.score`.
        corpus: name of the corpus.
        config: full name -> value of each setting.
        data: Markdown about the corpus.
        params: parameter counts of teacher and student.
        history: stage -> `History`.
        costs: see `results.costs.measure_costs`.
        starts: see `results.provenance.describe_start`.
        splits: fold -> part -> ids.
    """

    workdir: Path
    predictions: Predictions
    scores: dict[str, Any]
    corpus: str
    config: dict[str, Any]
    data: str
    params: dict[str, int]
    history: dict[str, History]
    costs: dict[str, Any]
    starts: list[dict[str, Any]]
    splits: dict[str, Any]

    @property
    def rows(self) -> list[str]:
        """The rows of the results, in the order of training; the linear probe is the last."""
        return rows_of(self.predictions)

    @property
    def trained(self) -> list[str]:
        """The rows whose values are logits: all but the linear probe."""
        return [row for row in self.rows if row != PROBE]

    @property
    def probable(self) -> list[str]:
        """The rows that have probabilities; a model that has diverged has none."""
        return [row for row in self.trained if np.isfinite(pooled(self.predictions, row)).all()]

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return next(iter(self.predictions.values()))["classes"].tolist()

    @property
    def speakers(self) -> int:
        """The number of known test speakers."""
        return count_speakers(self.predictions)

    @property
    def drawn_by(self) -> str:
        """What intervals draw: speakers, if there are enough of them."""
        return "speaker" if self.speakers >= LEAST_SPEAKERS else "utterance"

    def predicted(self, row: str) -> np.ndarray:
        """The classes that a row predicts, (n,), of all folds."""
        return pooled(self.predictions, row).argmax(-1)


def read_run(workdir: Path) -> Run:
    """Reads what is in a workdir.

    Raises:
        UserError: no fold is finished, or its predictions are damaged.
    """
    predictions = read_predictions(workdir, probe=True)
    results, settings = (_optional(workdir / name) for name in ("results.json", "run.json"))
    config = results.get("config")
    config = dict(leaves(config)) if isinstance(config, dict) else settings
    return Run(
        workdir,
        predictions,
        score(predictions),
        str(results.get("corpus") or config.get("corpus") or workdir.name),
        config,
        str(results.get("data", "")),
        results.get("params", {}),
        {stage: _history(workdir, stage) for stage in STAGES},
        _optional(workdir / costs.NAME),
        [start for start in provenance.read_starts(workdir) if isinstance(start, dict)],
        _optional(workdir / "splits.json"),
    )


def series(history: History, name: str) -> np.ndarray:
    """Returns a metric of all folds, (folds, epochs), NaN where it is missing."""
    values = np.full((len(history), max(map(len, history.values()))), np.nan)
    for fold, lines in enumerate(history.values()):
        for epoch, line in enumerate(lines):
            if isinstance(value := line.get(name), int | float):
                values[fold, epoch] = value
    return values


def task_counts(history: History) -> np.ndarray | None:
    """Returns how many steps of each epoch had each task, (epochs, K), of all folds together."""
    drawn = [
        [line["train/task"] for line in lines if isinstance(line.get("train/task"), list)]
        for lines in history.values()
    ]
    widths = [len(each) for lines in drawn for each in lines]
    if not widths:
        return None
    counts = np.zeros((max(map(len, drawn)), max(widths)))
    for lines in drawn:
        for epoch, each in enumerate(lines):
            counts[epoch, : len(each)] += each
    return counts


def _optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "")
    except (UserError, OSError):
        return {}


def _history(workdir: Path, stage: str) -> History:
    """Reads a stage's metrics by fold, up to a line that is incomplete."""
    folds = {}
    for path in sorted(workdir.glob(f"fold_*/{stage}/metrics.jsonl"), key=_fold_number):
        lines = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if lines := [line for line in lines if isinstance(line, dict)]:
            folds[path.parts[-3].removeprefix("fold_")] = lines
    return folds


def _fold_number(path: Path) -> tuple[int, str]:
    name = path.parts[-3].removeprefix("fold_")
    return int(name) if name.isdecimal() else 0, name
