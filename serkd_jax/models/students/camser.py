"""CA-MSER (Zou et al., ICASSP 2022): spectra and cepstra weigh the frames of an encoder."""

import math
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from serkd_jax.audio.spectra import BINS, COEFFICIENTS
from serkd_jax.losses import l2_normalize
from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames, zero_invalid
from serkd_jax.models.recurrent import both_ways
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import Dropout

xavier = nn.initializers.glorot_uniform()
# AlexNet's convolutions: channels, length, stride and padding, and whether they are pooled.
CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)
POOLED = 6  # AlexNet's last maps are averaged to 6 x 6
# Mean and deviation of the colours in ImageNet, by which AlexNet's images are standardised.
COLOURS = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)


class CAMSER(Student):
    """Segments of (B, T, N) features -> three views -> their weights and fusion -> classes.

    A frame has two spectra of `bins`, two cepstra of `coefficients`, and an encoder's hidden state,
    as the front-end of an encoder with `beside=spectra` gives them. A recording is cut into
    segments, of which the last one is filled up; its logits are the mean of their log
    probabilities, and h(., S) that of their fused vectors.

    Attributes:
        bins: number of values in a spectrum.
        coefficients: number of values in a cepstrum.
        segment_frames: number of frames in a segment; the last one of them has no weight, since
            the original's encoder gives 149 frames for 3 s.
        image: height and width of the image that is made of a segment's spectra.
        lstm_width: number of hidden units of the LSTM in each direction.
        width: width of each view, and of their fusion.
        dropout: dropout rate before each of the linear layers but the last.
        lstm_dropout: dropout rate between the two layers of the LSTM.
        see_padding: whether the LSTM reads padding and silence is loud, as in the public code.
    """

    classifier_dims: Sequence[int] = size((128,), 1, 8192)
    bins: int = size(BINS, 1, 4096)
    coefficients: int = size(COEFFICIENTS, 1, 4096)
    segment_frames: int = size(150, 2, 1500)
    image: Sequence[int] = size((256, 384), 64, 2048)
    lstm_width: int = size(256, 1, 2048)
    width: int = size(128, 1, 8192)
    dropout: float = size(0.1, 0, 0.99, deployed=False)
    lstm_dropout: float = size(0.5, 0, 0.99, deployed=False)
    see_padding: bool = size(False)

    description: ClassVar[str] = "a CA-MSER"
    beside: ClassVar[str] = "spectra"

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the features must have the three views, and images limit the size."""
        if len(self.image) != 2:
            raise ValueError("student.image is not two numbers, height and width")
        beside = 2 * (self.bins + self.coefficients)
        if 1 < variates <= beside:
            raise ValueError(
                f"CA-MSER reads {beside} values of spectra and cepstra and then an encoder's, but "
                f"the features have {variates}: use an encoder's, with frontend.beside=spectra"
            )
        segments = -(-frames // self.segment_frames)
        if segments * (math.prod(self.image) + self.segment_frames * variates) > 2**25:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        count = -(-features.shape[1] // self.segment_frames)
        valid = valid_frames(features, num_frames)

        def cut(x: jax.Array) -> jax.Array:
            missing = count * self.segment_frames - x.shape[1]
            x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
            return x.reshape(-1, self.segment_frames, *x.shape[2:])

        frames, valid = cut(zero_invalid(features, valid)), cut(valid)
        keys = None if dropout_keys is None else _keys_of_segments(dropout_keys, count)
        fused = self._fuse(frames, valid, keys)
        out = self.classify_and_project(fused, kernel_init=xavier)
        heard = valid.any(1).reshape(-1, count)
        hidden, logits, projection = (
            None if x is None else masked_mean(x.reshape(-1, count, x.shape[-1]), heard)
            for x in (fused, nn.log_softmax(out.logits), out.projection)
        )
        return StudentOutput(
            hidden, logits, None if projection is None else l2_normalize(projection)
        )

    @nn.nowrap
    def _fuse(self, frames: jax.Array, valid: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Maps segments (B, S, N), with their `valid` frames (B, S), to vectors (B, width)."""

        def dense(x: jax.Array, width: int, name: str) -> jax.Array:
            x = Dropout(self.dropout, name=f"{name}_dropout")(x, keys)
            return nn.relu(nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)(x))

        spectra, cepstra, states = jnp.split(
            frames, np.cumsum([2 * self.bins, 2 * self.coefficients]), axis=-1
        )
        spectra, cepstra = (
            x.reshape(-1, 2 * x.shape[1], x.shape[2] // 2) for x in (spectra, cepstra)
        )
        twice = jnp.repeat(valid, 2, axis=1)  # there are two of each in a frame

        levels = Range(self.axis, name="range")(spectra, twice, training=keys is not None)
        levels = levels if self.see_padding else zero_invalid(levels, twice)
        maps = AlexNet(self.dtype, name="alexnet")(_to_image(levels, *self.image))
        spectrum = dense(maps.reshape(-1, math.prod(maps.shape[1:])), self.width, "spectrum")

        x, twice = _unit(cepstra), twice | self.see_padding
        for layer in range(2):
            x = both_ways(x, twice, self.lstm_width, self.dtype, f"_{layer}")
            if layer == 0:
                x = Dropout(self.lstm_dropout, name="lstm_dropout")(x, keys)
        cepstrum = dense(x.reshape(-1, math.prod(x.shape[1:])), self.width, "cepstrum")

        pair = jnp.concatenate([spectrum, cepstrum], axis=-1)
        weights = dense(pair, self.segment_frames - 1, "co_attention")
        state = jnp.einsum("bt,btd->bd", weights, states[:, :-1].astype(weights.dtype))
        views = jnp.concatenate([pair, dense(state, self.width, "state")], axis=-1)
        fused = at_least_float32(dense(views, self.width, "fusion"))
        return Dropout(self.dropout, name="fused_dropout")(fused, keys)


def _keys_of_segments(keys: jax.Array, count: int) -> jax.Array:
    """Returns a key for each of the `count` segments of each of the examples with `keys` (B,)."""
    each = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count)))
    return each(keys).reshape(-1)


