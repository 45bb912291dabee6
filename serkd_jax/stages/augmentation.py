"""SpecAugment on stored features (Park et al. 2019), Section 4.4 of the paper."""

import jax
import jax.numpy as jnp


def example_keys(rng: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example, folded from its own index, so that draws do not depend on batching.

    Args:
        rng: a key.
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

    Widths are U{0..max}, but at most half of what there is; starts are uniform over the places
    where the block fits (in time, among the valid frames).

    Args:
        keys: (B,) keys, one per example.
        features: (B, T, N).
        num_frames: (B,) int, valid frames.
        max_frequency_width: widest block of features.
        max_time_width: widest block of frames.
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
