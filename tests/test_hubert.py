"""HuBERT in Flax against torch's, and the loading of checkpoints."""

import copy
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
import transformers
from flax import traverse_util

from serkd_jax.errors import UserError
from serkd_jax.models import hubert_weights
from serkd_jax.models.hubert import (
    HubertEmbed,
    HubertLayers,
    HubertModel,
    HubertOutput,
    PositionalConv,
    _FeatureProjection,
    check_config,
    num_frames,
)
from serkd_jax.models.hubert_weights import (
    HubertCheckpoint,
    convert_params,
    load_hubert,
    save_hubert,
    torch_name,
)
from serkd_jax.models.transformer import EncoderLayer

TOLERANCE = 1e-4
LENGTHS = np.array([16_000, 9_999, 400])  # 49, 30 and 1 frames
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
DISTIL = {"num_hidden_layers": 2, "feat_proj_layer_norm": False}
VARIANTS = {
    "base": TINY,
    "distil": TINY | DISTIL,
    "large": TINY | LARGE,
    # As large; heads of 20, no power of two, as the 80 of HuBERT-xlarge.
    "xlarge": TINY
    | LARGE
    | {"hidden_size": 40, "num_attention_heads": 2, "num_conv_pos_embedding_groups": 8},
    "batch_norm": TINY | {"conv_pos_batch_norm": True},
    # What no published architecture has, yet the configuration allows.
    "other": TINY
    | {
        "feat_extract_norm": "layer",
        "feat_proj_layer_norm": False,
        "feat_extract_activation": "relu",
        "hidden_act": "gelu_new",
        "num_conv_pos_embeddings": 15,
        "layer_norm_eps": 1e-3,
        "num_hidden_layers": 3,
    },
}
# Full size: facebook/hubert-base-ls960, -large-ll60k, -xlarge-ll60k and ntu-spml/distilhubert.
PUBLISHED = {
    "base": {},
    "large": LARGE
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "xlarge": LARGE
    | {
        "hidden_size": 1280,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
    },
    "distil": DISTIL,
}


def tiny_config(variant: str, **changes) -> transformers.HubertConfig:
    return transformers.HubertConfig(**VARIANTS[variant] | changes)


