"""MM-DFN with audio alone: its parts against torch and loops, and one dialogue after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from serkd_jax.models.students import find_student, mmdfn
from serkd_jax.models.students.mmdfn import Fusion, SpeakerEncoder, adjacency, normalize
from tiny_students import count, random_inputs, random_variables

N, WIDTH, GRAPH, LAYERS = 5, 6, 4, 3
SELF = 1 - np.arccos(0.99999) / np.pi


def tiny(**changes):
    sizes = {"width": WIDTH, "graph_width": GRAPH, "num_layers": LAYERS, "projection_dims": ()}
    return find_student("mmdfn")(3, **sizes | changes)


def dialogues(batch, rows, seed=0):
    """Dialogues of up to three speakers, the first of all `rows`, with a mark in each."""
    rng = np.random.default_rng(seed)
    features, num_rows = random_inputs(batch, rows, N + 2, seed)
    features[..., -2:] = 0
    for one, n in zip(features, num_rows, strict=True):
        names = rng.integers(0, 3, n)
        one[:n, -2] = [names.tolist().index(name) for name in names]
        one[rng.integers(n), -1] = 1
    return features, num_rows


def prepared(batch=5, rows=9, **changes):
    """Dialogues, and a function that applies a tiny student with random weights to any."""
    inputs, model = dialogues(batch, rows), tiny(**changes)
    apply = jax.jit(model.apply)
    variables = random_variables(model, *inputs)
    return *inputs, lambda *inputs: np.asarray(apply(variables, *inputs).hidden)


def test_its_sizes_are_those_of_the_original():
    sizes = {
        1024: {16: 990_407, 32: 1_310_407, 64: 1_950_407},
        300: {16: 845_607, 32: 1_165_607, 64: 1_805_607},
    }
    for width, layers in sizes.items():
        for num_layers, size in layers.items():
            assert count("mmdfn", 7, 33, width + 2, num_layers=num_layers) == (size, 0)
    assert count("mmdfn", 7, 33, 1026) == (990_407, 0)


def test_an_edge_weighs_what_the_angle_says():
    vectors = np.array([[[3, 0, 0], [0, 2, 0], [-5, 0, 0], [0.1, 0, 0], [1, 1, 0], [7, 8, 9]]])
    valid = np.arange(6)[None] < 5
    (found,) = adjacency(vectors.astype(np.float32), valid)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(np.diag(found)[:5], SELF, atol=1e-6)
    expected = [SELF, 0.5, 1 - SELF, SELF, 0.75]
    np.testing.assert_allclose(found[0, :5], expected, atol=2e-5)
    assert not found[5].any()
    assert not found[:, 5].any()
    (of_half,) = adjacency(vectors.astype(jnp.bfloat16), valid)
    assert of_half.dtype == jnp.float32


def test_edges_are_divided_by_the_roots_of_both_sums():
    rng = np.random.default_rng(0)
    weights = rng.random((3, 6, 6)).astype(np.float32)
    weights[1, 4:], weights[1, :, 4:] = 0, 0
    found = normalize(weights)
    for graph, one in zip(found, weights, strict=True):
        for i in range(6):
            for j in range(6):
                root = (one[i].sum() * one[j].sum()) ** 0.5
                expected = one[i, j] / root if one[i, j] else 0
                np.testing.assert_allclose(graph[i, j], expected, atol=1e-6)


def test_the_slope_is_finite_for_equal_and_zero_vectors_and_in_padding():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, N)).astype(np.float32)
    x[:, 1], x[:, 2], x[:, 3:5], x[:, 6] = x[:, 0], -x[:, 0], 0, 0
    valid = np.arange(7) < np.array([[6], [3]])
    factors = rng.normal(size=(2, 7, 7)).astype(np.float32)

    def total(x):
        return (factors * normalize(adjacency(x, valid))).sum()

    slope = np.asarray(jax.grad(total)(x))
    assert np.isfinite(slope).all()
    assert (slope[valid] != 0).any(-1).all()
    assert not slope[~valid].any()
    _, of_slope = jax.jvp(jax.grad(total), (x,), (np.roll(x, 1, axis=2),))
    assert np.isfinite(of_slope).all(), "the meta-teacher's gradient is through the student's"
    np.testing.assert_allclose(np.diag(adjacency(x, valid)[0])[:6], SELF, atol=1e-6)


def torch_gru(params, inputs):
    """A GRU of torch of two layers, in both directions, with the weights of a speaker encoder."""
    width = params["forward_0"]["kernel"].shape[0]
    gru = torch.nn.GRU(inputs, width, num_layers=2, bidirectional=True)
    weights = {}
    for i in range(2):
        for name, end in (("forward", ""), ("backward", "_reverse")):
            part = params[f"{name}_{i}"]
            weights |= {f"weight_ih_l{i}{end}": part["input"]["kernel"].T}
            weights |= {f"bias_ih_l{i}{end}": part["input"]["bias"]}
            weights |= {f"weight_hh_l{i}{end}": part["kernel"].T}
            weights |= {f"bias_hh_l{i}{end}": part["bias"]}
    gru.load_state_dict(weights)
    return gru


def each_speaker_alone(params, x, speaker):
    """The outputs (n, D) of the speaker encoder for one dialogue, run speaker by speaker."""
    gru, out = torch_gru(params, x.shape[1]), {}
    for name in set(speaker.tolist()):
        rows = np.flatnonzero(speaker == name)
        out |= dict(zip(rows, gru(x[rows])[0], strict=True))
    return torch.stack([out[row] for row in range(len(x))])


def test_the_speaker_encoder_is_torchs_gru_over_the_utterances_of_each_speaker():
    features, num_rows = dialogues(6, 11)
    x, valid = features[..., :N], np.arange(11) < num_rows[:, None]
    own, encoder = mmdfn.find_speakers(features[..., -2], valid), SpeakerEncoder(3, 0.4, None)
    params = random_variables(encoder, x, own, None)["params"]
    found = jax.jit(encoder.apply)({"params": params}, x, own, None)
    params = jax.tree.map(torch.tensor, params)
    several = 0
    for row, n in enumerate(num_rows):
        speaker = features[row, :n, -2]
        several += len(set(speaker.tolist())) > 1
        with torch.no_grad():
            expected = each_speaker_alone(params, torch.tensor(x[row, :n]), speaker)
        np.testing.assert_allclose(found[row, :n], expected, atol=1e-5)
    assert several > 3


def test_speakers_numbers_are_rows_and_padding_has_no_speaker():
    number, valid = np.array([[-5.0, 0, 99, 1]]), np.array([[True, True, True, False]])
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(mmdfn.find_speakers(number, valid)[0], expected)


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def graph_of(e):
    """The normalised graph of a dialogue's vectors (n, D), pair by pair."""
    weights = torch.zeros(len(e), len(e))
    for i, x in enumerate(e):
        for j, y in enumerate(e):
            cosine = torch.cosine_similarity(x, y, dim=0)
            weights[i, j] = 1 - torch.arccos(0.99999 * cosine) / torch.pi
    root = torch.diag(weights.sum(1) ** -0.5)
    return root @ weights @ root


