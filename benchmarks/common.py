"""What the benchmarks of training steps share: the paper's sizes, random data, the programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import common
from serkd_jax.batches import Examples
from serkd_jax.programs import Programs
from serkd_jax.standardization import no_statistics

CLASSES = 4  # of IEMOCAP
# Forward passes of the student over a batch, where a backward pass counts twice: the momentum
# encoder's keys (1) and the student's forward and backward (3); of the meta step also the pilot's
# backward (2), the quiz (3) and the pilot's slope along its gradient (1); of the curriculum the
# quiz's forward.
PASSES = {"student": 4, "kd": 4, "meta": 10, "curriculum": 5, "evaluation": 1}

_SIZE = flags.DEFINE_enum("size", "paper", ["paper", "tiny"], "Of student and features.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "0: 4 on a CPU, the paper's 32 elsewhere.")


def make_config() -> tuple[ConfigDict, int]:
    """The recipe for IEMOCAP in the size that the flags say, and the features' width N."""
    config, variates = common.paper("iemocap"), 1024
    config.batch_size = _BATCH_SIZE.value or (4 if jax.default_backend() == "cpu" else 32)
    if _SIZE.value == "tiny":
        config.max_frames, variates = 12, 6
        config.teacher.projector = variates  # in the paper's size, too, they are alike
        config.student.update({"width": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1})
    return config, variates


def layer_products(tokens: int, width: int, mlp_dim: int) -> float:
    """Multiplications of one encoder layer on one example."""
    return tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width


def student_operations(config: ConfigDict, variates: int) -> float:
    """Of the student's forward pass on one example; a multiplication and an addition are two."""
    s = config.student
    embed = variates * config.max_frames * s.width
    return 2.0 * (embed + s.num_layers * layer_products(variates, s.width, s.mlp_dim))


def describe(config: ConfigDict, **more: str | int) -> dict[str, str | int]:
    """What the figures were measured on; printed, too."""
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "size": _SIZE.value,
        "batch size": config.batch_size,
        **more,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    return about


def make_programs(config: ConfigDict, order: str, variates: int) -> Programs:
    """The programs of one order of the meta-gradient, for one device."""
    config = config.copy_and_resolve_references()
    config.meta.order = order
    shape = (config.max_frames, variates)
    return Programs(config, CLASSES, shape, variates, 1, jax.devices()[:1])


def new_classifier(programs: Programs) -> Any:
    """Parameters of T'."""
    hidden = jnp.zeros((1, programs.teacher_hidden))
    return programs.classifier.init(jax.random.key(0), hidden)["params"]


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


def make_examples(*batches: dict[str, np.ndarray]) -> Examples:
    """Batches one after the other, on one device."""
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Examples({}, jax.devices()[:1]).with_columns(**columns)


def make_steps(
    config: ConfigDict, variates: int, order: str, examples: Examples
) -> tuple[Programs, dict[str, tuple[Callable, Any, Any]]]:
    """The programs without a meta-gradient, and each step's: (steps, state, one step's rows).

    The examples are two batches: one to train on, one for the quiz.
    """
    plain, meta = (make_programs(config, each, variates) for each in ("none", order))
    statistics = no_statistics(variates)
    student = plain.init_student(jax.random.key(1), statistics)
    distilled = plain.init_distill(jax.random.key(1), new_classifier(plain), statistics)
    updated = plain.init_curriculum(jax.random.key(2), distilled)
    train, quiz = np.split(np.arange(len(examples.columns["index"])), 2)
    tasks = np.stack([train] * plain.policy.num_tasks)
    return plain, {
        "student": (plain.student_steps, student, train),
        "kd": (plain.distill_steps, distilled, {"train": train, "quiz": quiz}),
        "meta": (meta.distill_steps, distilled, {"train": train, "quiz": quiz}),
        "curriculum": (plain.curriculum_steps, updated, {"train": tasks, "quiz": quiz}),
    }
