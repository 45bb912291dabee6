"""Compares runs: mean and spread over seeds, intervals, and paired tests of rows and of runs."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.errors import UserError
from serkd_jax.files import read_json
from serkd_jax.results.intervals import (
    METRICS,
    Difference,
    check_same_utterances,
    holm,
    interval,
    mcnemar_by_fold,
    resample,
    two_sided_p,
)
from serkd_jax.results.predictions import (
    ABOUT,
    NO_ROWS,
    PROBE,
    Predictions,
    pooled,
    read_predictions,
    rows_of,
    score,
)

UNFINISHED = "it is not finished, or damaged: start the run again, which completes it"
OTHER_VERSION = "was made by another version: train it again to compare it"
DRAWS = 2000
DRAWS_PER_TEST = 200  # so that p can be as small as 0.01 after Holm's adjustment
DRAWN_BY = ("utterance", "speaker")
NAMED_KEYS = 5  # that differ, in the name of a group


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        workdir: its folder.
        settings: the contents of `run.json`.
        results: the contents of `results.json`.
        predictions: its test predictions, with the linear probe's.
    """

    workdir: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    predictions: Predictions

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Row -> the scores of the pooled predictions."""
        return score(self.predictions)["overall"]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        letter: what tables call it.
        name: how it differs from the other groups.
        runs: seed -> run.
    """

    letter: str
    name: str
    runs: dict[int, Run]

    @property
    def first(self) -> Run:
        """The run of the least seed."""
        return next(iter(self.runs.values()))

    @property
    def corpus(self) -> str:
        """The name of the corpus."""
        return self.first.results["corpus"]

    @property
    def metric(self) -> str:
        """The metric that is tested: UA; on MELD, whose classes are of very unequal sizes, wF1."""
        return "wf1" if self.corpus == "meld" else "ua"

    @property
    def rows(self) -> list[str]:
        """The rows of the results that any of the runs has; the linear probe is the last."""
        rows = dict.fromkeys(row for run in self.runs.values() for row in run.scores)
        return sorted(rows, key=lambda row: row == PROBE)

    def with_row(self, row: str) -> dict[int, Run]:
        """The runs that have a row."""
        return {seed: run for seed, run in self.runs.items() if row in run.scores}


class Score(NamedTuple):
    """Mean, standard deviation (NaN for one seed) and 95 % intervals of a score of a group."""

    group: Group
    row: str
    metric: str
    seeds: list[int]
    mean: float
    spread: float
    intervals: dict[str, tuple[float, float]]  # of the mean, by what is drawn


class Tested(NamedTuple):
    """A paired test of the rows of two groups, or of one: the first's score less the second's."""

    group: Group
    row: str
    other: Group
    other_row: str
    metric: str
    seeds: list[int]
    differences: dict[str, Difference]  # by what is drawn; p is not adjusted
    adjusted: dict[str, float]  # p by what is drawn, adjusted by Holm over all tests of the table
    mcnemar: dict[tuple[int, str], float]  # seed and fold -> p
    adjusted_mcnemar: dict[tuple[int, str], float]


class Comparison(NamedTuple):
    """Groups of runs, their scores, and the differences between rows and between groups."""

    groups: list[Group]
    scores: list[Score]
    between_rows: list[Tested]
    between_runs: list[Tested]
    draws: int
    notes: list[str]


