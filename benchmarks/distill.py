"""A distillation step by the order of its meta-gradient: time, memory and operations.

    python -m benchmarks.distill

It is the step of the pipeline at the paper's sizes (326 frames of 1024 features, 4 classes), on
random data and one device. The orders of `meta.order` take steps by turns, so that what else the
machine does hits all alike. Memory is what the compiler sets aside for a step beside its
arguments; operations are as it counts them. The last column is how far the meta-gradient of a
first step, read off Adam's first moment without clipping, is from the nested one, relative to it
(of the plain step, which has none, 1).
`--json` ends with one line of JSON.
"""

import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from configs import common
from serkd_jax.models.student import Adapter
from serkd_jax.programs import Programs

ORDERS = {
    "none": "plain KD",
    "first_order": "first order",
    "second_order": "nested",
    "second_order_forward": "by forward mode",
}
CLASSES, HIDDEN = 4, 1024  # of IEMOCAP; of the teacher

_SIZE = flags.DEFINE_enum("size", "paper", ["paper", "tiny"], "Of student and features.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "0: 4 on a CPU, the paper's 32 elsewhere.")
_SECONDS = flags.DEFINE_float("seconds", 60, "Steps are repeated so long, and at least 3 times.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def main(argv: list[str]) -> None:
    """Measures every order and prints a table."""
    del argv
    config, variates = common.paper("iemocap"), 1024
    config.optimizer.clip_norm = 0.0
    config.batch_size = _BATCH_SIZE.value or (4 if jax.default_backend() == "cpu" else 32)
    if _SIZE.value == "tiny":
        config.max_frames, variates = 12, 6
        config.student.update({"width": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1})
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "size": _SIZE.value,
        "batch size": config.batch_size,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    programs = {order: make_programs(config, order, variates) for order in ORDERS}
    classifier = programs["none"].classifier.init(jax.random.key(0), jnp.zeros((1, HIDDEN)))
    state = programs["none"].init_distill(jax.random.key(1), classifier["params"])
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    batch, rng = jax.device_put({"train": train, "quiz": quiz}), jax.random.key(2)
    steps, compile_seconds, gradients = {}, {}, {}
    for order, program in programs.items():
        start = time.perf_counter()
        steps[order] = program.distill_step.lower(state, batch, rng).compile()
        compile_seconds[order] = time.perf_counter() - start
    for order, step in steps.items():  # also the warm-up; a step takes its state's buffers
        after, _ = step(jax.tree.map(jnp.copy, state), batch, rng)
        gradients[order] = ravel_pytree(optax.tree_utils.tree_get(after.meta_opt_state, "mu"))[0]
    times: dict[str, list[float]] = {order: [] for order in ORDERS}
    while len(times["none"]) < 3 or sum(map(sum, times.values())) < _SECONDS.value:
        for order, step in steps.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, rng))
            times[order].append(time.perf_counter() - start)

    print(
        "| order | ms, fastest | median | of plain | of nested | memory, MiB | GFLOP "
        "| compilation, s | differs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    fastest = {order: min(taken) for order, taken in times.items()}
    exact, results = gradients["second_order"], {}
    for order, name in ORDERS.items():
        results[order] = {
            "ms": fastest[order] * 1e3,
            "median ms": statistics.median(times[order]) * 1e3,
            "of plain": fastest[order] / fastest["none"],
            "of nested": fastest[order] / fastest["second_order"],
            "memory MiB": steps[order].memory_analysis().temp_size_in_bytes / 2**20,
            "GFLOP": steps[order].cost_analysis().get("flops", math.nan) / 1e9,
            "compilation s": compile_seconds[order],
            "differs": float(np.linalg.norm(gradients[order] - exact) / np.linalg.norm(exact)),
        }
        columns = "| {} | {:.1f} | {:.1f} | {:.2f} | {:.2f} | {:.1f} | {:.3g} | {:.1f} | {:.0e} |"
        print(columns.format(f"{name} (`{order}`)", *results[order].values()))
    if _JSON.value:
        print(json.dumps({"orders": results, "repeats": len(times["none"]), **about}))


def make_programs(config: ConfigDict, order: str, variates: int) -> Programs:
    """The programs of one order, for one device."""
    config = config.copy_and_resolve_references()
    config.meta.order = order
    programs = Programs(config, CLASSES, (config.max_frames, variates), 1, jax.devices()[:1])
    programs.adapter = Adapter(HIDDEN)  # otherwise the teacher would be loaded for its width
    return programs


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
        "teacher_hidden": rng.normal(size=(size, HIDDEN)).astype(np.float32),
    }


if __name__ == "__main__":
    app.run(main)
