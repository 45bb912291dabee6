"""DWFormer: its windows against a loop, its layers against torch, its blocks window by window."""

import jax
import numpy as np
import pytest
import torch

from serkd_jax.models.students.dwformer import Block, GroupLayer, find_hot, find_windows
from tiny_students import count, random_inputs, random_variables, tiny

HEADS, FFN, D = 2, 12, 8
LAYER, BLOCK = GroupLayer(HEADS, FFN, 0.0, None), Block(HEADS, FFN, 0.0, None)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def size_of(module, *inputs):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_its_sizes_are_those_of_the_original():
    """The public code builds norms that it never uses, which its printed counts include."""
    x, ones = np.zeros((1, 4, 1024), np.float32), np.ones((1, 4), int)
    assert size_of(GroupLayer(8, 512, 0.3, None), x, ones, None) == 5_252_608
    assert size_of(Block(8, 512, 0.3, None), x, ones, ones, None) == 10_509_312
    norm = 2 * 1024
    assert count("dwformer", 4, 324, 1024) == (37_445_892 - norm, 0)
    assert count("dwformer", 7, 225, 1024, num_blocks=2) == (26_937_351 - 2 * norm, 0)


def windows_of(hot):
    """The lengths of the windows, by the rule as it is written."""
    changes = [t for t in range(len(hot)) if t == len(hot) - 1 or hot[t] != hot[t + 1]]
    ends = [t for t in changes if t == len(hot) - 1 or t - 1 not in changes]
    return np.diff([-1, *ends]).tolist()


def numbers(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


@pytest.mark.parametrize(
    ("hot", "lengths"),
    [("1100", [2, 2]), ("110100", [2, 4]), ("1000", [1, 3]), ("0001", [3, 1]), ("1", [1])],
)
def test_a_single_frame_joins_the_next_window(hot, lengths):
    hot = np.array([list(map(int, hot))], bool)
    assert windows_of(hot[0]) == lengths
    found = find_windows(hot, np.ones_like(hot))
    np.testing.assert_array_equal(found[0], numbers(lengths))


@pytest.mark.parametrize("see_padding", [False, True])
def test_windows_are_those_of_a_loop_with_ties_and_padding(see_padding):
    rng, cases, frames = np.random.default_rng(0), 900, 21
    few = rng.integers(0, rng.integers(1, 6, (cases, 1)), (cases, frames))
    score = np.where(rng.random((cases, 1)) < 0.7, few, rng.random((cases, frames)))
    score = score.astype(np.float32)
    num_frames = rng.integers(1, frames + 1, cases)
    valid = (np.arange(frames) < num_frames[:, None]) | see_padding
    hot = np.asarray(find_hot(score, num_frames, valid))
    windows = np.asarray(find_windows(hot, valid))
    for row in range(cases):
        n = num_frames[row]
        part = score[row] if see_padding else score[row, :n]
        threshold = np.sort(part)[int(0.5 * n + (len(part) - n))]
        expected = part >= threshold
        np.testing.assert_array_equal(hot[row, : len(part)], expected)
        np.testing.assert_array_equal(windows[row, : len(part)], numbers(windows_of(expected)))
        assert (windows[row, len(part) :] == -1).all()
    assert windows.max() < frames // 2 + 1  # the slots for windows in a block


def test_a_layer_of_one_group_is_torchs_and_scores_the_attention_that_is_received():
    x = np.random.default_rng(0).normal(size=(3, 10, D)).astype(np.float32)
    variables = random_variables(LAYER, x, np.zeros((3, 10)), None)
    ours, received = LAYER.apply(variables, x, np.zeros((3, 10)), None)
    p = jax.tree.map(torch.tensor, variables["params"])
    theirs = torch.nn.TransformerEncoderLayer(D, HEADS, FFN, dropout=0.0, batch_first=True).eval()
    projections = [p[name] for name in ("q_proj", "k_proj", "v_proj")]
    weights = {
        "self_attn.in_proj_weight": torch.cat([x["kernel"].T for x in projections]),
        "self_attn.in_proj_bias": torch.cat([x["bias"] for x in projections]),
    }
    dense = ("out_proj", "intermediate_dense", "output_dense")
    for name, part in zip(("self_attn.out_proj", "linear1", "linear2"), dense, strict=True):
        weights |= {f"{name}.weight": p[part]["kernel"].T, f"{name}.bias": p[part]["bias"]}
    for name, part in (("norm1", "layer_norm"), ("norm2", "final_layer_norm")):
        weights |= {f"{name}.weight": p[part]["scale"], f"{name}.bias": p[part]["bias"]}
    theirs.load_state_dict(weights)
    x = torch.tensor(x)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(x), atol=1e-5)
        attention = theirs.self_attn(x, x, x)[1]  # averaged over the heads
    np.testing.assert_allclose(received, attention.sum(1), atol=1e-5)


