"""Operations on frames that models share: means, standardised series, positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean of (B, L, D) over the positions where `mask` (B, L) is True."""
    weights = mask.astype(x.dtype)
    return jnp.einsum("bld,bl->bd", x, weights) / jnp.maximum(weights.sum(1), 1)[:, None]


def average_frames(frames: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Averages each group of `count` neighbouring frames over those that are valid.

    Args:
        frames: (B, T, N), zero where they are not valid.
        valid: (B, T) bool, True at valid frames.
        count: number of frames in a group.

    Returns:
        The means (B, ceil(T / count), N), and (B, ceil(T / count)) bool, True where a group has a
        valid frame.
    """
    if count == 1:
        return frames, valid
    whole = frames.shape[1] // count * count

    def average(x: jax.Array) -> jax.Array:
        """Averages with 0 for missing frames at the end; pooling's own padding differs in ONNX."""
        means = nn.avg_pool(x, window_shape=(count,), strides=(count,))
        rest = x[:, whole:].sum(1, keepdims=True) / count
        return means if whole == x.shape[1] else jnp.concatenate([means, rest], axis=1)

    share = average(valid[..., None].astype(frames.dtype))
    return average(frames) / jnp.maximum(share, 1 / count), share[..., 0] > 0


def standardize_series(features: jax.Array, valid: jax.Array) -> jax.Array:
    """Standardises every series of (B, T, N) over its valid frames; padding stays 0."""
    weights = valid.astype(features.dtype)[:, :, None]
    count = jnp.maximum(weights.sum(1, keepdims=True), 1)
    centred = (features - (features * weights).sum(1, keepdims=True) / count) * weights
    variance = jnp.square(centred).sum(1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-5)


def sinusoidal_positions(length: int, width: int) -> jax.Array:
    """Returns the (length, width) positions of Vaswani et al. 2017; `width` must be even."""
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)
