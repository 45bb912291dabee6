"""Estimated cost of the five-fold IEMOCAP experiment: operations, traffic, memory and time.

    python -m benchmarks.cost --device=h100

The formulas are in docs/scaling.md, which also says which figures have been measured. `--measure`
compiles the student's steps for the local device instead, and prints the operations by formula and
the memory that XLA allocates.
"""

from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks.common import (
    PASSES,
    layer_products,
    make_batch,
    make_config,
    make_examples,
    make_steps,
    student_operations,
)
from configs import common


class Device(NamedTuple):
    """A kind of accelerator, by its maker's specification."""

    name: str
    count: int
    operations: float  # bfloat16, per second and device
    bandwidth: float  # bytes per second of memory, per device
    interconnect: float  # bytes per second that one device sends in an all-reduce
    memory: float  # bytes per device
    fused: bool  # whether there is a fused attention kernel


DEVICES = {
    "h100": Device("one H100 SXM", 1, 989e12, 3.35e12, np.inf, 80e9, True),
    "v5e-8": Device("TPU v5e-8", 8, 197e12, 0.819e12, 0.1e12, 16e9, False),
}
MATMUL_SHARE = 0.7  # share of the nominal rate that large matrix products reach in practice
UTTERANCES, FOLDS, TEST_SHARE = 5531, 5, 0.2  # IEMOCAP: one session per fold
_DEVICE = flags.DEFINE_enum("device", "h100", list(DEVICES), "The device to estimate for.")
_MEASURE = flags.DEFINE_bool("measure", False, "Compile the steps here; print their memory.")


def main(argv: list[str]) -> None:
    """Prints the table of the experiment, or that of the memory."""
    del argv
    if _MEASURE.value:
        print_measured()
    else:
        print_experiment(DEVICES[_DEVICE.value])


def teacher_operations(max_frames: int) -> tuple[float, float]:
    """Operations of HuBERT-large on one example: its frozen front, and its layers' forward pass."""
    front, frames = 0.0, max_frames * 320 + 80  # samples
    for kernel, stride, inputs in [(10, 5, 1), *[(3, 2, 512)] * 4, *[(2, 2, 512)] * 2]:
        frames = (frames - kernel) // stride + 1
        front += frames * kernel * inputs * 512
    front += frames * (512 * 1024 + 128 * 1024 * 1024 / 16)  # projection, positions in 16 groups
    return 2 * front, 2.0 * 24 * layer_products(frames, 1024, 4096)


def layer_traffic(tokens: int, width: int, mlp_dim: int, heads: int, fused: bool) -> float:
    """Bytes that one layer's forward pass on one example moves; the backward pass moves twice that.

    In bfloat16 there are 14 reads and writes of width D and 4 of the feed-forward width; without a
    fused kernel, add 16 bytes per attention weight (float32 logits and softmax, written and read).
    """
    weights = 0 if fused else 16 * heads * tokens**2
    return 2.0 * tokens * (14 * width + 4 * mlp_dim) + weights


def seconds(operations: float, traffic: float, reduced: float, device: Device) -> float:
    """Seconds of a step: products, then traffic, then the all-reduce, without overlap."""
    products = operations / (device.count * device.operations * MATMUL_SHARE)
    moved = traffic / (device.count * device.bandwidth)
    return products + moved + 2 * reduced / device.interconnect


def print_experiment(device: Device) -> None:
    """Prints a row per stage: for one step, and over all folds."""
    config, variates = common.paper("iemocap"), 1024
    s, size = config.student, config.batch_size
    train = UTTERANCES * (1 - TEST_SHARE) * (1 - config.protocol.validation - config.protocol.quiz)
    steps = -(-train // size)

    def student_traffic(fused: bool) -> float:
        sizes = (s.width, s.mlp_dim, s.num_heads)
        return size * s.num_layers * layer_traffic(variates, *sizes, fused)

    student, moved = size * student_operations(config, variates), student_traffic(device.fused)
    front, layers = (size * x for x in teacher_operations(config.max_frames))
    # The teacher's attention has dropout, for which the fused kernel is not used.
    teacher_moved = size * 24 * layer_traffic(config.max_frames, 1024, 4096, 16, fused=False)
    rows = {
        "teacher": (front + 3 * layers, 3 * teacher_moved, 4 * 302e6),
        "student": (PASSES["student"] * student, PASSES["student"] * moved, 4 * 12e6),
        "distill": (  # tangents, two of the passes, are never fused
            PASSES["meta"] * student,
            (PASSES["meta"] - 2) * moved + 2 * student_traffic(fused=False),
            2 * 4 * 12e6,
        ),
        "curriculum": (PASSES["curriculum"] * student, PASSES["curriculum"] * moved, 4 * 12e6),
    }
    print(f"{device.name}: {steps:.0f} steps an epoch, {FOLDS} folds")
    print(
        "| stage | TFLOP a step | GB moved | ms | share of the products' rate | steps | minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    total = operations = 0.0
    for stage, (per_step, traffic, reduced) in rows.items():
        time = seconds(per_step, traffic, reduced, device)
        count = config[stage].epochs * steps * FOLDS
        share = per_step / time / (device.count * device.operations * MATMUL_SHARE)
        total, operations = total + time * count, operations + per_step * count
        cells = f"{per_step / 1e12:.3g} | {traffic / 1e9:.3g} | {time * 1e3:.3g} | {share:.0%}"
        print(f"| {stage} | {cells} | {count:,.0f} | {time * count / 60:.1f} |")
    validation = UTTERANCES * (1 - TEST_SHARE) * config.protocol.validation / size
    passes = sum(config[stage].epochs for stage in rows if stage != "teacher")
    scored = FOLDS * seconds(student, moved, 0, device) * passes * validation
    outputs = config.teacher.epochs * validation + UTTERANCES / size
    scored += FOLDS * seconds(front + layers, teacher_moved, 0, device) * outputs
    total += scored
    print(f"| validation, teacher's outputs | | | | | | {scored / 60:.1f} |")
    print(f"| all | | | | | | {total / 60:.0f} |")
    print(f"{operations / 1e18:.2f} EFLOP in steps")
    corpus = 2 * UTTERANCES * (config.max_frames * variates + config.max_frames * 320 + 80)
    print(f"examples: {corpus / 1e9:.2f} of {device.memory / 1e9:.0f} GB on each device")


def print_measured() -> None:
    """Prints a row per step: its operations and its memory."""
    config, variates = make_config()
    size = config.batch_size
    examples = make_examples(make_batch(config, variates, 0), make_batch(config, variates, 1))
    _, cases = make_steps(config, variates, "second_order", examples)
    forward = size * student_operations(config, variates)
    print(f"batch {size}, {jax.devices()[0].device_kind}")
    print("| step | GFLOP | memory beside state and examples, MiB |")
    print("|---|---|---|")
    for name, (steps, state, rows) in cases.items():
        data, taken = examples.take(jax.tree.map(lambda x: x[None], rows))
        compiled = steps.lower(state, data, taken, np.int32(1), jax.random.key(3)).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"| {name} | {PASSES[name] * forward / 1e9:.0f} | {memory:.0f} |")


if __name__ == "__main__":
    app.run(main)