def norm(params, x):
    spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / spread * params["scale"] + params["bias"]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def layer_alone(params, x):
    """A layer on the tokens (L, D) of one group, and the attention that they receive."""
    q, k, v = (
        dense(params[name], x).reshape(len(x), HEADS, -1).swapaxes(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    weights = np.exp(q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5)
    weights /= weights.sum(-1, keepdims=True)
    attended = dense(params["out_proj"], (weights @ v).swapaxes(0, 1).reshape(x.shape))
    x = norm(params["layer_norm"], x + attended)
    h = dense(params["output_dense"], np.maximum(dense(params["intermediate_dense"], x), 0))
    return norm(params["final_layer_norm"], x + h), weights.mean(0).sum(0)


def block_by_window(params, x, hot):
    """A block on the frames (n, D) of one recording, one window after the other."""
    x, frames, scores, tokens = norm(params["local_norm"], x), [], [], []
    lengths = windows_of(hot)
    for part in np.split(np.arange(len(x)), np.cumsum(lengths)[:-1]):
        y, received = layer_alone(params["local"], x[part])
        frames.append(y * np.where(hot[part], 1, 0.85)[:, None])
        scores.append(softmax(received))
        tokens.append(scores[-1] @ frames[-1])
    windows, received = layer_alone(params["wide"], norm(params["wide_norm"], np.stack(tokens)))
    frames = np.concatenate([y + w for y, w in zip(frames, windows, strict=True)])
    of_windows = softmax(received)
    return frames, np.concatenate([a * b for a, b in zip(scores, of_windows, strict=True)])


@pytest.mark.parametrize("see_padding", [False, True])
def test_a_student_is_its_blocks_window_by_window(see_padding):
    """With recordings of other lengths beside each, and with biases, which make scores differ.

    Where padding takes part, it does so in all but the index of the threshold.
    """
    model = tiny("dwformer", num_blocks=2, see_padding=see_padding)
    features, num_frames = random_inputs(8, 15, D)
    params = random_variables(model, features, num_frames)["params"]
    found = jax.jit(model.apply)({"params": params}, features, num_frames)
    several = 0
    for row, n in enumerate(num_frames):
        x = features[row] if see_padding else features[row, :n]
        x, received = layer_alone(params["layer"], norm(params["norm_0"], x))
        for i in range(2):
            x = norm(params["norm_1"], x) if i else x
            score = softmax(received)
            hot = score >= np.sort(score)[int(0.5 * n + len(x) - n)]
            several += len(windows_of(hot)) > 2
            x, received = block_by_window(params[f"blocks_{i}"], x, hot)
        np.testing.assert_allclose(found.hidden[row], x.mean(0), atol=2e-5)
    assert several > 6


def test_a_block_has_room_for_as_many_windows_as_there_can_be():
    hot = np.array([0, 1, 1, 0, 0, 1, 1], bool)
    assert windows_of(hot) == [1, 2, 2, 2]
    x = np.random.default_rng(0).normal(size=(1, 7, D)).astype(np.float32)
    weight = np.where(hot, 1, 0.85)[None].astype(np.float32)
    inputs = x, numbers(windows_of(hot))[None], weight, None
    params = random_variables(BLOCK, *inputs)["params"]
    found = BLOCK.apply({"params": params}, *inputs)
    for ours, expected in zip(found, block_by_window(params, x[0], hot), strict=True):
        np.testing.assert_allclose(ours[0], expected, atol=1e-5)
