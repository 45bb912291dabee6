"""The model card: `README.md` of an exported folder, with front matter for the hub."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from huggingface_hub import EvalResult, ModelCardData

from serkd_jax.audio.logmel import FRAME_RATE
from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.data.tables import markdown_cell
from serkd_jax.deploy.backends import make_student
from serkd_jax.deploy.folder import FILES
from serkd_jax.deploy.trained import Trained
from serkd_jax.results.intervals import bootstrap
from serkd_jax.results.predictions import Predictions, score

METRICS = {"ua": "UA", "wa": "WA", "wf1": "weighted F1"}


class Checked(NamedTuple):
    """How a format compares with the float32 student in Flax on the test utterances."""

    form: str  # the format; or `run`, for the logits that the run has saved
    difference: float  # the greatest difference of a logit from that student's
    agreement: float  # share of utterances with the same label as that student's
    ua: float


class Scores(NamedTuple):
    """Scores on the test utterances of one fold or of all folds."""

    title: str
    n: int
    values: dict[str, tuple[float, float, float]]  # metric -> value and interval


class Told(NamedTuple):
    """What only the user knows; whatever is empty is said as far as the run tells it."""

    name: str = ""  # of the model
    data: str = ""  # what the corpus is, as in "trained on ..."
    license: str = ""  # of the weights, as the hub abbreviates it
    terms: str = ""  # sentences about the licence


UNTOLD = Told()


def write_card(
    trained: Trained, folder: Path, checked: Sequence[Checked], told: Told = UNTOLD
) -> str:
    """Returns the text of the card for the files in `folder`."""
    labels, config = trained.config.labels, trained.config
    corpus, row = told.data or trained.results["corpus"], trained.row.replace("_", " ")
    scores = _scores(trained)
    name = told.name or f"serkd-{trained.results['corpus']}-{config.frontend['name']}"
    front_matter = ModelCardData(
        library_name="serkd-jax",
        license=told.license or "other",
        license_name=None if told.license else f"terms-of-{trained.results['corpus']}",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", "knowledge-distillation", "jax", *_runtimes(folder)],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="audio-classification",
                dataset_type=trained.results["corpus"],
                dataset_name=f"{corpus}, test part of fold {trained.fold}",
                metric_type={"ua": "recall", "wa": "accuracy", "wf1": "f1"}[metric],
                metric_name=METRICS[metric],
                metric_value=round(100 * value, 2),
            )
            for metric, (value, _, _) in scores[0].values.items()
        ],
    )
    size = sum(x.size for x in jax.tree.leaves(trained.variables.params))
    about = _paragraph(
        f"The {row} of fold {trained.fold} of a run of serkd-jax on {corpus}: {_kind(trained)}, "
        f"{size:,} parameters. Audio at 16 kHz goes through {_frontend(trained)}, in windows of at "
        f"most {config.max_frames / FRAME_RATE:g} s, to {len(labels)} classes: "
        f"{', '.join(map(markdown_cell, labels))}."
    )
    use = _paragraph(
        "For research on speech emotion recognition and distillation, and for prototypes whose "
        "users know about it. The labels are what annotators heard, or actors were asked to play, "
        f"in {corpus}; another language, microphone, age or way of speaking can give any label. "
        "The model was not tested on these, nor for equal error rates across groups of people."
    )
    run = trained.results["config"]
    protocol = _paragraph(
        f"Trained on {corpus}; folds by {run['protocol']['split_by']}, "
        f"{len(trained.results['folds'])} of them, seed {run['seed']}. {_selection(trained)} The "
        "test part of a fold was scored once, only by the model of that fold."
    )
    return f"""---
{front_matter.to_yaml()}
---

# {name}: a small speech emotion model

{about}

```python
from serkd_jax.predict import load_model

model = load_model("{folder.resolve().name}")  # this folder, or its name on the hub
print(model("speech.wav").label)
```

## Data and protocol

{protocol}

| test utterances | n | {" | ".join(METRICS.values())} |
|---|---|---|---|---|
{_score_rows(scores)}

In %, with 95 % intervals of a bootstrap over utterances. Utterances of one speaker are alike, so
expect other speakers to differ by more. Chance UA is {100 / len(labels):.1f} %.

## Files

{_format_rows(folder, checked)}

## Use

{use}

