"""Operations on frames that models share: means, standardised series, positions."""

import jax
import jax.numpy as jnp


def valid_frames(features: jax.Array, num_frames: jax.Array) -> jax.Array:
    """Returns (B, T) bool, True at the first `num_frames` (B,) frames of features (B, T, ...)."""
    return jnp.arange(features.shape[1]) < num_frames[:, None]


def zero_invalid(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns (B, ..., L, D) with 0 where `valid`, (B, L) or alike, is False."""
    return x * valid[..., None].astype(x.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns an array in float32, or as it is if it is more precise."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
    share = average_groups(valid[..., None].astype(frames.dtype), count)
    means = average_groups(frames, count) / jnp.maximum(share, 1 / count)
    return means, share[..., 0] > 0


def deviate_frames(frames: jax.Array, valid: jax.Array, means: jax.Array, count: int) -> jax.Array:
    """Returns the standard deviations of the groups whose means `average_frames` returned.

    They are at least 0.003, so that their gradient is finite; 0 where no frame is valid.
    """
    means = jnp.repeat(means, count, axis=1)[:, : frames.shape[1]]
    squares = jnp.square(zero_invalid(frames - means, valid))
    variances, group_valid = average_frames(squares, valid, count)
    return zero_invalid(jnp.sqrt(variances + 1e-5), group_valid)


def average_groups(x: jax.Array, count: int) -> jax.Array:
    """Averages each group of `count` neighbours of (B, T, N), with 0 for those after the end."""
    # Not nn.avg_pool, whose gradient is slow on a CPU and whose padding differs in ONNX.
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % count), (0, 0)))
    return x.reshape(x.shape[0], -1, count, x.shape[2]).mean(2)


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
