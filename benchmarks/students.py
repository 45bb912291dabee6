"""Which student generalises: readout, norm, time pooling, standardisation, inverted or not.

    python -m benchmarks.students --features=FOLDER --corpus=emodb --data_dir=DIR --out=FILE.jsonl

With `--study=training` it compares ways to train: rate, warm-up, decay, steps, batch and dropout;
with `--study=variates`, learned variates and deviations with the features themselves.

`FOLDER` holds feature records; `--corpus` or `--manifest` gives their labels and speakers, as for
`benchmarks.linear_probe`. The speakers are divided into five parts. Run k, with seed k, tests on
part k, validates on the next and trains a small student on the others by cross-entropy only, so the
validation and test figures are for unheard speakers. Each kind of student has a line in
`FILE.jsonl` and is not run again. The table at the end has 95 % t intervals over the runs and
includes the linear probe, trained on the same parts.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from scipy import stats

from benchmarks import linear_probe
from serkd_jax import losses
from serkd_jax.data.examples import stream_rows
from serkd_jax.errors import UserError
from serkd_jax.models.students.inverted import InvertedStudent
from serkd_jax.results.metrics import classification_metrics
from serkd_jax.results.probe import decide, pool
from serkd_jax.stages.augmentation import example_keys
from serkd_jax.stages.base import make_optimizer
from serkd_jax.stages.standardization import (
    Statistics,
    measure_statistics,
    no_statistics,
    standardize,
)

SPEAKER_PARTS, BATCH = 5, 32  # BATCH is for evaluation
PARTS = ("train", "validation", "test")
STUDENT = {
    "inverted": True,
    "readout": "flatten",
    "norm": "pre",
    "variates": 0,
    "time_pooling": 10,
    "deviations": False,
    "width": 32,
    "mlp_dim": 64,
    "num_heads": 1,
    "num_layers": 2,
    "dropout": 0.2,
    "classifier_dims": (128,),
    "projection_dims": (),
}
TRAINING = {
    "standardize": True,
    "learning_rate": 1e-3,
    "name": "adamw",
    "beta1": 0.9,
    "beta2": 0.999,
    "warmup": 0.1,
    "schedule": "cosine",
    "first_cycle": 0.0,
    "final": 0.0,
    "weight_decay": 0.1,
    "decayed": "kernels",
    "clip_norm": 1.0,
    "batch_size": 32,
    "steps": 200,
}


@dataclass(frozen=True)
class Corpus:
    """All utterances, in memory."""

    features: np.ndarray  # (n, T, N) float16, zero-padded
    length: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32
    speakers: np.ndarray  # (n,) str
    num_runs: int

    def runs(self) -> Iterator[dict[str, np.ndarray]]:
        """The rows of each run's parts."""
        names = np.random.default_rng(0).permutation(np.unique(self.speakers))
        groups = np.array_split(names, SPEAKER_PARTS)
        for k in range(self.num_runs):
            test, validation = groups[k], groups[(k + 1) % SPEAKER_PARTS]
            rest = np.setdiff1d(names, [*test, *validation])
            yield {
                part: np.flatnonzero(np.isin(self.speakers, who))
                for part, who in zip(PARTS, (rest, validation, test), strict=True)
            }


def main() -> None:
    """Runs the kinds that are not in the file yet, and prints the table."""
    options = parse_options()
    try:
        corpus = read_corpus(options)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    kinds = list(STUDIES[options.study]())
    if options.only:
        kinds = [json.loads(options.only)]
        if unknown := kinds[0].keys() - (STUDENT | TRAINING).keys():
            known = ", ".join(STUDENT | TRAINING)
            raise SystemExit(f"error: --only has {', '.join(unknown)}: use {known}")
    done = {}
    if options.out.exists():
        done = {row["kind"]: row for row in map(json.loads, options.out.open())}
    for kind in kinds:
        name = json.dumps(kind, sort_keys=True)
        if name not in done:
            start = time.monotonic()
            done[name] = {"kind": name, "ua": study(corpus, kind)}
            done[name]["seconds"] = time.monotonic() - start
            with options.out.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    print(table(kinds, [done[json.dumps(kind, sort_keys=True)]["ua"] for kind in kinds], corpus))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = linear_probe.corpus_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, appended to")
    parser.add_argument("--stride", type=int, default=8, help="take every K-th feature")
    parser.add_argument("--max_frames", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3, help="2 to 5")
    parser.add_argument("--study", choices=STUDIES, default="readout")
    parser.add_argument(
        "--only", default="", help="one kind, as JSON: what differs from STUDENT and TRAINING"
    )
    return parser.parse_args()


