"""CA-MSER against torch, its views, its co-attention without softmax, and its segments."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serkd_jax.models.students import find_student
from serkd_jax.models.students.camser import AlexNet, Range, adaptive_mean
from serkd_jax.stages.contrastive import momentum_update
from tiny_students import count, random_inputs, random_variables, tiny

DEAD_CLASSIFIER = 54_550_532  # of AlexNet, which the public code builds and never reads
WAV2VEC2_BASE = 94_371_712


def test_its_sizes_are_those_of_the_original():
    parameters, statistics = count("camser", 4, 150, 480 + 768)
    assert statistics == 2 * 200 + 1  # the range of each bin, and whether there is one
    assert parameters + WAV2VEC2_BASE == 120_072_409
    assert parameters + WAV2VEC2_BASE + DEAD_CLASSIFIER == 174_622_941
    assert count("camser", 4, 150, 480 + 1024)[0] == 25_733_465


def test_its_images_become_maps_of_the_original_sizes():
    shapes = {}

    def note(next_call, args, kwargs, context):
        out = next_call(*args, **kwargs)
        shapes[context.module.name] = out.shape[1:3]
        return out

    with nn.intercept_methods(note):
        model, image = AlexNet(None), jnp.zeros((1, 256, 384, 3))
        out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), image)[0])
    assert [shapes[f"conv_{i}"] for i in range(5)] == [(63, 95), (31, 47), *[(15, 23)] * 3]
    assert out.shape == (1, 6, 6, 256)


def test_adaptive_means_are_those_of_torch():
    for length in (1, 5, 7, 11, 12):
        x = np.random.default_rng(length).normal(size=(1, 3, length)).astype(np.float32)
        expected = F.adaptive_avg_pool1d(torch.tensor(x), 6)
        np.testing.assert_allclose(x @ adaptive_mean(length).T, expected, atol=1e-6)


def dense(params, x):
    return F.relu(x @ params["kernel"] + params["bias"])


def alexnet(params, image):
    """Maps (6, 6, 256) of an image (3, H, W)."""
    x = image[None]
    for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
        conv = params[f"conv_{i}"]
        kernel = conv["kernel"].permute(3, 2, 0, 1)
        x = F.relu(F.conv2d(x, kernel, conv["bias"], stride, padding))
        x = F.max_pool2d(x, 3, 2) if i in (0, 1, 4) else x
    return F.adaptive_avg_pool2d(x, (6, 6))[0].permute(1, 2, 0)


def lstm(params, x, width):
    """Two layers in both directions over (n, N)."""
    for layer in range(2):
        net = torch.nn.LSTM(x.shape[1], width, bidirectional=True)
        weights = {}
        for name, end in (("forward", ""), ("backward", "_reverse")):
            part = params[f"{name}_{layer}"]
            weights |= {f"weight_ih_l0{end}": part["input"]["kernel"].T}
            weights |= {f"weight_hh_l0{end}": part["kernel"].T}
            weights |= {f"bias_ih_l0{end}": part["input"]["bias"]}
            weights |= {f"bias_hh_l0{end}": part["bias"]}
        net.load_state_dict(weights)
        x = net(x)[0]
    return x


def segment(model, variables, frames):
    """The fused vector and the log probabilities of one segment (n, N), filled up here."""
    params, seen = variables["params"], variables["batch_stats"]["range"]
    n, bins, length = len(frames), model.bins, model.segment_frames
    spectra = frames[:, : 2 * bins].reshape(2 * n, bins)
    cepstra = frames[:, 2 * bins : 2 * (bins + model.coefficients)].reshape(2 * n, -1)
    states = frames[:, 2 * (bins + model.coefficients) :]

    levels = torch.zeros(2 * length, bins)
    levels[: 2 * n] = ((spectra - seen["low"]) / (seen["high"] - seen["low"])).clip(0, 1)
    image = F.interpolate(levels.T.flip(0)[None, None], model.image, mode="bilinear")[0]
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    maps = alexnet(params["alexnet"], (image.expand(3, -1, -1) - mean) / deviation)
    spectrum = dense(params["spectrum"], maps.reshape(-1))

    both = torch.zeros(2 * length, 2 * model.lstm_width)
    both[: 2 * n] = lstm(params, F.normalize(cepstra, dim=1, eps=1e-12), model.lstm_width)
    cepstrum = dense(params["cepstrum"], both.reshape(-1))

    weights = dense(params["co_attention"], torch.cat([spectrum, cepstrum]))
    heard = min(n, length - 1)
    state = dense(params["state"], weights[:heard] @ states[:heard])
    fused = dense(params["fusion"], torch.cat([spectrum, cepstrum, state]))
    hidden = dense(params["classifier_0"], fused)
    last = params["classifier_1"]
    return fused, F.log_softmax(hidden @ last["kernel"] + last["bias"], dim=-1)


@pytest.fixture(scope="module")
def example():
    """A tiny model, its variables, and recordings of one and of two segments."""
    model, (features, num_frames) = tiny("camser", segment_frames=10), random_inputs(5, 20, 8)
    num_frames[1] = 10  # just one segment
    features[1, 10:] = 0
    variables = random_variables(model, features, num_frames)
    ends = {"low": np.full(2, -1.0), "high": np.full(2, 1.5)}
    variables["batch_stats"] = {"range": ends | {"seen": np.ones(())}}
    return model, variables, features, num_frames


def test_it_is_torchs_for_each_recording_by_itself(example):
    model, variables, features, num_frames = example
    found = jax.jit(model.apply)(variables, features, num_frames)
    as_torch = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float32)), variables)
    length = model.segment_frames
    for row, n in enumerate(num_frames):
        starts, recording = range(0, n, length), torch.tensor(features[row, :n])
        with torch.no_grad():
            parts = [segment(model, as_torch, recording[s : s + length]) for s in starts]
        hidden, logits = (sum(part) / len(parts) for part in zip(*parts, strict=True))
        np.testing.assert_allclose(found.hidden[row], hidden, atol=2e-5)
        np.testing.assert_allclose(found.logits[row], logits, atol=2e-5)


def test_without_a_softmax_the_weights_are_free_and_may_all_be_zero(example):
    model, variables, features, num_frames = example
    other = features.copy()
    other[..., 6:] += 1.0  # the encoder's frames

    def logits(bias, features):
        params = dict(variables["params"])
        shapes = params["co_attention"]
        params["co_attention"] = {
            "kernel": np.zeros_like(shapes["kernel"]),
            "bias": np.full_like(shapes["bias"], bias),
        }
        return apply({**variables, "params": params}, features, num_frames).logits

    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(logits(-1, features), logits(-1, other))
    assert np.abs(logits(1, features) - logits(1, other)).max() > 1e-3
    doubled = features.copy()
    doubled[..., 6:] *= 2
    np.testing.assert_allclose(logits(2, features), logits(1, doubled), atol=1e-5)


def test_the_loudness_of_a_cepstrum_and_the_last_frame_of_a_segment_do_not_matter(example):
    model, variables, features, num_frames = example
    apply = jax.jit(model.apply)
    expected = apply(variables, features, num_frames).logits
    louder = features.copy()
    louder[..., 4:6] *= np.linspace(0.5, 3, 20)[:, None]
    np.testing.assert_allclose(apply(variables, louder, num_frames).logits, expected, atol=1e-5)
    last = features.copy()
    last[0, 9, 6:] += 5
    np.testing.assert_array_equal(apply(variables, last, num_frames).logits[0], expected[0])
    last[0, :9, 6:] += 5
    assert np.abs(apply(variables, last, num_frames).logits[0] - expected[0]).max() > 1e-3


def test_the_range_of_a_bin_is_that_of_the_training_data_and_padding_does_not_widen_it():
    scale = Range(None)
    first = np.array([[[-60.0, -30], [-20, -40], [-99, -1]]], np.float32)
    second = np.array([[[-50.0, -70], [-30, -35], [-10, -38]]], np.float32)
    variables = scale.init(jax.random.key(0), first, np.ones((1, 3), bool), training=False)
    for x, valid in ((first, [[True, True, False]]), (second, [[True] * 3])):
        _, variables = scale.apply(
            variables, x, np.array(valid), training=True, mutable=["batch_stats"]
        )
    np.testing.assert_array_equal(variables["batch_stats"]["low"], [-60, -70])
    np.testing.assert_array_equal(variables["batch_stats"]["high"], [-10, -30])
    x = np.array([[[-60.0, -50], [-10, -80], [0, 0]]], np.float32)
    found = scale.apply(variables, x, np.ones((1, 3), bool), training=False)
    np.testing.assert_allclose(found[0], [[0, 0.5], [1, 0], [1, 1]])


def test_the_range_is_that_of_all_devices_and_its_moving_average_is_a_range_too():
    x = np.random.default_rng(0).uniform(-80, 0, (2, 3, 5, 7)).astype(np.float32)
    valid = np.arange(5) < np.array([[5, 2, 3], [1, 4, 5]])[..., None]
    variables = Range(None).init(jax.random.key(0), x[0], valid[0], training=False)

    def update(scale, x, valid):
        return scale.apply(variables, x, valid, training=True, mutable=["batch_stats"])

    _, whole = update(Range(None), x.reshape(6, 5, 7), valid.reshape(6, 5))
    _, parts = jax.vmap(functools.partial(update, Range("device")), axis_name="device")(x, valid)
    for device in range(2):
        jax.tree.map(lambda a, b, i=device: np.testing.assert_array_equal(a, b[i]), whole, parts)
    np.testing.assert_array_equal(whole["batch_stats"]["low"], x[valid].min(0))

    followed = momentum_update(variables, whole, 0.999)
    expected = Range(None).apply(whole, x[0], valid[0], training=False)
    found = Range(None).apply(followed, x[0], valid[0], training=False)
    assert np.ptp(expected) == 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_without_its_views_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"the features have 512: .* frontend\.beside=spectra"):
        find_student("camser")(3, bins=256).check(100, 512)
    with pytest.raises(ValueError, match=r"student\.image is not two"):
        find_student("camser")(3, image=(256,)).check(100)
