"""The temporal shift, and the three students that have it, against torch; their masks."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serkd_jax.models.students import find_student
from serkd_jax.models.students.shiftcnn import Masks, temporal_shift
from tiny_students import count, random_inputs, random_variables, tiny

KINDS = ("shiftcnn", "shiftformer", "shiftlstm")


def test_its_sizes_are_those_of_the_original():
    sizes = {(768, 4): 9_465_604, (768, 7): 9_467_911, (1024, 4): 16_815_108}
    for (width, classes), size in sizes.items():
        assert count("shiftcnn", classes, 374, width) == (size, 0)
    for kind in KINDS:
        assert count(kind, 4, 20, 32) == count(kind, 4, 20, 32, shift=0), "the shift has no weights"


def test_the_shift_moves_its_channels_by_a_frame():
    ramp = np.repeat(np.arange(1.0, 6)[:, None], 8, axis=1)[None].astype(np.float32)
    one, both = temporal_shift(ramp, 2)[0].T, temporal_shift(ramp, 2, both_ways=True)[0].T
    kept, later, earlier = [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [2, 3, 4, 5, 0]
    np.testing.assert_array_equal(one, [later] * 2 + [kept] * 6)
    np.testing.assert_array_equal(both, [later] * 2 + [earlier] * 2 + [kept] * 4)


def shifted(x, fold, both_ways=False):
    """The shift of one recording (n, N), in torch."""
    y = x.clone()
    y[1:, :fold], y[0, :fold] = x[:-1, :fold], 0
    if both_ways:
        y[:-1, fold : 2 * fold], y[-1, fold : 2 * fold] = x[1:, fold : 2 * fold], 0
    return y


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def norm(params, x):
    return F.layer_norm(x, x.shape[-1:], params["scale"], params["bias"])


def pointwise(params, x):
    return dense(params["narrow"], F.gelu(dense(params["wide"], x)))


def conv_block(params, x):
    kernel = params["depthwise"]["kernel"].permute(2, 1, 0)
    bias, channels = params["depthwise"]["bias"], x.shape[1]
    h = F.conv1d(x.T[None], kernel, bias, padding=3, groups=channels)[0].T
    return pointwise(params["mlp"], norm(params["norm"], h))


def shiftcnn(params, x):
    x = x + conv_block(params["blocks_0"], x)
    return norm(params["norm"], shifted(x, 2) + conv_block(params["blocks_1"], x))


def shiftformer(params, x):
    for i in range(2):
        x = shifted(x, 2, both_ways=True)
        x = norm(params[f"norm_{i}"], x + pointwise(params[f"mlp_{i}"], x))
    return x


def shiftlstm(params, x):
    lstm = torch.nn.LSTM(8, 8, bidirectional=True)
    weights = {}
    for name, end in (("forward", ""), ("backward", "_reverse")):
        part = params[name]
        weights |= {f"weight_ih_l0{end}": part["input"]["kernel"].T}
        weights |= {f"weight_hh_l0{end}": part["kernel"].T}
        weights |= {f"bias_ih_l0{end}": part["input"]["bias"], f"bias_hh_l0{end}": part["bias"]}
    lstm.load_state_dict(weights)
    return norm(params["norm"], lstm(shifted(x, 2))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_torchs_on_recordings_without_padding(kind):
    model, (features, num_frames) = tiny(kind), random_inputs(5, 12, 8)
    params = random_variables(model, features, num_frames)["params"]
    found = jax.jit(model.apply)({"params": params}, features, num_frames)
    params = jax.tree.map(torch.tensor, params)
    for row, n in enumerate(num_frames):
        with torch.no_grad():
            hidden = globals()[kind](params, torch.tensor(features[row, :n])).mean(0)
            logits = dense(params["classifier_0"], hidden)
        np.testing.assert_allclose(found.hidden[row], hidden, atol=1e-5)
        np.testing.assert_allclose(found.logits[row], logits, atol=1e-5)


def test_only_the_second_block_is_shifted_and_by_a_sixteenth_of_the_channels():
    """Without the blocks' last layers, the first block is the identity and the second the shift."""
    model, (features, num_frames) = find_student("shiftcnn")(3), random_inputs(2, 9, 48)
    params = random_variables(model, features, num_frames)["params"]
    for i in range(2):
        narrow = params[f"blocks_{i}"]["mlp"]["narrow"]
        narrow.update(jax.tree.map(np.zeros_like, narrow))
    weights = jax.tree.map(torch.tensor, params["norm"])

    def hidden(x):
        return model.apply({"params": params}, x, num_frames).hidden

    for row, n in enumerate(num_frames):
        expected = norm(weights, shifted(torch.tensor(features[row, :n]), 3)).mean(0)
        np.testing.assert_allclose(hidden(features)[row], expected, atol=1e-6)
    slope = np.asarray(jax.grad(lambda x: np.arange(48.0) @ hidden(x)[0])(features))
    assert (slope[0, -1, :3] == 0).all(), "what is shifted out of the recording is lost"
    assert (slope[0, -1, 3:] != 0).all()
    assert (slope[0, :-1] != 0).all()


def test_the_convolutions_hear_thirteen_frames():
    """A frame of NaN in each of the copies shows in all that depends on it."""
    frames = 30
    features = np.ones((frames, frames, 8), np.float32)
    features[np.arange(frames), np.arange(frames)] = np.nan
    model, num_frames = tiny("shiftcnn"), np.full(frames, frames)
    variables = random_variables(model, features, num_frames)
    _, inner = model.apply(variables, features, num_frames, capture_intermediates=True)
    (output,) = inner["intermediates"]["norm"]["__call__"]
    distance = np.abs(np.arange(frames) - np.arange(frames)[:, None])
    np.testing.assert_array_equal(np.isnan(output).any(2), distance <= 6)


def test_masks_are_of_training_alone_and_stay_within_the_recording():
    masks, copies, n, width = Masks(15, 64), 200, 90, 100
    features = np.full((copies, 120, width), 7, np.float32)
    num_frames = np.full(copies, n)
    variables = {"params": {"instead": np.arange(100, 200, dtype=np.float32)}}
    assert (masks.apply(variables, features, num_frames, None) == features).all()
    keys = jax.random.split(jax.random.key(0), copies)
    out = np.asarray(jax.jit(masks.apply)(variables, features, num_frames, keys))
    in_time, of_features = (out > 99).any(2), (out[:, -1] == 0)
    assert not in_time[:, n:].any()
    assert set(in_time.sum(1)) <= set(range(15, 31)), "two blocks, which may overlap"
    assert (in_time.sum(1) == 30).mean() > 0.5
    assert (in_time.sum(0)[:n] > 0).all()
    assert set(of_features.sum(1)) == {width // 2}, "64, but at most half"
    expected = np.where(in_time[..., None], np.arange(100, 200), 7)
    np.testing.assert_array_equal(out, np.where(of_features[:, None], 0, expected))
    assert len({row.tobytes() for row in in_time}) > 150, "each example has its own"
