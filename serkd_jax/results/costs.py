"""What the deployed student costs, with its encoder: parameters, time, and operations."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from serkd_jax.audio.logmel import num_samples
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.sources import Frontend
from serkd_jax.distributed import parallel
from serkd_jax.files import write_json

NAME = "costs.json"
REPEATS = 3


def measure_costs(
    frontend: Frontend,
    max_frames: int,
    student: Callable[[np.ndarray, np.ndarray], Any],
    shape: tuple[int, int],
    params: dict[str, int],
) -> dict[str, Any]:
    """Measures how long one recording of `max_frames` takes, front-end and student apart.

    Args:
        frontend: the front-end of the student's features.
        max_frames: number of frames of the recording.
        student: (features (1, T, N), lengths (1,)) -> outputs.
        shape: T and N; of a student that reads dialogues, those of the longest one.
        params: parameter counts: `teacher`, `student`, and `deployed`, without its projection.

    Returns:
        `device`; `params`, with those of the front-end's `encoder`; `seconds` of `frontend` and
        `student` for each second of audio (real-time factors), the least of three times; and their
        `operations` (see `count_operations`) for each second, where a front-end without a model has
        none.
    """
    rng = np.random.default_rng(0)  # the time does not depend on what is heard
    waveform = rng.normal(0, 0.1, num_samples(max_frames)).astype(np.float32)
    features, length = np.zeros((1, *shape), np.float16), np.array(shape[:1], np.int32)

    def hear() -> None:
        for _ in frontend([waveform], max_frames):
            pass

    def classify() -> None:
        jax.block_until_ready(student(features, length))

    seconds = len(waveform) / SAMPLE_RATE
    checkpoint = getattr(frontend, "checkpoint", None)
    of_frontend = 0
    if checkpoint:
        batch = waveform[None], np.array([len(waveform)], np.int32)
        of_frontend = count_operations(frontend.encode, checkpoint.params, batch)
    of_student = count_operations(student, features, length)
    return {
        "device": jax.devices()[0].device_kind,
        "params": params | {"encoder": checkpoint.num_parameters if checkpoint else 0},
        "seconds": {
            "frontend": _least_time(hear) / seconds,
            "student": _least_time(classify) / seconds,
        },
        "operations": {"frontend": of_frontend / seconds, "student": of_student / seconds},
    }


def count_operations(function: Callable, *arguments: Any) -> int:
    """Counts the multiplications and additions of matrix products and convolutions, in loops, too.

    Compilers count the body of a loop once, and what does not contribute to the result not at all;
    this leaves out the latter as well.
    """
    traced = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count(needed)


def _count(program: Jaxpr) -> int:
    return sum(map(_count_equation, program.eqns))


def _count_equation(equation: JaxprEqn) -> int:
    settings, shapes = equation.params, [x.aval.shape for x in equation.invars]
    size = sum(math.prod(x.aval.shape) for x in equation.outvars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        return 2 * size * math.prod(shapes[0][i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        outputs = shapes[1][settings["dimension_numbers"].rhs_spec[0]]
        return 2 * size * math.prod(shapes[1]) // outputs
    if equation.primitive.name.startswith("dot_product_attention_fwd"):  # cuDNN's, tokens first
        return 2 * 2 * math.prod(shapes[0]) * shapes[1][1]
    inner = [
        value for value in settings.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    times = settings["length"] if equation.primitive.name == "scan" else 1
    return times * sum(_count(getattr(each, "jaxpr", each)) for each in inner)


def write_costs(workdir: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Writes `costs.json`, unless it is there; only the first process measures."""
    if parallel.is_first_process() and not (workdir / NAME).exists():
        write_json(workdir / NAME, measure())


def _least_time(work: Callable[[], None]) -> float:
    work()  # compiles
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
