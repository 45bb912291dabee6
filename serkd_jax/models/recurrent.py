"""A recurrent layer over frames."""

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
            i, f, g, o = jnp.split(gate + hidden @ kernel, 4, axis=-1)
            cell = zero_invalid(nn.sigmoid(f) * cell + nn.sigmoid(i) * nn.tanh(g), here)
            hidden = nn.sigmoid(o) * nn.tanh(cell)
            return (hidden, cell), hidden

        # The frames are turned round, since ONNX's converter has no scan from the end.
        order = slice(None, None, -1 if self.reverse else 1)
        zero = jnp.zeros_like(gates[:, 0, : self.width])
        inputs = (x.swapaxes(0, 1)[order] for x in (gates, valid))
        return jax.lax.scan(step, (zero, zero), tuple(inputs))[1][order].swapaxes(0, 1)