def torch_lstm(params):
    lstm = torch.nn.LSTMCell(GRAPH, GRAPH)
    of_input, of_state = params["lstm_kernel"].T.split(GRAPH, dim=1)
    first, second = params["lstm_bias_0"], params["lstm_bias_1"]
    weights = {"weight_ih": of_input, "weight_hh": of_state, "bias_ih": first, "bias_hh": second}
    lstm.load_state_dict(weights)
    return lstm


def layers_by_formula(params, x, graph, gate, lamda=0.5, alpha=0.2):
    """The layers over a graph; `gate` maps the input of each to that of its convolution."""
    first = h = torch.relu(dense(params["input"], x))
    for k, kernel in enumerate(params["kernels"], 1):
        theta = np.log(lamda / k + 1)
        z = graph @ gate(h)
        carried = (1 - alpha) * z + alpha * first
        y = theta * (torch.hstack([z, first]) @ kernel) + (1 - theta) * carried
        h = torch.relu(y) + h
    return h


def hidden_alone(params, dialogue, gamma):
    """h(., S) of a dialogue (n, N + 2) by the equations."""
    x, speaker, mark = dialogue[:, :N], dialogue[:, -2], dialogue[:, -1]
    u = dense(params["audio"], x)
    e = u + gamma * each_speaker_alone(params["speakers"], u, speaker)
    lstm, state = torch_lstm(params["fusion"]), None

    def gate(h):
        nonlocal state
        state = lstm(h, state)
        return state[0]

    h = layers_by_formula(params["fusion"], e, graph_of(e), gate)
    return torch.relu(torch.hstack([e, h])[int(mark.argmax())])


