"""Writes `report.html`: a run's results, how it came to them, and what to be careful about.

The file is complete in itself: pictures are inline, and there are no scripts.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.errors import UserError
from serkd_jax.files import read_json, write_file
from serkd_jax.results import diagnostics, figures, intervals, provenance
from serkd_jax.results.markup import (
    details,
    figure,
    markdown,
    page,
    paragraph,
    table,
    text,
)
from serkd_jax.results.predictions import Predictions, pooled, read_predictions, rows_of, score

NAME = "report.html"
STAGES = ("teacher", "student", "distill", "curriculum")  # in the order of training
METRICS = {"ua": "UA", "wa": "WA", "wf1": "wF1"}
# What the paper claims: that the first is better than the second.
CLAIMS = (
    ("meta_teacher", "teacher"),
    ("distilled_student", "student"),
    ("updated_student", "distilled_student"),
    ("updated_student", "meta_teacher"),
)
PARTS = ("train", "quiz", "reward", "validation", "test")
MOST_FOLDS, MOST_SPEAKERS, MOST_POINTS = 6, 30, 400  # in pictures
MOST_EPOCHS, MOST_HARD = 120, 25  # in tables
MOST_NAMED_SPEAKERS = 300


class Run(NamedTuple):
    """What a workdir holds; whatever is missing or damaged, save predictions, is empty.

    Attributes:
        workdir: its folder.
        predictions: the test predictions of the finished folds.
        scores: see `results.predictions.score`.
        corpus: name of the corpus.
        config: flat name -> value of the settings.
        data: Markdown about the corpus.
        params: parameter counts of teacher and student.
        history: stage -> fold -> the lines of its `metrics.jsonl`.
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
    history: dict[str, dict[str, list[dict[str, Any]]]]
    costs: dict[str, Any]
    starts: list[dict[str, Any]]
    splits: dict[str, dict[str, Any]]

    @property
    def rows(self) -> list[str]:
        """The rows of the results."""
        return rows_of(self.predictions)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return next(iter(self.predictions.values()))["classes"].tolist()

    @property
    def speakers(self) -> int:
        """The number of known test speakers."""
        return len({name for name in pooled(self.predictions, "speaker").tolist() if name})


def read_run(workdir: Path) -> Run:
    """Reads what is in a workdir.

    Raises:
        UserError: no fold is finished, or its predictions are damaged.
    """
    predictions = read_predictions(workdir)
    results, settings = (_optional(workdir / name) for name in ("results.json", "run.json"))
    config = _flat(results["config"]) if "config" in results else settings
    return Run(
        workdir,
        predictions,
        score(predictions),
        str(results.get("corpus") or config.get("corpus") or workdir.name),
        config,
        results.get("data", ""),
        results.get("params", {}),
        {stage: _history(workdir, stage) for stage in STAGES},
        _optional(workdir / "costs.json"),
        provenance.read_starts(workdir),
        _optional(workdir / "splits.json"),
    )


def write_report(workdir: Path) -> Path:
    """Writes `report.html` of a run to its workdir, and returns its path.

    Raises:
        UserError: no fold is finished, or its predictions are damaged.
    """
    run = read_run(Path(workdir))
    sections = [(heading, make(run)) for heading, make in SECTIONS.items()]
    write_file(path := run.workdir / NAME, page(run.corpus, _introduction(run), sections))
    return path


def write_comparison(workdirs: Sequence[Path], path: Path) -> None:
    """Writes one page about several runs.

    Raises:
        UserError: a workdir has no finished fold, or its predictions are damaged.
    """
    runs = name_runs([read_run(Path(workdir)) for workdir in workdirs])
    introduction = paragraph(
        f"{len(runs)} runs, compared by their pooled test predictions. Scores are in %, with 95 % "
        "intervals."
    )
    sections = [(heading, make(runs)) for heading, make in COMPARED.items()]
    write_file(Path(path), page("Comparison of runs", introduction, sections))


