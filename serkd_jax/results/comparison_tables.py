"""The tables of a comparison: scores, tests, and Tables 4 to 9 with the paper's figures beside."""

import os
from collections.abc import Iterable, Sequence
from math import isfinite, isnan
from typing import Any

from serkd_jax.results import paper
from serkd_jax.results.comparison import Comparison, Group, Score, Tested
from serkd_jax.results.intervals import LEAST_SPEAKERS, METRICS
from serkd_jax.results.metrics import TITLES
from serkd_jax.results.predictions import PROBE, count_speakers, pooled
from serkd_jax.results.typeset import Table

NONE = "–"
PAPER = "Columns and lines named paper have the paper's printed figures."
OURS = "The others are the mean over seeds ± their standard deviation, of the runs in the list."


def tables_of(comparison: Comparison) -> list[Table]:
    """Returns everything that the comparison found, as text."""
    tables = [_runs(comparison), _scores(comparison)]
    for name, tests in (("rows", comparison.between_rows), ("runs", comparison.between_runs)):
        if tests:
            first = name == "rows" or not comparison.between_rows
            tables.append(_tests(name, tests, comparison.draws, first))
    return tables + paper_tables(comparison)


def _runs(comparison: Comparison) -> Table:
    header = ["run", "what differs", "corpus", "seeds", "utterances", "speakers", "workdirs"]
    every = [run.workdir.absolute() for group in comparison.groups for run in group.runs.values()]
    place = os.path.commonpath([workdir.parent for workdir in every])
    rows = []
    for group in comparison.groups:
        predictions = group.first.predictions
        counts = [len(pooled(predictions, "ids")), count_speakers(predictions)]
        workdirs = ", ".join(os.path.relpath(run.workdir, place) for run in group.runs.values())
        seeds = ", ".join(map(str, group.runs))
        about = [group.letter, group.name or NONE, group.corpus, seeds]
        rows.append([*about, *(f"{count:,}" for count in counts), workdirs])
    notes = [f"The workdirs are in {place}.", *comparison.notes]
    return Table("comparison-of", "Runs", header, rows, notes)


def _scores(comparison: Comparison) -> Table:
    by = {(score.group.letter, score.row, score.metric): score for score in comparison.scores}
    known = any(group.corpus in paper.ROWS for group in comparison.groups)
    header = ["run", "row", "seeds", *TITLES.values(), "interval by utterance", "by speaker"]
    rows: list[list[str]] = []
    probes: dict[tuple[str, ...], list[str]] = {}  # equal lines of several groups are one line
    for group in comparison.groups:
        for row in group.rows:
            scores = [by[group.letter, row, metric] for metric in METRICS]
            tested = by[group.letter, row, group.metric]
            cells = [
                group.letter,
                words(row),
                f"{len(tested.seeds)}",
                *map(mean_and_spread, scores),
            ]
            cells += [_interval(tested.intervals[kind]) for kind in ("utterance", "speaker")]
            cells += [_printed(group.corpus, row)] * known
            if row == PROBE:
                probes.setdefault(tuple(cells[1:]), []).append(group.letter)
            else:
                rows.append(cells)
    rows += [[", ".join(letters), *cells] for cells, letters in probes.items()]
    notes = [
        "In %; mean over seeds ± their standard deviation. The 95 % intervals are of "
        f"{_metric(comparison)}, from {comparison.draws:,} draws of the test utterances, or of the "
        f"test speakers if there are at least {LEAST_SPEAKERS}."
    ]
    if known:
        header.append("paper")
        notes.append(PAPER)
    return Table("comparison", "Scores", header, rows, notes)


def _tests(name: str, tests: Sequence[Tested], draws: int, first: bool) -> Table:
    header = ["difference", "seeds", "metric", "value", "by utterance", "p", "by speaker", "p"]
    header += ["McNemar by fold", "data needed"]
    rows = []
    for test in tests:
        cells = [_sides(test), f"{len(test.seeds)}", TITLES[test.metric]]
        cells.append(_signed(test.differences["utterance"].value))
        for by, difference in test.differences.items():
            cells += [_interval(difference.interval, _signed), _p(test.adjusted[by])]
        rows.append([*cells, _folds(list(test.adjusted_mcnemar.values())), _needed(test)])
    least = _p(2 * len(tests) / (draws + 1))
    adjusted = f"Each p is adjusted (Holm) over the {len(tests)} tests of this table"
    title = f"Differences between {name}"
    if not first:
        notes = [f"As in the table before. {adjusted}; none can be below {least}."]
        return Table(f"between-{name}", title, header, rows, notes)
    notes = [
        "Differences in points, with 95 % intervals and two-sided p of a paired bootstrap of "
        f"{draws:,} draws. {adjusted}; so many draws find none below {least}. McNemar's exact test "
        "is adjusted over all folds and seeds too: the least p, and how many are below 0.05.",
        "Data needed: how many times as many test speakers (or utterances, where there is no "
        "interval by speaker) would show a difference of this size in four of five experiments.",
    ]
    if any(len(test.seeds) > 1 for test in tests):
        notes.append(
            "Of several seeds, each is paired with itself, and the differences are averaged."
        )
    return Table(f"between-{name}", title, header, rows, notes)


