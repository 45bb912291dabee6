"""How sure a score or a difference is: bootstrap of utterances or speakers, McNemar, Holm."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse, stats

from serkd_jax.errors import UserError
from serkd_jax.results.metrics import TITLES
from serkd_jax.results.predictions import (
    ABOUT,
    Predictions,
    count_speakers,
    pooled,
    rows_of,
    score,
)

METRICS = tuple(TITLES)
# With fewer, no test could find a difference: if all favour one side, p is at least 2 / 2^5 = 0.06.
LEAST_SPEAKERS = 6
BLOCK = 100  # draws that are scored at a time, to bound the memory


class Difference(NamedTuple):
    """A difference of two scores, its 95 % interval, and the p of there being none."""

    value: float
    interval: tuple[float, float]
    p: float

    @property
    def times_needed(self) -> float:
        """How many times the test data would show a difference of this size in 80 % of tries.

        It is ((z₀.₉₇₅ + z₀.₈) s / d)², where d is the difference and s its standard error, by
        which the interval extends z₀.₉₇₅ times to either side. NaN if there is no difference.
        """
        to_side = (self.interval[1] - self.interval[0]) / 2
        power = 1 + stats.norm.ppf(0.8) / stats.norm.ppf(0.975)
        return float((power * to_side / self.value) ** 2) if self.value else float("nan")


def bootstrap(
    predictions: Predictions, by: str = "utterance", draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns 95 % percentile intervals of the pooled scores, by `resample`.

    Utterances of the same speaker are alike, so the intervals by utterance are too narrow for what
    other speakers would give. Those by speaker are not, but are rough for fewer than some twenty,
    and NaN for fewer than `LEAST_SPEAKERS`.

    Returns:
        row -> metric -> (low, high), for the metrics `ua`, `wa` and `wf1`.
    """
    return {
        row: {metric: interval(values) for metric, values in scores.items()}
        for row, scores in resample(predictions, by, draws, seed).items()
    }


def mean_of_seeds(
    runs: Sequence[Predictions], by: str = "speaker"
) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
    """The scores of several seeds' predictions of the same utterances.

    Returns:
        row -> metric -> the mean over the seeds, and that of each draw of `resample`, (draws,); of
        the rows that all seeds have.
    """
    scores, draws = [score(run)["overall"] for run in runs], [resample(run, by) for run in runs]
    return {
        row: {
            metric: (
                float(np.mean([each[row][metric] for each in scores])),
                np.mean([each[row][metric] for each in draws], axis=0),
            )
            for metric in METRICS
        }
        for row in scores[0]
        if all(row in each for each in scores)
    }