def name_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Names runs by the end of their paths that tells them apart."""
    paths = [run.workdir.absolute().parts for run in runs]
    depth = 1
    while depth < max(map(len, paths)) and len({each[-depth:] for each in paths}) < len(paths):
        depth += 1
    names = ["/".join(each[-depth:]) for each in paths]
    if len(set(names)) < len(names):
        raise UserError("a workdir is named twice: name each once")
    return dict(zip(names, runs, strict=True))


def _introduction(run: Run) -> str:
    rows, classes = run.rows, run.classes
    missing = [fold for fold in run.splits if fold not in run.predictions]
    number, folds = len(pooled(run.predictions, "label")), len(run.predictions)
    sentences = [
        f"{number:,} test utterances in {_several(folds, 'fold')}, {len(classes)} classes"
        + (f", {_several(run.speakers, 'test speaker')}" if run.speakers else "")
        + f"; one seed ({run.config['seed']})" * ("seed" in run.config)
        + ". All scores are those of the test parts, pooled over folds unless a fold is named.",
    ]
    if missing:
        sentences.append(
            f"Not finished, and not in this report: fold {', '.join(missing)}. The scores will "
            "change."
        )
    if rows:
        best = run.scores["overall"][rows[-1]]
        sentences.append(
            f"The {_name(rows[-1])} reaches a UA of {_percent(best['ua'])} % (chance: "
            f"{100 / len(classes):.1f} %)."
        )
    sentences.append("Under each figure, its numbers are in tables that can be opened.")
    return paragraph(" ".join(sentences))


def _scores(run: Run) -> str:
    if not run.rows:
        return paragraph("No row of the results is finished in all folds.")
    by = "speaker" if run.speakers > 1 else "utterance"
    drawn = {how: intervals.bootstrap(run.predictions, how) for how in {by, "utterance"}}
    paper = paper_scores(run)
    metric = next((m for m in METRICS if any(m in each for each in paper.values())), "ua")
    if "ua" in METRICS and any("ua" in each for each in paper.values()):
        metric = "ua"
    overall, folds = run.scores["overall"], run.scores["folds"]
    lead = (
        "The rows are the models in the order of training. UA is the mean of the classes' recalls "
        "(Eq. 14), WA the share of utterances that are right (Eq. 15), wF1 the F1 of each class "
        "weighted by its size. "
    )
    lead += (
        "The intervals are by speaker: all utterances of a speaker are drawn together (bootstrap, "
        "2,000 draws), so they say what other speakers could give. "
        if by == "speaker"
        else "The intervals take utterances as independent (bootstrap, 2,000 draws); speakers are "
        "unknown or only one, so they are too narrow for what other speakers would give. "
    )
    if by == "speaker" and run.speakers < 10:
        lead += f"With {run.speakers} speakers they are rough. "
    lead += (
        "They do not contain what another seed would change: train again with other seeds before "
        "you call one row better than another."
    )
    columns = [m for m in METRICS if any(m in each for each in paper.values())]
    cited = [f"paper {METRICS[m]}" for m in columns]
    main = [
        [
            _name(row),
            *(_with_interval(overall[row][m], drawn[by][row][m]) for m in METRICS),
            *(_percent(paper.get(row, {}).get(m)) for m in columns),
        ]
        for row in run.rows
    ]
    picture = figures.score_plot(
        "scores",
        f"{METRICS[metric]} of each row of the results, with 95 % intervals",
        [_name(row) for row in run.rows],
        [100 * overall[row][metric] for row in run.rows],
        [tuple(100 * x for x in drawn[by][row][metric]) for row in run.rows],
        [[100 * fold[row][metric] for fold in folds.values()] for row in run.rows],
        [
            100 * x if (x := paper.get(row, {}).get(metric)) is not None else None
            for row in run.rows
        ],
        f"{METRICS[metric]}, %",
    )
    each = [
        [_name(row), METRICS[m], _percent(overall[row][m]), *(
            _range(drawn[how][row][m]) for how in sorted(drawn)
        ), *(_percent(fold[row][m]) for fold in folds.values())]
        for row in run.rows
        for m in METRICS
    ]  # fmt: skip
    head = ["model", "score", "all", *(f"95 %, by {how}" for how in sorted(drawn))]
    numbers = table("Scores by fold, in %", [*head, *(f"fold {fold}" for fold in folds)], each)
    return (
        paragraph(lead)
        + table(
            f"Scores in %, with 95 % intervals by {by}",
            ["model", *METRICS.values(), *cited],
            main,
            numbered=True,
        )
        + figure([("", picture)], f"{METRICS[metric]} of each model.", numbers)
        + _claims(run, by)
    )


def _claims(run: Run, by: str) -> str:
    """Compares rows in pairs."""
    pairs = [(a, b) for a, b in CLAIMS if a in run.rows and b in run.rows]
    if not pairs:
        return ""
    tested = [intervals.paired(run.predictions, a, run.predictions, b, by) for a, b in pairs]
    adjusted = intervals.holm([each["ua"].p for each in tested])
    rows = [
        [
            f"{_name(a)} − {_name(b)}",
            *(_with_interval(each[m].value, each[m].interval, sign=True) for m in METRICS),
            f"{each['ua'].p:.3f}",
            f"{p:.3f}",
        ]
        for (a, b), each, p in zip(pairs, tested, adjusted, strict=True)
    ]
    head = ["difference", *METRICS.values(), "p of UA", f"p, Holm ({len(pairs)} tests)"]
    return paragraph(
        "The differences are between models that were tested on the same utterances, drawn "
        "together. An interval that contains 0 leaves open which of the two is better."
    ) + table(f"Differences in points, with 95 % intervals by {by}", head, rows, numbered=True)


def paper_scores(run: Run) -> dict[str, dict[str, float]]:
    """Returns the paper's scores on this corpus, by row and metric, in [0, 1]; perhaps none."""
    del run
    return {}


