"""Checkpoints of encoders: loading, saving, and what is wrong with one."""

import copy
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
import transformers

from serkd_jax.encoders import checkpoint, find_encoder
from serkd_jax.encoders.checkpoint import (
    Checkpoint,
    convert_params,
    load_encoder,
    save_encoder,
)
from serkd_jax.errors import UserError
from tiny_encoders import (
    random_torch_model,
    save,
    tiny_config,
    to_numpy,
    torch_states,
)

HUBERT = find_encoder("hubert")


def params_of(model) -> dict:
    """Ours, of a torch encoder alone."""
    return convert_params(find_encoder(model.config.model_type), model.config, to_numpy(model))


def waveforms() -> np.ndarray:
    return np.random.default_rng(0).normal(0.1, 1, (2, 16_000)).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a tiny large-variant model, its parameters); not to be changed."""
    folder = tmp_path_factory.mktemp("hubert")
    model = random_torch_model(tiny_config("hubert large"))
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder, params_of(model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model to damage."""
    return shutil.copytree(saved[0], tmp_path / "model")


def assert_same(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_load_safetensors(saved):
    checkpoint = load_encoder(saved[0])
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
    digests = {load_encoder(folder).sha256}
    (folder / "preprocessor_config.json").unlink()
    checkpoint = load_encoder(folder)
    assert checkpoint.do_normalize is True
    digests.add(checkpoint.sha256)
    nested = {"processor_class": "Wav2Vec2Processor", "feature_extractor": {"do_normalize": False}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    checkpoint = load_encoder(folder)
    assert checkpoint.do_normalize is False
    digests.add(checkpoint.sha256)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    checkpoint = load_encoder(folder)
    assert checkpoint.do_normalize is extractor.do_normalize is False  # the nested one counts
    assert len(digests | {checkpoint.sha256}) == 2  # it is what is done that counts


def test_load_shards(saved, tmp_path):
    model = transformers.HubertModel.from_pretrained(saved[0])
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(load_encoder(tmp_path).params, saved[1])
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load_encoder(tmp_path)


def test_load_half_precision(saved, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = transformers.HubertModel.from_pretrained(saved[0], dtype=dtype)
        model.save_pretrained(tmp_path)
        assert_same(load_encoder(tmp_path).params, params_of(model.float()))


def test_load_torch_file_with_old_names(saved, folder):
    tensors = transformers.HubertModel.from_pretrained(folder).state_dict()
    conv = "encoder.pos_conv_embed.conv."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[conv + old] = tensors.pop(f"{conv}parametrizations.weight.{new}")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(load_encoder(folder).params, saved[1])
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no zip file")
    with pytest.raises(UserError, match=r"pytorch_model\.bin .*download it again"):
        load_encoder(folder)


def test_torch_file_without_torch(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = tiny_config("hubert large")
    monkeypatch.setattr(checkpoint, "_read_config", lambda *_: (HUBERT, config))  # may import torch
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"serkd-jax\[torch\]"):
        load_encoder(folder)


HEADS = [
    (transformers.HubertForCTC, "hubert large", {}),
    (
        transformers.HubertForSequenceClassification,
        "hubert large",
        {"use_weighted_layer_sum": True},
    ),
    (transformers.Wav2Vec2ForCTC, "wav2vec2 large", {}),
    (transformers.Wav2Vec2ForPreTraining, "wav2vec2 base", {}),  # with a quantizer
    (transformers.Wav2Vec2ForXVector, "wav2vec2 base", {"tdnn_dim": (8, 8, 8, 8, 8)}),
    (transformers.WavLMForSequenceClassification, "wavlm large", {}),
    (transformers.WhisperForConditionalGeneration, "whisper 80", {}),
    (transformers.WhisperForAudioClassification, "whisper 128", {}),
]


@pytest.mark.parametrize(("cls", "variant", "changes"), HEADS)
def test_load_fine_tuned_without_its_head(cls, variant, changes, tmp_path):
    model = random_torch_model(tiny_config(variant, **changes), cls)
    model.save_pretrained(tmp_path)
    encoder = model.base_model
    if isinstance(model, transformers.WhisperForAudioClassification):
        encoder = model.encoder
    assert_same(load_encoder(tmp_path).params, params_of(encoder))


def test_load_a_model_with_a_head_of_its_own(tmp_path):
    """As `audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim`, whose class is in no library."""
    model = random_torch_model(tiny_config("wav2vec2 large"))
    model.save_pretrained(tmp_path)
    tensors = {f"wav2vec2.{name}": value for name, value in to_numpy(model).items()}
    for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"):
        tensors[f"classifier.{name}"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    edit(tmp_path / "config.json", architectures=["Wav2Vec2ForSpeechClassification"])
    assert_same(load_encoder(tmp_path).params, params_of(model))


@pytest.mark.parametrize("prefix", ["", "encoder.", "model.encoder."])
def test_load_a_whisper_encoder_alone(prefix, tmp_path):
    model = random_torch_model(tiny_config("whisper 80"))
    model.save_pretrained(tmp_path)
    tensors = {f"{prefix}{name}": value for name, value in to_numpy(model).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load_encoder(tmp_path).params, params_of(model))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("variant", ["hubert base", "wav2vec2 base", "wavlm large", "whisper 80"])
def test_identity_is_the_encoders_whatever_else_is_in_the_files(variant, tmp_path):
    """Head or none, one file or shards; but another value or preprocessing is another encoder."""
    config = tiny_config(variant)
    save(random_torch_model(config), tmp_path / "whole")
    start = load_encoder(tmp_path / "whole")
    save_encoder(start, tmp_path / "saved")
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(
        tmp_path / "shards", max_shard_size="50KB"
    )
    same = {load_encoder(tmp_path / name).sha256 for name in ("saved", "shards")}
    assert same == {start.sha256}
    for path in (("embed",), ("encoder",)):
        params = copy.deepcopy(start.params)
        jax.tree.leaves(params[path[0]])[-1].flat[0] += 1
        save_encoder(dataclasses.replace(start, params=params), tmp_path / "other")
        assert load_encoder(tmp_path / "other").sha256 != start.sha256


def test_weights_in_half_precision_are_saved_in_it(tmp_path):
    model = random_torch_model(tiny_config("whisper 80")).half()
    save(model, tmp_path / "half")
    save_encoder(load_encoder(tmp_path / "half"), tmp_path / "saved")
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype.name for value in saved.values()} == {"float16"}
    assert all(name.startswith("model.encoder.") for name in saved)
    loaded = transformers.WhisperModel.from_pretrained(tmp_path / "saved").encoder
    for name, value in model.encoder.float().state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name].float()), name


# What is wrong ----------------------------------------------------------------------------------


def error_of(folder: Path) -> str:
    """One clear line."""
    with pytest.raises(UserError) as caught:
        load_encoder(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert str(folder) in message
    return message


def test_a_wav2vec2_that_says_hubert(tmp_path):
    model = random_torch_model(tiny_config("wav2vec2 base"), transformers.Wav2Vec2ForCTC)
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", model_type="hubert")
    assert "model_type 'hubert' but architecture 'Wav2Vec2ForCTC'" in error_of(tmp_path)
    edit(tmp_path / "config.json", architectures=None)
    assert "it says hubert, but there are tensors wav2vec2." in error_of(tmp_path)


def test_a_wavlm_without_its_position_bias(tmp_path):
    model = random_torch_model(tiny_config("wavlm base"))
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "encoder.layers.0.attention.rel_attn_embed.weight"
    tensors = safetensors.numpy.load_file(file)
    del tensors[name]
    safetensors.numpy.save_file(tensors, file)
    assert error_of(tmp_path).endswith(f"config.json describes: missing {name}")


def test_a_whisper_of_another_number_of_mel_bands(tmp_path):
    model = random_torch_model(tiny_config("whisper 80"))
    save(model, tmp_path)
    edit(tmp_path / "preprocessor_config.json", feature_size=128)
    assert "feature_size is 128, but the model wants 80" in error_of(tmp_path)
    edit(tmp_path / "preprocessor_config.json", feature_size=80, hop_length=200)
    assert "hop_length is 200, but the model wants 160" in error_of(tmp_path)
    edit(tmp_path / "preprocessor_config.json", feature_size=128, hop_length=160)
    edit(tmp_path / "config.json", num_mel_bins=128)
    assert "conv1.weight has shape (32, 80, 3) instead of (32, 128, 3)" in error_of(tmp_path)


def test_a_decoder_alone(tmp_path):
    model = random_torch_model(tiny_config("whisper 80"), transformers.WhisperForCausalLM)
    model.save_pretrained(tmp_path)
    assert "no encoder in it, only a decoder (tensors model.decoder.…)".replace(
        "…", "..."
    ) in error_of(tmp_path)


@pytest.mark.parametrize("variant", ["hubert base", "whisper 80"])
def test_weights_of_another_size_are_told_by_the_first_names_and_their_number(variant, tmp_path):
    random_torch_model(tiny_config(variant)).save_pretrained(tmp_path)
    sizes = {"d_model": 48} if variant == "whisper 80" else {"hidden_size": 48}
    edit(tmp_path / "config.json", **sizes)
    pattern = r"of another shape (\S+ has shape .{10,40}, ){10}\.\.\. \(\d\d in all\)"
    assert re.search(pattern, error_of(tmp_path))


@pytest.mark.parametrize("variant", ["hubert base", "wavlm base", "whisper 80"])
def test_what_is_assumed_without_a_preprocessor_is_told(variant, tmp_path):
    save(random_torch_model(tiny_config(variant)), tmp_path, preprocessor=False)
    assumed = load_encoder(tmp_path).assumption
    assert assumed.startswith(f"{tmp_path} has no preprocessor_config.json: ")
    assert ("log-mel" if variant == "whisper 80" else "zero mean and unit variance") in assumed
    kind = find_encoder(variant.split()[0])
    kind.write_preprocessor(tiny_config(variant), True, tmp_path)
    assert load_encoder(tmp_path).assumption == ""


def test_a_preprocessor_of_another_rate(folder):
    edit(folder / "preprocessor_config.json", sampling_rate=8000)
    assert "sampling_rate is 8000" in error_of(folder)


def test_wrong_tensors_are_listed_by_name(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["encoder.layers.1.attention.k_proj.bias"]
    tensors["encoder.layers.2.layer_norm.weight"] = np.zeros(32, np.float32)
    tensors["feature_projection.projection.weight"] = np.zeros((32, 17), np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match="missing") as caught:
        load_encoder(folder)
    for words in (
        str(folder),
        "missing encoder.layers.1.attention.k_proj.bias",
        "unexpected encoder.layers.2.layer_norm.weight",
        "of another shape feature_projection.projection.weight has shape (32, 17) instead of (32,",
    ):
        assert words in str(caught.value)


def test_a_model_in_another_is_told_by_the_prefix_of_its_names(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({f"model.net.{name}": x for name, x in tensors.items()}, file)
    with pytest.raises(UserError, match=r"names begin with 'model\.net\.'") as caught:
        load_encoder(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kept", [0, 5, 1_000, -1])
def test_truncated_file(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors .*download it again"):
        load_encoder(folder)


def test_missing_and_unreadable_files(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        load_encoder(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for broken, words in (
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        (
            json.dumps(content | {"model_type": "wav2vec2-bert"}),
            "supported encoders are hubert, wav2vec2",
        ),
        (json.dumps(content | {"model_type": None}), "type None"),
        (json.dumps(content | {"hidden_size": "wide"}), "hidden_size"),
        (json.dumps(content | {"hidden_act": "mish"}), "hidden_act"),
    ):
        config.write_text(broken)
        with pytest.raises(UserError, match=rf"config\.json.*{words}"):
            load_encoder(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_encoder(folder)


SAVED = ["hubert base", "hubert large", "hubert batch_norm", "wav2vec2 large", "wavlm base"]


@pytest.mark.parametrize("variant", [*SAVED, "whisper 80"])
def test_fine_tuned_parameters_go_back_to_transformers(variant, tmp_path):
    oracle, kind = random_torch_model(tiny_config(variant)), find_encoder(variant.split()[0])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + rng.normal(0, 0.05, p.shape).astype(np.float32), params_of(oracle)
    )
    masked = None
    if kind.model_type != "whisper":
        masked = oracle.masked_spec_embed.detach().numpy()
    start = Checkpoint(kind, oracle.config, params, False, "", "", masked)
    save_encoder(start, tmp_path / "new" / "folder")
    model, info = type(oracle).from_pretrained(
        tmp_path / "new" / "folder", output_loading_info=True
    )
    assert all(name.startswith("decoder.") for name in info.pop("missing_keys"))
    assert not any(info.values()), info
    ours = jax.jit(start.encode)(params, waveforms())
    ours = [*ours.hidden_states, ours.last_hidden_state]
    with torch.no_grad():
        theirs = [state.numpy() for state in torch_states(model, waveforms())]
        before = torch_states(oracle, waveforms())[-1].numpy()
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-5 * max(1, np.abs(their).max()))
    assert np.abs(theirs[-1] - before).max() > 1e-2
    loaded = load_encoder(tmp_path / "new" / "folder")
    assert_same(loaded.params, params)
    if masked is not None:
        np.testing.assert_array_equal(model.masked_spec_embed.detach(), masked)
        np.testing.assert_array_equal(loaded.masked_spec_embed, masked)
    added = {"architectures": [kind.model_name], "dtype": "float32"}
    assert loaded.config.to_diff_dict() == start.config.to_diff_dict() | added


def test_save_what_was_loaded(saved, tmp_path):
    checkpoint = load_encoder(saved[0])
    save_encoder(checkpoint, tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.do_normalize is False
    assert extractor.return_attention_mask  # as the large variant wants it
    again = load_encoder(tmp_path)
    assert_same(again.params, checkpoint.params)
    assert again.do_normalize is False
    np.testing.assert_array_equal(again.masked_spec_embed, checkpoint.masked_spec_embed)


def test_vector_for_masked_frames_of_a_fine_tuned_model_is_kept(tmp_path):
    model = random_torch_model(tiny_config("hubert base"), transformers.HubertForCTC)
    model.save_pretrained(tmp_path)
    masked = load_encoder(tmp_path).masked_spec_embed
    np.testing.assert_array_equal(masked, model.hubert.masked_spec_embed.detach())


def test_what_cannot_be_loaded_again_is_not_saved(saved, tmp_path):
    checkpoint = load_encoder(saved[0])
    name = "encoder.layers.1.feed_forward.output_dense.bias"
    for bad in (np.full(32, np.nan), np.zeros(31)):
        params = copy.deepcopy(checkpoint.params)
        params["encoder"]["layers_1"]["output_dense"]["bias"] = bad
        with pytest.raises(UserError, match=name):
            save_encoder(dataclasses.replace(checkpoint, params=params), tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["shards", "torch"])
def test_save_over_another_model(kind, saved, tmp_path):
    """Both loaders then read what was saved, whatever files of the other model are left."""
    other = random_torch_model(tiny_config("hubert base"))
    if kind == "shards":
        other.save_pretrained(tmp_path, max_shard_size="50KB")
    else:
        torch.save(other.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = load_encoder(saved[0])
    save_encoder(checkpoint, tmp_path)
    assert_same(load_encoder(tmp_path).params, saved[1])
    model = transformers.HubertModel.from_pretrained(tmp_path)
    assert_same(params_of(model), saved[1])
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    assert load_encoder(tmp_path).do_normalize is extractor.do_normalize is False
    (tmp_path / "processor_config.json").write_text("{}")  # transformers would read this one
    with pytest.raises(UserError, match=r"processor_config\.json of another model"):
        save_encoder(checkpoint, tmp_path)


def test_a_position_without_weights_is_saved(saved, tmp_path):
    checkpoint = load_encoder(saved[0])
    params = copy.deepcopy(checkpoint.params)
    params["embed"]["pos_conv_embed"]["conv"]["kernel"][5] = 0
    save_encoder(dataclasses.replace(checkpoint, params=params), tmp_path)
    assert_same(load_encoder(tmp_path).params, params)
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
        load_encoder(name)
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
    assert_same(load_encoder("someone/tiny").params, saved[1])
    assert_same(load_encoder("someone/tiny", revision=commit).params, saved[1])


def test_the_code_in_the_readme_runs(saved, tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the published one."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (code,) = (block for block in blocks if "facebook/hubert-large-ll60k" in block)
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", waveforms()[0] / 10, 16_000)
    exec(code.replace("facebook/hubert-large-ll60k", str(saved[0])), {})
    assert capsys.readouterr().out == "(1, 49, 32) 3 (1, 49)\n"
    assert_same(load_encoder("saved").params, saved[1])