def paper_tables(comparison: Comparison) -> list[Table]:
    """Returns Tables 4 to 9, those for which there are runs of the corpus."""
    groups = [group for group in comparison.groups if group.corpus in paper.ROWS]
    scores = {(score.group.letter, score.row, score.metric): score for score in comparison.scores}
    tables = []
    if any(_ablation(group) for group in groups):
        tables.append(_table4(groups, scores))
    for corpus, number in paper.TABLES.items():
        if ours := [group for group in groups if group.corpus == corpus]:
            tables.append(_rows_table(number, corpus, ours, scores))
    if groups:
        tables.append(_table7(groups))
    for corpus, number in paper.BASELINE_TABLES.items():
        ours = [g for g in groups if g.corpus == corpus and "updated_student" in g.rows]
        if ours:
            tables.append(_baselines_table(number, corpus, ours, scores))
    return tables


def _table4(groups: Sequence[Group], scores: dict) -> Table:
    corpora = list(dict.fromkeys(group.corpus for group in groups))
    header = ["Methods", "loss"]
    header += [title for c in corpora for title in (f"{_name(c)}, paper", f"{_name(c)}, ours")]
    rows = []
    for (inverted, contrastive), printed in paper.ABLATION.items():
        cells = [f"({'+' if inverted else '−'}) inverted", "CE + Sup" if contrastive else "CE"]
        for corpus in corpora:
            (metric, figure), *_ = printed[corpus].items()
            ours = [
                g for g in groups if g.corpus == corpus and _ablation(g) == (inverted, contrastive)
            ]
            told = [
                f"{mean_and_spread(scores[g.letter, 'student', metric])} ({g.letter})" for g in ours
            ]
            cells += [f"{figure:.2f}", "; ".join(told) or NONE]
        rows.append(cells)
    title = "As Table 4: the student, UA on IEMOCAP and wF1 on MELD (%)"
    return Table("table4", title, header, rows, [PAPER, OURS])


def _ablation(group: Group) -> tuple[bool, bool] | None:
    """Returns the line of Table 4 to which a group belongs; None if it has no such student."""
    settings = group.first.settings
    inverted, weight = settings.get("student.inverted"), settings.get("contrastive.weight")
    if "student" not in group.rows or not isinstance(inverted, bool) or weight is None:
        return None
    line = inverted, weight > 0
    return line if line in paper.ABLATION else None


def _rows_table(number: int, corpus: str, groups: Sequence[Group], scores: dict) -> Table:
    metrics = _printed_metrics(corpus)
    header = ["Methods", *(f"{TITLES[metric]}, paper" for metric in metrics)]
    header += [f"{TITLES[metric]}, {group.letter}" for group in groups for metric in metrics]
    rows = []
    for row in (*paper.ROWS[corpus], PROBE):
        printed = paper.ROWS[corpus].get(row, {})
        cells = [words(row), *(f"{printed[m]:.2f}" if m in printed else NONE for m in metrics)]
        cells += [
            mean_and_spread(scores.get((group.letter, row, metric)))
            for group in groups
            for metric in metrics
        ]
        rows.append(cells)
    title = f"As Table {number}: all models on {_name(corpus)} (%)"
    return Table(f"table{number}", title, header, rows, [PAPER, OURS])


def _table7(groups: Sequence[Group]) -> Table:
    corpora = list(dict.fromkeys(group.corpus for group in groups))
    header = ["Model", *(f"{_name(corpus)}, paper" for corpus in corpora)]
    header += [f"{_name(group.corpus)}, {group.letter}" for group in groups]
    rows = []
    for model, printed in paper.PARAMETERS.items():
        cells = [model, *(f"{printed[corpus]:.2f}M" for corpus in corpora)]
        rows.append(cells + [_parameters(group, model) for group in groups])
    notes = [PAPER, "M is 2^20, as in the paper."]
    return Table("table7", "As Table 7: parameters of teacher and student", header, rows, notes)


def _baselines_table(number: int, corpus: str, groups: Sequence[Group], scores: dict) -> Table:
    metrics = _printed_metrics(corpus)
    header = ["Methods", "Params", *(TITLES[metric] for metric in metrics)]
    rows = [
        [f"{name}, paper", f"{figures['params']:.2f}M", *(f"{figures[m]:.2f}" for m in metrics)]
        for name, figures in paper.BASELINES[corpus].items()
    ]
    for group in groups:
        for row, params in ((PROBE, NONE), ("updated_student", _parameters(group, "student"))):
            cells = [mean_and_spread(scores.get((group.letter, row, m))) for m in metrics]
            rows.append([f"{words(row)}, {group.letter}", params, *cells])
    title = f"As Table {number}: baselines on {_name(corpus)} (%)"
    return Table(f"table{number}", title, header, rows, [PAPER, OURS, "M is 2^20."])