def _confusions(run: Run) -> str:
    shown = {row: np.array(run.scores["overall"][row]["confusion"]) for row in run.rows}
    panels = [
        (_name(row), figures.confusion_matrix(
            f"confusion-{i}", f"Confusion matrix of the {_name(row)}", counts, run.classes
        ))
        for i, (row, counts) in enumerate(shown.items())
    ]  # fmt: skip
    numbers = [
        table(f"Confusion of the {_name(row)}: counts and % of the true class",
              ["true class", *run.classes], _confusion_cells(counts, run.classes))
        for row, counts in shown.items()
    ]  # fmt: skip
    return paragraph(
        "A row of a matrix is a true class, a column a predicted one. The upper number of a cell "
        "is the percentage of the true class, the lower one the count; on the diagonal are the "
        "recalls, whose mean is UA. The paper's Fig. 3 shows such matrices of its student with "
        "and without the contrastive branch."
    ) + figure(panels, "Confusion matrices, of all folds together.", *numbers)


def _confusion_cells(counts: np.ndarray, classes: Sequence[str]) -> list[list[str]]:
    sizes = counts.sum(1)
    return [
        [name, *(f"{n:,} ({100 * n / size:.1f} %)" if size else f"{n:,}" for n in row)]
        for name, row, size in zip(classes, counts.tolist(), sizes.tolist(), strict=True)
    ]


def _learning(run: Run) -> str:
    stages = {stage: folds for stage, folds in run.history.items() if folds}
    if not stages:
        return paragraph("This workdir has no metrics.jsonl of its stages.", note=True)
    made = [
        paragraph(
            "Thin lines are folds, thick lines their mean. Cross-entropy is shown for training "
            "and validation, since the training losses of the later stages have further terms; "
            "that of training is measured with dropout while the epoch changes the weights. "
            "Validation parts are small and share their speakers with training, where the "
            "protocol does not hold them apart: expect test scores to be lower. " + _selection(run)
        )
    ]
    return "".join(made + [_stage_curves(stage, folds) for stage, folds in stages.items()])


def _selection(run: Run) -> str:
    metric = run.config.get("selection_metric")
    if metric == "last":
        return "The last epoch of each stage was kept."
    return f"The epoch with the best validation {METRICS.get(metric, metric)} was kept." * bool(
        metric
    )


def _stage_curves(stage: str, folds: Mapping[str, list[dict[str, Any]]]) -> str:
    names = dict.fromkeys(name for rows in folds.values() for row in rows for name in row)
    entropy = "train/cross_entropy" if "train/cross_entropy" in names else "train/loss"
    series = {name: _series(folds, name) for name in names if name not in ("epoch", "step")}
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    panels = [
        ("Cross-entropy, nats", {"training": entropy, "validation": "validation/loss"}, {}),
        ("Scores, %", {"training WA": "train/accuracy", "validation WA": "validation/wa",
                       "validation UA": "validation/ua"}, {"limits": (0, 103)}),
        ("Terms of the training loss", {
            name.removeprefix("train/").replace("_", " "): name
            for name in ("train/loss", "train/cross_entropy", "train/contrastive", "train/soft",
                         "train/patient", "train/consistency", "train/meta_loss")
        }, {"log": True}),
    ]  # fmt: skip
    drawn, title = [], stage.capitalize()
    for i, (heading, lines, how) in enumerate(panels):
        scale = 100 if heading.endswith("%") else 1
        lines = {name: scale * series[key] for name, key in lines.items() if key in series}
        if lines and not (how.get("log") and len(lines) < 2):
            drawn.append((heading, figures.curves(
                f"{stage}-{i}", f"{title}: {heading} by epoch", lines, heading.split(",")[0], **how
            )))  # fmt: skip
    shown = [name for name in series if name not in ("steps_per_second", "seconds", "train/task")]
    epochs = max(values.shape[1] for values in series.values()) if series else 0
    rows = [
        [str(epoch + 1), *(_mean_and_range(series[name][:, epoch]) for name in shown)]
        for epoch in figures.thinned(epochs, MOST_EPOCHS).tolist()
    ]
    several = ": mean over folds, and in brackets the least and the greatest" * (len(folds) > 1)
    numbers = table(
        f"{title} by epoch{several}",
        ["epoch", *(name.replace("_", " ").replace("/", " ") for name in shown)],
        rows,
        tall=True,
    )
    caption = f"Learning curves of the stage “{stage}”, {_several(len(folds), 'fold')}."
    return f"<h3>{text(_STAGE_TITLES[stage])}</h3>\n" + figure(drawn, caption, numbers)


_STAGE_TITLES = {
    "teacher": "Teacher (3.1)",
    "student": "Student with the contrastive branch (3.2.1)",
    "distill": "Distilled student and meta-teacher (3.2.2, 3.3)",
    "curriculum": "Updated student: the curriculum (3.4)",
}


