"""The MoCo queue, the momentum update, and SpecAugment."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serkd_jax.augmentation import example_keys, spec_augment
from serkd_jax.contrastive import empty_queue, enqueue, momentum_update


def test_the_queue_holds_the_latest_keys_as_a_deque_does():
    size, batch, width = 10, 4, 3
    rng = np.random.default_rng(0)
    queue, expected = empty_queue(size, width), deque(maxlen=size)
    push = jax.jit(enqueue)
    for step in range(50):
        keys = rng.normal(size=(batch, width)).astype(np.float32)
        labels = np.arange(step * batch, (step + 1) * batch, dtype=np.int32)
        queue = push(queue, keys, labels)
        expected.extend(zip(labels.tolist(), keys, strict=True))
        order = np.roll(np.arange(size), -int(queue.position))  # from the oldest slot on
        filled = [slot for slot in order if queue.labels[slot] >= 0]
        assert [int(queue.labels[slot]) for slot in filled] == [label for label, _ in expected]
        np.testing.assert_array_equal(queue.keys[np.array(filled)], [key for _, key in expected])


def test_a_batch_larger_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="does not fit a queue of 2"):
        enqueue(empty_queue(2, 3), jnp.ones((4, 3)), jnp.ones(4, jnp.int32))


def test_momentum_update_moves_by_one_minus_m():
    moved = momentum_update({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}, 0.9)
    np.testing.assert_allclose(moved["w"], [0.9, 0.1], rtol=1e-6)


@pytest.fixture(scope="module")
def masked():
    """1,000 all-ones clips (20 x 30), the last five frames invalid, after SpecAugment."""
    count = 1000
    keys = example_keys(jax.random.key(0), jnp.arange(count))
    features = jnp.ones((count, 20, 30))
    return np.asarray(spec_augment(keys, features, jnp.full(count, 15), 6, 4))


def test_mask_widths_are_uniform_up_to_the_maximum(masked):
    frequency_widths = (masked.sum(1) == 0).sum(-1)  # columns that are zero throughout
    time_widths = (masked.sum(2) == 0).sum(-1)
    for widths, maximum in ((frequency_widths, 6), (time_widths, 4)):
        shares = np.bincount(widths, minlength=maximum + 1) / len(widths)
        assert len(shares) == maximum + 1
        np.testing.assert_allclose(shares, 1 / (maximum + 1), atol=0.05)


def test_masks_are_single_blocks_and_time_masks_lie_in_the_valid_frames(masked):
    for axis in (1, 2):
        for clip in masked[:100]:
            zero = np.flatnonzero(clip.sum(2 - axis) == 0)
            assert len(zero) == 0 or np.array_equal(zero, np.arange(zero[0], zero[-1] + 1))
    assert masked[:, 15:].sum(2).all()


def test_a_mask_wider_than_the_clip_leaves_half_of_it():
    keys = example_keys(jax.random.key(0), jnp.arange(200))
    masked = spec_augment(keys, jnp.ones((200, 4, 6)), jnp.full(200, 4), 50, 8)
    assert masked.sum((1, 2)).min() == 2 * 3


def test_a_mask_depends_on_the_example_and_not_on_the_batch():
    rng, features = jax.random.key(1), jnp.ones((3, 20, 30))

    def mask(index):
        return spec_augment(example_keys(rng, index), features, jnp.full(3, 20), 9, 9)

    first, second = mask(jnp.array([4, 5, 6])), mask(jnp.array([6, 4, 9]))
    np.testing.assert_array_equal(first[0], second[1])
    np.testing.assert_array_equal(first[2], second[0])
    assert not np.array_equal(first[1], second[2])
