"""Training steps of the student against torch: steps a second, and the share of the peak.

    python -m benchmarks.steps

The steps of the pipeline (student, plain distillation, distillation with the meta-teacher,
curriculum, evaluation) at the paper's sizes (326 frames of 1024 features, 4 classes), on random
data that is on one device; ours as the pipeline dispatches them. `benchmarks/torch_steps.py` does
the same work in torch: scaled dot-product attention, fused AdamW, and on a GPU `torch.compile` and
bfloat16 autocast (of the meta step, torch cannot compile what is differentiated twice). The two
take turns, so that what else the machine does hits both.

Operations are those of the matrix products that the method needs, nothing that is computed again;
the peak is that of one large matrix product in the same precision, in the same run, of the faster
of the two. `--json` ends with one line of JSON.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is torch's as well

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import torch_steps
from benchmarks.common import (
    CLASSES,
    PASSES,
    describe,
    make_batch,
    make_config,
    make_examples,
    make_steps,
    student_operations,
)
from serkd_jax.parallel import replicate

_SECONDS = flags.DEFINE_float("seconds", 30, "Each step is repeated so long, at least 3 times.")
_ORDER = flags.DEFINE_string("order", "second_order", "Of our meta-gradient; see meta.order.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def main(argv: list[str]) -> None:
    """Measures every step in both and prints a table."""
    del argv
    on_cpu = jax.default_backend() == "cpu"
    config, variates = make_config()
    more = {"cores": os.cpu_count(), "torch": torch.__version__}
    about = describe(config, **more, dtype="float32" if on_cpu else "bfloat16")
    peak = matmul_peak(on_cpu)
    print(f"matrix products reach {peak / 1e12:.3g} TFLOP/s", flush=True)
    train, quiz = (make_batch(config, variates, seed) for seed in (0, 1))
    ours = our_steps(config, variates, train, quiz)
    theirs = their_steps(config, variates, train, quiz, on_cpu)
    results = {}
    for name, passes in PASSES.items():
        mine, peer = by_turns(ours[name], theirs[name], count=1 if on_cpu else 20)
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
    print("| step | steps/s | torch | ratio | of the medians | share of peak | torch |")
    print("|---|---|---|---|---|---|---|")
    for name, row in results.items():
        columns = "| {} | {:.3g} | {:.3g} | {:.2f} | {:.2f} | {:.0%} | {:.0%} |"
        print(columns.format(name, *row.values()))
    meta = results["kd"]["steps/s"] / results["meta"]["steps/s"]
    print(f"A meta step ({_ORDER.value}) takes as long as {meta:.2f} plain distillation steps.")
    if _JSON.value:
        ratio = {name: row["ratio"] for name, row in results.items()}
        print(json.dumps({"ratio": ratio, "meta of kd": meta, "steps": results, **about}))


def our_steps(config: ConfigDict, variates: int, train: dict, quiz: dict) -> dict[str, Callable]:
    """Name -> a function that takes so many steps and waits for them."""
    examples = make_examples(train, quiz)
    plain, cases = make_steps(config, variates, _ORDER.value, examples)

    def make(name: str) -> Callable[[int], None]:
        steps, state, rows = cases[name]
        held = replicate(jax.tree.map(jnp.array, state), jax.devices()[:1])
        most = 20
        data, taken = examples.take(jax.tree.map(lambda x: np.stack([x] * most), rows))

        def take(count: int) -> None:
            nonlocal held
            held, metrics = steps(held, data, taken, np.int32(count), jax.random.key(3))
            jax.device_get(metrics)

        return take

    _, student, rows = cases["student"]

    def evaluate(count: int) -> None:
        variables = student.params, student.statistics
        plain.student_predict(variables, examples, np.tile(rows, count))

    return {name: make(name) for name in cases} | {"evaluation": evaluate}


def their_steps(
    config: ConfigDict, variates: int, train: dict, quiz: dict, on_cpu: bool
) -> dict[str, Callable]:
    """The same in torch."""
    device = "cpu" if on_cpu else "cuda"
    dtype = None if on_cpu else torch.bfloat16
    torch.set_float32_matmul_precision("high")  # on a GPU, XLA's default, too
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


def by_turns(mine: Callable, peer: Callable, count: int) -> tuple[list[float], list[float]]:
    """Seconds a step of both, after a step to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for take in (mine, peer):
        take(count)
    while len(times[0]) < 3 or sum(map(sum, times)) * count < _SECONDS.value:
        for take, taken in zip((mine, peer), times, strict=True):
            start = time.perf_counter()
            take(count)
            taken.append((time.perf_counter() - start) / count)
    return times


def matmul_peak(on_cpu: bool) -> float:
    """Operations a second of one large matrix product, the faster of XLA's and torch's."""
    size, repeats = (2048, 5) if on_cpu else (8192, 50)
    x = jax.random.normal(jax.random.key(0), (size, size))
    a = x if on_cpu else x.astype(jnp.bfloat16)
    b = torch.randn(size, size)
    b = b if on_cpu else b.to("cuda", torch.bfloat16)
    product = jax.jit(jnp.matmul)

    def xla() -> Any:
        return jax.block_until_ready([product(a, a) for _ in range(repeats)])

    def by_torch() -> Any:
        out = [b @ b for _ in range(repeats)]
        if not on_cpu:
            torch.cuda.synchronize()
        return out

    fastest = []
    for run in (xla, by_torch):
        run()
        for _ in range(3):
            start = time.perf_counter()
            run()
            fastest.append((time.perf_counter() - start) / repeats)
    return 2.0 * size**3 / min(fastest)


if __name__ == "__main__":
    app.run(main)
