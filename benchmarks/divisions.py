"""Does a gain depend on who is trained on? Random halves of a corpus's speakers.

    python -m benchmarks.divisions make RUN --out=divisions
    python -m serkd_jax.sweep --config=RECIPE --experiments=configs/sweeps.py:divisions --out=RUNS
    python -m benchmarks.divisions compare RUNS

RUN is a finished run of the corpus. `make` writes folds: in each of ten files, half of the
speakers, drawn by chance, are tested by models of the other half, and the other way round.
Division k is trained with seed k. `compare` gives the differences of the rows, and of the settings
if the sweep has several (`divisions_whisper`), with intervals for which both divisions and speakers
are drawn again: for other halves of other speakers, and other seeds.
"""

import argparse
import csv
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import common
from serkd_jax.data.splits import folds_as_json, make_folds
from serkd_jax.errors import UserError
from serkd_jax.files import write_file
from serkd_jax.results.comparison import read_runs
from serkd_jax.results.intervals import interval, resample, two_sided_p
from serkd_jax.results.predictions import PROBE, Predictions, rows_of, score

STUDENTS = ("distilled_student", "updated_student")
WHOLE = "whole"  # the method as it is, in `configs/sweeps.py`
PAIRS = [(row, "student") for row in STUDENTS] + [("updated_student", "distilled_student")]
PAIRS += [("updated_student", "teacher"), ("updated_student", PROBE)]


def main() -> None:
    """Makes the divisions, or compares the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write files of folds")
    making.add_argument("run", type=Path, help="the workdir of a finished run")
    making.add_argument("--out", type=Path, required=True, help="the folder to make")
    making.add_argument("--count", type=int, default=10, help="number of divisions")
    comparing = commands.add_parser("compare", help="print the differences")
    comparing.add_argument("runs", type=Path, help="a folder of runs")
    comparing.add_argument("--to", default=WHOLE, help="the setting that others are compared with")
    options = parser.parse_args()
    try:
        if options.command == "make":
            make(options.run, options.out, options.count)
        else:
            print(compare(options.runs, options.to))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def make(run: Path, out: Path, count: int) -> None:
    """Writes the folds of `count` divisions of a run's test speakers."""
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        lines = {line["id"]: line for line in csv.DictReader(file)}.values()
    ids, speakers, names = (np.array([x[key] for x in lines]) for key in ("id", "speaker", "label"))
    classes, labels = np.unique(names, return_inverse=True)
    people, number = np.unique(speakers, return_inverse=True)
    protocol = common.paper().protocol
    half = -(-len(people) // 2)
    possible = math.comb(len(people), half) // (2 if 2 * half == len(people) else 1)
    if count > possible:
        raise UserError(f"{len(people)} speakers can only be divided in {possible} ways")
    protocol.update({"split_by": "speaker", "groups_per_fold": half})
    seen: set[frozenset[int]] = set()
    for k in range(1, count + 1):
        rng = np.random.default_rng(k)
        order = rng.permutation(len(people))
        while (tested := frozenset(np.flatnonzero(order < half))) in seen:
            order = rng.permutation(len(people))
        seen |= {tested, frozenset(range(len(people))) - tested}
        protocol.seed = k
        renamed = {"id": ids, "speaker": order[number].astype(str)}
        folds = make_folds(labels, renamed, protocol, classes)
        write_file(out / f"{k}.json", folds_as_json(folds, ids))


def compare(folder: Path, reference: str = WHOLE) -> str:
    """Returns the differences as Markdown, over the divisions that were run with every setting.

    Raises:
        UserError: there are fewer than two of them, or no setting is called `reference`.
    """
    settings: dict[str, dict[str, Predictions]] = defaultdict(dict)
    runs, problems = read_runs([folder])
    for run in runs:
        if found := re.fullmatch(r"(division=\d+),?(.*)", run.workdir.name):
            settings[found[2] or WHOLE][found[1]] = run.predictions
    shared = sorted(set.intersection(*map(set, settings.values()))) if settings else []
    if len(shared) < 2:
        raise UserError(f"{folder} has fewer than two divisions: run configs/sweeps.py:divisions")
    if reference not in settings:
        raise UserError(f"{folder} has no {reference!r}: --to may be {', '.join(settings)}")
    scored = {name: score_runs([runs[k] for k in shared]) for name, runs in settings.items()}
    lines = []
    for name, (values, _) in scored.items():
        for row, each in values.items():
            lines.append(f"| {name}: {row} | {told(each)} | | | | | |")
    for name, each in scored.items():
        for row, other in (pair for pair in PAIRS if each[0].keys() >= {*pair}):
            lines.append(difference(f"{name}: {row} − {other}", each, row, each, other))
    for name, each in scored.items():
        both = each[0].keys() & scored[reference][0]
        for row in (x for x in ("student", *STUDENTS) if x in both and name != reference):
            what = f"{row}: {name} − {reference}"
            lines.append(difference(what, each, row, scored[reference], row))
    header = f"| {len(shared)} divisions | UA | least | greatest | of them > 0 | 95 % | p |"
    left_out = [f"\nLeft out: {problem}" for problem in problems]
    return "\n".join([header, "|---" * 7 + "|", *lines, *left_out])


def score_runs(runs: Sequence[Predictions]) -> tuple[dict, dict]:
    """Row -> UAs (K,) of the divisions; and row -> UAs (K, draws), all of the same draws."""
    values = [score(run)["overall"] for run in runs]
    draws = [resample(run, "speaker") for run in runs]
    rows = rows_of(runs[0])
    return (
        {row: np.array([each[row]["ua"] for each in values]) for row in rows},
        {row: np.stack([each[row]["ua"] for each in draws]) for row in rows},
    )


def difference(what: str, first: tuple, row: str, second: tuple, other: str) -> str:
    """A line: how far `row` is above `other`, with divisions and speakers drawn again."""
    values, drawn = (a[row] - b[other] for a, b in zip(first, second, strict=True))
    count, draws = drawn.shape
    picked = np.random.default_rng(0).integers(count, size=(count, draws))
    both = drawn[picked, np.arange(draws)].mean(0)
    low, high = 100 * np.array(interval(both))
    ends = f"{100 * values.min():+.1f} | {100 * values.max():+.1f} | {(values > 0).sum()}/{count}"
    return (
        f"| {what} | {told(values, '+')} | {ends} | {low:+.1f} to {high:+.1f} "
        f"| {two_sided_p(both):.3f} |"
    )


def told(values: Sequence[float], sign: str = "") -> str:
    """The mean and the deviation, in points."""
    return f"{100 * np.mean(values):{sign}.1f} ± {100 * np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    main()