def read_corpus(options: argparse.Namespace) -> Corpus:
    """Reads every ``stride``-th feature, cut or padded to ``max_frames``.

    Raises:
        UserError: there are fewer speakers than parts, or too few or too many runs.
    """
    if not 2 <= options.runs <= SPEAKER_PARTS:
        raise UserError(f"--runs is {options.runs}: use 2 to {SPEAKER_PARTS}")
    listed = linear_probe.list_utterances(options.corpus, options.manifest, options.data_dir)
    rows = sorted(linear_probe.read_labelled(options.features, listed), key=lambda row: row[0])
    frames = options.max_frames
    features = np.zeros((len(rows), frames, rows[0][1][:, :: options.stride].shape[1]), np.float16)
    for place, (_, values, _, _) in zip(features, rows, strict=True):
        place[: len(values)] = values[:frames, :: options.stride]
    length = np.array([min(len(values), frames) for _, values, _, _ in rows], np.int32)
    labels = np.unique([label for _, _, label, _ in rows], return_inverse=True)[1]
    speakers = np.array([row[3] for row in rows])
    if len(np.unique(speakers)) < SPEAKER_PARTS:
        raise UserError(
            f"{options.features} has {len(np.unique(speakers))} speakers: the study needs "
            f"{SPEAKER_PARTS} or more, to train, validate and test on different ones"
        )
    return Corpus(features, length, labels.astype(np.int32), speakers, options.runs)


def readouts() -> Iterator[dict[str, Any]]:
    """All combinations of the settings of the readout study."""
    for pooling, standard, norm in itertools.product((10, 1), (True, False), ("pre", "post")):
        for inverted, readout in (
            (True, "tokens"),
            (True, "variates"),
            (True, "flatten"),
            (False, "tokens"),
        ):
            yield {
                "inverted": inverted,
                "readout": readout,
                "norm": norm,
                "time_pooling": pooling,
                "standardize": standard,
            }


def trainings() -> Iterator[dict[str, Any]]:
    """The settings of the training study, one changed at a time."""
    yield {}
    for key, values in {
        "learning_rate": (3e-4, 3e-3),
        "warmup": (0.0,),
        "schedule": ("constant",),
        "weight_decay": (0.0, 0.01, 1.0),
        "decayed": ("all",),
        "batch_size": (16, 64),
        "steps": (100, 600),
        "dropout": (0.0, 0.4),
    }.items():
        yield from ({key: value} for value in values)


def variates() -> Iterator[dict[str, Any]]:
    """The student of the recipes' `:whisper`, its predecessor, and what lies between them."""
    preset = {"variates": 64, "time_pooling": 0, "deviations": True, "num_layers": 1}
    for changes in (
        {},
        {"variates": 32},
        {"variates": 128},
        {"deviations": False},
        {"time_pooling": 25},
        {"num_layers": 2},
        {"variates": 0},
        {"variates": 0, "time_pooling": 25, "deviations": False, "num_layers": 2},
    ):
        yield preset | changes | {"width": 16, "steps": 300}


STUDIES = {"readout": readouts, "training": trainings, "variates": variates}


