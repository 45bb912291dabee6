"""What a stage of training is; and what the stages share: batches and the optimiser."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from serkd_jax.errors import UserError

if TYPE_CHECKING:
    from serkd_jax.programs import Programs


@dataclass(frozen=True)
class Stage(abc.ABC):
    """A stage of training: its parts, and what is said of it, once.

    A stage has an `init` of its own that makes its state, a `flax.struct.PyTreeNode` with
    `step`, the steps taken, and `frozen`, what no step changes and no checkpoint keeps.

    Attributes:
        name: of its part of the config, its folder, and its random stream.
        starts_from: the stages whose results it begins with.
        rows: of the results that it gives.
        student_row: which of them is its student's; empty if it trains none.
    """

    name: ClassVar[str]
    starts_from: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]]
    student_row: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def make(cls, programs: Programs) -> Stage:
        """The stage with the models and optimisers of a config."""

    @abc.abstractmethod
    def step(
        self, state: Any, batch: Any, rng: jax.Array, axis: str | None = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """A training step, pure: the next state and metrics, `loss` among them.

        Args:
            state: the present one.
            batch: of the batch's share that this device has.
            rng: the stage's key; the step folds in the step number.
            axis: name of the device axis under pmap.
        """

    @staticmethod
    def pick(state: Any, rows: Any) -> Any:
        """Of the rows that a step is given, those that make up its batch: all."""
        del state
        return rows

    @staticmethod
    def student_params(params: Any) -> Any:
        """The student's part of a state's `params`: all."""
        return params


class Batch(TypedDict):
    """Examples of one step; B is the global batch, or a device's share of it.

    Attributes:
        inputs: (B, T, N) float16 features, or (B, samples) int16 audio.
        length: (B,) int32 valid frames, or samples.
        label: (B,) int32.
        index: (B,) int32, the example's number in the corpus.
        teacher_hidden: (B, H) float32, h(., T), where the stage needs it.
    """

    inputs: jax.Array
    length: jax.Array
    label: jax.Array
    index: jax.Array
    teacher_hidden: jax.Array


class QuizBatch(TypedDict):
    """A training batch and the quiz batch of the same step."""

    train: Batch
    quiz: Batch


def make_optimizer(
    config: ConfigDict, learning_rate: float, total_steps: int
) -> optax.GradientTransformation:
    """AdamW with the config's weight decay, gradient clipping and schedule.

    Args:
        config: `weight_decay`, of `decayed` `kernels` alone (not of biases, norms and
            embeddings) or `all`; `clip_norm`, 0 for none; and the keys of `make_schedule`.
        learning_rate: the peak.
        total_steps: length of the stage.
    """
    schedule = make_schedule(config, learning_rate, total_steps)
    if not config.clip_norm:
        return make_adamw(config, schedule)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), make_adamw(config, schedule))


def make_schedule(config: ConfigDict, learning_rate: float, total_steps: int) -> optax.Schedule:
    """The learning rate by steps taken.

    Args:
        config: `schedule`, `constant` or `cosine` (to zero at `total_steps`); `warmup`,
            the share of the steps over which the rate rises from 0.
        learning_rate: the peak.
        total_steps: length of the stage.
    """
    warmup_steps = round(config.warmup * total_steps)
    if config.schedule == "cosine":
        end = max(total_steps, warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, end)
    if config.schedule == "constant":
        if not warmup_steps:
            return optax.constant_schedule(learning_rate)
        return optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    raise UserError(f"optimizer.schedule must be constant or cosine: {config.schedule!r}")


def make_adamw(
    config: ConfigDict, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """AdamW with the config's `weight_decay` of what is `decayed`."""
    mask = None if config.decayed == "all" else _kernels
    return optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=mask)


def _kernels(params: Any) -> Any:
    """True for each kernel of a tree of parameters, False for the others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of (B, C) logits whose largest is the (B,) label."""
    return (logits.argmax(-1) == labels).astype(jnp.float32).mean()