def scores_as_records(scores: Iterable[Score]) -> list[dict[str, Any]]:
    """Returns the scores as lines of a CSV file, in %."""
    records = []
    for group, row, metric, seeds, mean, spread, intervals in scores:
        printed = paper.ROWS.get(group.corpus, {}).get(row, {}).get(metric, "")
        record = {"run": group.letter, "differs": group.name, "corpus": group.corpus, "row": row}
        record |= {"metric": metric, "seeds": len(seeds), "mean": _percent(mean)}
        record["standard_deviation"] = _percent(spread)
        for by, (low, high) in intervals.items():
            record |= {f"low_by_{by}": _percent(low), f"high_by_{by}": _percent(high)}
        records.append(record | {"paper": printed})
    return records


def tests_as_records(tests: Iterable[Tested]) -> list[dict[str, Any]]:
    """Returns the tests as lines of a CSV file, differences in points."""
    records = []
    for test in tests:
        record = _about(test) | {"metric": test.metric, "seeds": len(test.seeds)}
        record["difference"] = _percent(test.differences["utterance"].value)
        for by, (_, (low, high), p) in test.differences.items():
            record |= {f"low_by_{by}": _percent(low), f"high_by_{by}": _percent(high)}
            record |= {f"p_by_{by}": _number(p), f"adjusted_p_by_{by}": _number(test.adjusted[by])}
            record[f"times_needed_by_{by}"] = _number(test.differences[by].times_needed)
        records.append(record)
    return records


def mcnemar_as_records(tests: Iterable[Tested]) -> list[dict[str, Any]]:
    """Returns McNemar's tests as lines of a CSV file."""
    return [
        _about(test)
        | {"seed": seed, "fold": fold, "p": _number(p)}
        | {"adjusted_p": _number(test.adjusted_mcnemar[seed, fold])}
        for test in tests
        for (seed, fold), p in test.mcnemar.items()
    ]


def _about(test: Tested) -> dict[str, str]:
    first = {"run": test.group.letter, "row": test.row}
    return first | {"other_run": test.other.letter, "other_row": test.other_row}


def words(row: str) -> str:
    """Returns the name of a row of the results as people write it."""
    return row.replace("_", " ")


def mean_and_spread(score: Score | None) -> str:
    """Returns a score in %; with its standard deviation, if there are several seeds."""
    if score is None:
        return NONE
    spread = "" if isnan(score.spread) else f" ± {100 * score.spread:.1f}"
    return f"{100 * score.mean:.1f}{spread}"


def _interval(interval: tuple[float, float], form: Any = lambda x: f"{100 * x:.1f}") -> str:
    return NONE if isnan(interval[0]) else " to ".join(map(form, interval))


def _signed(value: float) -> str:
    """Returns points with their sign, of which there is none for 0.0."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text[1:] if text[1:] == "0.0" else text


def _p(p: float) -> str:
    return NONE if isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"


def _folds(adjusted: list[float]) -> str:
    if not adjusted:
        return NONE
    return f"{_p(min(adjusted))} ({sum(p < 0.05 for p in adjusted)} of {len(adjusted)})"


def _needed(test: Tested) -> str:
    times = [test.differences[by].times_needed for by in ("speaker", "utterance")]
    known = [x for x in times if isfinite(x)]
    return f"× {known[0]:,.{0 if known[0] >= 10 else 1}f}" if known else NONE


def _sides(test: Tested) -> str:
    if test.group is test.other:
        return f"{test.group.letter}: {words(test.row)} − {words(test.other_row)}"
    return f"{words(test.row)}: {test.group.letter} − {test.other.letter}"


def _metric(comparison: Comparison) -> str:
    metrics = {group.metric for group in comparison.groups}
    if len(metrics) > 1:
        return "UA, of MELD's runs of wF1"
    return TITLES[metrics.pop()]


def _printed(corpus: str, row: str) -> str:
    printed = paper.ROWS.get(corpus, {}).get(row, {})
    return ", ".join(f"{TITLES[metric]} {figure:.2f}" for metric, figure in printed.items()) or NONE


def _printed_metrics(corpus: str) -> list[str]:
    return [*paper.ROWS[corpus]["student"]]


def _name(corpus: str) -> str:
    return corpus.upper()


def _parameters(group: Group, model: str) -> str:
    count = group.first.results["params"].get(model)
    return NONE if count is None else f"{count / 2**20:.2f}M"


def _percent(value: float) -> str:
    return "" if isnan(value) else f"{100 * value:.4f}"


def _number(value: float) -> str:
    return "" if isnan(value) else f"{value:.6g}"
