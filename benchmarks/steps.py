"""Training steps of the student against torch: steps per second, and the share of the peak.

    python -m benchmarks.steps

It measures the steps of the pipeline (student, plain distillation, distillation with the
meta-teacher, curriculum, evaluation) at the paper's sizes (326 frames of 1024 features, 4 classes),
on random data that is already on one device. Ours run as the pipeline dispatches them.
`benchmarks/torch_steps.py` does the same work in torch: scaled dot-product attention, fused AdamW,
and on a GPU `torch.compile` and bfloat16 autocast (in the meta step, torch cannot compile what is
differentiated twice). The two take turns, so that other load on the machine affects both.

Operations are those of the matrix products that the method needs, without anything that is computed
again. The peak is that of one large matrix product in the same precision and the same run, by the
faster of the two. `--json` ends with one line of JSON.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is shared with torch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import torch_steps
from benchmarks.common import (
    CLASSES,
    JSON,
    PASSES,
    SECONDS,
    by_turns,
    cells,
    describe,
    make_batch,
    make_config,
    make_examples,
    make_steps,
    markdown,
    student_operations,
)
from serkd_jax.distributed.parallel import replicate

_ORDER = flags.DEFINE_string("order", "second_order", "Order of our meta-gradient; see meta.order.")


HEADER = ("step", "steps/s", "torch", "ratio", "of the medians", "share of peak", "torch")


def main(argv: list[str]) -> None:
    """Measures every step in both and prints a table."""
    del argv
    config, variates = make_config()
    on_cpu = jax.default_backend() == "cpu"
    about = describe(config, dtype="float32" if on_cpu else "bfloat16")
    peak = matmul_peak(on_cpu)
    print(f"matrix products reach {peak / 1e12:.3g} TFLOP/s", flush=True)
    results = measure(config, variates, _ORDER.value, peak, SECONDS.value)
    print(markdown(HEADER, table(results)))
    meta = results["kd"]["steps/s"] / results["meta"]["steps/s"]
    print(f"A meta step ({_ORDER.value}) takes as long as {meta:.2f} plain distillation steps.")
    if JSON.value:
        ratio = {name: row["ratio"] for name, row in results.items()}
        print(json.dumps({"ratio": ratio, "meta of kd": meta, "steps": results, **about}))


def measure(
    config: ConfigDict, variates: int, order: str, peak: float, seconds: float
) -> dict[str, dict[str, float]]:
    """Measures each step, alternating with torch's, which exists for CPUs and NVIDIA's GPUs.

    Args:
        config: the recipe, in the size to measure.
        variates: N.
        order: of our meta-gradient.
        peak: operations per second of a large matrix product.
        seconds: how long each step is repeated.
    """
    on_cpu = jax.default_backend() == "cpu"
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    count = 1 if on_cpu else 20
    ours = our_steps(config, variates, order, train, quiz, count)
    has_peer = on_cpu or torch.cuda.is_available()
    theirs = their_steps(config, variates, train, quiz, on_cpu) if has_peer else {}
    results = {}
    for name, passes in PASSES.items():
        steps = {"ours": ours[name]} | ({"torch": theirs[name]} if has_peer else {})
        cases = {who: partial(take, count) for who, take in steps.items()}
        for case in cases.values():
            case()
        times = by_turns(cases, seconds)
        mine, peer = ([x / count for x in times.get(who, [np.nan])] for who in ("ours", "torch"))
        operations = passes * config.batch_size * student_operations(config, variates)
        results[name] = {
            "steps/s": 1 / min(mine),
            "torch steps/s": 1 / min(peer),
            "ratio": min(peer) / min(mine),
            "ratio of medians": statistics.median(peer) / statistics.median(mine),
            "share of peak": operations / min(mine) / peak,
            "torch share": operations / min(peer) / peak,
        }
        print(name, results[name], flush=True)
    return results


def table(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row of `HEADER` for each step."""
    columns = "{:.3g}", "{:.3g}", "{:.2f}", "{:.2f}", "{:.0%}", "{:.0%}"
    return [[name, *cells(columns, row)] for name, row in results.items()]


def our_steps(
    config: ConfigDict, variates: int, order: str, train: dict, quiz: dict, most: int
) -> dict[str, Callable]:
    """Name -> a function that takes a number of steps, at most ``most``, and waits for them."""
    examples = make_examples(train, quiz)
    plain, cases = make_steps(config, variates, order, examples)

    def make(name: str) -> Callable[[int], None]:
        steps, state, rows = cases[name]
        held = replicate(jax.tree.map(jnp.array, state), jax.devices()[:1])
        data, taken = examples.take(jax.tree.map(lambda x: np.stack([x] * most), rows))

        def take(count: int) -> None:
            nonlocal held
            held, metrics = steps(held, data, taken, np.int32(count), jax.random.key(3))
            jax.device_get(metrics)

        return take

    _, student, rows = cases["student"]

    def evaluate(count: int) -> None:
        trained = {"params": student.params}, student.frozen
        plain.student_predict(trained, examples, np.tile(rows, count))

    return {name: make(name) for name in cases} | {"evaluation": evaluate}


def their_steps(
    config: ConfigDict, variates: int, train: dict, quiz: dict, on_cpu: bool
) -> dict[str, Callable]:
    """The same in torch."""
    device = "cpu" if on_cpu else "cuda"
    dtype = None if on_cpu else torch.bfloat16
    torch.set_float32_matmul_precision("high")  # also XLA's default on a GPU
    torch.compiler.reset()
    hidden = config.teacher.projector
    steps = torch_steps.make_steps(
        config, CLASSES, variates, hidden, device, dtype, compile=not on_cpu
    )
    one, other = (
        {name: torch.tensor(array, device=device) for name, array in batch.items()}
        for batch in (train, quiz)
    )

    def make(name: str) -> Callable[[int], None]:
        batch = one if name in ("student", "evaluation") else {"train": one, "quiz": other}

        def take(count: int) -> None:
            for _ in range(count):
                steps[name](batch)
            if not on_cpu:
                torch.cuda.synchronize()

        return take

    return {name: make(name) for name in PASSES}


def matmul_peak(on_cpu: bool) -> float:
    """Operations per second of a large matrix product, by the faster of XLA and torch."""
    size, repeats = (2048, 5) if on_cpu else (8192, 50)
    x = jax.random.normal(jax.random.key(0), (size, size))
    a = x if on_cpu else x.astype(jnp.bfloat16)
    product = jax.jit(jnp.matmul)

    def xla() -> Any:
        return jax.block_until_ready([product(a, a) for _ in range(repeats)])

    cases = [xla]
    if on_cpu or torch.cuda.is_available():
        b = torch.randn(size, size)
        b = b if on_cpu else b.to("cuda", torch.bfloat16)

        def by_torch() -> None:
            for _ in range(repeats):
                b @ b
            if not on_cpu:
                torch.cuda.synchronize()

        cases.append(by_torch)
    fastest = []
    for run in cases:
        run()
        for _ in range(3):
            start = time.perf_counter()
            run()
            fastest.append((time.perf_counter() - start) / repeats)
    return 2.0 * size**3 / min(fastest)


if __name__ == "__main__":
    app.run(main)
