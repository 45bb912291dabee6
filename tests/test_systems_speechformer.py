"""SpeechFormer++: its attention, its merges and the whole student against loops and torch."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serkd_jax.models.frames import sinusoidal_positions
from serkd_jax.models.students import find_student
from serkd_jax.models.students.speechformer import attend_to_words_and_neighbours, merge
from tiny_students import count, random_inputs, random_variables, tiny

ORIGINAL = find_student("speechformer")
HEADS, D = 2, 8
STAGES = {"num_layers": (1, 1, 1), "windows": (3, 5), "merges": (2, 3), "word_frames": 10}


def test_its_sizes_are_those_of_the_original():
    assert count("speechformer", 4, 326, 1024) == (66_858_756, 0)
    assert count("speechformer", 7, 224, 1024) == (66_857_479, 0)
    model = find_student("speechformer")(4)
    sizes = (model.windows, model.merges, model.num_layers, model.num_heads)
    assert sizes == ((3, 11, 9), (2, 6, 4), (2, 2, 4, 4), 8)


@pytest.mark.parametrize(
    ("frames", "lengths", "words"), [(326, (326, 163, 28, 7), 7), (224, (224, 112, 19, 5), 5)]
)
def test_its_stages_have_as_many_tokens_as_the_original(frames, lengths, words):
    model = ORIGINAL(4, num_layers=(1, 1, 1, 1), mlp_dim=8)
    inputs = np.zeros((1, frames, 16), np.float32), np.array([frames])
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    inner = jax.eval_shape(
        lambda variables: model.apply(variables, *inputs, capture_intermediates=True)[1], variables
    )["intermediates"]
    found = [inner[f"norm_{stage}"]["__call__"][0].shape[1] - words for stage in range(4)]
    assert tuple(found) == lengths
    assert variables["params"]["words"].shape == (words, 16)


def softmax(x):
    x = torch.stack(x) if isinstance(x, list) else x
    return torch.softmax(x, 0)


def attention_loop(query, key, value, num_words, length, window):
    """The attention of one head on W words and n frames (W + n, d), frame by frame.

    Segments are of `length` frames; missing frames of a window or a segment are vectors of 0.
    """
    W, d = num_words, query.shape[1]
    query = query * d**-0.5
    (wq, wk, wv), (q, k, v) = (
        [x[part] for x in (query, key, value)] for part in (slice(W), slice(W, None))
    )
    zero, n = torch.zeros(d), len(q)
    words, frames = [], []
    for w in range(W):
        there = [j if j < n else None for j in range(w * length, (w + 1) * length)]
        keys = [wk[w], *(zero if j is None else k[j] for j in there)]
        values = [wv[w], *(zero if j is None else v[j] for j in there)]
        weights = softmax([wq[w] @ x for x in keys])
        words.append(sum(a * x for a, x in zip(weights, values, strict=True)))
    for i in range(n):
        near = range(i - window // 2, i + window // 2 + 1)
        near = [j if 0 <= j < n else None for j in near]
        local = softmax([q[i] @ (zero if j is None else k[j]) for j in near])
        out = sum(a * v[j] for a, j in zip(local, near, strict=True) if j is not None)
        w = i // length
        segment = range(w * length, min((w + 1) * length, n))
        share = softmax([q[j] @ words[w] for j in segment])[i - w * length]
        frames.append(out + share * words[w])
    return torch.stack(words + frames)


@pytest.mark.parametrize(("frames", "num_words", "window"), [(7, 1, 3), (10, 3, 5), (12, 4, 3)])
def test_the_attention_is_that_of_a_loop(frames, num_words, window):
    """Also where the words do not divide the frames, and where the speech ends before them."""
    rng, length = np.random.default_rng(0), -(-frames // num_words)
    shape = (3, HEADS, num_words + frames, 4)
    query, key, value = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    num_frames = [frames, frames - 2, (frames + 1) // 2]
    valid = np.arange(num_words + frames) < num_words + np.array(num_frames)[:, None]
    out = jax.jit(attend_to_words_and_neighbours, static_argnums=(4, 5))(
        query, key, value, valid, num_words, window
    )
    for row, n in enumerate(num_frames):
        heard = slice(num_words + n)
        for head in range(HEADS):
            given = [torch.tensor(x[row, head, heard]) for x in (query, key, value)]
            expected = attention_loop(*given, num_words, length, window)
            np.testing.assert_allclose(out[row, head, heard], expected, atol=1e-5)


def test_a_frame_at_the_edge_hears_less():
    """At scores of 0, two of three in its window; and its share of its word, of which half is 0."""
    zero, one = np.zeros((1, 1, 5, 4), np.float32), np.ones((1, 1, 5, 4), np.float32)
    one[:, :, 0] = 0
    out = attend_to_words_and_neighbours(zero, zero, one, np.ones((1, 5), bool), 1, 3)
    word = 4 / 5
    np.testing.assert_allclose(out[0, 0, 0], word, rtol=1e-6)
    expected = np.array([2 / 3, 1, 1, 2 / 3]) + word / 4
    np.testing.assert_allclose(out[0, 0, 1:, 0], expected, rtol=1e-6)


def test_a_short_last_group_is_merged_with_zeros():
    x = np.ones((2, 2 + 7, 3), np.float32)
    x[:, :2] = 5
    valid = np.arange(9) < np.array([9, 6])[:, None]
    merged, kept = merge(x, valid, 2, 3)
    np.testing.assert_allclose(merged[0, :, 0], [5, 5, 1, 1, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(merged[1, :, 0], [5, 5, 1, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(kept, [[True] * 5, [True] * 4 + [False]])


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def norm(params, x):
    return F.layer_norm(x, x.shape[-1:], params["scale"], params["bias"])


def layer(params, x, attend, positions):
    query, key, value = (
        dense(params[name], x + positions).unflatten(-1, (HEADS, -1)).swapaxes(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    heads = [attend(*head) for head in zip(query, key, value, strict=True)]
    x = norm(params["layer_norm"], x + dense(params["out_proj"], torch.cat(heads, -1)))
    h = dense(params["output_dense"], torch.relu(dense(params["intermediate_dense"], x)))
    return norm(params["final_layer_norm"], x + h)


def student_loop(params, features, frames):
    """h(., S) of one recording (n, D), with `STAGES` and T = `frames`."""
    total = -(-frames // STAGES["word_frames"])
    length = -(-frames // total)
    words = params["words"][: -(-len(features) // length)]
    x, W = torch.cat([words, features]), len(words)
    positions = torch.tensor(np.array(sinusoidal_positions(total + frames, D)))
    positions = torch.cat([positions[:W], positions[total : total + len(features)]])
    for stage in range(3):
        x = norm(params[f"norm_{stage}"], x)
        if stage == 2:
            x = layer(
                params["layers_2_0"], x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v), 0
            )
            return x.mean(0)
        window, group = STAGES["windows"][stage], STAGES["merges"][stage]

        def attend(q, k, v, length=-(-frames // total), window=window):
            return attention_loop(q, k, v, W, length, window)

        x = layer(params[f"layers_{stage}_0"], x, attend, positions if stage == 0 else 0)
        grouped = F.pad(x[W:], (0, 0, 0, -(len(x) - W) % group)).unflatten(0, (-1, group)).mean(1)
        x = norm(
            params[f"merge_norm_{stage}"],
            dense(params[f"merge_{stage}"], torch.cat([x[:W], grouped])),
        )
        frames = -(-frames // group)


def test_a_student_is_that_of_a_loop_on_each_recording_without_padding():
    model, (features, num_frames) = tiny("speechformer", **STAGES), random_inputs(5, 25, D)
    params = random_variables(model, features, num_frames)["params"]
    found = jax.jit(model.apply)({"params": params}, features, num_frames)
    params = jax.tree.map(torch.tensor, params)
    for row, n in enumerate(num_frames):
        expected = student_loop(params, torch.tensor(features[row, :n]), 25)
        np.testing.assert_allclose(found.hidden[row], expected, atol=2e-5)


def test_features_beyond_a_multiple_of_the_heads_are_not_read():
    model, (features, num_frames) = tiny("speechformer"), random_inputs(3, 25, D + 1)
    variables = random_variables(model, features, num_frames)
    apply, other = jax.jit(model.apply), features.copy()
    other[..., D:] = 9
    found = [apply(variables, x, num_frames).logits for x in (features, other)]
    np.testing.assert_array_equal(*found)