def resample(
    predictions: Predictions, by: str = "utterance", draws: int = 2000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Scores every row on test parts that are drawn again, with replacement.

    All rows are scored on the same draws, and so are all runs that tested the same utterances;
    differences of their scores are therefore paired. A draw is scored by what is in it, as
    `classification_metrics` would: a class that does not occur in it does not count for its UA.

    Args:
        predictions: the test predictions of all folds.
        by: `utterance`; or `speaker`, to draw all utterances of a speaker together, while those
            without a speaker are drawn one by one.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        row -> metric -> (draws,) scores; all NaN by speaker if fewer than `LEAST_SPEAKERS` are
        known.
    """
    ids, label = pooled(predictions, "ids"), pooled(predictions, "label")
    clusters = [("", key) for key in ids.tolist()]  # one, where several folds test an utterance
    if by == "speaker":
        speakers = pooled(predictions, "speaker").tolist()
        clusters = [(s, "" if s else key) for s, (_, key) in zip(speakers, clusters, strict=True)]
    elif by != "utterance":
        raise ValueError(f"by is {by!r}: use utterance or speaker")
    number = {cluster: i for i, cluster in enumerate(sorted(set(clusters)))}
    cluster = np.array([number[each] for each in clusters])

    rows, size = rows_of(predictions), len(number)
    if by == "speaker" and count_speakers(predictions) < LEAST_SPEAKERS:
        return {row: dict.fromkeys(METRICS, np.full(draws, np.nan)) for row in rows}
    classes = pooled(predictions, rows[0]).shape[1]
    shape = len(rows), classes, classes
    cells = [(i, label, pooled(predictions, row).argmax(-1)) for i, row in enumerate(rows)]
    cells = np.concatenate([np.ravel_multi_index(cell, shape) for cell in cells])
    where = cells, np.tile(cluster, len(rows))
    counts = sparse.coo_array((np.ones(len(cells)), where), (np.prod(shape), size)).tocsr()

    rng, scored = np.random.default_rng(seed), []
    for start in range(0, draws, BLOCK):
        drawn = rng.integers(size, size=(min(BLOCK, draws - start), size))
        times = np.stack([np.bincount(draw, minlength=size) for draw in drawn])
        confusion = (counts @ times.T).T.reshape(-1, *shape)
        scored.append(confusion_scores(confusion))
    scores = {metric: np.concatenate([block[metric] for block in scored]) for metric in METRICS}
    return {row: {m: scores[m][:, i] for m in METRICS} for i, row in enumerate(rows)}


def confusion_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores (..., C, C) counts, whose rows are true classes, as `classification_metrics` does."""
    confusion = confusion.astype(np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    size, guessed = confusion.sum(-1), confusion.sum(-2)
    total, occur = size.sum(-1), (size > 0).sum(-1)
    return {
        "ua": (hits / np.maximum(size, 1)).sum(-1) / occur,
        "wa": hits.sum(-1) / total,
        "wf1": (2 * hits / np.maximum(size + guessed, 1) * size).sum(-1) / total,
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile interval of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def two_sided_p(differences: np.ndarray) -> float:
    """Returns p = min(1, 2 (1 + min(L, G)) / (1 + D)), for D resampled differences.

    L of them are at most 0, and G at least 0. It is below 0.05 where the 95 % interval does not
    include 0, and it is never less than 2 / (1 + D). If the differences are NaN, so is p.
    """
    if np.isnan(differences).any():
        return float("nan")
    fewer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1, 2 * (1 + fewer) / (1 + len(differences))))


def paired(
    first: Predictions,
    row: str,
    second: Predictions,
    other_row: str,
    by: str = "utterance",
    draws: int = 2000,
    seed: int = 0,
    names: tuple[str, str] = ("the first run", "the second run"),
) -> dict[str, Difference]:
    """Compares a row of a run with a row of a run, which may be the same, by paired bootstrap.

    Both are scored on the same draws. p is that of `two_sided_p`.

    Args:
        first: the test predictions of a run.
        row: the row that is compared.
        second: the test predictions of another run on the same utterances.
        other_row: the row that it is compared with.
        by: see `resample`.
        draws: see `resample`.
        seed: see `resample`.
        names: what the runs are called, for the message.

    Returns:
        metric -> the score of `row` less that of `other_row`.

    Raises:
        UserError: the runs were tested on other utterances, or have no such row.
    """
    check_same_utterances(first, second, names)
    scores, drawn = [], []
    for predictions, name, run in zip((first, second), (row, other_row), names, strict=True):
        if name not in rows_of(predictions):
            raise UserError(f"{run} has no {name}; it has {', '.join(rows_of(predictions))}")
        alone = {k: {n: fold[n] for n in (*ABOUT, name)} for k, fold in predictions.items()}
        scores.append(score(alone)["overall"][name])
        drawn.append(resample(alone, by, draws, seed)[name])
    compared = {}
    for metric in METRICS:
        differences = drawn[0][metric] - drawn[1][metric]
        value = scores[0][metric] - scores[1][metric]
        compared[metric] = Difference(value, interval(differences), two_sided_p(differences))
    return compared


def check_same_utterances(first: Predictions, second: Predictions, names: tuple[str, str]) -> None:
    """Refuses to compare runs that were not tested on the same utterances.

    Raises:
        UserError: names both runs, and what differs.
    """
    runs, told = (_described(first), _described(second)), " and ".join(names)
    for what in runs[0]:
        if not np.array_equal(runs[0][what], runs[1][what]):
            raise UserError(
                f"{told} were not tested on the same utterances: their {what} differ, so that "
                "they cannot be compared in pairs"
            )


def _described(predictions: Predictions) -> dict[str, np.ndarray]:
    """Returns what two runs must have in common, in the order of the ids."""
    order = np.argsort(pooled(predictions, "ids"), kind="stable")
    classes = next(iter(predictions.values()))["classes"]
    columns = {"ids": "ids", "labels": "label", "speakers": "speaker"}
    described = {what: pooled(predictions, name)[order] for what, name in columns.items()}
    return {"ids": described.pop("ids"), "classes": classes, **described}


def mcnemar(label: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Returns the exact two-sided p that two classifiers are right equally often.

    Of the utterances on which only one of them is right, either is that one with probability 1/2.

    Args:
        label: (n,) true classes.
        first: (n,) classes predicted by one of them.
        second: (n,) classes predicted by the other.
    """
    right, other_right = first == label, second == label
    only, either = int((right & ~other_right).sum()), int((right != other_right).sum())
    return float(stats.binomtest(only, either).pvalue) if either else 1.0


def mcnemar_by_fold(
    first: Predictions, row: str, second: Predictions, other_row: str
) -> dict[str, float]:
    """Applies `mcnemar` to each fold that has the same test utterances in both runs."""
    found = {}
    for fold in (fold for fold in first if fold in second):
        ones, others = first[fold], second[fold]
        order, other_order = (np.argsort(each["ids"], kind="stable") for each in (ones, others))
        if np.array_equal(ones["ids"][order], others["ids"][other_order]):
            predicted = ones[row].argmax(-1)[order], others[other_row].argmax(-1)[other_order]
            found[fold] = mcnemar(ones["label"][order], *predicted)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for their number (Holm): the k-th smallest of m is multiplied by m - k + 1.

    An adjusted value is not less than that of a smaller one, and at most 1. NaN are no tests: they
    are not counted, and stay NaN.
    """
    adjusted = np.array(p_values, np.float64)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * adjusted[order]))
    return adjusted.tolist()