def _curriculum(run: Run) -> str:
    folds = run.history["curriculum"]
    if not folds:
        return paragraph("The run has no curriculum stage.", note=True)
    reward = _series(folds, "train/reward")
    parts = [
        paragraph(
            "A task is a part of the training set: task 1 is what the meta-teacher T′ finds "
            "easiest. The policy picks the task of every step and is rewarded by the share of "
            "reward clips on which the student S′ gives the true class a higher probability than "
            "T′ does (Eq. 13). A reward of 0.5 means that neither is ahead. A policy that "
            "has learned nothing keeps the shares it started with, which favour easy tasks."
        )
    ]
    panels, numbers = [], []
    counts = _task_counts(folds)
    if counts is not None:
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        tasks = [f"task {k + 1}" for k in range(counts.shape[1])]
        tasks[0] += " (easiest)"
        panels.append(
            ("Tasks over time", figures.task_shares(
                "tasks", "Share of the steps that each task had, by epoch", shares, tasks))
        )  # fmt: skip
        numbers.append(
            table(
                "Steps of each task, all folds, and their share",
                ["epoch", *tasks],
                [
                    [str(e + 1), *(f"{n:,.0f} ({100 * s:.1f} %)" for n, s in
                                   zip(counts[e], shares[e], strict=True))]
                    for e in figures.thinned(len(counts), MOST_EPOCHS).tolist()
                ],
                tall=True,
            )
        )  # fmt: skip
    if np.isfinite(reward).any():
        panels.append(
            ("Reward", figures.curves(
                "reward", "Mean reward by epoch", {"reward": reward}, "reward", (0, 1)))
        )  # fmt: skip
        numbers.append(
            table(
                "Mean reward by epoch",
                ["epoch", *(f"fold {fold}" for fold in folds)],
                [
                    [str(e + 1), *(_number(x) for x in reward[:, e])]
                    for e in figures.thinned(reward.shape[1], MOST_EPOCHS).tolist()
                ],
                tall=True,
            )
        )
    if {"meta_teacher", "updated_student"} <= {*run.rows}:
        teacher, student = (
            diagnostics.true_class_probability(run.predictions, row)
            for row in ("meta_teacher", "updated_student")
        )
        label = pooled(run.predictions, "label")
        right = [
            pooled(run.predictions, row).argmax(-1) == label
            for row in ("meta_teacher", "updated_student")
        ]
        panels.append(
            ("S′ against T′ on test utterances", figures.duel(
                "duel", "Probability of the true class: student S′ against meta-teacher T′",
                teacher, student))
        )  # fmt: skip
        numbers += [_duel_table(teacher, student, right)]
    caption = (
        "The tasks that the policy picked (all folds together), what they earned (thin: folds), "
        "and S′ against T′ on test utterances, which the policy never sees."
    )
    return "".join(parts) + figure(panels, caption, *numbers)


def _duel_table(teacher: np.ndarray, student: np.ndarray, right: Sequence[np.ndarray]) -> str:
    n, (t, s) = len(teacher), right

    def told(mask: np.ndarray) -> str:
        return f"{mask.sum():,} ({100 * mask.mean():.1f} %)"

    rows = [
        ["S′ gives the true class more than T′ does", told(student > teacher)],
        ["both right", told(t & s)],
        ["only S′ right", told(s & ~t)],
        ["only T′ right", told(t & ~s)],
        ["neither right", told(~t & ~s)],
        ["mean p(true class) of S′", _number(student.mean())],
        ["mean p(true class) of T′", _number(teacher.mean())],
    ]
    return table(f"S′ against T′ on {n:,} test utterances", ["", "utterances"], rows)


def _task_counts(folds: Mapping[str, list[dict[str, Any]]]) -> np.ndarray | None:
    """Returns how many steps of each epoch had each task, (epochs, K), of all folds."""
    drawn = [
        [row["train/task"] for row in rows if isinstance(row.get("train/task"), list)]
        for rows in folds.values()
    ]
    widths = {len(each) for rows in drawn for each in rows}
    if not widths:
        return None
    counts = np.zeros((max(map(len, drawn)), max(widths)))
    for rows in drawn:
        for epoch, each in enumerate(rows):
            counts[epoch, : len(each)] += each
    return counts


def _classes(run: Run) -> str:
    label, classes = pooled(run.predictions, "label"), run.classes
    scores = {
        row: diagnostics.class_scores(label, pooled(run.predictions, row).argmax(-1), len(classes))
        for row in run.rows
    }
    picture = figures.dot_plot(
        "classes", "Recall of each class, by model", classes,
        {_name(row): 100 * each["recall"] for row, each in scores.items()}, "recall, %",
    )  # fmt: skip
    rows = [
        [name, f"{n:,}", _name(row), *(_percent(scores[row][m][c]) for m in ("recall", "precision", "f1"))]
        for c, (name, n) in enumerate(
            zip(classes, np.bincount(label, minlength=len(classes)).tolist(), strict=True)
        )
        for row in run.rows
    ]  # fmt: skip
    head = ["class", "n", "model", "recall", "precision", "F1"]
    return paragraph(
        "A class that is rare in training is often the one with the lowest recall; recall alone "
        "does not show how often a class is predicted wrongly, which is what precision does."
    ) + figure([("", picture)], "Recall of each class.", table("Scores by class, in %", head, rows))


