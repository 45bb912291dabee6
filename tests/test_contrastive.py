"""The MoCo queue, the momentum update, and SpecAugment."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from serkd_jax.stages.augmentation import example_keys, spec_augment
from serkd_jax.stages.contrastive import empty_queue, enqueue, momentum_update

augment = jax.jit(spec_augment, static_argnums=(3, 4))


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (11, 3), (5, 5)])
def test_the_queue_holds_the_latest_keys_as_a_deque_does(size, batch):
    steps = 400
    keys = np.random.default_rng(0).normal(size=(steps, batch, 3)).astype(np.float32)
    labels = np.arange(steps * batch, dtype=np.int32).reshape(steps, batch)

    @jax.jit
    def push_all(queue):
        def push(queue, new):
            queue = enqueue(queue, *new)
            return queue, queue

        return jax.lax.scan(push, queue, (keys, labels))[1]

    queues = jax.tree.map(np.asarray, push_all(empty_queue(size, 3)))
    expected = deque([(-1, np.zeros(3))] * size, maxlen=size)
    for step in range(steps):
        expected.extend(zip(labels[step], keys[step], strict=True))
        oldest = (step + 1) * batch % size
        assert queues.position[step] == oldest
        in_order = (np.arange(size) + oldest) % size
        assert queues.labels[step, in_order].tolist() == [label for label, _ in expected]
        np.testing.assert_array_equal(queues.keys[step, in_order], [key for _, key in expected])


def test_a_batch_larger_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="does not fit a queue of 2"):
        enqueue(empty_queue(2, 3), jnp.ones((4, 3)), jnp.ones(4, jnp.int32))


def test_momentum_update_approaches_a_constant_encoder_geometrically():
    start, target = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 3.0])}
    moved = jax.jit(
        lambda k: jax.lax.fori_loop(0, 300, lambda _, k: momentum_update(k, target, 0.99), k)
    )(start)
    remaining = 0.99**300
    expected = remaining * start["w"] + (1 - remaining) * target["w"]
    np.testing.assert_allclose(moved["w"], expected, rtol=1e-4)


def test_momentum_update_of_a_moving_encoder_equals_torch_lerp_for_every_parameter():
    rng = np.random.default_rng(1)
    query = {"w": rng.normal(size=(200, 2, 3)), "b": {"c": rng.normal(size=(200, 3))}}
    keys = jax.tree.map(lambda q: jnp.zeros(q.shape[1:]), query)
    keys, _ = jax.jit(jax.lax.scan, static_argnums=0)(
        lambda k, q: (momentum_update(k, q, 0.9), None), keys, query
    )
    for ours, moving in zip(jax.tree.leaves(keys), jax.tree.leaves(query), strict=True):
        expected = torch.zeros(ours.shape, dtype=torch.float64)
        for q in torch.tensor(moving):
            expected = torch.lerp(expected, q, 1 - 0.9)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def masks():
    """4,000 clips of 20 x 30, the last five frames invalid: what SpecAugment zeroed of each.

    The widths allowed are 0..7 features and 0..3 frames: 8 and 4 cases, so that draws from one
    random number would show.
    """
    features = np.random.default_rng(2).normal(size=(4000, 20, 30)).astype(np.float32)
    keys = example_keys(jax.random.key(0), jnp.arange(4000))
    masked = np.asarray(augment(keys, features, jnp.full(4000, 15), 7, 3))
    frequency, time = (masked == 0).all(1), (masked == 0).all(2)
    zeroed = time[:, :, None] | frequency[:, None, :]
    np.testing.assert_array_equal(masked, np.where(zeroed, 0, features))
    return {"frequency": frequency, "time": time}


@pytest.mark.parametrize(("axis", "room", "widest"), [("frequency", 30, 7), ("time", 15, 3)])
def test_masks_are_blocks_of_uniform_width_and_place_among_what_is_valid(masks, axis, room, widest):
    zero = masks[axis]
    widths, starts = zero.sum(-1), zero.argmax(-1)
    positions = np.arange(zero.shape[-1])
    block = (positions >= starts[:, None]) & (positions < (starts + widths)[:, None])
    np.testing.assert_array_equal(zero, block)
    counts = np.bincount(widths)
    assert len(counts) == widest + 1
    assert stats.chisquare(counts).pvalue > 1e-4
    for width in range(1, widest + 1):
        counts = np.bincount(starts[widths == width])
        assert len(counts) == room - width + 1
        assert stats.chisquare(counts).pvalue > 1e-4


def test_masks_in_frequency_and_time_are_independent(masks):
    table = stats.contingency.crosstab(masks["frequency"].sum(-1), masks["time"].sum(-1)).count
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_mask_wider_than_the_clip_leaves_half_of_it():
    keys = example_keys(jax.random.key(0), jnp.arange(200))
    frames = jnp.tile(jnp.array([5, 1]), 100)
    left = np.asarray(augment(keys, jnp.ones((200, 5, 7)), frames, 50, 8).sum((1, 2)))
    assert left[::2].min() == 3 * 4
    assert left[1::2].min() == 5 * 4  # the only valid frame stays
    # All widths above a half count as a half: 3..50 of 7 features and 2..8 of 5 frames.
    assert np.mean(left[::2] == 3 * 4) == pytest.approx(48 / 51 * 7 / 9, abs=0.1)


def test_a_mask_depends_on_the_example_and_the_key_and_not_on_the_batch():
    def mask(seed, index):
        keys = example_keys(jax.random.key(seed), jnp.array(index))
        return np.asarray(augment(keys, jnp.ones((3, 20, 30)), jnp.full(3, 20), 9, 9))

    first, second = mask(1, [4, 5, 6]), mask(1, [6, 4, 9])
    np.testing.assert_array_equal(first[0], second[1])
    np.testing.assert_array_equal(first[2], second[0])
    distinct = np.concatenate([first, second[2:], mask(2, [4, 5, 6])])
    assert len(np.unique(distinct, axis=0)) == 7
