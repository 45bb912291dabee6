"""The student and the shared encoder layer against torch; padding; what the options change."""

import re
from functools import partial, reduce
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax._src.cudnn import fused_attention_stablehlo
from jax.flatten_util import ravel_pytree
from transformers import HubertConfig, HubertModel

from configs import common, iemocap, meld
from serkd_jax.data.examples import Examples, predict_rows
from serkd_jax.distributed import parallel
from serkd_jax.encoders.checkpoint import load_encoder
from serkd_jax.encoders.hubert import ENCODER
from serkd_jax.encoders.wav2vec2 import Wav2Vec2Layers
from serkd_jax.models import transformer
from serkd_jax.models.students.inverted import InvertedStudent
from serkd_jax.models.teacher import Teacher
from serkd_jax.models.transformer import EncoderLayer, attend
from serkd_jax.programs import Programs
from serkd_jax.results.metrics import classification_metrics
from tiny_stages import HUBERT
from torch_oracle import FrameTransformer, InvertedTransformer, MetaTeacher, torch_names

B, T, N, D = 3, 10, 6, 8
TOKENS = pytest.mark.parametrize(
    "tokens", [{"readout": "variates"}, {"inverted": False, "readout": "tokens"}]
)
SIZES = {
    "width": D,
    "mlp_dim": 12,
    "num_heads": 2,
    "num_layers": 1,
    "classifier_dims": (7, 5),
    "projection_dims": (6, 4),
}