@pytest.mark.parametrize("gamma", [3.0, 0.5])
def test_a_student_is_the_equations_dialogue_by_dialogue_as_is_its_slope(gamma):
    model, (features, num_rows) = tiny(speaker_weight=gamma), dialogues(6, 8)
    params = random_variables(model, features, num_rows)["params"]
    factors = np.array([1, -2, 3], np.float32)

    @jax.jit
    def found(features):
        out = model.apply({"params": params}, features, num_rows)
        return (out.logits @ factors).sum(), out

    slope, out = jax.grad(found, has_aux=True)(features)
    weights = jax.tree.map(torch.tensor, params)
    for row, n in enumerate(num_rows):
        dialogue = torch.tensor(features[row, :n], requires_grad=True)
        hidden = hidden_alone(weights, dialogue, gamma)
        logits = dense(weights["classifier_0"], hidden)
        np.testing.assert_allclose(out.hidden[row], hidden.detach(), atol=2e-5)
        np.testing.assert_allclose(out.logits[row], logits.detach(), atol=2e-5)
        (logits @ torch.tensor(factors)).backward()
        expected = dialogue.grad[:, :N]
        np.testing.assert_allclose(slope[row, :n, :N], expected, rtol=1e-3, atol=2e-4)
        assert not slope[row, n:].any()
    assert (out.hidden[:, :WIDTH] > 0).any()
    assert (out.hidden[:, WIDTH:] > 0).any()


def test_without_its_gate_it_is_gcnii_with_a_skip(monkeypatch):
    rng, fusion = np.random.default_rng(0), Fusion(GRAPH, 5, 0.7, 0.3, 0.4, None, False)
    x, graph = rng.normal(size=(2, 7, WIDTH)), rng.random((2, 7, 7))
    inputs = x.astype(np.float32), graph.astype(np.float32), None
    params = random_variables(fusion, *inputs)["params"]
    params |= {f"lstm_bias_{i}": np.zeros(4 * GRAPH, np.float32) for i in range(2)}
    params["lstm_kernel"] = np.eye(2 * GRAPH, 4 * GRAPH, dtype=np.float32)
    monkeypatch.setattr(mmdfn, "lstm_step", lambda gates, cell: (gates[..., :GRAPH], cell))
    found = fusion.apply({"params": params}, *inputs)
    params = jax.tree.map(torch.tensor, params)
    for ours, *one in zip(found, *map(torch.tensor, inputs[:2]), strict=True):
        expected = layers_by_formula(params, *one, lambda h: h, lamda=0.7, alpha=0.3)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)


def test_deeper_layers_use_their_weights_less():
    strengths = mmdfn.layer_strengths(64, 0.5)
    assert len(strengths) == 64
    assert strengths[0] == pytest.approx(np.log(1.5))
    assert strengths[15] == pytest.approx(0.0308, abs=5e-5)
    assert (np.diff(strengths) < 0).all()


def test_only_who_speaks_with_whom_matters_not_the_numbers():
    features, num_rows, hidden = prepared()
    expected = hidden(features, num_rows)
    renamed, merged = features.copy(), features.copy()
    renamed[..., -2] = 8 - features[..., -2]
    merged[..., -2] = 0
    np.testing.assert_allclose(hidden(renamed, num_rows), expected, atol=1e-6)
    several = features[..., -2].any(1)
    assert several.sum() > 2
    assert (np.abs(hidden(merged, num_rows) - expected).max(1) > 1e-3)[several].all()


def test_padding_and_other_dialogues_change_nothing():
    features, num_rows, hidden = prepared()
    expected = hidden(features, num_rows)
    padding = np.arange(9) >= num_rows[:, None]
    assert padding.any(1).sum() == 4
    noisy = np.where(padding[..., None], 4, features)
    np.testing.assert_allclose(hidden(noisy, num_rows), expected, atol=1e-6)
    longer = np.pad(features, ((0, 0), (0, 6), (0, 0)))
    np.testing.assert_allclose(hidden(longer, num_rows), expected, atol=1e-6)
    others, lengths = dialogues(5, 9, seed=1)
    others[3], lengths[3] = features[1], num_rows[1]
    np.testing.assert_allclose(hidden(others, lengths)[3], expected[1], atol=1e-6)


