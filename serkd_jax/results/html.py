"""Writes `report.html`: a run's results, how it came to them, and what to be careful about.

The file is complete in itself: its pictures are inline, it loads nothing, and it has no scripts.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from serkd_jax.errors import UserError
from serkd_jax.files import write_file
from serkd_jax.results import html_scores, html_training
from serkd_jax.results.comparison import compare, read_runs
from serkd_jax.results.html_comparison import comparison_page
from serkd_jax.results.markup import page, paragraph, percent, row_name, several
from serkd_jax.results.predictions import pooled
from serkd_jax.results.runs import Run, read_run

NAME = "report.html"

SECTIONS: dict[str, Callable[[Run], str]] = {
    "Scores": html_scores.scores,
    "Confusion matrices": html_scores.confusions,
    "Learning curves": html_training.learning,
    "The curriculum": html_training.curriculum,
    "Scores by class": html_scores.classes,
    "Scores by speaker": html_scores.speakers,
    "The student’s vectors": html_scores.vectors,
    "Calibration": html_scores.calibration,
    "Sizes and costs": html_training.costs,
    "Data": html_training.data,
    "The hardest utterances": html_scores.hardest,
    "How it was run": html_training.provenance,
}


def write_report(workdir: Path) -> Path:
    """Writes the report of a run to its workdir, and returns the file's path.

    Raises:
        UserError: no fold is finished, or its predictions are damaged.
    """
    run = read_run(Path(workdir))
    sections = [(heading, make(run)) for heading, make in SECTIONS.items()]
    path = run.workdir / NAME
    write_file(path, page(f"Results on {run.corpus}", _introduction(run), sections))
    return path


def write_comparison(workdirs: Iterable[Path], path: Path) -> None:
    """Writes one page about several finished runs; those that cannot be read are named in it.

    Raises:
        UserError: none of them can be read.
    """
    runs, problems = read_runs(workdirs)
    if not runs:
        raise UserError("; ".join(problems) or "no run to compare: name workdirs of finished runs")
    comparison = compare(runs)
    comparison.notes.extend(f"Left out: {problem}." for problem in problems)
    write_file(Path(path), comparison_page(comparison))


def _introduction(run: Run) -> str:
    size, folds = len(pooled(run.predictions, "label")), len(run.predictions)
    facts = [several(size, "test utterance"), several(folds, "fold")]
    facts += [several(len(run.classes), "class")]
    facts += [several(run.speakers, "test speaker")] if run.speakers else []
    facts += [f"one seed ({run.config['seed']})"] if "seed" in run.config else []
    told = [f"{', '.join(facts)}. Scores are those of test parts, pooled over folds."]
    if run.trained:
        ua = run.scores["overall"][run.trained[-1]]["ua"]
        chance = f"chance is {100 / len(run.classes):.1f}"
        told.append(f"The {row_name(run.trained[-1])} reaches a UA of {percent(ua)} % ({chance}).")
    if missing := [fold for fold in run.splits if fold not in run.predictions]:
        told.append(f"Not finished, and so not in this report: fold {', '.join(missing)}.")
    told.append("The numbers of each figure are in tables below it, which open on a click.")
    return paragraph(" ".join(told))