def _speakers(run: Run) -> str:
    if not run.speakers:
        return paragraph("The corpus does not name its speakers.", note=True)
    rows = [row for row in (run.rows[0], run.rows[-1])] if len(run.rows) > 1 else run.rows
    scores = {row: diagnostics.speaker_scores(run.predictions, row) for row in run.rows}
    last = scores[rows[-1]]
    by_size = sorted(last, key=lambda name: -last[name]["n"])
    drawn = sorted(by_size[:MOST_SPEAKERS], key=lambda name: (-last[name]["ua"], name))
    picture = figures.dot_plot(
        "speakers", "UA of each speaker, by model", drawn,
        {_name(row): [100 * scores[row][name]["ua"] for name in drawn] for row in rows}, "UA, %",
    )  # fmt: skip
    named = sorted(by_size[:MOST_NAMED_SPEAKERS], key=lambda name: (-last[name]["ua"], name))
    numbers = table(
        "Scores by speaker, in %",
        ["speaker", "n", *(f"{METRICS[m]}, {_name(row)}" for row in run.rows for m in ("ua", "wa"))],
        [
            [name, f"{last[name]['n']:,}",
             *(_percent(scores[row][name][m]) for row in run.rows for m in ("ua", "wa"))]
            for name in named
        ],
        tall=len(named) > 15,
    )  # fmt: skip
    few = (
        f" Drawn are the {len(drawn)} of {len(last)} speakers with the most utterances."
        if len(drawn) < len(last)
        else ""
    )
    spread = [each["ua"] for each in last.values()]
    return paragraph(
        f"UA of a speaker is the mean over the classes that this speaker has. It ranges from "
        f"{_percent(min(spread))} to {_percent(max(spread))} % for the {_name(rows[-1])}: with "
        "few speakers, this spread decides the score more than the model does. Speakers with "
        f"few utterances scatter by chance.{few}"
    ) + figure([("", picture)], "UA of each speaker, best first.", numbers)


def _vectors(run: Run) -> str:
    folds = {
        name: arrays
        for name, arrays in run.predictions.items()
        if "vectors" in arrays and len(arrays["vectors"]) > 2 and arrays["vectors"].shape[1] > 1
    }
    if not folds:
        return paragraph("No student was trained, so there are no vectors to show.", note=True)
    counted = Counter(pooled(run.predictions, "label").tolist())
    classes = [run.classes[c] for c, _ in counted.most_common(8)]
    classes.sort(key=run.classes.index)
    by_class, by_speaker, agreement, places, method = [], [], [], [], ""
    for i, (fold, arrays) in enumerate(folds.items()):
        vectors = arrays["vectors"].astype(np.float64)
        names = arrays["classes"][arrays["label"]]
        speakers = arrays["speaker"]
        near = [diagnostics.same_neighbour(vectors, groups) for groups in (names, speakers)]
        agreement.append([
            f"fold {fold}", f"{len(vectors):,}", *(_percent(x) for x in near[0]),
            *((_percent(x) for x in near[1]) if len(set(speakers.tolist())) > 1 else ("–", "–")),
        ])  # fmt: skip
        if i >= MOST_FOLDS:
            continue
        points, method = diagnostics.embed(vectors)
        kept = figures.thinned(len(points), MOST_POINTS)
        heading, axis = f"Fold {fold}, by class", f"two dimensions by {method}"
        by_class.append((heading, figures.scatter(
            f"class-{fold}", f"The student's vectors of fold {fold}, coloured by class",
            points[kept], names[kept], classes, axis)))  # fmt: skip
        common = [str(s) for s, _ in Counter(speakers.tolist()).most_common(8) if s]
        if len(common) > 1:
            by_speaker.append((f"Fold {fold}, by speaker", figures.scatter(
                f"speaker-{fold}", f"The student's vectors of fold {fold}, coloured by speaker",
                points[kept], speakers[kept], sorted(common), axis)))  # fmt: skip
        places += [
            [str(arrays["ids"][k]), str(fold), str(names[k]), str(speakers[k]),
             f"{points[k, 0]:.2f}", f"{points[k, 1]:.2f}"]
            for k in kept.tolist()
        ]  # fmt: skip
    lead = (
        "Each point is the vector of a test utterance in the last student (h in the paper), "
        f"brought from its 16 leading principal components to two dimensions by {method}. Each "
        "fold has a student, and so a space, of its own. Groups that lie apart by class but not by "
        "speaker are what one wants. Distances between groups mean little in such a picture; the "
        "shares of nearest neighbours in the table are measured in the 16 dimensions."
    )
    if len(folds) > MOST_FOLDS:
        lead += f" Drawn are the first {MOST_FOLDS} of {len(folds)} folds."
    drawn = sum(len(arrays["vectors"]) for arrays in list(folds.values())[:MOST_FOLDS])
    if len(places) < drawn:
        lead += f" Of each fold, at most {MOST_POINTS} points are drawn."
    near = table(
        "How often an utterance's nearest neighbour is of its class, or its speaker, in %",
        ["fold", "n", "same class", "by chance", "same speaker", "by chance"],
        agreement,
        numbered=True,
    )
    where = table(
        "The points", ["utterance", "fold", "class", "speaker", "x", "y"], places, tall=True
    )
    caption = "The last student's vectors of test utterances, by class and by speaker."
    return paragraph(lead) + near + figure([*by_class, *by_speaker], caption, where)