def random_params(model, *inputs):
    """Parameters without zeros or ones, so that a bias or a norm that is left out shows."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)

    def draw(x):
        scale = 0.4 if x.ndim == 1 else x.shape[0] ** -0.5
        return rng.normal(0, scale, x.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def load(module, params):
    """A torch module with the weights of ours."""
    weights = {name: torch.tensor(w) for name, w in torch_names(params).items()}
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_encoder_layer_equals_torch_with_and_without_a_mask(pre_norm):
    tokens = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    mask = np.arange(T) < np.array([10, 4, 7])[:, None]
    layer = EncoderLayer(2, 12, pre_norm=pre_norm)
    params = random_params(layer, tokens)
    oracle = torch.nn.TransformerEncoderLayer(
        D, 2, 12, 0.0, "gelu", batch_first=True, norm_first=pre_norm
    )
    load(oracle, params).train()  # eval takes another path for masked tokens
    for m in (None, mask):
        ours = layer.apply({"params": params}, tokens, m)
        padding = None if m is None else torch.tensor(~m)
        theirs = oracle(torch.tensor(tokens), src_key_padding_mask=padding).detach().numpy()
        valid = np.ones((B, T), bool) if m is None else m
        np.testing.assert_allclose(np.asarray(ours)[valid], theirs[valid], atol=1e-5)


def test_dropout_keeps_the_attention_path_equal_to_the_fused_one_on_average():
    tokens = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    mask = np.arange(T) < np.array([10, 4, 7])[:, None]
    layer = EncoderLayer(2, 12, attention_dropout=1e-7)  # takes the unfused path, drops nothing
    params = random_params(layer, tokens)
    exact = layer.apply({"params": params}, tokens, mask)
    unfused = layer.apply({"params": params}, tokens, mask, jax.random.split(jax.random.key(0), B))
    np.testing.assert_allclose(np.asarray(unfused)[mask], np.asarray(exact)[mask], atol=1e-5)


@pytest.mark.parametrize(
    ("patch_frames", "length", "projector", "time_pooling"),
    [
        (0, 8, 0, 1),
        (0, 8, 5, 1),
        (2, 8, 0, 1),
        (4, 7, 5, 1),
        (4, 6, 0, 1),
        (4, 1, 0, 1),
        (1, 8, 0, 3),
        (2, 7, 5, 5),
    ],
)
def test_the_teacher_is_the_mean_of_its_encoder_and_does_not_hear_padding(
    patch_frames, length, projector, time_pooling
):
    """With a projector, the mean of every frame projected."""
    teacher = Teacher(Wav2Vec2Layers(HUBERT), 3, patch_frames, projector, (7, 5), time_pooling)
    frames = np.random.default_rng(2).normal(size=(2, 12, HUBERT.hidden_size)).astype(np.float32)
    mask = np.arange(12) < np.array([12, length])[:, None]
    params = random_params(teacher, frames, mask)

    @jax.jit
    def apply(frames, mask):
        of_layers = {"capture_intermediates": lambda module, _: module.name == "encoder"}
        return teacher.apply({"params": params}, frames, mask, **of_layers)

    padded, _ = apply(frames, mask)
    alone, seen = apply(frames[1:, :length], mask[1:, :length])
    np.testing.assert_allclose(padded.hidden[1], alone.hidden[0], atol=1e-5)
    np.testing.assert_allclose(padded.logits[1], alone.logits[0], atol=1e-5)
    ((encoded, _),) = seen["intermediates"]["encoder"]["__call__"]
    if projector:
        encoded = encoded @ params["projector"]["kernel"] + params["projector"]["bias"]
    np.testing.assert_allclose(alone.hidden, np.mean(encoded, axis=1), atol=1e-5)
    classifier = load(MetaTeacher(encoded.shape[-1], (7, 5), 3), params["classifier"])
    logits = classifier(torch.tensor(np.array(alone.hidden))).detach()
    np.testing.assert_allclose(alone.logits, logits, atol=1e-5)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(2).normal(size=(B, T, N)).astype(np.float32)


def assert_equal_to_torch(student, oracle, features, lengths):
    """All outputs to 1e-5; gradients of a random function of them to 1e-4 of the largest."""
    params = random_params(student, features, lengths)
    rng = np.random.default_rng(3)

    def apply(params):
        return student.apply({"params": params}, features, lengths)

    weights = [rng.normal(size=x.shape).astype(np.float32) for x in jax.eval_shape(apply, params)]

    def outputs_and_gradients(params):
        out, vjp = jax.vjp(apply, params)
        return out, vjp(type(out)(*weights))[0]

    out, gradients = jax.jit(outputs_and_gradients)(params)
    theirs = load(oracle, params)(torch.tensor(features), torch.tensor(lengths))
    for a, b in zip(out, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach(), atol=1e-5)
    sum((y * torch.tensor(w)).sum() for y, w in zip(theirs, weights, strict=True)).backward()
    ours = torch_names(gradients)
    assert ours.keys() == dict(oracle.named_parameters()).keys()
    for name, parameter in oracle.named_parameters():
        size = np.abs(ours[name]).max()
        np.testing.assert_allclose(ours[name], parameter.grad, atol=1e-4 * size, err_msg=name)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("readout", ["variates", "tokens", "flatten"])
def test_the_inverted_student_equals_a_torch_model_of_variate_tokens(features, readout, norm):
    student = InvertedStudent(3, **SIZES | {"num_layers": 2}, readout=readout, norm=norm)
    oracle = InvertedTransformer(student, T, N, 3)
    assert_equal_to_torch(student, oracle, features, np.full(B, T))


@pytest.mark.slow
def test_the_student_of_the_paper_equals_torch_at_its_full_size():
    """12.5M parameters on one clip of IEMOCAP's shape."""
    student = InvertedStudent(4)
    features = np.random.default_rng(2).normal(size=(1, 326, 1024)).astype(np.float32)
    oracle = InvertedTransformer(student, 326, 1024, 4)
    assert_equal_to_torch(student, oracle, features, np.full(1, 326))


@pytest.mark.parametrize(("readout", "norm"), [("tokens", "post"), ("flatten", "pre")])
def test_the_time_token_student_equals_a_torch_model_of_frame_tokens(features, readout, norm):
    """Which does not read the padding of shorter clips."""
    student = InvertedStudent(3, **SIZES, inverted=False, readout=readout, norm=norm)
    oracle = FrameTransformer(student, T, N, 3)
    assert_equal_to_torch(student, oracle, features, np.array([T, 4, 7]))


