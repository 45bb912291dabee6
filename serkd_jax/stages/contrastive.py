"""MoCo's momentum encoder and queue of labelled keys (He et al. 2020; Section 4.4)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from serkd_jax.errors import UserError


class Queue(struct.PyTreeNode):
    """A first-in, first-out dictionary of labelled keys.

    Attributes:
        keys: (Q, P) float32, L2-normalised keys.
        labels: (Q,) int32, their labels; -1 where the slot is empty.
        position: () int32, the slot that the next key takes.
    """

    keys: jax.Array
    labels: jax.Array
    position: jax.Array


def empty_queue(size: int, width: int) -> Queue:
    """Makes a queue of `size` empty slots for keys of width `width`."""
    return Queue(jnp.zeros((size, width)), jnp.full(size, -1, jnp.int32), jnp.int32(0))


def enqueue(queue: Queue, keys: jax.Array, labels: jax.Array) -> Queue:
    """Overwrites the oldest slots with (B, P) keys and (B,) labels; B must not exceed Q."""
    size, batch = queue.labels.shape[0], labels.shape[0]
    if batch > size:
        raise UserError(f"a batch of {batch} keys does not fit a queue of {size}")
    slots = (queue.position + jnp.arange(batch)) % size
    return Queue(
        queue.keys.at[slots].set(keys),
        queue.labels.at[slots].set(labels),
        (queue.position + batch) % size,
    )


def momentum_update(momentum_params: Any, params: Any, momentum: float) -> Any:
    """Returns m θ_k + (1-m) θ_q for all parameters; θ_k are `momentum_params`, θ_q `params`."""
    return optax.incremental_update(params, momentum_params, 1.0 - momentum)
