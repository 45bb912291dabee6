"""The page of a comparison of runs: its tables, the curves of a sweep, and confusion matrices."""

from collections.abc import Sequence
from math import isfinite

import numpy as np

from serkd_jax.results import comparison_tables, figures, paper
from serkd_jax.results.comparison import Comparison, Group
from serkd_jax.results.html_scores import confusion
from serkd_jax.results.markup import figure, page, paragraph, row_name, several, table
from serkd_jax.results.metrics import TITLES
from serkd_jax.results.predictions import PROBE
from serkd_jax.results.typeset import Table


def comparison_page(comparison: Comparison) -> str:
    """Makes one page about several runs, in HTML."""
    runs, *tables = comparison_tables.tables_of(comparison)
    ours = [each for each in tables if not each.name.startswith("table")]
    papers = [each for each in tables if each.name.startswith("table")]
    number = sum(len(group.runs) for group in comparison.groups)
    introduction = paragraph(
        f"{several(number, 'run')}. Those that differ in their seeds alone are one line, and have "
        "a letter. Scores are those of test parts, in %: do not choose settings by them."
    )
    sections = [("Runs", _table(runs))]
    picture = {"Scores": _score_figure(comparison)}
    sections += [(each.title, _table(each) + picture.get(each.title, "")) for each in ours]
    sections += [("Scores by a setting", _sweep(comparison.groups))]
    sections += [("Confusion matrices", _confusions(comparison.groups))]
    if papers:
        sections.append(("The paper’s tables", "".join(map(_table, papers))))
    return page("Comparison of runs", introduction, sections)


def _table(given: Table) -> str:
    notes = "".join(map(paragraph, given.notes))
    return notes + table(given.title, given.header, given.rows, numbered=True)


def _score_figure(comparison: Comparison) -> str:
    """Draws the score by which each line is tested, with its interval and its seeds."""
    tested = [score for score in comparison.scores if score.metric == score.group.metric]
    # The linear probe of runs with the same features is shown once, at the end.
    probes = {str((x.mean, x.intervals)): x for x in tested[::-1] if x.row == PROBE}  # NaN, too
    shown = [x for x in tested if x.row != PROBE] + [*probes.values()]
    by = "speaker" if all(isfinite(x.intervals["speaker"][0]) for x in shown) else "utterance"
    metrics = " or ".join(dict.fromkeys(TITLES[score.metric] for score in shown))
    picture = figures.score_plot(
        "scores",
        f"{metrics} of each line, with 95 % intervals",
        [f"{score.group.letter}: {row_name(score.row)}" for score in shown],
        [100 * score.mean for score in shown],
        [tuple(100 * x for x in score.intervals[by]) for score in shown],
        [
            [100 * run.scores[x.row][x.metric] for run in x.group.with_row(x.row).values()]
            for x in shown
        ],
        [paper.ROWS.get(x.group.corpus, {}).get(x.row, {}).get(x.metric) for x in shown],
        f"{metrics}, %",
        "seeds",
    )
    return figure(
        [("", picture)],
        f"{metrics} of each line; intervals by {by}. The table above has the numbers.",
    )


def swept(groups: Sequence[Group]) -> str:
    """Returns the one numeric setting in which groups differ, or nothing."""
    settings = [
        {k: v for k, v in group.first.settings.items() if not k.startswith("the ")}
        for group in groups
    ]
    keys = dict.fromkeys(key for each in settings for key in each if key != "seed")
    differ = [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]
    if len(differ) != 1:
        return ""
    values = [each.get(differ[0]) for each in settings]
    numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    return differ[0] if numeric else ""


def _sweep(groups: Sequence[Group]) -> str:
    """Draws scores against a setting, as the paper's Fig. 2 does."""
    key = swept(groups)
    if not key:
        return paragraph(
            "There are curves here if the runs differ in one number only, such as "
            "`contrastive.weight` (the paper’s Fig. 2), and perhaps in their seeds.",
            note=True,
        )
    groups = sorted(groups, key=lambda group: group.first.settings[key])
    values = [group.first.settings[key] for group in groups]
    rows = [row for row in groups[0].rows if all(row in group.rows for group in groups)]
    # The linear probe does not depend on how the student is trained.
    rows = [row for row in rows if row != PROBE] or rows
    panels, body = [], []
    for i, (metric, name) in enumerate(TITLES.items()):
        lines = {
            row_name(row): [
                [100 * run.scores[row][metric] for run in group.with_row(row).values()]
                for group in groups
            ]
            for row in rows
        }
        title = f"{name} by {key}"
        panels.append((name, figures.sweep(f"sweep-{i}", title, values, lines, key, "%")))
        body += [[row, name, *map(_of_seeds, line)] for row, line in lines.items()]
    seeds = max(len(group.runs) for group in groups)
    told = f"A small dot is a run, and a band the range of up to {several(seeds, 'seed')}."
    if seeds == 1:
        told = "There is one run of each value, so a curve contains the chance of its seeds."
    head = ["model", "score", *(f"{key} = {value:g}" for value in values)]
    caption = "Scores by setting, in %; of several seeds the mean, the least and the greatest"
    numbers = table(caption, head, body, names=2)
    return paragraph(
        f"{told} The values of the setting are evenly spaced, whatever they are, as in the paper’s "
        "Fig. 2."
    ) + figure(panels, f"Scores by {key}.", numbers)


def _of_seeds(scores: Sequence[float]) -> str:
    mean = f"{np.mean(scores):.1f}"
    return f"{mean} ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else mean


def _confusions(groups: Sequence[Group]) -> str:
    panels, numbers = [], []
    for i, group in enumerate(groups):
        rows = [row for row in group.rows if row != PROBE] or group.rows
        of_seeds = [
            np.array(run.scores[rows[-1]]["confusion"]) for run in group.with_row(rows[-1]).values()
        ]
        classes = next(iter(group.first.predictions.values()))["classes"].tolist()
        name = f"{row_name(rows[-1])}, {group.letter}"
        panel, told = confusion(f"confusion-{i}", name, sum(of_seeds), classes)
        panels.append(panel)
        numbers.append(told)
    return paragraph(
        "Each row of a matrix is a true class, each column a predicted one; the upper number is "
        "the percentage of the true class, the lower one the count, summed over seeds. Runs of the "
        "student with and without the contrastive loss make the paper’s Fig. 3."
    ) + figure(panels, "Confusion matrices of the last model of each line.", *numbers)
