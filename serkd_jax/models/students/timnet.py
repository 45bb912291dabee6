"""TIM-Net (Ye et al., ICASSP 2023): gated causal convolutions in both directions of time."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames, zero_invalid
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import Dropout

glorot = nn.initializers.glorot_uniform()


class TimNet(Student):
    """Features (B, T, N) -> two stacks of gated blocks -> weighted sum of their levels -> classes.

    One stack reads the frames in their order, the other one from the last to the first. Level j
    has seen 2^(j+1) - 1 frames. h(., S) is the weighted sum, over the levels, of their means over
    time.

    Attributes:
        width: number of channels.
        num_levels: number of blocks in each stack; their dilations are 1, 2, 4, ...
        dropout: dropout rate of whole channels.
        see_padding: whether padding takes part, as in the public code, which has no mask.
    """

    classifier_dims: Sequence[int] = size((), 1, 8192)
    width: int = size(39, 1, 8192)
    num_levels: int = size(10, 1, 16)
    dropout: float = size(0.1, 0, 0.99, deployed=False)
    see_padding: bool = size(False)

    description: ClassVar[str] = "TIM-Net"

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the deepest level's input limits the size."""
        if (frames + 2**self.num_levels) * max(self.width, variates) > 2**26:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames) | self.see_padding
        means = []
        for name, order in (("forward", slice(None)), ("backward", slice(None, None, -1))):
            stack = Stack(
                self.width, self.num_levels, self.dropout, self.dtype, self.axis, name=name
            )
            levels = stack(features[:, order], valid[:, order], dropout_keys)
            means.append(jnp.stack([masked_mean(x, valid[:, order]) for x in levels]))
        weights = self.param("level_weights", _uniform, (self.num_levels,))
        hidden = jnp.einsum("l,lbd->bd", weights, sum(means))
        return self.classify_and_project(hidden, kernel_init=glorot)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-0.05, maxval=0.05)


class Stack(nn.Module):
    """A stack of gated blocks that read (B, T, N) frames from the first to the last.

    Invalid frames are 0 before every convolution, as is what comes before the first frame.
    """

    width: int
    num_levels: int
    dropout: float
    dtype: DTypeLike | None
    axis: str | None

    @nn.compact
    def __call__(
        self, x: jax.Array, valid: jax.Array, dropout_keys: jax.Array | None
    ) -> list[jax.Array]:
        """Returns the (B, T, width) outputs of all blocks, at least in float32."""
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=glorot, name="embed")(x)
        levels = []
        for level in range(self.num_levels):
            gate, dilation = x, 2**level
            for part in range(2):
                conv = CausalConv(self.width, dilation, self.dtype, name=f"conv_{level}_{part}")
                gate = conv(zero_invalid(gate, valid))
                norm = BatchNorm(self.axis, name=f"norm_{level}_{part}")
                gate = nn.relu(norm(gate, valid, training=dropout_keys is not None))
                if dropout_keys is not None:
                    channels = jnp.ones((len(x), self.width), gate.dtype)
                    kept = Dropout(self.dropout, name=f"dropout_{level}_{part}")
                    gate *= kept(channels, dropout_keys)[:, None]
            x = nn.sigmoid(gate) * x
            levels.append(x)
        return levels


class CausalConv(nn.Module):
    """A convolution of each frame with one before it, as a product: faster in a loop on a CPU."""

    width: int
    dilation: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, N) frames to (B, T, width), with 0 before the first."""
        kernel = self.param("kernel", glorot, (2, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        before = jnp.pad(x, ((0, 0), (self.dilation, 0), (0, 0)))[:, : x.shape[1]]
        return jnp.concatenate([before, x], axis=-1) @ kernel.reshape(-1, self.width) + bias


class BatchNorm(nn.Module):
    """Batch normalisation over the valid frames of all devices, with the constants of Keras.

    Flax's own weighs devices alike, however many valid frames each has.
    """

    axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, training: bool) -> jax.Array:
        """Normalises (B, T, D), in training by the batch, whose statistics it then follows."""
        width = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_variance = self.variable("batch_stats", "var", jnp.ones, width)
        mean, variance = running_mean.value, running_variance.value
        x = at_least_float32(x)
        if training:
            weights = valid[..., None].astype(x.dtype)
            share = self._mean(weights)
            mean = self._mean(x * weights) / share
            variance = self._mean(jnp.square(x - mean) * weights) / share
            running_mean.value = 0.99 * running_mean.value + 0.01 * mean
            running_variance.value = 0.99 * running_variance.value + 0.01 * variance
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-3) * scale + bias

    def _mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean over batch, time and devices."""
        mean = x.mean((0, 1))
        return mean if self.axis is None else jax.lax.pmean(mean, self.axis)