def read_runs(places: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Reads the runs in the places, each of which is a workdir or a folder of workdirs.

    Returns:
        The runs, each once; and a line for each place or workdir that had to be left out.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for place in map(Path, places):
        workdirs = [*_workdirs_below(place)]
        if not workdirs:
            problems.append(f"{place} holds no run: name a workdir, or a folder of workdirs")
        for workdir in workdirs:
            try:
                runs.setdefault(workdir.resolve(), read_run(workdir))
            except (UserError, OSError) as error:
                problems.append(str(error))
    return [*runs.values()], list(dict.fromkeys(problems))


def _workdirs_below(place: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(place):
        below.sort()
        if "run.json" in files or "results.json" in files:
            below.clear()  # a workdir holds no other
            yield Path(folder)


def read_run(workdir: Path) -> Run:
    """Reads a finished run.

    Raises:
        UserError: it is unfinished, damaged, or made by another version.
    """
    settings, results = (read_json(workdir / f"{n}.json", UNFINISHED) for n in ("run", "results"))
    predictions = read_predictions(workdir, probe=True)
    kinds = {"corpus": str, "folds": dict, "params": dict}
    known = isinstance(settings.get("seed"), int)
    if not known or not all(isinstance(results.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{workdir} {OTHER_VERSION}")
    if list(results["folds"]) != list(predictions):
        raise UserError(f"{workdir} has not predicted all folds of its results.json: {UNFINISHED}")
    for fold, arrays in predictions.items():
        _check_arrays(f"{workdir}/fold_{fold}", arrays)
    if not rows_of(predictions):
        raise UserError(f"{workdir} has no row that all folds have: {UNFINISHED}")
    return Run(workdir, settings, results, predictions)


def _check_arrays(folder: str, arrays: dict[str, np.ndarray]) -> None:
    if any(name not in arrays for name in ABOUT):
        raise UserError(f"{folder} {OTHER_VERSION}")
    size, classes = arrays["ids"].size, arrays["classes"].size
    label = arrays["label"]
    fits = label.shape == arrays["speaker"].shape == (size,) and label.dtype.kind in "iu"
    fits = fits and size > 0 and 0 <= label.min() <= label.max() < classes
    rows = [arrays[name] for name in arrays if name not in NO_ROWS]
    fits = fits and all(x.shape == (size, classes) and np.isfinite(x).all() for x in rows)
    if not fits:
        raise UserError(f"{folder} has predictions that do not fit together: {UNFINISHED}")


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ in their seed alone; a seed that occurs again starts a new group."""
    grouped: dict[str, list[dict[int, Run]]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        alike = grouped.setdefault(json.dumps(settings, sort_keys=True), [])
        seed = run.settings["seed"]
        members = next((members for members in alike if seed not in members), None)
        if members is None:
            alike.append(members := {})
        members[seed] = run
    every = [dict(sorted(members.items())) for alike in grouped.values() for members in alike]
    names = _names([next(iter(members.values())) for members in every])
    return [
        Group(_letter(i), name, x) for i, (name, x) in enumerate(zip(names, every, strict=True))
    ]


def _letter(i: int) -> str:
    """Returns A to Z, then AA, AB, and so on."""
    return (_letter(i // 26 - 1) if i >= 26 else "") + ascii_uppercase[i % 26]


def _names(runs: Sequence[Run]) -> list[str]:
    """Names runs, one of each group, by the settings that differ; else by sources or folders."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "seed")
    differ = [k for k in keys if len({json.dumps(run.settings.get(k)) for run in runs}) > 1]
    # A source, such as the splits, mostly differs because a setting does.
    sources = [key for key in differ if key.startswith("the ")]
    chosen = [key for key in differ if key not in sources]
    names = [_told(run, chosen, differ) for run in runs]
    if len(set(names)) < len(names) and sources:
        names = [_told(run, [*sources, *chosen], differ) for run in runs]
    if len(set(names)) < len(names):
        told = zip(names, runs, strict=True)
        names = [", ".join(filter(None, (name, str(run.workdir)))) for name, run in told]
    return names


def _told(run: Run, keys: Sequence[str], differ: Sequence[str]) -> str:
    told = [f"{_short(key, differ)}={_value(run.settings.get(key))}" for key in keys[:NAMED_KEYS]]
    told += [f"{len(keys) - NAMED_KEYS} more"] if len(keys) > NAMED_KEYS else []
    return ", ".join(told)


def _short(key: str, differ: Sequence[str]) -> str:
    """Returns the last two parts of a key, or all where these are those of another one."""
    short = ".".join(key.split(".")[-2:])
    return key if sum(f".{other}".endswith(f".{short}") for other in differ) > 1 else short


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.rpartition("/")[2] or "''"
    return "none" if value is None else json.dumps(value)


def compare(runs: Sequence[Run]) -> Comparison:
    """Compares runs; docs/results.md says how."""
    groups = group_runs(runs)
    tested_alike, notes = _by_utterances(groups)
    of_rows = [
        (group, row, group, other)
        for group in groups
        for row, other in map(_later_first, combinations(group.rows, 2))
        if group.with_row(row).keys() & group.with_row(other).keys()
    ]
    of_runs = []
    for other, group in (pair for alike in tested_alike for pair in combinations(alike, 2)):
        found = [
            (group, row, other, row)
            for row in group.rows
            if group.with_row(row).keys() & other.with_row(row).keys()
            and not (row == PROBE and _predict_alike(group, other, row))
        ]
        if not found:
            names = f"{other.letter} and {group.letter}"
            notes.append(f"{names} have no row of the same seed in common: not tested.")
        of_runs += found
    draws = max(DRAWS, DRAWS_PER_TEST * max(len(of_rows), len(of_runs)))
    drawn = {
        (run.workdir, by): resample(run.predictions, by, draws)
        for group in groups
        for run in group.runs.values()
        for by in DRAWN_BY
    }
    scores = [
        _score(group, row, metric, drawn)
        for group in groups
        for row in group.rows
        for metric in METRICS
    ]
    between = [_adjust([_test(*sides, drawn) for sides in table]) for table in (of_rows, of_runs)]
    return Comparison(groups, scores, *between, draws, notes)


def _later_first(rows: tuple[str, str]) -> tuple[str, str]:
    """Orders two rows for a difference: what is trained later less the other, or less the probe."""
    earlier, later = rows
    return (earlier, later) if later == PROBE else (later, earlier)


def _by_utterances(groups: Sequence[Group]) -> tuple[list[list[Group]], list[str]]:
    """Returns the groups that were tested on the same utterances, and notes on the others."""
    alike: list[list[Group]] = []
    for group in groups:
        for members in alike:
            if not _difference(members, [group]):
                members.append(group)
                break
        else:
            alike.append([group])
    return alike, [f"{_difference(*pair)}." for pair in combinations(alike, 2)]


def _difference(first: Sequence[Group], second: Sequence[Group]) -> str:
    """Says why groups cannot be compared in pairs; empty if they can."""
    names = [", ".join(group.letter for group in groups) for groups in (first, second)]
    try:
        check_same_utterances(first[0].first.predictions, second[0].first.predictions, names)
    except UserError as error:
        return str(error)
    return ""


def _predict_alike(group: Group, other: Group, row: str) -> bool:
    runs = group.with_row(row), other.with_row(row)
    seed = min(set.intersection(*map(set, runs)))
    predicted = []
    for predictions in (each[seed].predictions for each in runs):
        order = np.argsort(pooled(predictions, "ids"), kind="stable")
        predicted.append(pooled(predictions, row).argmax(-1)[order])
    return np.array_equal(*predicted)


def _score(group: Group, row: str, metric: str, drawn: dict) -> Score:
    runs = group.with_row(row)
    values = np.array([run.scores[row][metric] for run in runs.values()])
    intervals = {
        by: interval(np.mean([drawn[run.workdir, by][row][metric] for run in runs.values()], 0))
        for by in DRAWN_BY
    }
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return Score(group, row, metric, list(runs), float(values.mean()), float(spread), intervals)


def _test(group: Group, row: str, other: Group, other_row: str, drawn: dict) -> Tested:
    """Tests a difference; with several seeds its mean, in which each seed is paired with itself."""
    metric = group.metric
    seeds = [seed for seed in group.with_row(row) if seed in other.with_row(other_row)]
    pairs = [(group.runs[seed], other.runs[seed]) for seed in seeds]
    value = np.mean([a.scores[row][metric] - b.scores[other_row][metric] for a, b in pairs])
    differences = {}
    for by in DRAWN_BY:
        resampled = [
            drawn[a.workdir, by][row][metric] - drawn[b.workdir, by][other_row][metric]
            for a, b in pairs
        ]
        mean = np.mean(resampled, axis=0)
        differences[by] = Difference(float(value), interval(mean), two_sided_p(mean))
    folds = {
        (seed, fold): p
        for seed, (a, b) in zip(seeds, pairs, strict=True)
        for fold, p in mcnemar_by_fold(a.predictions, row, b.predictions, other_row).items()
    }
    return Tested(group, row, other, other_row, metric, seeds, differences, {}, folds, {})


def _adjust(tests: list[Tested]) -> list[Tested]:
    """Adjusts the p values of each kind over all tests of a table."""
    by_kind = {by: holm([test.differences[by].p for test in tests]) for by in DRAWN_BY}
    keys = [(i, key) for i, test in enumerate(tests) for key in test.mcnemar]
    folds = dict(zip(keys, holm([tests[i].mcnemar[key] for i, key in keys]), strict=True))
    return [
        test._replace(
            adjusted={by: by_kind[by][i] for by in DRAWN_BY},
            adjusted_mcnemar={key: folds[i, key] for key in test.mcnemar},
        )
        for i, test in enumerate(tests)
    ]