A voice does not show what a person feels. Do not use this to judge people in hiring, school,
policing, health, credit or insurance. In the European Union, inferring emotions at work and in
education is forbidden (Regulation 2024/1689, Article 5), and elsewhere people must be told of it
(Article 50). Recordings of voices are personal data.

## Licence

{_paragraph(_licence(trained, corpus, told))}
"""


def _licence(trained: Trained, corpus: str, told: Told) -> str:
    source = f"The code is Apache-2.0. The weights come from {corpus}{_weights_of(trained)}, whose "
    if told.license:
        return f"{source}terms apply; they are licensed under {told.license}. {told.terms}"
    advice = "read them before you pass the weights on, and name the licence that fits above"
    return f"{source}terms apply; {advice}. {told.terms}"


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100)


def _runtimes(folder: Path) -> list[str]:
    return sorted({form.split("-")[0] for form, file in FILES.items() if (folder / file).exists()})


def _frontend(trained: Trained) -> str:
    frontend = trained.config.frontend
    if spectral := SPECTRAL.get(frontend["name"]):
        return f"{frontend[spectral.size]} {spectral.words}"
    told = f"{_layers(frontend['layer'])} of {_encoder(frontend)}"
    if beside := SPECTRAL.get(frontend.get("beside", "")):
        return f"{beside.words}, and {told}"
    return told


def _layers(layer: int | Sequence[int]) -> str:
    if layer == -1:
        return "the last layer"
    if isinstance(layer, int):
        return f"layer {layer}"
    return f"the mean of layers {', '.join(map(str, layer))}"


def _encoder(frontend: Mapping) -> str:
    return frontend["model"] or f"the {frontend['name']} encoder in `frontend/`"


def _weights_of(trained: Trained) -> str:
    frontend = trained.config.frontend
    return "" if frontend["name"] in SPECTRAL else f" and {_encoder(frontend)}"


def _kind(trained: Trained) -> str:
    taught = "" if trained.row == "student" else " taught by a larger model"
    return f"{make_student(trained.config).description}{taught}"


def _selection(trained: Trained) -> str:
    metric = trained.results["config"]["selection_metric"]
    if metric == "last":
        return "The last epoch was taken."
    return f"The epoch of the best {METRICS[metric]} on part of the training data was taken."


def _scores(trained: Trained) -> list[Scores]:
    """Scores the fold's own model and, if there are several folds, all their models together."""
    names = ("ids", "label", trained.row)
    every = {
        fold: {name: arrays[name] for name in names}
        for fold, arrays in trained.predictions.items()
        if trained.row in arrays
    }
    sets = {f"fold {trained.fold}, this model": {trained.fold: every[trained.fold]}}
    if len(every) > 1:
        sets[f"all {len(every)} folds, a model each"] = every
    return [_score(title, predictions, trained.row) for title, predictions in sets.items()]


def _score(title: str, predictions: Predictions, row: str) -> Scores:
    scores = score(predictions)["overall"][row]
    intervals = bootstrap(predictions)[row]
    values = {metric: (scores[metric], *intervals[metric]) for metric in METRICS}
    return Scores(title, scores["n"], values)


def _score_rows(scores: Sequence[Scores]) -> str:
    rows = []
    for title, n, values in scores:
        cells = [
            f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            for value, low, high in values.values()
        ]
        rows.append(f"| {title} | {n} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _format_rows(folder: Path, checked: Sequence[Checked]) -> str:
    """Makes a table with a row for each file, and how it compares if it was checked."""
    by_form = {each.form: each for each in checked}
    lines = ["| format | file | MB |", "|---|---|---|"]
    if checked:
        lines = [
            "| format | file | MB | greatest difference of a logit | same label | UA |",
            "|---|---|---|---|---|---|",
        ]
    for form, file in FILES.items():
        if not (folder / file).exists():
            continue
        line = f"| {form} | `{file}` | {(folder / file).stat().st_size / 1e6:.2f} |"
        if each := by_form.get(form):
            line += f" {each.difference:.1e} | {100 * each.agreement:.1f} % | {100 * each.ua:.1f} |"
        lines.append(line)
    told = "The files were not run."
    if checked:
        told = _paragraph(
            "Compared with the float32 student in Flax on the fold's test utterances, whose logits "
            f"differ from those of the run by at most {by_form['run'].difference:.1e}."
        )
    return "\n".join([*lines, "", told])
