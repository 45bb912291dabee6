"""Shared by the benchmarks of training steps: the paper's sizes, random data, the programs."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import common
from serkd_jax.data.examples import Examples
from serkd_jax.programs import Programs
from serkd_jax.stages.curriculum import CurriculumStage
from serkd_jax.stages.distill import DistillStage, DistillState
from serkd_jax.stages.standardization import no_statistics
from serkd_jax.stages.student import StudentStage

CLASSES = 4  # of IEMOCAP
# Forward passes of the student over a batch, where a backward pass counts as two: the momentum
# encoder's keys (1) and the student's forward and backward (3). The meta step adds the pilot's
# backward (2), the quiz (3) and the tangent of the student's outputs along its gradient (2, since
# inputs and weights both move); the curriculum adds the quiz's forward.
PASSES = {"student": 4, "kd": 4, "meta": 11, "curriculum": 5, "evaluation": 1}

SIZE = flags.DEFINE_enum("size", "paper", ["paper", "tiny"], "Size of models and features.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "0 means 4 on a CPU, the paper's 32 elsewhere.")
SECONDS = flags.DEFINE_float("seconds", 30, "How long each measurement repeats, at least 3 times.")
JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def make_config() -> tuple[ConfigDict, int]:
    """The recipe for IEMOCAP in the size given by the flags, and the features' width N."""
    config, variates = common.paper("iemocap"), 1024
    config.batch_size = BATCH_SIZE.value or (4 if jax.default_backend() == "cpu" else 32)
    if SIZE.value == "tiny":
        config.max_frames, variates = 12, 6
        config.teacher.projector = variates  # equal in the paper's size too
        config.student.update({"width": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1})
    return config, variates


def layer_products(tokens: int, width: int, mlp_dim: int) -> float:
    """Multiplications of one encoder layer on one example."""
    return tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width


def student_operations(config: ConfigDict, variates: int) -> float:
    """Operations of the student's forward pass on one example; a multiply-add counts as two."""
    s = config.student
    embed = variates * config.max_frames * s.width
    return 2.0 * (embed + s.num_layers * layer_products(variates, s.width, s.mlp_dim))


def describe(config: ConfigDict, **more: str | int) -> dict[str, str | int]:
    """Returns and prints what the figures were measured on."""
    about = describe_machine() | {"size": SIZE.value, "batch size": config.batch_size, **more}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    return about


def describe_machine() -> dict[str, str | int]:
    """Device, CPU, versions and XLA's flags."""
    about: dict[str, str | int] = {"device": jax.devices()[0].device_kind, "CPU": cpu_name()}
    about |= {"cores": os.cpu_count() or 0, "python": platform.python_version()}
    about |= {name: metadata.version(name) for name in ("jax", "torch", "transformers")}
    return about | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "none")}


def cpu_name() -> str:
    """The CPU's name from the kernel, with family and model, which say more than some names."""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line]
    said = {name.strip(): value.strip() for name, value in reversed(lines)}
    name = said.get("model name", platform.machine())
    known = [key for key in ("cpu family", "model") if key in said]
    return " ".join([name, *(f"{key.removeprefix('cpu ')} {said[key]}" for key in known)])


def make_programs(
    config: ConfigDict, order: str, variates: int, device: jax.Device | None = None
) -> Programs:
    """The programs of one order of the meta-gradient, for one device."""
    config = config.copy_and_resolve_references()
    config.meta.order = order
    shape = (config.max_frames, variates)
    return Programs(config, CLASSES, shape, variates, 1, [device or jax.devices()[0]])


def init_distill(programs: Programs, variates: int) -> DistillState:
    """The state before distillation, with a new T'."""
    hidden = jnp.zeros((1, programs.teacher_hidden))
    classifier = programs.classifier.init(jax.random.key(0), hidden)["params"]
    statistics = no_statistics(variates)
    return programs.stage(DistillStage).init(jax.random.key(1), statistics, classifier)


def make_batch(config: ConfigDict, variates: int, seed: int) -> dict[str, np.ndarray]:
    """Random examples of all lengths."""
    rng, size, frames = np.random.default_rng(seed), config.batch_size, config.max_frames
    length = rng.integers(frames // 4, frames + 1, size).astype(np.int32)
    valid = np.arange(frames) < length[:, None]
    return {
        "inputs": (rng.normal(size=(size, frames, variates)) * valid[..., None]).astype(np.float16),
        "length": length,
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
        "teacher_hidden": rng.normal(size=(size, config.teacher.projector)).astype(np.float32),
    }


def make_examples(*batches: dict[str, np.ndarray], device: jax.Device | None = None) -> Examples:
    """The concatenated batches, on one device."""
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Examples({}, [device or jax.devices()[0]]).with_columns(**columns)


def make_steps(
    config: ConfigDict, variates: int, order: str, examples: Examples
) -> tuple[Programs, dict[str, tuple[Callable, Any, Any]]]:
    """The programs without a meta-gradient, and for each step (steps, state, one step's rows).

    The examples are two batches: one to train on and one for the quiz.
    """
    device = examples.devices[0]
    plain, meta = (make_programs(config, each, variates, device) for each in ("none", order))
    statistics = no_statistics(variates)
    student = plain.stage(StudentStage).init(jax.random.key(1), statistics)
    distilled = init_distill(plain, variates)
    updated = plain.stage(CurriculumStage).init(jax.random.key(2), distilled)
    train, quiz = np.split(np.arange(len(examples.columns["index"])), 2)
    tasks = np.stack([train] * plain.policy.num_tasks)
    return plain, {
        "student": (plain.steps(StudentStage), student, train),
        "kd": (plain.steps(DistillStage), distilled, {"train": train, "quiz": quiz}),
        "meta": (meta.steps(DistillStage), distilled, {"train": train, "quiz": quiz}),
        "curriculum": (plain.steps(CurriculumStage), updated, {"train": tasks, "quiz": quiz}),
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table made of cells that are ready to print."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cells(formats: Sequence[str], row: Mapping[str, object]) -> list[str]:
    """The values of a row, each in its format."""
    return [form.format(value) for form, value in zip(formats, row.values(), strict=True)]


def by_turns(cases: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each case; the cases take turns, so that other load on the machine affects all.

    Args:
        cases: what to time, by name; each blocks until it is done and has already run once.
        seconds: total time to measure for; at least three rounds are made.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    rounds = 0
    while rounds < 3 or sum(map(sum, times.values())) < seconds:
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times