def _calibration(run: Run) -> str:
    rows = [row for row in run.rows if row not in diagnostics.NO_PROBABILITIES]
    label = pooled(run.predictions, "label")
    found = {row: diagnostics.calibration(pooled(run.predictions, row), label) for row in rows}
    panels = [
        (_name(row), figures.reliability(
            f"calibration-{i}", f"Accuracy by confidence, {_name(row)}",
            each.confidence, each.accuracy, each.counts))
        for i, (row, each) in enumerate(found.items())
    ]  # fmt: skip
    summary = table(
        "Calibration",
        ["model", "ECE, %", "Brier score", "log loss, nats"],
        [
            [_name(row), _percent(each.ece), _number(each.brier), _number(each.nll)]
            for row, each in found.items()
        ],
        numbered=True,
    )
    width = 1 / len(next(iter(found.values())).counts) if found else 1
    bins = table(
        "Bins of confidence",
        ["model", "confidence", "n", "mean confidence", "accuracy"],
        [
            [_name(row), f"{i * width:.1f} to {(i + 1) * width:.1f}", f"{n:,}",
             *((_number(c), _number(a)) if n else ("–", "–"))]
            for row, each in found.items()
            for i, (n, c, a) in enumerate(
                zip(each.counts.tolist(), each.confidence, each.accuracy, strict=True)
            )
        ],
    )  # fmt: skip
    return (
        paragraph(
            "Confidence is the probability of the predicted class. Where a point lies below the "
            "diagonal, the model is surer than it is right; its area is the share of utterances. "
            "ECE is the mean distance from the diagonal. Nothing was done to calibrate the models, "
            "and on speakers or recordings of another kind they will be worse."
        )
        + summary
        + figure(panels, "Accuracy by confidence, in ten bins.", bins)
    )


def _costs(run: Run) -> str:
    costs, made = run.costs, []
    params = costs.get("params", run.params)
    if params:
        encoder = params.get("encoder")
        rows = [
            [name, f"{n:,}", f"{n / 2**20:.2f}", f"{4 * n / 1e6:,.1f}"]
            for name, n in params.items()
        ]
        if encoder is not None:
            total = params["student"] + encoder
            rows.append(["student and encoder", f"{total:,}", f"{total / 2**20:.2f}",
                         f"{4 * total / 1e6:,.1f}"])  # fmt: skip
        numbers = table(
            "Parameters",
            ["model", "parameters", "M (2^20)", "MB in float32"],
            rows,
            numbered=True,
        )
        made.append(paragraph(
            "The paper counts the parameters “used after feature extraction” and leaves out the "
            "encoder whose features the student reads. A device needs both, so both are here. "
            "M is 2^20, as in the paper. What an exported file takes depends on its format."
        ) + numbers)  # fmt: skip
    if seconds := costs.get("seconds"):
        total = sum(seconds.values())
        names = {"frontend": "front-end (encoder)", "student": "student"}
        rows = [
            [names.get(name, name), f"{x:.6f}", f"{1 / x:,.0f}×" if x else "–"]
            for name, x in [*seconds.items(), ("together", total)]
        ]
        picture = figures.stacked_bars(
            "time", "Computing time for a second of audio", ["a second of audio"],
            {names.get(name, name): [1000 * x] for name, x in seconds.items()},
            "computing time, milliseconds",
        )  # fmt: skip
        numbers = table(
            "Real-time factor: seconds of computing for a second of audio",
            ["part", "real-time factor", "faster than real time"],
            rows,
        )
        made.append(
            figure([("", picture)], f"Time to classify a second of audio, one recording at a time, "
                   f"on: {costs.get('device', 'an unnamed device')}. It is the least of three "
                   "measurements; other devices differ by orders of magnitude.", numbers)
        )  # fmt: skip
    trained = _training_time(run)
    if trained:
        made.append(
            table(
                "Training time, all folds, with validation and checkpoints",
                ["stage", "folds", "epochs", "minutes", "steps per second"],
                trained,
                numbered=True,
            )
        )
    return "".join(made) or paragraph("Costs were not measured in this run.", note=True)


def _training_time(run: Run) -> list[list[str]]:
    rows = []
    for stage, folds in run.history.items():
        lines = [line for each in folds.values() for line in each]
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        rates = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
        if seconds:
            rate = f"{np.median(rates):.2f}" if rates else "–"
            rows.append([stage, f"{len(folds)}", f"{len(lines)}", f"{sum(seconds) / 60:.1f}", rate])
    return rows


def _data(run: Run) -> str:
    made = [
        markdown(run.data)
        if run.data
        else paragraph("What was noticed about the data is in no results.json yet.", note=True)
    ]
    rows = [
        [fold, *(f"{len(parts[part]):,}" if isinstance(parts.get(part), list) else "–" for part in PARTS),
         str(parts.get("held_out", ""))]
        for fold, parts in run.splits.items()
        if isinstance(parts, dict)
    ]  # fmt: skip
    if rows:
        made.append(
            paragraph(
                "The quiz part is for the meta-teacher and the reward part for the policy; "
                "neither is trained on. The validation part picks the epoch where one is picked."
            )
            + table("Utterances of each part", ["fold", *PARTS, "held out"], rows, numbered=True)
        )
    return "".join(made)


