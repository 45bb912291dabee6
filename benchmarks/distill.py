"""Time, memory and operations of a distillation step for each order of its meta-gradient.

    python -m benchmarks.distill

It is the step of the pipeline at the paper's sizes (326 frames of 1024 features, 4 classes), on
random data and one device. The orders of `meta.order` take turns, so that other load on the machine
affects all alike. Memory is what the compiler allocates for a step in addition to its arguments;
operations are as the compiler counts them. The last column is the difference between the
meta-gradient of a first step, read from Adam's first moment without clipping, and the nested one,
relative to the latter (1 for the plain step, which has none). `--json` ends with one line of JSON.
"""

import json
import math
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from benchmarks.common import (
    JSON,
    SECONDS,
    by_turns,
    cells,
    describe,
    init_distill,
    make_batch,
    make_config,
    make_examples,
    make_programs,
    markdown,
)
from serkd_jax.stages.distill import DistillStage

ORDERS = {
    "none": "plain KD",
    "first_order": "first order",
    "second_order": "nested",
    "second_order_forward": "by forward mode",
}

HEADER = ("order", "ms, fastest", "median", "of plain", "memory, MiB", "GFLOP")
HEADER += ("compilation, s", "differs")


def main(argv: list[str]) -> None:
    """Measures every order and prints a table."""
    del argv
    config, variates = make_config()
    about = describe(config)
    results = measure(config, variates, SECONDS.value)
    print(markdown(HEADER, table(results)))
    if JSON.value:
        print(json.dumps({"orders": results, **about}))


def measure(config: ConfigDict, variates: int, seconds: float) -> dict[str, dict[str, float]]:
    """Measures a step of each order, in turn, for ``seconds`` in all."""
    config = config.copy_and_resolve_references()
    config.optimizer.clip_norm = 0.0
    programs = {order: make_programs(config, order, variates) for order in ORDERS}
    plain = programs["none"]
    state = init_distill(plain, variates)
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    examples = make_examples(train, quiz)
    one_step = np.arange(2 * config.batch_size).reshape(2, 1, -1)
    data, rows = examples.take({"train": one_step[0], "quiz": one_step[1]})
    rest = (data, rows, np.int32(1), jax.random.key(2))
    steps, compile_seconds, gradients = {}, {}, {}
    for order, program in programs.items():
        start = time.perf_counter()
        steps[order] = program.steps(DistillStage).lower(state, *rest).compile()
        compile_seconds[order] = time.perf_counter() - start
    for order, step in steps.items():  # also the warm-up; a step consumes its state's buffers
        after, _ = step(jax.tree.map(jnp.copy, state), *rest)
        gradients[order] = ravel_pytree(optax.tree_utils.tree_get(after.meta_opt_state, "mu"))[0]

    def take(order: str) -> None:
        nonlocal state
        state, _ = jax.block_until_ready(steps[order](state, *rest))

    times = by_turns({order: partial(take, order) for order in ORDERS}, seconds)
    fastest = {order: min(taken) for order, taken in times.items()}
    exact = gradients["second_order"]
    return {
        order: {
            "ms": fastest[order] * 1e3,
            "median ms": statistics.median(times[order]) * 1e3,
            "of plain": fastest[order] / fastest["none"],
            "memory MiB": step.memory_analysis().temp_size_in_bytes / 2**20,
            "GFLOP": step.cost_analysis().get("flops", math.nan) / 1e9,
            "compilation s": compile_seconds[order],
            "differs": float(np.linalg.norm(gradients[order] - exact) / np.linalg.norm(exact)),
        }
        for order, step in steps.items()
    }


def table(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row of `HEADER` for each order."""
    columns = "{:.1f}", "{:.1f}", "{:.2f}", "{:.0f}", "{:.3g}", "{:.1f}", "{:.0e}"
    return [
        [f"{ORDERS[order]} (`{order}`)", *cells(columns, row)] for order, row in results.items()
    ]


if __name__ == "__main__":
    app.run(main)
