"""Everything that the owner of an accelerator wants to know, the most important first.

    python -m benchmarks.accelerator --minutes=10 --out=DIR

It reports in turn whether everything works; the steps against torch; the orders of the
meta-gradient with their compile times and memory; the encoders against torch; and the five-fold
IEMOCAP experiment, estimated from its measured parts and run for one fold on synthetic data of its
size. Each part is written to DIR/accelerator.md and .json as it ends, so an interrupted run keeps
its results, and a part that fails does not stop the next. Neither TensorFlow nor a download is
needed.

On a CPU the paper's sizes take hours; parts that do not fit in the given minutes are reported as
not run.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from benchmarks import cost, distill, encoders, steps
from benchmarks.common import (
    CLASSES,
    PASSES,
    SECONDS,
    SIZE,
    describe,
    make_batch,
    make_config,
    make_examples,
    make_steps,
    markdown,
    student_operations,
)
from serkd_jax.audio.logmel import num_samples
from serkd_jax.data.examples import Examples
from serkd_jax.data.reader import Table
from serkd_jax.data.splits import Fold, make_folds
from serkd_jax.distributed.parallel import replicate
from serkd_jax.encoders.frontends import LogMel
from serkd_jax.experiment import STAGES, Experiment
from serkd_jax.files import write_file, write_json
from serkd_jax.models.transformer import attend
from serkd_jax.programs import Programs

UTTERANCES, FOLDS, HOURS = 5531, 5, 7.0  # IEMOCAP, four classes
PARTS = ["works", "steps", "orders", "encoders", "experiment"]

STEPS = {"student": "student", "distill": "meta", "curriculum": "curriculum"}  # of each stage

_EPOCHS = flags.DEFINE_integer("epochs", 2, "Of each stage in the fold that is run; at least 2.")
_MINUTES = flags.DEFINE_float("minutes", 10, "How long everything may take.")
_OUT = flags.DEFINE_string("out", "accelerator", "Folder for accelerator.md and .json.")
_PARTS = flags.DEFINE_list("parts", PARTS, "Which parts to run, in this order.")


class Report:
    """The results so far, on disk."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.end = folder, time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {}
        self.texts: list[str] = []

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def add(self, name: str, title: str, result: Any, text: str) -> None:
        """Writes a part."""
        self.results[name] = result
        self.texts.append(f"## {title}\n\n{text}\n")
        print(self.texts[-1], flush=True)
        write_json(self.folder / "accelerator.json", self.results)
        write_file(self.folder / "accelerator.md", "\n".join(self.texts))


def main(argv: list[str]) -> None:
    """Runs the parts."""
    del argv
    logging.set_verbosity(logging.WARNING)
    report = Report(Path(_OUT.value), _MINUTES.value)
    config, variates = make_config()
    on_cpu = jax.default_backend() == "cpu"
    peak = steps.matmul_peak(on_cpu)
    about = describe(config, dtype="float32" if on_cpu else "bfloat16")
    about["matmul TFLOP/s"] = round(peak / 1e12, 3)
    listed = ", ".join(f"{key} {value}" for key, value in about.items())
    report.add("about", "Where this was measured", about, listed)
    parts: dict[str, tuple[str, Callable[..., tuple[Any, str]]]] = {
        "works": ("Does it work", check),
        "steps": ("Steps against torch", measure_steps),
        "orders": ("Orders of the meta-gradient", measure_orders),
        "encoders": ("Encoders against torch", measure_encoders),
        "experiment": ("The five-fold IEMOCAP experiment", measure_experiment),
    }
    for name in _PARTS.value:
        title, part = parts[name]
        if report.left() <= 0 and name != "experiment":  # which then only estimates
            report.add(name, title, {"not run": "no time"}, "Not run: the minutes are over.")
            continue
        start = time.monotonic()
        try:
            result, text = part(config, variates, peak, report)
        except Exception as error:
            result = {"failed": repr(error)}
            text = f"Failed:\n\n```\n{traceback.format_exc(limit=-6)}```"
        taken = time.monotonic() - start
        report.add(name, title, result, f"{text}\n\nThis part took {taken:.0f} s.")