def _hardest(run: Run) -> str:
    rows = [row for row in run.rows if row not in diagnostics.NO_PROBABILITIES]
    if not rows:
        return paragraph("No row has probabilities.", note=True)
    places = diagnostics.hardest(run.predictions, rows, MOST_HARD)
    ids, speakers = (pooled(run.predictions, name) for name in ("ids", "speaker"))
    label, last = pooled(run.predictions, "label"), pooled(run.predictions, rows[-1]).argmax(-1)
    folds = np.concatenate([[fold] * len(each["ids"]) for fold, each in run.predictions.items()])
    p = {row: diagnostics.true_class_probability(run.predictions, row) for row in rows}
    wrong = np.all([pooled(run.predictions, r).argmax(-1) != label for r in rows], axis=0)
    body = [
        [str(ids[k]), str(folds[k]), str(speakers[k]), run.classes[label[k]], run.classes[last[k]],
         *(_number(p[row][k]) for row in rows)]
        for k in places.tolist()
    ]  # fmt: skip
    head = ["utterance", "fold", "speaker", "label", f"{_name(rows[-1])} says"]
    return paragraph(
        f"{wrong.sum():,} of {len(label):,} test utterances are wrong in every row. Below are the "
        f"{len(body)} to whose label the models give the least probability, on average. Listen to "
        "them: some are hard, some are labelled wrongly, and some are damaged. Do not remove them "
        "from a test part because of this list."
    ) + table(
        "The hardest test utterances, and the probability of their label",
        [*head, *(f"p, {_name(row)}" for row in rows)],
        body,
        numbered=True,
    )


def _provenance(run: Run) -> str:
    made = []
    for start in run.starts:
        devices = start.get("devices") or ["?", "?"]
        made.append([
            str(start.get("time", "–")), str(start.get("command", "–")),
            str(start.get("revision") or "unknown"), f"{devices[0]} × {devices[1]}",
            str(start.get("processes", "–")), str(start.get("dtype", "–")),
            str(start.get("machine", "–")),
        ])  # fmt: skip
    head = ["time", "command", "revision", "devices", "processes", "dtype", "machine"]
    parts = [
        table("Starts of this run", head, made, numbered=True)
        if made
        else paragraph("This workdir does not say how the run was started.", note=True)
    ]
    if run.starts:
        versions = {
            "python": run.starts[-1].get("python", "–"),
            **run.starts[-1].get("versions", {}),
        }
        parts.append(
            details("Versions", table("Versions of the last start", ["package", "version"],
                                      [[k, str(v)] for k, v in versions.items()]))
        )  # fmt: skip
    if run.config:
        parts.append(
            details("Settings", table("Settings of the run", ["setting", "value"],
                                      [[k, _setting(v)] for k, v in sorted(run.config.items())]))
        )  # fmt: skip
    return "".join(parts)


SECTIONS: dict[str, Callable[[Run], str]] = {
    "Scores": _scores,
    "Confusion matrices": _confusions,
    "Learning curves": _learning,
    "The curriculum": _curriculum,
    "Scores by class": _classes,
    "Scores by speaker": _speakers,
    "The student’s vectors": _vectors,
    "Calibration": _calibration,
    "Sizes and costs": _costs,
    "Data": _data,
    "The hardest utterances": _hardest,
    "How it was run": _provenance,
}


def _name(row: str) -> str:
    return {"meta_teacher": "meta-teacher"}.get(row, row.replace("_", " "))


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _range(interval: tuple[float, float]) -> str:
    return " to ".join(_percent(x) for x in interval)


