"""The base class of the training stages, and the batches and the optimiser that they share."""

from __future__ import annotations

import abc
from collections.abc import Callable
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
    """A stage of training: its models and optimisers, and everything that others need to know.

    Each stage also has an `init`, with arguments of its own, that makes the initial state: a
    `flax.struct.PyTreeNode` with a field `step` (the number of steps taken) and a field `frozen`
    (what no step changes and no checkpoint contains).

    Attributes:
        name: the name of its part of the config, of its folder and of its random stream.
        starts_from: names of the stages whose results it starts from.
        reads: the parts of the config that it reads, besides what all stages read.
        rows: the rows that it contributes to the results.
        student_row: the one of `rows` that is its student's; empty if it trains no student.
    """

    name: ClassVar[str]
    starts_from: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]]
    rows: ClassVar[tuple[str, ...]]
    student_row: ClassVar[str] = ""

    @classmethod
    @abc.abstractmethod
    def make(cls, programs: Programs) -> Stage:
        """Makes the stage with the models and optimisers of a config."""

    @abc.abstractmethod
    def step(
        self, state: Any, batch: Any, rng: jax.Array, axis: str | None = None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Takes a training step, as a pure function.

        Args:
            state: the current state.
            batch: this device's share of the batch.
            rng: the stage's key, into which the step folds the step number.
            axis: name of the device axis under pmap.

        Returns:
            The next state, and metrics by name, with `loss` among them.
        """

    @staticmethod
    def pick(state: Any, rows: Any) -> Any:
        """Selects the rows of a step's batch from those that it is given; by default all."""
        del state
        return rows

    @staticmethod
    def student_params(params: Any) -> Any:
        """Selects the student's part of a state's `params`; by default all."""
        return params


class Batch(TypedDict):
    """The examples of one step; B is the size of the global batch, or of a device's share of it.

    Attributes:
        inputs: (B, T, N) float16 features, or (B, samples) int16 audio.
        length: (B,) int32, the numbers of valid frames or samples.
        label: (B,) int32, the classes.
        index: (B,) int32, the examples' numbers in the corpus.
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
    """Makes AdamW, Adam or SGD with the config's weight decay, gradient clipping and schedule.

    Args:
        config: the config's `optimizer` part. `name` is `adamw` or `adam`, with `beta1` and
            `beta2`, or `sgd`, whose momentum is `beta1`. `weight_decay` applies to what `decayed`
            says: only `kernels` (not biases, norms and embeddings) or `all`. `clip_norm` is the
            largest norm of the gradient, 0 for no clipping. `make_schedule` reads the other keys.
        learning_rate: the peak of the learning rate.
        total_steps: number of steps of the stage.
    """
    make = {"adamw": make_adamw, "adam": _make_coupled, "sgd": _make_coupled}[config.name]
    optimizer = make(config, make_schedule(config, learning_rate, total_steps))
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def make_schedule(config: ConfigDict, learning_rate: float, total_steps: int) -> optax.Schedule:
    """Makes the learning rate as a function of the number of steps taken.

    Args:
        config: the config's `optimizer` part. `schedule` is `constant` or `cosine`; `warmup` is
            the share of the steps over which the rate rises from 0. A cosine falls to the share
            `final` of its peak, at `total_steps`, or first after the share `first_cycle` of them
            and then, each time from the peak, after twice as many.
        learning_rate: the peak of the learning rate.
        total_steps: number of steps of the stage.
    """
    warmup_steps = round(config.warmup * total_steps)
    if config.schedule == "cosine":
        starts, cycle = [warmup_steps], max(total_steps - warmup_steps, 1)
        if config.first_cycle:
            cycle = max(round(config.first_cycle * total_steps), 1)
        parts = [optax.linear_schedule(0.0, learning_rate, warmup_steps)]
        while len(parts) == 1 or starts[-1] < total_steps:
            parts.append(optax.cosine_decay_schedule(learning_rate, cycle, config.final))
            starts.append(starts[-1] + cycle)
            cycle *= 2
        return optax.join_schedules(parts, starts[:-1])
    if config.schedule == "constant":
        if not warmup_steps:
            return optax.constant_schedule(learning_rate)
        return optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    raise UserError(f"optimizer.schedule must be constant or cosine: {config.schedule!r}")


def make_adamw(
    config: ConfigDict, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Makes AdamW with the config's `weight_decay` on the parameters that `decayed` names."""
    betas = config.beta1, config.beta2
    return optax.adamw(
        learning_rate, *betas, weight_decay=config.weight_decay, mask=_decayed(config)
    )


def _make_coupled(
    config: ConfigDict, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Makes Adam, or SGD with momentum; weight decay is added to the gradient, as in torch."""
    decay = optax.add_decayed_weights(config.weight_decay, _decayed(config))
    if config.name == "adam":
        return optax.chain(decay, optax.adam(learning_rate, config.beta1, config.beta2))
    return optax.chain(decay, optax.sgd(learning_rate, config.beta1))


def _decayed(config: ConfigDict) -> Callable[[Any], Any] | None:
    """Returns the function that marks the parameters to be decayed; None means all."""
    return None if config.decayed == "all" else _kernels


def _kernels(params: Any) -> Any:
    """Returns a tree like `params` that is True at kernels and False elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of the (B, C) logits whose maximum is at the (B,) label."""
    return (logits.argmax(-1) == labels).astype(jnp.float32).mean()
