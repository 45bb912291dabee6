"""The sections of a report that are made from a run's logs, costs and data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serkd_jax.results import diagnostics, figures, paper
from serkd_jax.results.markup import (
    Panel,
    details,
    figure,
    markdown,
    number,
    paragraph,
    setting,
    several,
    subheading,
    table,
)
from serkd_jax.results.predictions import pooled
from serkd_jax.results.runs import History, Run, series, task_counts

TITLES = {
    "teacher": "Teacher (3.1)",
    "student": "Student with the contrastive branch (3.2.1)",
    "distill": "Distilled student and meta-teacher (3.2.2, 3.3)",
    "curriculum": "Updated student: the curriculum (3.4)",
}
# Panel -> name in the legend -> metric.
LOSSES = {"training": "train/cross_entropy", "validation": "validation/loss"}
SCORES = {
    "training WA": "train/accuracy",
    "validation WA": "validation/wa",
    "validation UA": "validation/ua",
}
# Positive terms, for an axis of powers of ten; the consistency of Eq. 12 has a sign.
TERMS = {
    "all": "train/loss",
    "cross-entropy": "train/cross_entropy",
    "Sup (Eq. 3)": "train/contrastive",
    "soft (Eq. 5)": "train/soft",
    "patient (Eq. 8)": "train/patient",
    "meta (Eq. 9)": "train/meta_loss",
}
UNLISTED = ("epoch", "step", "seconds", "steps_per_second", "train/task")
PARTS = ("train", "quiz", "reward", "validation", "test")
MOST_EPOCHS = 120  # in tables


def learning(run: Run) -> str:
    """Learning curves of all stages."""
    stages = {stage: history for stage, history in run.history.items() if history}
    if not stages:
        return paragraph("The workdir has no metrics of its stages.", note=True)
    kept = {"": "", "last": "The last epoch of each stage was kept."}
    metric = str(run.config.get("selection_metric", ""))
    told = kept.get(metric, f"Of each stage, the epoch with the best validation {metric} was kept.")
    return paragraph(
        "A thick line is the mean over folds, a thin one a fold (of more than ten, there is a band "
        "from the least to the greatest). The losses of the later stages have more terms than "
        "cross-entropy, so the first picture compares only this term. In training it is measured "
        "with dropout, and while the epoch changes the weights. Unless `protocol.speakers_apart` "
        "is set, validation speakers are also trained on: expect lower scores on test speakers. "
        f"{told}"
    ) + "".join(subheading(TITLES[stage]) + _curves(stage, each) for stage, each in stages.items())


def _curves(stage: str, history: History) -> str:
    names = dict.fromkeys(name for lines in history.values() for line in lines for name in line)
    found = {name: series(history, name) for name in names if name not in UNLISTED}
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    if not found:
        return paragraph("Its metrics hold no numbers.", note=True)
    if "train/cross_entropy" not in found and "train/loss" in found:  # the teacher's only term
        entropy = {"train/cross_entropy": found["train/loss"]}
    else:
        entropy = {}

    def panel(heading: str, lines: Mapping[str, str], label: str, **how: Any) -> list[Panel]:
        drawn = {k: (found | entropy)[name] for k, name in lines.items() if name in found | entropy}
        if "%" in label:
            drawn = {name: 100 * values for name, values in drawn.items()}
        title = f"{TITLES[stage]}: {heading.lower()} by epoch"
        svg = figures.curves(f"{stage}-{len(panels)}", title, drawn, label, **how)
        return [(heading, svg)] if drawn else []

    panels: list[Panel] = []
    panels += panel("Cross-entropy", LOSSES, "nats")
    panels += panel("Scores", SCORES, "%", limits=(0, 104))
    if entropy == {}:
        panels += panel("Terms of the training loss", TERMS, "value", log=True)
    last = figures.thinned(max(values.shape[1] for values in found.values()), MOST_EPOCHS)
    rows = [
        [str(epoch + 1), *(_mean_and_range(values[:, epoch]) for values in found.values())]
        for epoch in last.tolist()
    ]
    head = ["epoch", *(name.replace("_", " ").replace("/", " ") for name in found)]
    several_folds = "; the mean over folds, and in brackets the least and the greatest"
    caption = f"{TITLES[stage]} by epoch{several_folds * (len(history) > 1)}"
    numbers = table(caption, head, rows, tall=True)
    return figure(panels, f"{TITLES[stage]}: {several(len(history), 'fold')}.", numbers)


def curriculum(run: Run) -> str:
    """Tasks over time, the reward, and S' against T'."""
    history = run.history["curriculum"]
    if not history:
        return paragraph("The run has no curriculum stage.", note=True)
    panels, numbers = [], []
    for made in (_tasks(history), _reward(history), _duel(run)):
        if made:
            panels.append(made[0])
            numbers.append(made[1])
    chosen = "The policy chooses the task of every step."
    if run.config.get("curriculum.easy_bias"):
        chosen += " At first it prefers easy tasks (`curriculum.easy_bias`)."
    if run.config.get("curriculum.sampling") == "uniform":
        chosen = "Here tasks are drawn at random (`curriculum.sampling`), whatever the policy says."
    caption = (
        "The tasks of the steps (all folds together), the reward (thin: each fold), and test "
        "utterances, which the policy never sees."
    )
    if len(pooled(run.predictions, "label")) > figures.MOST_CLIPS:
        caption += f" Of these, {figures.MOST_CLIPS:,} are drawn, evenly spread over their list."
    return paragraph(
        "A task is a part of the training set; task 1 is what the meta-teacher T′ finds easiest. "
        f"{chosen} The reward is the share of reward clips to whose true class the student S′ "
        "gives a higher probability than T′ does (Eq. 13): at 0.5 neither is ahead. A surer "
        "student need not be right more often, which the last picture and its table show."
    ) + figure(panels, caption, *numbers)


def _tasks(history: History) -> tuple[Panel, str] | None:
    counts = task_counts(history)
    if counts is None:
        return None
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [f"task {k + 1}" for k in range(counts.shape[1])]
    svg = figures.task_shares("tasks", "Share of the steps of each task, by epoch", shares, names)
    rows = [
        [str(e + 1)]
        + [f"{n:,.0f} ({100 * s:.1f} %)" for n, s in zip(counts[e], shares[e], strict=True)]
        for e in figures.thinned(len(counts), MOST_EPOCHS).tolist()
    ]
    told = table("Steps of each task, of all folds", ["epoch", *names], rows, tall=True)
    return ("Tasks over time", svg), told


def _reward(history: History) -> tuple[Panel, str] | None:
    reward = series(history, "train/reward")
    if not np.isfinite(reward).any():
        return None
    svg = figures.curves("reward", "Mean reward by epoch", {"": reward}, "reward", (0, 1))
    rows = [
        [str(e + 1), *map(number, reward[:, e])]
        for e in figures.thinned(reward.shape[1], MOST_EPOCHS).tolist()
    ]
    head = ["epoch", *(f"fold {fold}" for fold in history)]
    return ("Reward", svg), table("Mean reward of each epoch", head, rows, tall=True)


def _duel(run: Run) -> tuple[Panel, str] | None:
    both = "meta_teacher", "updated_student"
    if not {*both} <= {*run.probable}:
        return None
    p_t, p_s = (diagnostics.true_class_probability(run.predictions, row) for row in both)
    label = pooled(run.predictions, "label")
    t, s = (run.predicted(row) == label for row in both)
    title = "Probability of the true class of each test utterance, by S′ and by T′"
    svg = figures.duel("duel", title, p_t, p_s)
    masks = {
        "S′ gives the true class a higher probability": p_s > p_t,
        "both right": t & s,
        "only S′ right": s & ~t,
        "only T′ right": t & ~s,
        "neither right": ~t & ~s,
    }
    rows = [[name, f"{m.sum():,}", f"{100 * m.mean():.1f}"] for name, m in masks.items()]
    head = ["S′ against T′", "utterances", "%"]
    caption = (
        f"Test utterances; the mean p of the true class is {number(p_s.mean())} by S′ and "
        f"{number(p_t.mean())} by T′"
    )
    return ("S′ against T′", svg), table(caption, head, rows)


def costs(run: Run) -> str:
    """Parameters and times, with the encoder that the student needs."""
    made = [_parameters(run), _real_time(run), _training_time(run)]
    return "".join(made) or paragraph("The workdir tells no costs.", note=True)


def _parameters(run: Run) -> str:
    params = run.costs.get("params") or run.params
    if not params:
        return ""
    cited = {k: each[run.corpus] for k, each in paper.PARAMETERS.items() if run.corpus in each}
    papers, none = {name: [f"{m:.2f}"] for name, m in cited.items()}, ["–"] * bool(cited)
    counts = {name: n for name, n in params.items() if name != "teacher" or "teacher" in run.rows}
    encoder = counts.pop("encoder", None)
    if encoder:
        counts |= {"encoder of the student’s features": encoder}
        student = counts.get("deployed", counts["student"])
        counts |= {"deployed student and its encoder": student + encoder}
    rows = [
        [name, f"{n:,}", f"{n / 2**20:.2f}", *papers.get(name, none), f"{4 * n / 1e6:,.1f}"]
        for name, n in counts.items()
    ]
    head = ["model", "parameters", "M (2²⁰)", *["paper’s M"] * bool(cited), "MB in float32"]
    told = (
        "The paper counts “the parameters used after feature extraction”. A device also needs the "
        "encoder that makes the student’s features, so it is counted here."
    )
    if encoder is None:
        told += " This run has not measured it."
    if encoder == 0:
        told += " This student needs no encoder."
    told += " What an exported file takes depends on its format (`docs/export.md`)."
    return paragraph(told) + table("Parameters", head, rows, numbered=True)


def _real_time(run: Run) -> str:
    seconds = run.costs.get("seconds")
    if not seconds:
        return ""
    encoder = run.costs.get("params", {}).get("encoder")
    names = {"frontend": "front-end, with its encoder" if encoder else "front-end"}
    named = {names.get(name, name): value for name, value in seconds.items()}
    svg = figures.stacked_bars(
        "time",
        "Time to classify a second of audio",
        ["a second of audio"],
        {name: [1000 * value] for name, value in named.items()},
        "milliseconds",
    )
    rows = [
        [name, f"{x:.2g}", f"{1 / x:,.0f}" if x else "–"]
        for name, x in [*named.items(), ("both", sum(named.values()))]
    ]
    head = ["part", "real-time factor", "times faster than real time"]
    numbers = table("Seconds of computing for a second of audio", head, rows)
    device = run.costs.get("device", "an unnamed device")
    caption = (
        f"Time to classify a second of audio, one recording at a time (device: {device}): the "
        "least of three measurements, on a machine that may have been busy."
    )
    return figure([("", svg)], caption, numbers)


def _training_time(run: Run) -> str:
    rows = []
    for stage, history in run.history.items():
        lines = [line for each in history.values() for line in each]
        seconds, rates = (
            [line[name] for line in lines if isinstance(line.get(name), int | float)]
            for name in ("seconds", "steps_per_second")
        )
        if seconds and rates:
            total, rate = f"{sum(seconds) / 60:.1f}", f"{np.median(rates):.2f}"
            rows.append([stage, f"{len(history)}", f"{len(lines)}", total, rate])
    head = ["stage", "folds", "epochs of all", "minutes of all", "steps per second"]
    return table("Training time, with validation", head, rows, numbered=True) if rows else ""


def data(run: Run) -> str:
    """Counts, skipped and suspicious files, and the sizes of the parts."""
    unknown = "What was noticed about the data is written at the end of a run."
    told = markdown(run.data) if run.data else paragraph(unknown, note=True)
    head = ["fold", *PARTS, "held out"]
    rows = [
        [fold, *(_size(parts.get(part)) for part in PARTS), str(parts.get("held_out", ""))]
        for fold, parts in run.splits.items()
        if isinstance(parts, dict)
    ]
    if not rows:
        return told
    return (
        told
        + paragraph(
            "The quiz part teaches the meta-teacher and the reward part the policy; no student is "
            "trained on either. The validation part picks an epoch, where one is picked."
        )
        + table("Utterances in the parts of each fold", head, rows, numbered=True)
    )


def _size(ids: Sequence | None) -> str:
    return f"{len(ids):,}" if isinstance(ids, list) else "–"


def provenance(run: Run) -> str:
    """Starts, versions and settings."""
    made = []
    rows = [
        [
            str(start.get("time", "–")).replace("T", " ").replace("+00:00", " UTC"),
            str(start.get("command", "–")),
            str(start.get("revision") or "unknown"),
            _machine(start),
        ]
        for start in run.starts
    ]
    if rows:
        head = ["time", "command", "revision", "machine"]
        made.append(table("Starts of this run", head, rows, numbered=True, names=4))
        last = run.starts[-1]
        versions = {"python": last.get("python", "–"), **last.get("versions", {})}
        body = [[name, str(version)] for name, version in versions.items()]
        told = table("Versions at the last start", ["package", "version"], body, names=2)
        made.append(details("Versions", told))
    else:
        made.append(paragraph("The workdir does not say how the run was started.", note=True))
    if run.config:
        body = [[name, setting(value)] for name, value in sorted(run.config.items())]
        told = table("Settings of the run", ["setting", "value"], body, names=2)
        made.append(details("Settings", told))
    return "".join(made)


def _machine(start: dict[str, Any]) -> str:
    count, kind = start.get("devices") or ("?", "?")
    processes = several(start.get("processes", 1), "process")
    return f"{count} × {kind}, {start.get('dtype', '?')}, {processes}; {start.get('machine', '?')}"


def _mean_and_range(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    mean = f"{known.mean():.4g}"
    return f"{mean} ({known.min():.4g} to {known.max():.4g})" if len(values) > 1 else mean