@pytest.mark.parametrize("use_norm", [False, True])
def test_the_time_token_student_does_not_see_padding(features, use_norm):
    student = InvertedStudent(3, **SIZES, inverted=False, readout="tokens", use_norm=use_norm)
    lengths = np.array([10, 4, 7])
    clean = features * (np.arange(T) < lengths[:, None])[..., None]
    params, apply = random_params(student, features, lengths), jax.jit(student.apply)
    alone = [
        apply({"params": params}, clean[i : i + 1, :n], np.array([n])).logits[0]
        for i, n in enumerate(lengths)
    ]
    batched = apply({"params": params}, clean, lengths).logits
    np.testing.assert_allclose(batched, alone, atol=1e-5)


@TOKENS
def test_use_norm_standardises_every_variate_over_the_valid_frames_of_the_clip(features, tokens):
    """As iTransformer does; here they have other means and spreads, and the last is constant."""
    lengths = np.array([T, 4, 7])
    features = features * np.array([0.1, 0.3, 1, 3, 30, 0]) + np.arange(N)
    expected = np.zeros_like(features)
    for clip, length, standard in zip(features, lengths, expected, strict=True):
        clip[length:] = 0
        mean, variance = clip[:length].mean(0), clip[:length].var(0)
        standard[:length] = (clip[:length] - mean) / np.sqrt(variance + 1e-5)
    student = InvertedStudent(3, **SIZES, **tokens)
    params = random_params(student, features, lengths)
    logits, standardised = (
        jax.jit(used.apply)({"params": params}, x.astype(np.float32), lengths).logits
        for used, x in ((student.clone(use_norm=True), features), (student, expected))
    )
    np.testing.assert_allclose(logits, standardised, atol=3e-5)


@pytest.mark.parametrize("readout", ["variates", "tokens"])
def test_only_a_variate_embedding_tells_the_encoder_the_variates_apart(features, readout):
    """Without it, variates in another order come out in that order, or with the same mean."""
    lengths = np.full(B, T)
    for variate_embedding in (False, True):
        student = InvertedStudent(3, **SIZES, readout=readout, variate_embedding=variate_embedding)
        params = random_params(student, features, lengths)
        hidden, turned = (
            student.apply({"params": params}, x, lengths).hidden
            for x in (features, features[..., ::-1])
        )
        turned = turned[:, ::-1] if readout == "variates" else turned
        assert np.allclose(hidden, turned, atol=1e-5) != variate_embedding


