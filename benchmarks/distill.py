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

from benchmarks.common import (
    describe,
    make_batch,
    make_config,
    make_examples,
    make_programs,
    new_classifier,
)
from serkd_jax.standardization import no_statistics

ORDERS = {
    "none": "plain KD",
    "first_order": "first order",
    "second_order": "nested",
    "second_order_forward": "by forward mode",
}

_SECONDS = flags.DEFINE_float("seconds", 60, "Steps are repeated so long, and at least 3 times.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def main(argv: list[str]) -> None:
    """Measures every order and prints a table."""
    del argv
    config, variates = make_config()
    config.optimizer.clip_norm = 0.0
    about = describe(config)

    programs = {order: make_programs(config, order, variates) for order in ORDERS}
    plain = programs["none"]
    state = plain.init_distill(jax.random.key(1), new_classifier(plain), no_statistics(variates))
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    examples = make_examples(train, quiz)
    one_step = np.arange(2 * config.batch_size).reshape(2, 1, -1)
    data, rows = examples.take({"train": one_step[0], "quiz": one_step[1]})
    rest = (data, rows, np.int32(1), jax.random.key(2))
    steps, compile_seconds, gradients = {}, {}, {}
    for order, program in programs.items():
        start = time.perf_counter()
        steps[order] = program.distill_steps.lower(state, *rest).compile()
        compile_seconds[order] = time.perf_counter() - start
    for order, step in steps.items():  # also the warm-up; a step takes its state's buffers
        after, _ = step(jax.tree.map(jnp.copy, state), *rest)
        gradients[order] = ravel_pytree(optax.tree_utils.tree_get(after.meta_opt_state, "mu"))[0]
    times: dict[str, list[float]] = {order: [] for order in ORDERS}
    while len(times["none"]) < 3 or sum(map(sum, times.values())) < _SECONDS.value:
        for order, step in steps.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, *rest))
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


if __name__ == "__main__":
    app.run(main)