def test_the_mark_chooses_an_utterance_which_depends_on_all_of_its_dialogue():
    n, (features, _) = 8, dialogues(1, 8)
    copies, num_rows = np.repeat(features, n, axis=0), np.full(n, n)
    copies[..., -1] = np.eye(n)
    *_, hidden = prepared(n, n)
    each = hidden(copies, num_rows)
    assert all(np.abs(each[i] - each[j]).max() > 1e-3 for i in range(n) for j in range(i))
    two_marks = copies.copy()
    two_marks[0, 1, -1] = 1
    active = (each[:2] > 0).all(0)  # a ReLU follows the mean
    assert active.any()
    found = hidden(two_marks, num_rows)
    np.testing.assert_allclose(found[0, active], each[:2].mean(0)[active], atol=1e-5)
    np.testing.assert_allclose(found[1:], each[1:], atol=1e-6)
    for row in (0, n - 1):
        changed = copies.copy()
        changed[:, row, :N] += 1
        assert (np.abs(hidden(changed, num_rows) - each).max(1) > 1e-4).all()


def test_each_layer_drops_values_of_its_own():
    """Without edges and weights, every layer adds what it keeps of the first layer's output."""
    layers, rate = 12, 0.4
    fusion = Fusion(50, layers, 0.0, 1.0, rate, None, False)
    x, graph = np.ones((3, 40, 2), np.float32), np.zeros((3, 40, 40), np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    params = random_variables(fusion, x, graph, None)["params"]
    params["input"] = {"kernel": np.zeros((2, 50), np.float32), "bias": np.full(50, 1 - rate)}
    found = np.asarray(jax.jit(fusion.apply)({"params": params}, x, graph, keys))
    kept = found.round()
    np.testing.assert_allclose(found, kept, atol=1e-4)
    trials = layers + 1
    assert kept.mean() == pytest.approx(trials * (1 - rate), rel=0.02)
    assert kept.var() == pytest.approx(trials * rate * (1 - rate), rel=0.1)
    whole = fusion.apply({"params": params}, x, graph, None)
    np.testing.assert_allclose(whole, trials * (1 - rate), rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_vectors_and_nodes_are_dropped_twice_and_the_context_of_speakers_once(gamma):
    model, (features, num_rows) = tiny(width=60, speaker_weight=gamma), dialogues(60, 4)
    variables = random_variables(model, features, num_rows)
    keys, apply = jax.random.split(jax.random.key(0), 60), jax.jit(model.apply)
    whole, dropped = (
        np.asarray(apply(variables, features, num_rows, x).hidden) for x in (None, keys)
    )
    share = 0.6**2  # what two dropouts keep
    clear = whole > 0.05
    vectors = share * dropped[:, :60][clear[:, :60]] / whole[:, :60][clear[:, :60]]
    kept = vectors[vectors > 0]
    assert len(kept) / len(vectors) == pytest.approx(share, abs=0.03)
    # Between the layers of the speaker encoder, it is hidden units that are dropped.
    assert (np.abs(kept - 1).max() < 1e-4) == (gamma == 0)
    nodes = dropped[:, 60:][clear[:, 60:]]
    assert (nodes > 0).mean() == pytest.approx(share, abs=0.1)


def test_the_graph_is_that_of_the_vectors_before_dropout(monkeypatch):
    model, (features, num_rows) = tiny(speaker_weight=0.0), dialogues(3, 6)
    variables, seen = random_variables(model, features, num_rows), []
    monkeypatch.setattr(mmdfn, "normalize", lambda x: seen.append(x) or normalize(x))
    for keys in (None, jax.random.split(jax.random.key(0), 3)):
        model.apply(variables, features, num_rows, keys)
    np.testing.assert_array_equal(*seen)


def test_layers_that_are_computed_again_have_the_same_slope():
    features, num_rows = dialogues(3, 6)
    variables = random_variables(tiny(), features, num_rows)
    keys = jax.random.split(jax.random.key(0), 3)

    def slope(model):
        def total(x):
            return jnp.square(model.apply(x, features, num_rows, keys).logits).sum()

        return jax.tree.leaves(jax.jit(jax.grad(total))(variables))

    for kept, again in zip(slope(tiny()), slope(tiny(remat=True)), strict=True):
        assert np.abs(kept).max() > 0
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-5)


def test_sizes_that_cannot_be_are_refused():
    student = find_student("mmdfn")
    assert student.reads_dialogues
    for width, layers in ((200, 16), (2000, 128)):
        student(3, width=width, num_layers=layers).check(200, 1026)
    student(3).check(200)
    with pytest.raises(ValueError, match=r"student\.width is 7: use an even number"):
        student(3, width=7).check(200, 1026)
    with pytest.raises(ValueError, match="the features have 2 dimensions"):
        student(3).check(200, 2)
    student(3).check(200, 3)
    for sizes, frames in (({}, 10_000), ({"num_layers": 128, "graph_width": 8192}, 20)):
        with pytest.raises(ValueError, match="too large to be run"):
            student(3, **sizes).check(frames, 1026)