@TOKENS
@pytest.mark.parametrize(("count", "deviations"), [(2, False), (3, False), (3, True), (0, True)])
def test_time_points_are_means_and_deviations_of_neighbouring_frames_that_are_valid(
    features, count, deviations, tokens
):
    lengths = np.array([T, 5, 1])
    features = np.where(np.arange(T)[:, None] < lengths[:, None, None], features, 0)
    pooled = np.zeros((2, B, -(-T // (count or T)), N), np.float32)
    for clip, length, means, spreads in zip(features, lengths, *pooled, strict=True):
        for i, start in enumerate(range(0, length, count or T)):
            group = clip[start : min(start + (count or T), length)]
            means[i], spreads[i] = group.mean(0), np.sqrt(group.var(0) + 1e-5)
    axis = 1 if tokens.get("inverted", True) else 2
    points = np.concatenate(pooled, axis) if deviations else pooled[0]
    student = InvertedStudent(3, **SIZES, **tokens)
    params = random_params(student, points, lengths)
    expected = student.apply({"params": params}, points, -(-lengths // (count or T))).logits
    pooling = student.clone(time_pooling=count, deviations=deviations)
    actual = pooling.apply({"params": params}, features, lengths).logits
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_learned_variates_are_sums_of_the_features(features):
    lengths = np.full(B, T)
    student = InvertedStudent(3, **SIZES, variates=4, readout="flatten", deviations=True)
    params = random_params(student, features, lengths)
    sums = features @ params.pop("variates")["kernel"]
    expected = student.clone(variates=0).apply({"params": params}, sums, lengths).logits
    params |= {"variates": {"kernel": np.eye(4)}}
    actual = student.apply({"params": params}, sums, lengths).logits
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def student_gradient(params, features, num_frames, **options):
    """The gradient of a scalar of a student's outputs, dropout on, and the outputs."""
    model = InvertedStudent(3, width=16, mlp_dim=16, num_heads=2, num_layers=2, **options)
    keys = jax.random.split(jax.random.key(0), len(features))

    def scalar(params):
        out = model.apply({"params": params}, features, num_frames, keys)
        return out.logits.sum() + jnp.sin(out.projection).sum(), out

    return jax.jit(jax.grad(scalar, has_aux=True))(params)


@TOKENS
def test_rematerialisation_changes_no_gradient_and_bfloat16_little(tokens):
    features = np.random.default_rng(0).normal(size=(B, T, N)).astype(np.float32)
    num_frames = np.full(B, T)
    model = InvertedStudent(3, width=16, mlp_dim=16, num_heads=2, num_layers=2, **tokens)
    params = model.init(jax.random.key(1), features, num_frames)["params"]
    run = partial(student_gradient, params, features, num_frames, **tokens)
    exact, out = run()
    again, _ = run(remat=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), again, exact)
    rounded, rounded_out = run(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves([rounded, rounded_out])} == {jnp.dtype("float32")}
    exact, rounded = ravel_pytree(exact)[0], ravel_pytree(rounded)[0]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05
    np.testing.assert_allclose(rounded_out.logits, out.logits, atol=0.05)


def test_rematerialisation_of_the_teacher_changes_no_gradient():
    frames, mask = np.random.default_rng(0).normal(size=(B, T, 8)), np.ones((B, T), bool)
    keys = jax.random.split(jax.random.key(0), B)
    params = Teacher(Wav2Vec2Layers(HUBERT), 3, 2).init(jax.random.key(1), frames, mask)["params"]

    def gradient(remat):
        teacher = Teacher(Wav2Vec2Layers(HUBERT, remat=remat), 3, 2)

        def scalar(params):
            return jnp.sin(teacher.apply({"params": params}, frames, mask, keys).logits).sum()

        return jax.jit(jax.grad(scalar))(params)

    remat, plain = gradient(True), gradient(False)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), remat, plain)


def derivatives(attention, seed=0):
    """Output, gradient, tangent, and gradient of the gradient (B, heads, L, d), in float64."""
    *heads, gradient, query, key, value = jax.random.normal(
        jax.random.key(seed), (7, B, 2, T, 4), float
    )
    heads, tangents = tuple(heads), (query, key, value)
    out, pull_back = jax.vjp(attention, *heads)
    tangent = jax.jvp(attention, heads, tangents)[1]

    def slope(gradient):
        pulled = pull_back(gradient)
        return sum((x * move).sum() for x, move in zip(pulled, tangents, strict=True))

    return out, pull_back(gradient), tangent, jax.grad(slope)(gradient)


@pytest.mark.parametrize("at_once", [1, 4, 100], ids=["one_by_one", "four_by_four", "all"])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_head_by_head_has_the_derivatives_of_the_formula(masked, at_once, monkeypatch):
    monkeypatch.setattr(transformer, "WEIGHTS_AT_ONCE", at_once * T**2)
    mask = jnp.arange(T) < np.array([[T], [4], [1]]) if masked else None
    with jax.enable_x64(True):
        actual, expected = (
            jax.jit(lambda form=form: derivatives(partial(attend, mask=mask, form=form)))()
            for form in ("auto", "plain")
        )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), actual, expected)


