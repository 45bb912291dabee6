"""Recurrent layers over frames, and what they have in common."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import zero_invalid


class LSTM(nn.Module):
    """An LSTM with torch's two biases, whose state is 0 until the first valid frame that it reads.

    Attributes:
        width: number of hidden units.
        reverse: whether it reads the frames from the last to the first.
        dtype: dtype of the computation; None means that of inputs and parameters.
    """

    width: int
    reverse: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Maps (B, T, N) frames, of which those that are `valid` (B, T) come first."""
        gates = nn.Dense(4 * self.width, dtype=self.dtype, name="input")(x)
        shape = (self.width, 4 * self.width)
        kernel = self.param("kernel", nn.initializers.orthogonal(), shape).astype(gates.dtype)
        gates += self.param("bias", nn.initializers.zeros, shape[1:]).astype(gates.dtype)

        def step(state: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
            (hidden, cell), (gate, here) = state, inputs
            after = lstm_step(gate + hidden @ kernel, cell)
            hidden, cell = (zero_invalid(x, here) for x in after)
            return (hidden, cell), hidden

        zero = jnp.zeros_like(gates[:, 0, : self.width])
        return scan_frames(step, (zero, zero), (gates, valid), self.reverse)


def both_ways(
    x: jax.Array, valid: jax.Array, width: int, dtype: DTypeLike | None, layer: str = ""
) -> jax.Array:
    """Runs LSTMs `forward` and `backward`, for compact methods; `layer` ends their names.

    Maps (B, T, N) frames, of which those that are `valid` (B, T) come first, to (B, T, 2 width).
    """
    both = [
        LSTM(width, reverse, dtype, name=f"{name}{layer}")(x, valid)
        for name, reverse in (("forward", False), ("backward", True))
    ]
    return jnp.concatenate(both, axis=-1)


def lstm_step(gates: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the next hidden state and cell (..., H), given the gates (..., 4 H)."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * nn.tanh(g)
    return nn.sigmoid(o) * nn.tanh(cell), cell


def scan_frames(
    step: Callable[[Any, Any], tuple[Any, jax.Array]],
    start: Any,
    inputs: tuple[jax.Array, ...],
    reverse: bool,
) -> jax.Array:
    """Returns the outputs (B, T, D) of `step` over inputs (B, T, ...), perhaps from the last on."""
    # The frames are turned round, since ONNX's converter has no scan from the end.
    order = slice(None, None, -1 if reverse else 1)
    inputs = tuple(x.swapaxes(0, 1)[order] for x in inputs)
    return jax.lax.scan(step, start, inputs)[1][order].swapaxes(0, 1)