def random_torch_model(config, cls=transformers.HubertModel, noise: float = 0.1):
    """A torch model, none of whose tensors has the 0 or 1 it is initialised with."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)
    return model


def to_numpy(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def torch_states(model, waveform: np.ndarray, attention_mask=None) -> list[np.ndarray]:
    """All hidden states, then the last hidden state."""
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    waveform = torch.from_numpy(waveform).to(model.dtype)
    with torch.no_grad():
        out = model(waveform, attention_mask=mask, output_hidden_states=True)
    return [state.float().numpy() for state in (*out.hidden_states, out.last_hidden_state)]


def states(output) -> list[np.ndarray]:
    return [np.asarray(state) for state in (*output.hidden_states, output.last_hidden_state)]


class Models(NamedTuple):
    """A tiny torch model and ours with its parameters."""

    oracle: transformers.HubertModel  # the positional convolution has a plain weight
    params: dict
    # (params, waveform, num_samples) to the output and the gradients, with respect to params and
    # waveform, of the sum over the valid frames of the last hidden state times `weighting`.
    run: Callable
    padded: HubertOutput  # of the noisily padded batch
    gradients: tuple[dict, jax.Array]  # the same


@pytest.fixture(scope="module", params=list(VARIANTS))
def models(request):
    config = tiny_config(request.param)
    oracle = random_torch_model(config)
    params = convert_params(config, to_numpy(oracle))
    if not config.conv_pos_batch_norm:
        torch.nn.utils.parametrize.remove_parametrizations(
            oracle.encoder.pos_conv_embed.conv, "weight"
        )

    def scalar(params, waveform, num_samples):
        output = HubertModel(config).apply({"params": params}, waveform, num_samples)
        weighted = output.last_hidden_state * weighting(config)
        return jnp.where(output.frame_mask[..., None], weighted, 0).sum(), output

    @jax.jit
    def run(params, waveform, num_samples):
        gradients, output = jax.grad(scalar, (0, 1), has_aux=True)(params, waveform, num_samples)
        return output, gradients

    return Models(oracle, params, run, *run(params, waveforms(), LENGTHS))


def waveforms() -> np.ndarray:
    """Clips of `LENGTHS` samples; what follows a clip is no silence."""
    return np.random.default_rng(0).normal(0.1, 1, (3, 16_000)).astype(np.float32)


def weighting(config) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 49, config.hidden_size)).astype(np.float32)


def test_every_hidden_state_equals_torch_without_padding(models):
    output, _ = models.run(models.params, waveforms(), np.full(3, 16_000))
    assert output.frame_mask.shape == (3, 49)
    assert output.frame_mask.all()
    theirs = torch_states(models.oracle, waveforms())
    for our, their in zip(states(output), theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("models", ["base"], indirect=True)
def test_all_samples_are_valid_by_default(models):
    apply = jax.jit(HubertModel(models.oracle.config).apply)
    output = apply({"params": models.params}, waveforms()[:1])
    assert output.frame_mask.all()
    np.testing.assert_allclose(
        output.last_hidden_state, models.padded.last_hidden_state[:1], atol=TOLERANCE
    )


def test_padded_batch_equals_torch_on_each_clip_alone(models):
    np.testing.assert_array_equal(models.padded.frame_mask.sum(1), [49, 30, 1])
    for i, length in enumerate(LENGTHS):
        alone = torch_states(models.oracle, waveforms()[i : i + 1, :length])
        for our, their in zip(states(models.padded), alone, strict=True):
            frames = their.shape[1]
            np.testing.assert_allclose(our[i, :frames], their[0], rtol=0, atol=TOLERANCE)


def torch_gradients(oracle) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """As `Models.gradients`, from each clip alone, by torch name of our parameters."""
    oracle.zero_grad()
    waveform = torch.from_numpy(waveforms()).requires_grad_()
    for i, length in enumerate(LENGTHS):
        last = oracle(waveform[i : i + 1, :length]).last_hidden_state[0]
        (last * torch.from_numpy(weighting(oracle.config)[i, : len(last)])).sum().backward()
    named = oracle.named_parameters()
    gradients = {name: p.grad.numpy() for name, p in named if p.grad is not None}
    if (norm := oracle.encoder.pos_conv_embed.batch_norm) is not None:
        # Ours are scale = weight / deviation and shift = bias - mean * scale.
        prefix = "encoder.pos_conv_embed.batch_norm"
        weight, bias = gradients.pop(f"{prefix}.weight"), gradients.pop(f"{prefix}.bias")
        deviation = np.sqrt(norm.running_var.numpy() + norm.eps)
        gradients[f"{prefix}_bias"] = bias
        gradients[f"{prefix}_scale"] = deviation * weight + norm.running_mean.numpy() * bias
    return gradients, waveform.grad.numpy()


def test_every_gradient_of_a_padded_batch_equals_torch_on_each_clip_alone(models):
    theirs, their_waveform = torch_gradients(models.oracle)
    ours = {
        torch_name(path): np.asarray(value).T
        for path, value in traverse_util.flatten_dict(models.gradients[0]).items()
    }
    assert ours.keys() == theirs.keys()
    ours["waveform"], theirs["waveform"] = models.gradients[1], their_waveform
    norms = {name: np.linalg.norm(value) for name, value in theirs.items()}
    for name, norm in norms.items():
        error = np.linalg.norm(ours[name] - theirs[name])
        # The softmax does not see what is added to all keys: this gradient is 0 but for rounding.
        is_zero = name.endswith("k_proj.bias")
        assert error < (1e-6 * max(norms.values()) if is_zero else 1e-3 * norm), name


# Not base: torch's group norm depends on the padding, ours does not.
# Nor batch_norm: after it, torch's padding is no longer 0.
@pytest.mark.parametrize("models", ["large", "xlarge", "other"], indirect=True)
def test_padded_batch_equals_torch_with_attention_mask(models):
    attention_mask = (np.arange(16_000) < LENGTHS[:, None]).astype(np.int64)
    valid = np.asarray(models.padded.frame_mask)
    silent = waveforms() * attention_mask.astype(np.float32)
    theirs = torch_states(models.oracle, silent, attention_mask)
    for our, their in zip(states(models.padded), theirs, strict=True):
        np.testing.assert_allclose(our[valid], their[valid], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("models", ["base", "large"], indirect=True)
def test_bfloat16_is_as_close_to_float32_as_torchs(models):
    half = HubertModel(models.oracle.config, jnp.bfloat16)
    output = jax.jit(half.apply)({"params": models.params}, waveforms(), np.full(3, 16_000))
    ours = states(output)
    assert all(state.dtype == jnp.bfloat16 for state in ours)
    exact = torch_states(models.oracle, waveforms())
    theirs = torch_states(copy.deepcopy(models.oracle).bfloat16(), waveforms())
    for our, their, true in zip(ours, theirs, exact, strict=True):
        error = np.linalg.norm(our.astype(np.float32) - true) / np.linalg.norm(true)
        assert error < 2 * np.linalg.norm(their - true) / np.linalg.norm(true)
        assert error < 3e-2


@pytest.mark.parametrize("models", ["base"], indirect=True)
def test_softmax_and_statistics_of_norms_are_float32_in_bfloat16(models):
    half = HubertModel(models.oracle.config, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(half.apply)({"params": models.params}, waveforms(), LENGTHS)
    dtypes = re.findall(r":(\w+)\[[^\]]*\] = (?:exp|reduce_max|reduce_sum|rsqrt)\b", str(jaxpr))
    assert len(dtypes) > 20
    assert set(dtypes) == {"f32"}


def test_dropout_of_every_kind():
    none = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    )
    config = tiny_config("base", num_hidden_layers=1, **none)
    params = convert_params(config, to_numpy(random_torch_model(config)))
    frames = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [3]])

    def run(**rates: float) -> np.ndarray:
        config = tiny_config("base", num_hidden_layers=1, **none | rates)

        @jax.jit
        def apply(key):
            keys = jax.random.split(key, 2)
            projection = {"params": params["embed"]["feature_projection"]}
            hidden = _FeatureProjection(config).apply(projection, frames, keys)
            encoder = {"params": params["encoder"]}
            return HubertLayers(config).apply(encoder, hidden, mask, keys)

        return np.asarray(apply(jax.random.key(0))[0])[mask]

    expected = run()
    for name in none:
        assert np.abs(run(**{name: 0.5}) - expected).max() > 1e-2, name


@pytest.mark.parametrize("models", ["base"], indirect=True)
def test_empty_clip_in_a_batch_stays_finite(models):
    output, _ = models.run(models.params, waveforms(), np.array([16_000, 0, 100]))
    np.testing.assert_array_equal(output.frame_mask.sum(1), [49, 0, 0])
    assert jnp.isfinite(output.last_hidden_state).all()


def test_waveform_without_a_frame_is_refused():
    with pytest.raises(ValueError, match="399 samples"):
        HubertEmbed(tiny_config("base")).init(jax.random.key(0), jnp.zeros((1, 399)))


def test_num_frames():
    config = transformers.HubertConfig()
    lengths = [0, 1, 399, 400, 719, 720, 16_000, 71_760, 104_400]
    expected = [0, 0, 0, 1, 1, 2, 49, 224, 326]
    assert [num_frames(config, n) for n in lengths] == expected
    np.testing.assert_array_equal(num_frames(config, jnp.array(lengths)), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_architectures(name):
    config = transformers.HubertConfig(**PUBLISHED[name])
    with torch.device("meta"):
        parameters = dict(transformers.HubertModel(config).named_parameters())
    theirs = {name: tuple(p.shape) for name, p in parameters.items()}
    del theirs["masked_spec_embed"]  # only pre-training uses it
    weight = "encoder.pos_conv_embed.conv.{}"
    del theirs[weight.format("parametrizations.weight.original0")]
    theirs[weight.format("weight")] = theirs.pop(weight.format("parametrizations.weight.original1"))
    ours = hubert_weights._param_shapes(config)
    assert {torch_name(path): shape[::-1] for path, shape in ours.items()} == theirs


def test_parameter_counts_of_the_layers_of_hubert_large():
    def count(module) -> int:
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 1024)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    config = transformers.HubertConfig(**PUBLISHED["large"])
    assert count(HubertLayers(config)) == 24 * 12_596_224 + 2 * 1024
    assert count(EncoderLayer(16, 4096, pre_norm=True)) == 12_596_224


@pytest.mark.slow
def test_hubert_large_at_full_size_equals_torch():
    config = transformers.HubertConfig(**PUBLISHED["large"])
    model = random_torch_model(config, noise=0.01)
    assert sum(p.numel() for p in model.parameters()) == 315_438_720
    clips = waveforms()[:2]
    alone = [torch_states(model, clips[i : i + 1, :n]) for i, n in enumerate(LENGTHS[:2])]
    params = convert_params(config, to_numpy(model))
    del model
    output = jax.jit(HubertModel(config).apply)({"params": params}, clips, LENGTHS[:2])
    for i, theirs in enumerate(alone):
        for our, their in zip(states(output), theirs, strict=True):
            frames = their.shape[1]
            np.testing.assert_allclose(our[i, :frames], their[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_positional_conv_keeps_the_length(kernel_size):
    output, _ = jax.eval_shape(
        PositionalConv(tiny_config("base", num_conv_pos_embeddings=kernel_size)).init_with_output,
        jax.random.key(0),
        jnp.ones((2, 5, 32)),
        jnp.ones((2, 5), bool),
    )
    assert output.shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "mish"),
        ("feat_extract_activation", "mish"),
        ("feat_extract_norm", "batch"),
        ("adapter_attn_dim", 16),
        ("num_attention_heads", 5),
        ("num_conv_pos_embedding_groups", 5),
    ],
)
def test_unsupported_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        check_config(tiny_config("base", **{field: value}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a tiny large-variant model, its parameters); not to be changed."""
    folder = tmp_path_factory.mktemp("hubert")
    model = random_torch_model(tiny_config("large"))
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder, convert_params(model.config, to_numpy(model))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model to damage."""
    return shutil.copytree(saved[0], tmp_path / "model")


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_load_safetensors(saved):
    checkpoint = load_hubert(saved[0])
    assert_same(checkpoint.params, saved[1])
    assert set(checkpoint.params) == {"embed", "encoder"}
    assert all(
        type(leaf) is np.ndarray and leaf.dtype == np.float32
        for leaf in jax.tree.leaves(checkpoint.params)
    )
    assert checkpoint.config.do_stable_layer_norm
    assert checkpoint.do_normalize is False
    assert len(checkpoint.sha256) == 64


def test_do_normalize_is_read_as_transformers_does(folder):
    digests = {load_hubert(folder).sha256}
    (folder / "preprocessor_config.json").unlink()
    checkpoint = load_hubert(folder)
    assert checkpoint.do_normalize is True
    digests.add(checkpoint.sha256)
    nested = {"processor_class": "Wav2Vec2Processor", "feature_extractor": {"do_normalize": False}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    checkpoint = load_hubert(folder)
    assert checkpoint.do_normalize is False
    digests.add(checkpoint.sha256)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    checkpoint = load_hubert(folder)
    assert checkpoint.do_normalize is extractor.do_normalize is False  # the nested one counts
    assert len(digests | {checkpoint.sha256}) == 4


def test_load_shards(saved, tmp_path):
    model = transformers.HubertModel.from_pretrained(saved[0])
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_hubert(tmp_path).params, saved[1])
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_hubert(tmp_path)


def test_load_half_precision(saved, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = transformers.HubertModel.from_pretrained(saved[0], dtype=dtype)
        model.save_pretrained(tmp_path)
        assert_same(
            load_hubert(tmp_path).params, convert_params(model.config, to_numpy(model.float()))
        )


def test_load_torch_file_with_old_names(saved, folder):
    tensors = transformers.HubertModel.from_pretrained(folder).state_dict()
    conv = "encoder.pos_conv_embed.conv."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[conv + old] = tensors.pop(f"{conv}parametrizations.weight.{new}")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(load_hubert(folder).params, saved[1])
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no zip file")
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*download it again"):
        load_hubert(folder)


def test_torch_file_without_torch(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = tiny_config("large")
    monkeypatch.setattr(hubert_weights, "_read_config", lambda file: config)  # may import torch
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"serkd-jax\[torch\]"):
        load_hubert(folder)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (transformers.HubertForCTC, {}),
        (transformers.HubertForSequenceClassification, {"use_weighted_layer_sum": True}),
    ],
)
def test_load_fine_tuned_without_its_head(cls, changes, tmp_path):
    model = random_torch_model(tiny_config("large", **changes), cls)
    model.save_pretrained(tmp_path)
    assert_same(load_hubert(tmp_path).params, convert_params(model.config, to_numpy(model.hubert)))


def test_wrong_tensors_are_listed_by_name(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["encoder.layers.1.attention.k_proj.bias"]
    tensors["encoder.layers.2.layer_norm.weight"] = np.zeros(32, np.float32)
    tensors["feature_projection.projection.weight"] = np.zeros((32, 17), np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match="missing") as caught:
        load_hubert(folder)
    for words in (
        str(folder),
        "missing encoder.layers.1.attention.k_proj.bias",
        "unexpected encoder.layers.2.layer_norm.weight",
        "feature_projection.projection.weight has shape (32, 17) instead of (32, 16)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 1_000, -1])
def test_truncated_file(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors .*download it again"):
        load_hubert(folder)


def test_missing_and_unreadable_files(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        load_hubert(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for broken, words in (
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        (json.dumps(content | {"model_type": "wav2vec2"}), "wav2vec2"),
        (json.dumps(content | {"hidden_size": "wide"}), "hidden_size"),
        (json.dumps(content | {"hidden_act": "mish"}), "hidden_act"),
    ):
        config.write_text(broken)
        with pytest.raises(UserError, match=rf"config\.json.*{words}"):
            load_hubert(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_hubert(folder)


@pytest.mark.parametrize("models", ["base", "large", "batch_norm"], indirect=True)
def test_fine_tuned_parameters_go_back_to_transformers(models, tmp_path):
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, models.params, models.gradients[0])
    masked = models.oracle.masked_spec_embed.detach().numpy()
    checkpoint = HubertCheckpoint(models.oracle.config, params, False, "", masked)
    save_hubert(checkpoint, tmp_path / "new" / "folder")
    model, info = transformers.HubertModel.from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert not any(info.values()), info
    output, _ = models.run(params, waveforms(), np.full(3, 16_000))
    for our, their in zip(states(output), torch_states(model, waveforms()), strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-5)
    assert np.abs(states(output)[-1] - states(models.padded)[-1])[0].max() > 1e-2
    np.testing.assert_array_equal(model.masked_spec_embed.detach(), masked)
    loaded = load_hubert(tmp_path / "new" / "folder")
    assert_same(loaded.params, params)
    added = {"architectures": ["HubertModel"], "dtype": "float32"}
    assert loaded.config.to_diff_dict() == checkpoint.config.to_diff_dict() | added


def test_save_what_was_loaded(saved, tmp_path):
    checkpoint = load_hubert(saved[0])
    save_hubert(checkpoint, tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize is False
    assert extractor.return_attention_mask  # as the large variant wants it
    again = load_hubert(tmp_path)
    assert_same(again.params, checkpoint.params)
    assert again.do_normalize is False
    np.testing.assert_array_equal(again.masked_spec_embed, checkpoint.masked_spec_embed)


def test_vector_for_masked_frames_of_a_fine_tuned_model_is_kept(tmp_path):
    model = random_torch_model(tiny_config("base"), transformers.HubertForCTC)
    model.save_pretrained(tmp_path)
    masked = load_hubert(tmp_path).masked_spec_embed
    np.testing.assert_array_equal(masked, model.hubert.masked_spec_embed.detach())


def test_what_cannot_be_loaded_again_is_not_saved(saved, tmp_path):
    checkpoint = load_hubert(saved[0])
    name = "encoder.layers.1.feed_forward.output_dense.bias"
    for bad in (np.full(32, np.nan), np.zeros(31)):
        params = copy.deepcopy(checkpoint.params)
        params["encoder"]["layers_1"]["output_dense"]["bias"] = bad
        with pytest.raises(UserError, match=name):
            save_hubert(dataclasses.replace(checkpoint, params=params), tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["shards", "torch"])
def test_save_over_another_model(kind, saved, tmp_path):
    """Both loaders then read what was saved, whatever files of the other model are left."""
    other = random_torch_model(tiny_config("base"))
    if kind == "shards":
        other.save_pretrained(tmp_path, max_shard_size="50KB")
    else:
        torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = load_hubert(saved[0])
    save_hubert(checkpoint, tmp_path)
    assert_same(load_hubert(tmp_path).params, saved[1])
    model = transformers.HubertModel.from_pretrained(tmp_path)
    assert_same(convert_params(model.config, to_numpy(model)), saved[1])
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    assert load_hubert(tmp_path).do_normalize is extractor.do_normalize is False
    (tmp_path / "processor_config.json").write_text("{}")  # transformers would read this one
    with pytest.raises(UserError, match=r"processor_config\.json of another model"):
        save_hubert(checkpoint, tmp_path)


def test_a_position_without_weights_is_saved(saved, tmp_path):
    checkpoint = load_hubert(saved[0])
    params = copy.deepcopy(checkpoint.params)
    params["embed"]["pos_conv_embed"]["conv"]["kernel"][5] = 0
    save_hubert(dataclasses.replace(checkpoint, params=params), tmp_path)
    assert_same(load_hubert(tmp_path).params, params)
    model = transformers.HubertModel.from_pretrained(tmp_path)
    weight = model.encoder.pos_conv_embed.conv.weight.detach().numpy()
    np.testing.assert_allclose(weight.T, params["embed"]["pos_conv_embed"]["conv"]["kernel"], 1e-6)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """An empty hub cache on a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["someone/not-cached", "./no/such/folder", "no folder"])
def test_missing_folder_and_offline_hub(name, offline_cache):
    with pytest.raises(UserError, match="neither a local folder nor a model") as caught:
        load_hubert(name)
    assert name in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_load_from_the_hub_cache_offline(weights, saved, offline_cache):
    repository = offline_cache / "models--someone--tiny"
    commit = "0" * 40
    snapshot = shutil.copytree(saved[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    if weights.endswith(".bin"):
        torch.save(
            transformers.HubertModel.from_pretrained(snapshot).state_dict(), snapshot / weights
        )
        (snapshot / "model.safetensors").unlink()
    assert_same(load_hubert("someone/tiny").params, saved[1])
    assert_same(load_hubert("someone/tiny", revision=commit).params, saved[1])


def test_the_code_in_the_readme_runs(saved, tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the published one."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (code,) = (block for block in blocks if "facebook/hubert-large-ll60k" in block)
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", waveforms()[0] / 10, 16_000)
    exec(code.replace("facebook/hubert-large-ll60k", str(saved[0])), {})
    assert capsys.readouterr().out == "(1, 49, 32) 3 (1, 49)\n"
    assert_same(load_hubert("saved").params, saved[1])