def test_the_kernel_for_gpus_gets_a_tangent_and_a_gradient_of_its_gradient(monkeypatch):
    """A stand-in for cuDNN's, which has a gradient and nothing else."""

    def formula(query, key, value, lengths):
        mask = jnp.arange(T) < lengths[:, None]
        heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
        return attend(*heads_first, mask, form="plain").swapaxes(1, 2)

    @jax.custom_vjp
    def backward(inputs, gradient):
        return jax.vjp(partial(formula, lengths=inputs[3]), *inputs[:3])[1](gradient)

    @jax.custom_vjp
    def kernel(*inputs):
        return formula(*inputs)

    def has_none(*_):
        pytest.fail("the kernel was differentiated twice")

    backward.defvjp(has_none, has_none)
    kernel.defvjp(
        lambda *inputs: (formula(*inputs), inputs),
        lambda inputs, gradient: (*backward(inputs, gradient), None),
    )

    def stand_in(*heads, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        return kernel(*heads, key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    mask = jnp.arange(T) < np.array([[T], [4], [1]])
    with jax.enable_x64(True):
        actual, expected = (
            jax.jit(lambda used=used: derivatives(used))()
            for used in (
                lambda *heads: transformer._attend_by_cudnn(*heads, mask),
                partial(attend, mask=mask, form="plain"),
            )
        )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), actual, expected)


