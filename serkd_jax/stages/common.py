"""What every stage's step shares: the batch and the optimiser."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from serkd_jax.errors import UserError


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


def make_optimizer(
    config: ConfigDict, learning_rate: float, total_steps: int
) -> optax.GradientTransformation:
    """AdamW with the config's weight decay, gradient clipping and schedule.

    Args:
        config: ``weight_decay``, of ``decayed`` ``kernels`` alone (not of biases, norms and
            embeddings) or ``all``; ``clip_norm``, 0 for none; and the keys of `make_schedule`.
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
        config: ``schedule``, ``constant`` or ``cosine`` (to zero at ``total_steps``); ``warmup``,
            the share of the steps over which the rate rises from 0.
        learning_rate: the peak.
        total_steps: length of the stage.
    """
    warmup_steps = round(config.warmup * total_steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    elif config.schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        raise UserError(f"optimizer.schedule must be constant or cosine: {config.schedule!r}")
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_adamw(
    config: ConfigDict, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """AdamW with the config's ``weight_decay`` of what is ``decayed``."""
    mask = None if config.decayed == "all" else _kernels
    return optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=mask)


def _kernels(params: Any) -> Any:
    """True for each kernel of a tree of parameters, False for the others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of (B, C) logits whose largest is the (B,) label."""
    return (logits.argmax(-1) == labels).astype(jnp.float32).mean()
