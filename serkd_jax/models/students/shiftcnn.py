"""ShiftCNN, Shiftformer and ShiftLSTM (Shen et al., ICASSP 2023): channels shifted in time."""

import zlib
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames, zero_invalid
from serkd_jax.models.recurrent import both_ways
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import TorchLayerNorm, exact_gelu, portable_gelu


class ShiftStudent(Student):
    """Features (B, T, N) -> masks in training -> layers with a shift -> mean -> classes.

    Attributes:
        shift: 1 / `shift` of the channels is shifted by a frame; 0 for none.
        time_mask: in training, width of the two blocks of frames that are replaced by a learned
            vector; 0 for none.
        feature_mask: in training, width of the block of features that is set to 0; 0 for none.
        see_padding: whether padding takes part, as in the public code, which has no mask.
    """

    classifier_dims: Sequence[int] = size((), 1, 8192)
    shift: int = size(16, 0, 8192)
    time_mask: int = size(15, 0, 10_000, deployed=False)
    feature_mask: int = size(64, 0, 10_000, deployed=False)
    see_padding: bool = size(False)

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the widest activations limit the size."""
        if 1 < variates < self.shift:
            raise ValueError(
                f"the features have {variates} dimensions, less than student.shift {self.shift}: "
                "nothing would be shifted"
            )
        if frames * variates > 2**25:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames) | self.see_padding
        masks = Masks(self.time_mask, self.feature_mask, name="masks")
        x = self.encode(masks(features, valid.sum(1), dropout_keys), valid)
        hidden = masked_mean(at_least_float32(x), valid)
        return self.classify_and_project(hidden)

    def encode(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Encodes (B, T, N) frames, of which those that are `valid` (B, T) come first."""
        raise NotImplementedError

    @nn.nowrap
    def move(self, x: jax.Array, valid: jax.Array, both_ways: bool = False) -> jax.Array:
        """Returns the temporal shift of the valid frames, and 0 after them."""
        fold = x.shape[-1] // self.shift if self.shift else 0
        return temporal_shift(zero_invalid(x, valid), fold, both_ways)


class ShiftCNN(ShiftStudent):
    """Two blocks of depthwise convolutions; in the second one, what is skipped is shifted."""

    description: ClassVar[str] = "a ShiftCNN"

    @nn.nowrap
    def encode(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """See `ShiftStudent`."""
        make_block = nn.remat(ConvBlock) if self.remat else ConvBlock
        blocks = [make_block(self.portable, self.dtype, name=f"blocks_{i}") for i in range(2)]
        x = zero_invalid(x, valid)
        x = zero_invalid(x + blocks[0](x), valid)
        return TorchLayerNorm(dtype=self.dtype, name="norm")(self.move(x, valid) + blocks[1](x))


class Shiftformer(ShiftStudent):
    """A transformer of two layers, in which a shift in both directions replaces the attention."""

    shift: int = size(4, 0, 8192)

    description: ClassVar[str] = "a Shiftformer"

    @nn.nowrap
    def encode(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """See `ShiftStudent`."""
        for i in range(2):
            x = self.move(x, valid, both_ways=True)
            mlp = Pointwise(self.portable, self.dtype, name=f"mlp_{i}")
            x = TorchLayerNorm(dtype=self.dtype, name=f"norm_{i}")(x + mlp(x))
        return x


class ShiftLSTM(ShiftStudent):
    """A bidirectional LSTM of one layer, whose input is shifted."""

    shift: int = size(4, 0, 8192)

    description: ClassVar[str] = "a ShiftLSTM"

    @nn.nowrap
    def encode(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """See `ShiftStudent`."""
        x = both_ways(self.move(x, valid), valid, x.shape[-1], self.dtype)
        return TorchLayerNorm(dtype=self.dtype, name="norm")(x)


def temporal_shift(x: jax.Array, fold: int, both_ways: bool = False) -> jax.Array:
    """Moves channels of (B, T, N) frames by a frame, with 0 where a frame is missing.

    The first `fold` channels become those of the frame before; with `both_ways`, the next `fold`
    become those of the frame after.
    """
    if not fold:
        return x
    parts = [jnp.pad(x[:, :-1, :fold], ((0, 0), (1, 0), (0, 0)))]
    if both_ways:
        parts.append(jnp.pad(x[:, 1:, fold : 2 * fold], ((0, 0), (0, 1), (0, 0))))
    return jnp.concatenate([*parts, x[..., len(parts) * fold :]], axis=-1)


class ConvBlock(nn.Module):
    """A depthwise convolution over seven frames, a norm, and two layers on each frame."""

    portable: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, N) frames, 0 where they are padding, to (B, T, N)."""
        x = DepthwiseConv(7, self.dtype, name="depthwise")(x)
        return Pointwise(self.portable, self.dtype, name="mlp")(
            TorchLayerNorm(dtype=self.dtype, name="norm")(x)
        )


class DepthwiseConv(nn.Module):
    """A convolution of each channel by itself, as a sum of products: faster on a CPU."""

    length: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, N) frames to (B, T, N), with 0 before the first and after the last."""
        frames, width = x.shape[1:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.length, 1, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        padded = jnp.pad(x, ((0, 0), (self.length // 2, self.length // 2), (0, 0)))
        return bias + sum(padded[:, i : i + frames] * kernel[i, 0] for i in range(self.length))


class Pointwise(nn.Module):
    """Two layers on each frame, the first of which is four times as wide."""

    portable: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, N) frames to (B, T, N)."""
        gelu = portable_gelu if self.portable else exact_gelu
        wide = gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="wide")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="narrow")(wide)


class Masks(nn.Module):
    """Masks of the features in training: two of frames, and one of features.

    Attributes:
        time_mask: width of a block of frames, but at most half of the valid ones.
        feature_mask: width of the block of features, but at most half of them.
    """

    time_mask: int
    feature_mask: int

    @nn.compact
    def __call__(
        self, x: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        """Masks (B, T, N), of which `num_frames` (B,) are valid; keys (B,) of None mask nothing."""
        frames, variates = x.shape[1:]
        instead = self.param("instead", nn.initializers.uniform(1.0), (variates,))
        if dropout_keys is None:
            return x
        place = zlib.crc32("/".join(self.path).encode())

        def block(key: jax.Array, length: int, limit: jax.Array, width: int) -> jax.Array:
            width = jnp.minimum(width, limit // 2)
            start = jax.random.randint(key, (), 0, limit - width + 1)
            position = jnp.arange(length)
            return (position >= start) & (position < start + width)

        def mask(key: jax.Array, x: jax.Array, limit: jax.Array) -> jax.Array:
            first, second, third = jax.random.split(jax.random.fold_in(key, place), 3)
            in_time = block(first, frames, limit, self.time_mask)
            in_time |= block(second, frames, limit, self.time_mask)
            of_features = block(third, variates, variates, self.feature_mask)
            x = jnp.where(in_time[:, None], instead.astype(x.dtype), x)
            return jnp.where(of_features, 0, x)

        return jax.vmap(mask)(dropout_keys, x, num_frames)