def study(corpus: Corpus, kind: dict[str, Any]) -> dict[str, list]:
    """UA of each part in each run."""
    settings = ConfigDict(STUDENT | TRAINING)
    settings.update(kind)  # this refuses a value of another type
    student = InvertedStudent(
        int(corpus.labels.max()) + 1, **{key: settings[key] for key in STUDENT}
    )
    train = make_training(student, corpus, settings)
    scores: dict[str, list] = {part: [] for part in PARTS}
    for seed, rows in enumerate(corpus.runs()):
        statistics = no_statistics(corpus.features.shape[2])
        if settings.standardize:
            statistics = statistics_of(corpus, rows["train"])
        order = stream_rows(rows["train"], settings.batch_size, range(settings.steps), [seed])
        logits = np.asarray(train(jax.random.key(seed), order, statistics))
        for part, values in scores.items():
            values.append(ua(corpus.labels[rows[part]], logits[rows[part]].argmax(-1)))
    return scores


def statistics_of(corpus: Corpus, rows: np.ndarray) -> Statistics:
    """The statistics of the features in the training part."""
    member = np.zeros((1, len(corpus.labels)), bool)
    member[0, rows] = True
    everything = np.arange(len(corpus.labels)), corpus.features, corpus.length
    return measure_statistics([everything], member)[0]


def make_training(student: InvertedStudent, corpus: Corpus, settings: ConfigDict) -> Callable:
    """(key, (steps, B) rows, statistics) -> (n, C) logits of all utterances after training."""
    optimizer = make_optimizer(settings, settings.learning_rate, settings.steps)
    features, length, labels = map(jnp.asarray, (corpus.features, corpus.length, corpus.labels))

    @jax.jit
    def train(key: jax.Array, order: jax.Array, statistics: Statistics) -> jax.Array:
        def apply(params: Any, rows: jax.Array, keys: jax.Array | None = None) -> jax.Array:
            inputs = standardize(features[rows], length[rows], statistics)
            return student.apply({"params": params}, inputs, length[rows], keys).logits

        def step(carry: tuple, rows_and_step: tuple) -> tuple:
            params, state = carry
            rows, number = rows_and_step
            keys = example_keys(jax.random.fold_in(key, number), rows)
            grads = jax.grad(lambda p: losses.cross_entropy(apply(p, rows, keys), labels[rows]))
            updates, state = optimizer.update(grads(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = student.init(key, features[:1].astype(jnp.float32), length[:1])["params"]
        steps = order, jnp.arange(len(order))
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), steps)
        missing = -len(labels) % BATCH
        batches = jnp.pad(jnp.arange(len(labels)), (0, missing)).reshape(-1, BATCH)
        logits = jax.lax.map(lambda rows: apply(params, rows), batches)
        return logits.reshape(-1, logits.shape[-1])[: len(labels)]

    return train


def ua(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Unweighted accuracy."""
    return classification_metrics(labels, predicted, int(max(labels.max(), predicted.max())) + 1)[
        "ua"
    ]


def probe(corpus: Corpus) -> dict[str, list]:
    """UA of the linear SVM on mean and deviation of the same features, with the same parts."""
    vectors = np.stack([pool(x[:n]) for x, n in zip(corpus.features, corpus.length, strict=True)])
    scores: dict[str, list] = {part: [] for part in PARTS}
    for rows in corpus.runs():
        for part, values in scores.items():
            decided = decide(vectors, corpus.labels, rows["train"], rows[part])
            values.append(ua(corpus.labels[rows[part]], decided.argmax(-1)))
    return scores


def table(kinds: list[dict[str, Any]], scores: list[dict[str, list]], corpus: Corpus) -> str:
    """A Markdown table of what distinguishes each kind, and its scores."""
    columns = list(kinds[0]) or ["changed"]
    lines = [[*columns, *(f"{part} UA" for part in PARTS)], ["---"] * (len(columns) + len(PARTS))]
    for kind, ua_of_parts in zip(kinds, scores, strict=True):
        cells = [str(value) for value in kind.values()]
        if not kinds[0]:
            cells = [", ".join(f"{key} {value}" for key, value in kind.items()) or "nothing"]
        lines.append([*cells, *map(interval, ua_of_parts.values())])
    cells = ["linear probe", *[""] * (len(columns) - 1)]
    lines.append([*cells, *map(interval, probe(corpus).values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t interval, in %."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    main()
