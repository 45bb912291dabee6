"""SpecAugment on stored features (Park et al. 2019; Section 4.4 of the paper)."""

import jax
import jax.numpy as jnp


def example_keys(rng: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per example, so that its draws do not depend on the batch it is in.

    Args:
        rng: the key into which each example's index is folded.
        index: (B,) int, the example's number in the corpus.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, index)


def spec_augment(
    keys: jax.Array,
    features: jax.Array,
    num_frames: jax.Array,
    max_frequency_width: int,
    max_time_width: int,
) -> jax.Array:
    """Zeroes one block of features and one block of frames of every example.

    The width of a block is drawn from U{0..max}, but is at most half of the features or valid
    frames. Its start is uniform over the positions where it fits (in time, among the valid frames).

    Args:
        keys: (B,) keys, one per example.
        features: (B, T, N) features.
        num_frames: (B,) int, the numbers of valid frames.
        max_frequency_width: width of the widest block of features.
        max_time_width: width of the widest block of frames.
    """
    time, variates = features.shape[1:]

    def outside_block(key: jax.Array, length: int, limit: jax.Array, max_width: int) -> jax.Array:
        width_key, start_key = jax.random.split(key)
        width = jnp.minimum(jax.random.randint(width_key, (), 0, max_width + 1), limit // 2)
        start = jax.random.randint(start_key, (), 0, limit - width + 1)
        position = jnp.arange(length)
        return (position < start) | (position >= start + width)

    def augment(key: jax.Array, x: jax.Array, frames: jax.Array) -> jax.Array:
        frequency_key, time_key = jax.random.split(key)
        keep_frequency = outside_block(frequency_key, variates, variates, max_frequency_width)
        keep_time = outside_block(time_key, time, frames, max_time_width)
        return x * (keep_time[:, None] & keep_frequency[None, :])

    return jax.vmap(augment)(keys, features, num_frames)
