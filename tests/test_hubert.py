"""HuBERT in Flax against torch's, and the loading of checkpoints."""

import json
import shutil
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from serkd_jax.errors import UserError
from serkd_jax.models import hubert_weights
from serkd_jax.models.hubert import (
    HubertEmbed,
    HubertLayers,
    HubertModel,
    PositionalConv,
    _FeatureProjection,
    check_config,
    num_frames,
)
from serkd_jax.models.hubert_weights import convert_params, load_hubert
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
VARIANTS = {
    "base": TINY,
    "large": TINY | {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
    # What neither published architecture has, yet the configuration allows.
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


def tiny_config(variant: str, **changes) -> transformers.HubertConfig:
    return transformers.HubertConfig(**VARIANTS[variant] | changes)


def random_torch_model(config, cls=transformers.HubertModel):
    """A torch model, none of whose parameters has the 0 or 1 it is initialised with."""
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def to_numpy(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def torch_states(model, waveform: np.ndarray, attention_mask=None) -> list[np.ndarray]:
    """All hidden states, then the last hidden state."""
    mask = None if attention_mask is None else torch.from_numpy(attention_mask)
    with torch.no_grad():
        out = model(torch.from_numpy(waveform), attention_mask=mask, output_hidden_states=True)
    return [state.numpy() for state in (*out.hidden_states, out.last_hidden_state)]


def states(output) -> list[np.ndarray]:
    return [np.asarray(state) for state in (*output.hidden_states, output.last_hidden_state)]


@pytest.fixture(scope="module", params=list(VARIANTS))
def models(request):
    """(torch model, jitted Flax apply, Flax output of the noisily padded batch)."""
    config = tiny_config(request.param)
    oracle = random_torch_model(config)
    params = convert_params(config, to_numpy(oracle))
    apply = jax.jit(
        lambda waveform, num_samples: HubertModel(config).apply(
            {"params": params}, waveform, num_samples
        )
    )
    return oracle, apply, apply(waveforms(), LENGTHS)


def waveforms() -> np.ndarray:
    """Clips of `LENGTHS` samples; what follows a clip is no silence."""
    return np.random.default_rng(0).normal(0.1, 1, (3, 16_000)).astype(np.float32)


def test_every_hidden_state_equals_torch_without_padding(models):
    oracle, apply, _ = models
    output = apply(waveforms(), np.full(3, 16_000))
    assert output.frame_mask.shape == (3, 49)
    assert output.frame_mask.all()
    for ours, theirs in zip(states(output), torch_states(oracle, waveforms()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("models", ["base"], indirect=True)
def test_all_samples_are_valid_by_default(models):
    _, apply, padded = models
    output = apply(waveforms()[:1], None)
    assert output.frame_mask.all()
    np.testing.assert_allclose(
        output.last_hidden_state, padded.last_hidden_state[:1], atol=TOLERANCE
    )


def test_padded_batch_equals_torch_on_each_clip_alone(models):
    oracle, _, padded = models
    np.testing.assert_array_equal(padded.frame_mask.sum(1), [49, 30, 1])
    for i, length in enumerate(LENGTHS):
        alone = torch_states(oracle, waveforms()[i : i + 1, :length])
        for ours, theirs in zip(states(padded), alone, strict=True):
            frames = theirs.shape[1]
            np.testing.assert_allclose(ours[i, :frames], theirs[0], atol=TOLERANCE)


# Not base: torch's group norm depends on the padding, ours does not.
@pytest.mark.parametrize("models", ["large", "other"], indirect=True)
def test_padded_batch_equals_torch_with_attention_mask(models):
    oracle, _, padded = models
    attention_mask = (np.arange(16_000) < LENGTHS[:, None]).astype(np.int64)
    valid = np.asarray(padded.frame_mask)
    theirs = torch_states(oracle, waveforms() * attention_mask.astype(np.float32), attention_mask)
    for our, their in zip(states(padded), theirs, strict=True):
        np.testing.assert_allclose(our[valid], their[valid], atol=TOLERANCE)


def test_dropout_of_every_kind():
    none = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    )
    config = tiny_config("base", num_hidden_layers=1, **none)
    params = convert_params(config, to_numpy(random_torch_model(config)))
    frames = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    mask = np.arange(6) < np.array([[6], [3]])

    def run(deterministic: bool = False, **rates: float) -> np.ndarray:
        config = tiny_config("base", num_hidden_layers=1, **none | rates)

        @jax.jit
        def apply(key):
            rngs = {"dropout": key}
            projection = {"params": params["embed"]["feature_projection"]}
            hidden = _FeatureProjection(config).apply(projection, frames, deterministic, rngs=rngs)
            encoder = {"params": params["encoder"]}
            return HubertLayers(config).apply(encoder, hidden, mask, deterministic, rngs=rngs)

        return np.asarray(apply(jax.random.key(0))[0])[mask]

    expected = run(deterministic=True)
    # Nothing is dropped, yet the attention takes its path for dropout.
    np.testing.assert_allclose(run(attention_dropout=1e-9), expected, atol=1e-5)
    for name in none:
        assert np.abs(run(**{name: 0.5}) - expected).max() > 1e-2, name


@pytest.mark.parametrize("models", ["base"], indirect=True)
def test_empty_clip_in_a_batch_stays_finite(models):
    output = models[1](waveforms(), np.array([16_000, 0, 100]))
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


def count(module, *inputs) -> int:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parameter_counts_of_hubert_large():
    config = transformers.HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
    )
    with torch.device("meta"):
        theirs = sum(p.numel() for p in transformers.HubertModel(config).parameters())
    assert theirs == 315_438_720
    # Torch counts the vector for masked frames (1024), which only pre-training uses, and the
    # magnitudes of the positional convolution's weight (128), which ours has folded.
    assert count(HubertModel(config), jnp.zeros((1, 400))) == theirs - 1024 - 128
    frames = jnp.zeros((1, 1, 1024))
    assert count(HubertLayers(config), frames) == 24 * 12_596_224 + 2 * 1024
    assert count(EncoderLayer(16, 4096, pre_norm=True), frames) == 12_596_224


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_positional_conv_keeps_the_length(kernel_size):
    output, _ = jax.eval_shape(
        PositionalConv(8, kernel_size, groups=2).init_with_output,
        jax.random.key(0),
        jnp.ones((2, 5, 8)),
    )
    assert output.shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conv_pos_batch_norm", True),
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
    assert len(digests | {checkpoint.sha256}) == 3


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
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_hubert(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for broken, words in (
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        (json.dumps(content | {"model_type": "wav2vec2"}), "wav2vec2"),
        (json.dumps(content | {"hidden_size": "wide"}), "hidden_size"),
        (json.dumps(content | {"conv_pos_batch_norm": True}), "conv_pos_batch_norm"),
    ):
        config.write_text(broken)
        with pytest.raises(UserError, match=rf"config\.json.*{words}"):
            load_hubert(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_hubert(folder)


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