def _with_interval(value: float, interval: tuple[float, float], sign: bool = False) -> str:
    shown = _signed if sign else _percent
    return f"{shown(value)} ({' to '.join(shown(x) for x in interval)})"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _mean_and_range(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    mean = f"{known.mean():.4g}"
    return f"{mean} ({known.min():.4g} to {known.max():.4g})" if len(values) > 1 else mean


def _optional(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, "")
    except (UserError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _history(workdir: Path, stage: str) -> dict[str, list[dict[str, Any]]]:
    """Reads a stage's metrics by fold; what is not a complete line is left out."""
    folds = {}
    for path in sorted(workdir.glob(f"fold_*/{stage}/metrics.jsonl"), key=_fold_of):
        rows = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            rows += [row] if isinstance(row, dict) else []
        if rows:
            folds[path.parts[-3][5:]] = rows
    return folds


def _fold_of(path: Path) -> tuple[int, str]:
    name = path.parts[-3][5:]
    return int(name) if name.isdecimal() else 0, name


def _series(folds: Mapping[str, list[dict[str, Any]]], name: str) -> np.ndarray:
    """Returns a metric of all folds, (folds, epochs), NaN where it is missing."""
    values = np.full((len(folds), max(map(len, folds.values()))), np.nan)
    for fold, rows in enumerate(folds.values()):
        for epoch, row in enumerate(rows):
            if isinstance(value := row.get(name), int | float):
                values[fold, epoch] = value
    return values


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# Several runs


def _compared_scores(runs: Mapping[str, Run]) -> str:
    body = []
    for name, run in runs.items():
        by = "speaker" if run.speakers > 1 else "utterance"
        drawn = intervals.bootstrap(run.predictions, by)
        for row in run.rows:
            scores = run.scores["overall"][row]
            body.append([
                name, _name(row), f"{scores['n']:,}", str(run.config.get("seed", "–")),
                *(_with_interval(scores[m], drawn[row][m]) for m in METRICS), by,
            ])  # fmt: skip
    head = ["run", "model", "n", "seed", *METRICS.values(), "interval by"]
    return paragraph(
        "UA is the mean of the classes' recalls, WA the share of utterances that are right, wF1 "
        "the F1 of each class weighted by its size. Runs can be compared only if they tested the "
        "same utterances; overlapping intervals do not mean that two runs are alike, since their "
        "difference has an interval of its own."
    ) + table("Scores in %, with 95 % intervals", head, body, numbered=True)


def _different_settings(runs: Mapping[str, Run]) -> dict[str, list[Any]]:
    """Returns the settings that differ, with the value of each run."""
    ignored = ("data_dir", "cache_dir", "num_devices", "examples", "strict")
    keys = sorted({key for run in runs.values() for key in run.config} - {*ignored})
    values = {key: [run.config.get(key) for run in runs.values()] for key in keys}
    return {key: each for key, each in values.items() if any(x != each[0] for x in each)}


def _compared_settings(runs: Mapping[str, Run]) -> str:
    differ = _different_settings(runs)
    if not differ:
        return paragraph("All settings are the same.", note=True)
    body = [[key, *(_setting(x) for x in values)] for key, values in differ.items()]
    return table("Settings that differ", ["setting", *runs], body, numbered=True)


def _sweep(runs: Mapping[str, Run]) -> str:
    differ = _different_settings(runs)
    keys = [key for key in differ if key not in ("seed", "protocol.seed")]
    numeric = len(keys) == 1 and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in differ[keys[0]]
    )
    if not numeric:
        return paragraph(
            "Curves over a setting are drawn where the runs differ in one number, such as "
            "contrastive.weight (Fig. 2 of the paper), and perhaps in their seeds.", note=True
        )  # fmt: skip
    (key,) = keys
    values, settings = differ[key], sorted(set(differ[key]))
    rows = [row for row in next(iter(runs.values())).rows
            if all(row in run.rows for run in runs.values())]  # fmt: skip
    panels, body = [], []
    for i, metric in enumerate(METRICS):
        lines = {
            _name(row): [
                [100 * run.scores["overall"][row][metric]
                 for run, x in zip(runs.values(), values, strict=True) if x == setting]
                for setting in settings
            ]
            for row in rows
        }  # fmt: skip
        panels.append((METRICS[metric], figures.sweep(
            f"sweep-{i}", f"{METRICS[metric]} by {key}", settings, lines, key,
            f"{METRICS[metric]}, %")))  # fmt: skip
        body += [
            [name, METRICS[metric], *(_of_seeds(each) for each in line)]
            for name, line in lines.items()
        ]
    numbers = table(
        "Mean over runs, and in brackets the least and the greatest, in %",
        ["model", "score", *(f"{key} = {x:g}" for x in settings)],
        body,
    )
    seeds = max(Counter(values).values())
    told = f"The band is the range of up to {seeds} runs (seeds). " if seeds > 1 else (
        "There is one run of each value, so the curves contain the chance of a seed. "
    )  # fmt: skip
    return paragraph(
        f"{told}The values are spaced evenly, as in the paper's Fig. 2. They are scores of test "
        "parts: do not choose a value by them."
    ) + figure(panels, f"Scores by {key}.", numbers)


def _of_seeds(scores: Sequence[float]) -> str:
    mean = f"{np.mean(scores):.1f}"
    return f"{mean} ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else mean


def _compared_confusions(runs: Mapping[str, Run]) -> str:
    panels, numbers = [], []
    for i, (name, run) in enumerate(runs.items()):
        if run.rows:
            counts = np.array(run.scores["overall"][run.rows[-1]]["confusion"])
            heading = f"{name}: {_name(run.rows[-1])}"
            panels.append((heading, figures.confusion_matrix(
                f"confusion-{i}", f"Confusion matrix of {heading}", counts, run.classes)))  # fmt: skip
            cells = _confusion_cells(counts, run.classes)
            numbers.append(table(f"Confusion of {heading}", ["true class", *run.classes], cells))
    return paragraph(
        "Rows are true classes, columns predicted ones; the upper number is the percentage of the "
        "true class, the lower one the count. Two runs of the student, with and without the "
        "contrastive branch, make the paper's Fig. 3."
    ) + figure(panels, "Confusion matrices of the last row of each run.", *numbers)


COMPARED: dict[str, Callable[[Mapping[str, Run]], str]] = {
    "Scores": _compared_scores,
    "Settings": _compared_settings,
    "Scores by a setting": _sweep,
    "Confusion matrices": _compared_confusions,
}