# Does it work -----------------------------------------------------------------------------------


def check(
    config: ConfigDict, variates: int, peak: float, report: Report
) -> tuple[dict[str, dict[str, float]], str]:
    """Attention, two steps and the meta-gradient against float32 on this machine's CPU."""
    del peak, report
    differences = {f"attention, {name}": x for name, x in check_attention(variates).items()}
    differences |= check_steps(config, variates)
    rows = [[name, f"{value:.1e}", verdict(value)] for name, value in differences.items()]
    table = markdown(("what", "differs", "verdict"), rows)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return differences, (
        f"In {dtype}, against the plain formula in float32 on this machine's CPU: the norm of the "
        f"difference over the norm. Rounding to bfloat16 makes some percent.\n\n{table}"
    )


def verdict(difference: float) -> str:
    """The difference in words; a wrong gradient differs by about 1."""
    return "as it should be" if difference < 0.1 else "WRONG"


def check_attention(length: int) -> dict[str, float]:
    """Errors of attention here: output, gradient, tangent and gradient through the gradient."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    arrays = jax.random.normal(jax.random.key(0), (7, 2, 4, length, 64), jnp.float32)
    lengths = np.array([length, length // 3])

    def derivatives(arrays: jax.Array, form: str) -> tuple:
        *heads, gradient, query, key, value = arrays
        mask = jnp.arange(length) < lengths[:, None]
        out, pull_back = jax.vjp(lambda *heads: attend(*heads, mask, form), *heads)
        moves = query, key, value
        tangent = jax.jvp(lambda *heads: attend(*heads, mask, form), tuple(heads), moves)[1]

        def slope(gradient: jax.Array) -> jax.Array:
            pulled = pull_back(gradient)
            return sum((x * move).sum() for x, move in zip(pulled, moves, strict=True))

        return out, pull_back(gradient), tangent, jax.grad(slope)(gradient)

    run = jax.jit(derivatives, static_argnums=1)
    ours = run(arrays.astype(dtype), "auto")
    exact = run(jax.device_put(arrays, jax.devices("cpu")[0]), "plain")
    names = "output", "gradient", "tangent", "gradient through the gradient"
    return dict(zip(names, map(apart, ours, exact), strict=True))


def check_steps(config: ConfigDict, variates: int) -> dict[str, float]:
    """The gradients of a first step, read from Adam's first moments.

    Only the student's step and the nested meta step are checked, as a GPU takes most of a minute to
    compile each.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = min(config.batch_size, 4)
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    found: dict[str, dict[str, Any]] = {}
    places = {"here": jax.devices()[0], "cpu": jax.devices("cpu")[0]}
    if places["here"] == places["cpu"]:
        return {}  # it would spend minutes on comparing the CPU with itself
    for place, device in places.items():
        examples = make_examples(train, quiz, device=device)
        _, cases = make_steps(config, variates, "second_order", examples)
        for name in ("student", "meta"):
            take, state, rows = cases[name]
            data, taken = examples.take(jax.tree.map(lambda x: x[None], rows))
            held = replicate(jax.device_get(state), [device])
            after, _ = take(held, data, taken, np.int32(1), jax.random.key(3))
            moments = optax.tree_utils.tree_get(after.opt_state, "mu")
            found.setdefault(f"step: {name}", {})[place] = moments
            if name == "meta":
                moments = optax.tree_utils.tree_get(after.meta_opt_state, "mu")
                found.setdefault("meta-gradient", {})[place] = moments
    return {name: apart(both["here"], both["cpu"]) for name, both in found.items()}


def apart(ours: Any, exact: Any) -> float:
    """Norm of the difference over the norm of the exact value."""
    a, b = (ravel_pytree(jax.device_get(tree))[0].astype(np.float32) for tree in (ours, exact))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# Speed ------------------------------------------------------------------------------------------