def _unit(x: jax.Array) -> jax.Array:
    """Divides each (B, T, N) frame by its norm; its loudness does not matter then."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class Range(nn.Module):
    """Maps each bin's range in the training data to 0 to 1, and what is outside to its ends.

    The range is a batch statistic that only grows, and that of all data after the first epoch. The
    momentum encoder has moving averages of `low`, `high` and `seen` from 0 on; divided by that of
    `seen`, the others are means of what there was.
    """

    axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, training: bool) -> jax.Array:
        """Maps levels (B, T, N), of which those that are `valid` (B, T) count."""
        shape = x.shape[-1:]
        low = self.variable("batch_stats", "low", jnp.zeros, shape)
        high = self.variable("batch_stats", "high", jnp.zeros, shape)
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        x = at_least_float32(x)
        if training:
            here = valid[..., None]
            least = jnp.where(here, x, x.max()).min((0, 1))
            most = jnp.where(here, x, x.min()).max((0, 1))
            if self.axis is not None:
                least, most = jax.lax.pmin(least, self.axis), jax.lax.pmax(most, self.axis)
            low.value = jnp.where(seen.value, jnp.minimum(low.value, least), least)
            high.value = jnp.where(seen.value, jnp.maximum(high.value, most), most)
            seen.value = jnp.ones(())
        share = jnp.where(seen.value > 0, seen.value, 1)
        least, most = low.value / share, high.value / share
        return jnp.clip((x - least) / jnp.where(most > least, most - least, 1), 0, 1)


def _to_image(levels: jax.Array, height: int, width: int) -> jax.Array:
    """Makes (B, height, width, 3) images, high tones above, of levels (B, T, N) in 0 to 1."""
    frames, bins = levels.shape[1:]
    rows, columns = interpolation(bins, height)[:, ::-1], interpolation(frames, width)
    image = jnp.einsum("hn,btn,wt->bhw", rows, levels, columns, optimize="optimal")
    return (image[..., None] - COLOURS[0]) / COLOURS[1]


def interpolation(length: int, new_length: int) -> np.ndarray:
    """Returns linear interpolation as a matrix (new_length, length), with the ends in place."""
    places = (np.arange(new_length) + 0.5) * length / new_length - 0.5
    columns = [np.interp(places, np.arange(length), unit) for unit in np.eye(length)]
    return np.stack(columns, axis=1).astype(np.float32)


class AlexNet(nn.Module):
    """The convolutions of AlexNet (Krizhevsky 2014), as in torchvision, from random weights."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, height, width, 3) to maps (B, 6, 6, 256)."""
        for i, (channels, length, stride, padding, pooled) in enumerate(CONVOLUTIONS):
            x = Convolution(channels, length, stride, padding, self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(x)
            x = max_pool(x) if pooled else x
        rows, columns = (adaptive_mean(n).astype(x.dtype) for n in x.shape[1:3])
        return jnp.einsum("ih,jw,bhwd->bijd", rows, columns, x, optimize="optimal")


class Convolution(nn.Module):
    """An `nn.Conv` of two dimensions, as one product; in a loop on a CPU, XLA's is far slower."""

    channels: int
    length: int
    stride: int
    padding: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, height, width, C) to (B, new height, new width, channels)."""
        shape = (self.length, self.length, x.shape[-1], self.channels)
        kernel = self.param("kernel", xavier, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = jnp.pad(x, ((0, 0), *[(self.padding, self.padding)] * 2, (0, 0)))
        height, width = (n - self.length + 1 for n in x.shape[1:3])
        parts = [
            x[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(self.length)
            for j in range(self.length)
        ]
        return jnp.concatenate(parts, axis=-1) @ kernel.reshape(-1, self.channels) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """Returns the maxima of (B, H, W, D) over 3 x 3, every second one."""
    # Not nn.max_pool, whose gradient is slow on a CPU.
    for axis in (1, 2):
        last = x.shape[axis] - 3
        parts = (jax.lax.slice_in_dim(x, i, last + i + 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(next(parts), next(parts)), next(parts))
    return x


def adaptive_mean(length: int) -> np.ndarray:
    """Returns means as (6, length): row i of those from floor(i n / 6) to ceil((i + 1) n / 6)."""
    rows = np.zeros((POOLED, length), np.float32)
    for i in range(POOLED):
        start, end = i * length // POOLED, -(-(i + 1) * length // POOLED)
        rows[i, start:end] = 1 / (end - start)
    return rows
