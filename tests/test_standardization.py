"""Mean and spread of features against scikit-learn, and what they make of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from serkd_jax.data.examples import Examples
from serkd_jax.stages.standardization import (
    FLOOR,
    Statistics,
    measure_statistics,
    no_statistics,
    standardize,
)

SIZE, T, N = 60, 20, 7
LENGTH = np.random.default_rng(0).integers(1, T + 1, SIZE).astype(np.int32)
VALID = np.arange(T) < LENGTH[:, None]
MEMBERS = np.random.default_rng(1).random((3, SIZE)) < 0.5


def make_features(mean, spread, dtype=np.float16):
    """(SIZE, T, N), the clips' own means apart, 0 after the valid frames."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(SIZE, T, N)) + rng.normal(size=(SIZE, 1, N))
    return np.where(VALID[..., None], mean + spread * values, 0).astype(dtype)


MILD = make_features(np.linspace(-1, 2, N), np.linspace(0.1, 3, N))


def chunks(features, size=16, length=LENGTH):
    """As `Examples.chunks` gives them."""
    for start in range(0, SIZE, size):
        part = slice(start, start + size)
        yield np.arange(SIZE)[part], features[part], length[part]


def frames_of(features, member):
    """(frames, N) float64: all valid frames of the members, one after the other."""
    return features[member][VALID[member]].astype(np.float64)


@pytest.mark.parametrize(
    "features",
    [
        MILD,
        # A few of Whisper's dimensions are thousands away from 0, and float16 has steps of 2 there.
        make_features(np.linspace(-5000, 5000, N), 20.0),
        make_features(np.linspace(-5000, 5000, N), 0.5, np.float32),
        make_features(0.0, np.logspace(-2, 2, N), np.float32),
    ],
    ids=["mild", "far_float16", "far_float32", "uneven"],
)
def test_mean_and_spread_are_those_of_all_valid_frames(features):
    measured = measure_statistics(chunks(features), MEMBERS)
    for member, statistics in zip(MEMBERS, measured, strict=True):
        scaler = StandardScaler().fit(frames_of(features, member))
        np.testing.assert_allclose(statistics.mean, scaler.mean_, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(statistics.spread, np.sqrt(scaler.var_), rtol=1e-5)
        assert statistics.mean.dtype == statistics.spread.dtype == np.float32


def test_several_sets_in_one_pass_are_measured_as_each_alone():
    together = measure_statistics(chunks(MILD), MEMBERS)
    for k, statistics in enumerate(together):
        (alone,) = measure_statistics(chunks(MILD), MEMBERS[k : k + 1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), statistics, alone)


@pytest.mark.parametrize("size", [1, 7, SIZE])
def test_it_does_not_matter_how_many_are_read_at_a_time(size):
    for expected, actual in zip(
        measure_statistics(chunks(MILD), MEMBERS),
        measure_statistics(chunks(MILD, size), MEMBERS),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


def test_utterances_of_no_set_do_not_count():
    others = ~MEMBERS[0]
    poisoned = np.where(others[:, None, None] & VALID[..., None], np.float16(1e4), MILD)
    lengths = np.where(others, 1, LENGTH).astype(np.int32)
    (expected,) = measure_statistics(chunks(MILD), MEMBERS[:1])
    (actual,) = measure_statistics(chunks(poisoned, length=lengths), MEMBERS[:1])
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_padding_does_not_count():
    longer = np.pad(MILD, ((0, 0), (0, 30), (0, 0)))
    for expected, actual in zip(
        measure_statistics(chunks(MILD), MEMBERS),
        measure_statistics(chunks(longer), MEMBERS),
        strict=True,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


def test_a_dimension_that_does_not_vary_is_not_blown_up():
    features = MILD.copy()
    features[..., 2] = np.where(VALID, np.float16(1234), 0)
    for statistics in measure_statistics(chunks(features), MEMBERS):
        floor = FLOOR * np.median(statistics.spread)
        assert statistics.spread[2] == pytest.approx(floor, rel=1e-5)
        standard = standardize(jnp.asarray(features), LENGTH, statistics)
        assert np.abs(standard[..., 2]).max() == 0
    (nothing,) = measure_statistics(chunks(0 * MILD), MEMBERS[:1])
    np.testing.assert_array_equal(nothing.mean, 0)
    assert (nothing.spread > 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_are_standardised_and_their_padding_stays_zero(dtype):
    features = make_features(np.linspace(-100, 100, N), np.linspace(1, 3, N), dtype)
    with jax.enable_x64(True):
        (statistics,) = measure_statistics(chunks(features), np.ones((1, SIZE), bool))
        standard = np.asarray(standardize(jnp.asarray(features), LENGTH, statistics))
    assert standard.dtype == (np.float64 if dtype == np.float64 else np.float32)
    expected = np.zeros(features.shape)
    for place, clip, length in zip(expected, features.astype(np.float64), LENGTH, strict=True):
        place[:length] = (clip[:length] - statistics.mean) / statistics.spread
    np.testing.assert_allclose(standard, expected, rtol=1e-4, atol=1e-5)
    assert not standard[~VALID].any()
    np.testing.assert_allclose(standard[VALID].mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(standard[VALID].std(0), 1, atol=1e-3)


def test_whatever_is_stored_as_padding_becomes_zero():
    features = np.where(VALID[..., None], MILD, np.float16("nan"))
    standard = standardize(jnp.asarray(features), LENGTH, no_statistics(N))
    np.testing.assert_array_equal(standard, MILD.astype(np.float32))


def test_statistics_of_nothing_change_no_bit():
    standard = standardize(jnp.asarray(MILD), LENGTH, no_statistics(N))
    np.testing.assert_array_equal(standard, MILD.astype(np.float32))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_resident_examples_and_those_that_are_read_give_the_same_bits(num_devices):
    devices = jax.devices()[:num_devices]
    resident = Examples({}, devices).with_columns(inputs=MILD, length=LENGTH)
    read = Examples({}, devices, lambda rows: MILD[rows]).with_columns(length=LENGTH)
    ones, others = (
        measure_statistics(examples.chunks(16), MEMBERS) for examples in (resident, read)
    )
    jax.tree.map(np.testing.assert_array_equal, ones, others)
    jax.tree.map(np.testing.assert_array_equal, ones, measure_statistics(chunks(MILD), MEMBERS))
    assert all(isinstance(one, Statistics) for one in ones)


@pytest.mark.parametrize("size", [1, 16, 60, 100])
def test_chunks_go_through_all_examples_in_order(size):
    examples = Examples({}, jax.devices()[:1]).with_columns(inputs=MILD, length=LENGTH)
    rows, inputs, lengths = map(np.concatenate, zip(*examples.chunks(size), strict=True))
    np.testing.assert_array_equal(rows, np.arange(SIZE))
    np.testing.assert_array_equal(inputs, MILD)
    np.testing.assert_array_equal(lengths, LENGTH)