def measure_steps(
    config: ConfigDict, variates: int, peak: float, report: Report
) -> tuple[dict[str, dict[str, float]], str]:
    """Student, plain distillation, meta step, curriculum and evaluation, by turns with torch."""
    seconds = min(SECONDS.value, report.left() / 30)
    results = steps.measure(config, variates, "second_order", peak, seconds)
    return results, markdown(steps.HEADER, steps.table(results))


def measure_orders(
    config: ConfigDict, variates: int, peak: float, report: Report
) -> tuple[dict[str, Any], str]:
    """A distillation step by the order of its meta-gradient."""
    del peak
    results = distill.measure(config, variates, min(SECONDS.value, report.left() / 20))
    text = markdown(distill.HEADER, distill.table(results))
    stats = jax.devices()[0].memory_stats() or {}
    if most := stats.get("peak_bytes_in_use"):
        text += f"\n\nThe most that was in use on the device so far: {most / 2**30:.1f} GiB."
    return {"orders": results, "peak bytes": most}, text


def measure_encoders(
    config: ConfigDict, variates: int, peak: float, report: Report
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """HuBERT-large on a batch of 10 s clips, and Whisper-base on the clips an extractor meets."""
    del config, variates
    rows: list[dict[str, Any]] = []
    tiny, seconds = SIZE.value == "tiny", min(SECONDS.value, report.left() / 30)
    cases = {"hubert-large": "a batch of", "whisper-base": "1 to 15 s"}
    for model, case in cases.items():  # for a tiny model, one shape is enough
        rows += encoders.measure(model, "one clip" if tiny else case, peak, seconds, tiny)
    return {"rows": rows}, markdown(encoders.HEADER, encoders.table(rows))


# The whole experiment ---------------------------------------------------------------------------


def measure_experiment(
    config: ConfigDict, variates: int, peak: float, report: Report
) -> tuple[dict[str, Any], str]:
    """The time of five folds, from the measured steps and from one fold that is run."""
    tiny = SIZE.value == "tiny"
    config = config.copy_and_resolve_references()
    config.batch_size = config.batch_size if tiny else 32
    utterances = 80 if tiny else UTTERANCES
    table, folds = synthetic_table(utterances, config)
    steps_per_epoch = -(-max(len(fold.train) for fold in folds) // config.batch_size)
    seconds = {
        stage: (x, "operations") for stage, x in by_operations(config, variates, peak).items()
    }
    measured = report.results.get("steps", {})
    if "student" in measured:
        for stage, name in STEPS.items():  # measured on a batch that may have been smaller
            scale = config.batch_size / report.results["about"]["batch size"]
            seconds[stage] = scale / measured[name]["steps/s"], "the steps above"
    planned = sum(x for x, _ in seconds.values()) * steps_per_epoch * _EPOCHS.value
    notes, result = [], {}
    if planned > report.left():
        notes.append(
            f"The fold was not run: {_EPOCHS.value} epochs of it take some {planned / 60:.0f} "
            f"minutes, and {max(report.left(), 0) / 60:.0f} were left."
        )
    else:
        result = run_fold(config, variates, table, folds, steps_per_epoch)
        seconds |= {stage: (row["step"], "the fold") for stage, row in result["stages"].items()}
        notes.append(
            f"One fold was run on synthetic data of that size, {_EPOCHS.value} epochs a stage, "
            f"with checkpoints and validation: {result['seconds']:.0f} s, of which "
            f"{result['compilation']:.0f} s before the first steps (compilation)."
        )
    rows, total = [], 0.0
    for stage, (step, source) in seconds.items():
        count = config[stage].epochs * steps_per_epoch * FOLDS
        between = result["stages"][stage]["between epochs"] if result else 0.0
        minutes = (count * step + config[stage].epochs * FOLDS * between) / 60
        total += minutes
        rows.append([stage, f"{step * 1e3:.4g}", source, f"{count:,}", f"{minutes:.1f}"])
    for row in report.results.get("encoders", {}).get("rows", [])[:1]:
        minutes = HOURS * 60 / row["ours s/s"]
        total += minutes
        rows.append(["features, once", "", "the encoders above", "", f"{minutes:.1f}"])
    rows.append(["all", "", "", "", f"{total:.1f}"])
    result |= {"minutes": total, "step seconds": {stage: x for stage, (x, _) in seconds.items()}}
    head = ("stage", "ms a step", "by", "steps in five folds", "minutes")
    return result, "\n\n".join([*notes, markdown(head, rows)])


def by_operations(config: ConfigDict, variates: int, peak: float) -> dict[str, float]:
    """Seconds of each stage's step at half the rate of a large matrix product."""
    front, layers = cost.teacher_operations(config.max_frames)
    student = student_operations(config, variates)
    operations = {stage: PASSES[name] * student for stage, name in STEPS.items()}
    operations = {"teacher": front + 3 * layers, **operations}
    return {stage: config.batch_size * x / (0.5 * peak) for stage, x in operations.items()}


def synthetic_table(utterances: int, config: ConfigDict) -> tuple[Table, list[Fold]]:
    """Utterances of five sessions, and folds that hold out each session in turn."""
    rng, none = np.random.default_rng(0), np.full(utterances, "")
    sessions = np.array([f"{row % FOLDS + 1}" for row in range(utterances)])
    table = Table(
        ids=np.array([f"{row:06d}" for row in range(utterances)]),
        labels=rng.integers(0, CLASSES, utterances).astype(np.int32),
        class_names=tuple(f"class {k}" for k in range(CLASSES)),
        speakers=sessions,
        sessions=sessions,
        splits=none,
        folds=none,
        num_samples=np.full(utterances, num_samples(config.max_frames), np.int32),
        skipped=[],
    )
    config.protocol.split_by = "session"
    return table, make_folds(table.labels, table.columns(), config.protocol)


def run_fold(
    config: ConfigDict, variates: int, table: Table, folds: list[Fold], steps_per_epoch: int
) -> dict[str, Any]:
    """Seconds of all four stages of one fold, through `Experiment`, on random features and audio.

    The teacher is a HuBERT-large with random weights that hears waveforms, like the paper's.
    """
    config = config.copy_and_resolve_references()
    for stage in (kind.name for kind in STAGES):
        config[stage].epochs = _EPOCHS.value
    with tempfile.TemporaryDirectory() as folder:
        model = encoders.make_model("hubert-large", SIZE.value == "tiny")
        model.save_pretrained(f"{folder}/hubert")
        config.teacher.update({"model": f"{folder}/hubert", "projector": variates})
        shape, devices = (config.max_frames, variates), jax.devices()[:1]
        programs = Programs(config, CLASSES, shape, variates, steps_per_epoch, devices)

        def examples(inputs: np.ndarray, length: int) -> Examples:
            rows = np.arange(len(table)) % len(inputs)
            columns = {"inputs": inputs[rows], "length": np.full(len(table), length, np.int32)}
            columns |= {"label": table.labels, "index": np.arange(len(table), dtype=np.int32)}
            return Examples({}, devices).with_columns(**columns)

        rng, samples = np.random.default_rng(0), num_samples(config.max_frames)
        features = examples(rng.normal(size=(64, *shape)).astype(np.float16), config.max_frames)
        audio = examples(rng.integers(-9999, 9999, (64, samples)).astype(np.int16), samples)
        data = programs, table, folds, features, features, audio, LogMel(variates)
        run = Experiment(config, Path(folder) / "run", *data)
        start = time.monotonic()
        run.run_fold(folds[0])
        taken, stages = time.monotonic() - start, {}
        for stage in (kind.name for kind in STAGES):
            log = (run.workdir / "fold_1" / stage / "metrics.jsonl").read_text().splitlines()
            first, *_, last = map(json.loads, log)
            step = 1 / last["steps_per_second"]
            stages[stage] = {
                "step": step,
                "between epochs": last["seconds"] - step * steps_per_epoch,
                "compilation": steps_per_epoch * (1 / first["steps_per_second"] - step),
            }
    compilation = sum(row["compilation"] for row in stages.values())
    return {"seconds": taken, "compilation": compilation, "stages": stages}


if __name__ == "__main__":
    app.run(main)