def test_the_slope_of_gelu_is_torchs():
    x = torch.linspace(-8, 8, 201, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.gelu(x).sum().backward()
    with jax.enable_x64(True):
        slopes = jax.vmap(jax.grad(transformer.exact_gelu))(x.detach().numpy())
    np.testing.assert_allclose(slopes, x.grad, rtol=1e-9, atol=1e-12)


@pytest.fixture
def h100(monkeypatch):
    """JAX takes the CPU for this GPU."""
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(platform="gpu", compute_capability="9.0", client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    return device


@TOKENS
def test_on_a_gpu_half_precision_attention_and_its_gradient_are_cudnns(tokens, h100):
    """As lowered for a GPU; no GPU is needed for that, nor does the test run the program."""
    model = InvertedStudent(3, width=32, mlp_dim=16, num_heads=2, num_layers=1, **tokens)
    features, num_frames = jnp.zeros((B, T, N)), jnp.full(B, T)
    params = jax.eval_shape(model.init, jax.random.key(0), features, num_frames)
    mask = "NO_MASK" if model.inverted else "PADDING"

    def calls(twice=False, **options):
        used = model.clone(**options)

        def gradient(params, scale=1.0):
            logits, pull_back = jax.vjp(
                lambda p: used.apply(p, features, num_frames).logits, params
            )
            return pull_back(scale * jnp.cos(logits))[0]

        def slope(params):  # a gradient through the gradient
            return jax.grad(lambda scale: ravel_pytree(gradient(params, scale))[0].sum())(1.0)

        traced = jax.jit(slope if twice else gradient).trace(params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        kernels = re.findall(r"@__cudnn\$fmhaSoftmax(\w*)\(.*mask_type\\22: \\22(\w+)", text)
        return [kernels.count((part, mask)) for part in ("", "Backward")]

    assert calls(dtype=jnp.bfloat16) == [1, 1]
    assert calls(twice=True, dtype=jnp.bfloat16)[0] == 1
    assert calls() == calls(dtype=jnp.bfloat16, portable=True) == [0, 0]
    h100.compute_capability = "7.5"
    assert calls(dtype=jnp.bfloat16) == [0, 0]


@TOKENS
def test_cudnns_kernel_attends_to_the_valid_tokens_alone(tokens, features, request, monkeypatch):
    """A loop over clips in torch stands in for it; the output is that of a CPU, where it is not."""
    lengths, received = np.array([T, 4, 7]), []

    def stand_in(*heads, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        received.append(key_value_seq_lengths)
        counts = [None] * B if received[-1] is None else np.array(received[-1])
        out = []
        for count, *clip in zip(counts, *(np.array(x, np.float32) for x in heads), strict=True):
            query, key, value = (torch.tensor(x).transpose(0, 1) for x in clip)
            attended = F.scaled_dot_product_attention(query, key[:, :count], value[:, :count])
            out.append(attended.transpose(0, 1).numpy())
        return jnp.asarray(np.stack(out), heads[0].dtype)

    student = InvertedStudent(3, **SIZES | {"width": 16}, **tokens, dtype=jnp.bfloat16)
    features = features * (np.arange(T) < lengths[:, None])[..., None]
    params = random_params(student, features, lengths)
    expected = student.apply({"params": params}, features, lengths)
    request.getfixturevalue("h100")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    actual = student.apply({"params": params}, features, lengths)
    assert len(received) == 1
    if student.inverted:
        assert received == [None]
    else:
        np.testing.assert_array_equal(received[0], lengths)
    np.testing.assert_allclose(actual.hidden, expected.hidden, atol=0.02)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("count", [1, 16, 21])
def test_predictions_of_any_number_of_examples_come_back_in_order(num_devices, count):
    devices = jax.devices()[:num_devices]
    predict = parallel.compile_predict(lambda scale, batch: {"y": scale * batch["x"]}, devices)
    x = np.arange(count, dtype=np.float32)
    examples = Examples({}, devices).with_columns(x=x)
    rows = np.random.default_rng(0).permutation(count)
    outputs = predict_rows(predict, np.float32(3), examples, rows, 16)
    np.testing.assert_array_equal(outputs["y"], 3 * x[rows])


def test_metrics_equal_the_definitions_of_the_paper():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    scores = classification_metrics(labels, predictions, 4)  # class 3 does not occur
    assert scores["ua"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores["wa"] == pytest.approx(4 / 6)
    f1 = [0.8, 0.5, 2 / 3]
    assert scores["wf1"] == pytest.approx((3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
    assert scores["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="empty"):
        classification_metrics(labels[:0], predictions[:0], 4)


@pytest.mark.parametrize(
    ("table3", "classes", "expected"),
    [
        ("iemocap", 4, {"teacher": 317_145_476, "student": 12_498_948}),
        ("meld", 7, {"teacher": 316_495_495, "student": 12_447_111}),
    ],
)
def test_the_paper_sizes_are_those_of_table_7(table3, classes, expected):
    """Shapes alone: HuBERT-large as transformers has it, in place of the download."""
    large = HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    with torch.device("meta"):
        published = sum(p.numel() for p in HubertModel(large).parameters())
    config = common.paper(table3)
    programs = Programs(config, classes, (config.max_frames, 1024), 1024, 1, jax.devices()[:1])
    programs.checkpoint = SimpleNamespace(kind=ENCODER, config=large, num_parameters=published)
    assert programs.count_parameters() == expected
    in_table_7 = {"iemocap": (302.45, 11.92), "meld": (301.83, 11.87)}[table3]
    assert tuple(round(count / 2**20, 2) for count in expected.values()) == in_table_7


TABLE_3 = """
teacher.learning_rate        1e-4  1e-4
teacher.epochs               20    20
student.learning_rate        1e-4  1e-4
student.epochs               30    100
meta.learning_rate           1e-3  1e-3
distill.epochs               30    100
curriculum.learning_rate     1e-3  1e-3
curriculum.epochs            100   100
batch_size                   32    32
distill.alpha                0.1   0.5
distill.beta                 100   100
contrastive.weight           0.05  0.2
contrastive.temperature      0.07  1.0
distill.temperature          5.0   6.0
max_frames                   326   224
student.num_layers           4     4
contrastive.max_frequency_mask 50  50
contrastive.max_time_mask    8     8
"""


@pytest.mark.parametrize(("column", "recipe"), [(1, iemocap), (2, meld)])
def test_the_recipes_have_table_3_and_the_sizes_of_sections_4_3_and_4_4(column, recipe):
    values = recipe.get_config()
    for line in TABLE_3.strip().splitlines():
        key, value = line.split()[0], float(line.split()[column])
        assert reduce(getattr, key.split("."), values) == value, key
    assert values.frontend.model == "facebook/hubert-large-ll60k"
    assert values.teacher.model == "facebook/hubert-large-ls960-ft"


def test_a_checkpoint_counts_all_parameters_of_its_encoder_as_torch_does(hubert_folder):
    model = HubertModel.from_pretrained(hubert_folder)
    counted = load_encoder(hubert_folder).num_parameters
    assert counted == sum(p.numel() for p in model.parameters())
