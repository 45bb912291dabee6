"""Every kind of encoder in Flax against torch's."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
import transformers
from flax import traverse_util

from serkd_jax.encoders import find_encoder
from serkd_jax.encoders.base import Encoder, EncoderModel, EncoderOutput
from serkd_jax.encoders.checkpoint import _param_shapes, convert_params, load_encoder
from serkd_jax.encoders.wav2vec2 import (
    PositionalConv,
    Wav2Vec2Layers,
    conv_frames,
)
from serkd_jax.encoders.wavlm import distance_buckets
from serkd_jax.encoders.whisper import log_mel
from serkd_jax.models.transformer import EncoderLayer
from tiny_encoders import (
    LARGE,
    VARIANTS,
    encoder_of,
    random_torch_model,
    tiny_config,
    to_numpy,
    torch_states,
    whisper_extractor,
    without_weight_norm,
)

TOLERANCE = 1e-4
LENGTHS = np.array([16_000, 10_120, 400])  # the second has an odd number of log-mel frames
WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# At full size, and how many parameters torch counts, less the vector for masked frames and the
# magnitudes of the positional convolution, which its weight includes here.
PUBLISHED = {
    "hubert base": ({}, 94_371_712 - 768 - 128),
    "hubert large": (LARGE | WIDE, 315_438_720 - 1024 - 128),
    "hubert xlarge": (
        LARGE
        | {
            "hidden_size": 1280,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        None,
    ),
    "hubert distil": ({"num_hidden_layers": 2, "feat_proj_layer_norm": False}, None),
    "wav2vec2 base": ({}, 94_371_712 - 768 - 128),
    "wav2vec2 large": (LARGE | WIDE, 315_438_720 - 1024 - 128),
    "wavlm base": ({}, None),
    "wavlm large": (LARGE | WIDE | {"conv_bias": False}, None),
    "whisper base": (
        {
            "d_model": 512,
            "encoder_layers": 6,
            "encoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_attention_heads": 8,
        },
        20_590_592,
    ),
    "whisper large-v3": (
        {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_attention_heads": 20,
            "num_mel_bins": 128,
        },
        None,
    ),
}


def states(output) -> list[np.ndarray]:
    return [np.asarray(state) for state in (*output.hidden_states, output.last_hidden_state)]


@torch.no_grad()
def their_states(model, waveform: np.ndarray, attention_mask=None) -> list[np.ndarray]:
    return [x.float().numpy() for x in torch_states(model, waveform, attention_mask)]


class Models(NamedTuple):
    """A tiny torch model and ours with its parameters."""

    kind: Encoder
    oracle: transformers.PreTrainedModel  # the positional convolution has a plain weight
    params: dict
    # (params, waveform, num_samples) to the output and the gradients, with respect to params and
    # waveform, of the sum over the valid frames of the last hidden state times `weighting`.
    run: Callable
    padded: EncoderOutput  # of the noisily padded batch
    gradients: tuple[dict, jax.Array]  # the same


@pytest.fixture(scope="module", params=list(VARIANTS))
def models(request):
    config, kind = tiny_config(request.param), find_encoder(request.param.split()[0])
    oracle = random_torch_model(config)
    params = convert_params(kind, config, to_numpy(oracle))
    if kind.model_type != "whisper" and not getattr(config, "conv_pos_batch_norm", False):
        torch.nn.utils.parametrize.remove_parametrizations(
            oracle.encoder.pos_conv_embed.conv, "weight"
        )

    def scalar(params, waveform, num_samples):
        output = EncoderModel(kind, config).apply({"params": params}, waveform, num_samples)
        weighted = output.last_hidden_state * weighting(*output.last_hidden_state.shape[1:])
        return jnp.where(output.frame_mask[..., None], weighted, 0).sum(), output

    @jax.jit
    def run(params, waveform, num_samples):
        gradients, output = jax.grad(scalar, (0, 1), has_aux=True)(params, waveform, num_samples)
        return output, gradients

    return Models(kind, oracle, params, run, *run(params, waveforms(), LENGTHS))


def waveforms() -> np.ndarray:
    """Clips of `LENGTHS` samples; what follows a clip is no silence."""
    return np.random.default_rng(0).normal(0.1, 1, (3, 16_000)).astype(np.float32)


def weighting(frames: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, frames, width)).astype(np.float32)


def difference(of: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The greatest; printed, for the table in docs/encoders.md."""
    greatest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    print(f"{of}: {greatest:.0e}")
    return greatest


def frames_of(kind: Encoder) -> list[int]:
    """Of `LENGTHS`: Whisper's frames are centred earlier, so that more begin in a clip."""
    return [50, 32, 1] if kind.model_type == "whisper" else [49, 31, 1]


def test_every_hidden_state_equals_torch_without_padding(models):
    output, _ = models.run(models.params, waveforms(), np.full(3, 16_000))
    assert output.frame_mask.shape == (3, frames_of(models.kind)[0])
    assert output.frame_mask.all()
    theirs = their_states(models.oracle, waveforms())
    assert difference("hidden states", states(output), theirs) < TOLERANCE


@pytest.mark.parametrize("models", ["hubert base", "whisper 80"], indirect=True)
def test_all_samples_are_valid_by_default(models):
    apply = jax.jit(EncoderModel(models.kind, models.oracle.config).apply)
    output = apply({"params": models.params}, waveforms()[:1])
    assert output.frame_mask.all()
    np.testing.assert_allclose(
        output.last_hidden_state, models.padded.last_hidden_state[:1], atol=TOLERANCE
    )


def test_padded_batch_equals_torch_on_each_clip_alone(models):
    np.testing.assert_array_equal(models.padded.frame_mask.sum(1), frames_of(models.kind))
    np.testing.assert_array_equal(
        models.kind.num_frames(models.oracle.config, LENGTHS), frames_of(models.kind)
    )
    ours, theirs = [], []
    for i, length in enumerate(LENGTHS):
        for our, their in zip(
            states(models.padded),
            their_states(models.oracle, waveforms()[i : i + 1, :length]),
            strict=True,
        ):
            ours.append(our[i, : frames_of(models.kind)[i]])
            theirs.append(their[0])
    assert difference("padded", ours, theirs) < TOLERANCE


def torch_gradients(oracle) -> dict[str, np.ndarray]:
    """As `Models.gradients`, from each clip alone, by torch name of our parameters."""
    encoder = encoder_of(oracle).requires_grad_()  # Whisper's positions are frozen in torch
    encoder.zero_grad()
    waveform = torch.from_numpy(waveforms())
    if encoder.config.model_type != "whisper":  # whose log-mel is NumPy's
        waveform.requires_grad_()
    factors = torch.from_numpy(weighting(*frames_and_width(oracle)))
    for i, length in enumerate(LENGTHS):
        clip = waveform[i : i + 1, :length]
        last = torch_states(oracle, clip if clip.requires_grad else clip.numpy())[-1][0]
        (last * factors[i, : len(last)]).sum().backward()
    named = encoder.named_parameters()
    gradients = {name: p.grad.numpy() for name, p in named if p.grad is not None}
    convolution = getattr(getattr(encoder, "encoder", None), "pos_conv_embed", None)
    if (norm := getattr(convolution, "batch_norm", None)) is not None:
        # Ours are scale = weight / deviation and shift = bias - mean * scale.
        prefix = "encoder.pos_conv_embed.batch_norm"
        weight, bias = gradients.pop(f"{prefix}.weight"), gradients.pop(f"{prefix}.bias")
        deviation = np.sqrt(norm.running_var.numpy() + norm.eps)
        gradients[f"{prefix}_bias"] = bias
        gradients[f"{prefix}_scale"] = deviation * weight + norm.running_mean.numpy() * bias
    return gradients | ({"waveform": waveform.grad.numpy()} if waveform.requires_grad else {})


def frames_and_width(oracle) -> tuple[int, int]:
    config = oracle.config
    return 50 if config.model_type == "whisper" else 49, config.hidden_size


def test_every_gradient_of_a_padded_batch_equals_torch_on_each_clip_alone(models):
    theirs = torch_gradients(models.oracle)
    ours = {
        models.kind.torch_name(path): np.asarray(x).T if path[-1] == "kernel" else np.asarray(x)
        for path, x in traverse_util.flatten_dict(models.gradients[0]).items()
    }
    if "waveform" in theirs:
        ours["waveform"] = models.gradients[1]
    assert ours.keys() == theirs.keys()
    norms = {name: np.linalg.norm(value) for name, value in theirs.items()}
    errors = {name: np.linalg.norm(ours[name] - theirs[name]) for name in norms}
    # The softmax does not see what is added to all keys: this gradient is 0 but for rounding.
    zeros = {name: errors.pop(name) for name in norms if name.endswith("k_proj.bias")}
    assert all(error < 1e-6 * max(norms.values()) for error in zeros.values()), zeros
    relative = {name: error / norms[name] for name, error in errors.items()}
    worst = max(relative, key=relative.get)
    print(f"gradients: {relative[worst]:.0e}")
    assert relative[worst] < 1e-3, worst


# Not base: torch's group norm depends on the padding, ours does not.
# Nor batch_norm: after it, torch's padding is no longer 0. Nor Whisper, which has no masks.
@pytest.mark.parametrize(
    "models",
    ["hubert large", "hubert xlarge", "hubert other", "wav2vec2 large", "wavlm large"],
    indirect=True,
)
def test_padded_batch_equals_torch_with_attention_mask(models):
    attention_mask = (np.arange(16_000) < LENGTHS[:, None]).astype(np.int64)
    valid = np.asarray(models.padded.frame_mask)
    silent = waveforms() * attention_mask.astype(np.float32)
    theirs = their_states(models.oracle, silent, attention_mask)
    for our, their in zip(states(models.padded), theirs, strict=True):
        np.testing.assert_allclose(our[valid], their[valid], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "models", ["hubert base", "hubert large", "wavlm large", "whisper 80"], indirect=True
)
def test_bfloat16_is_as_close_to_float32_as_torchs(models):
    half = EncoderModel(models.kind, models.oracle.config, jnp.bfloat16)
    output = jax.jit(half.apply)({"params": models.params}, waveforms(), np.full(3, 16_000))
    ours = states(output)
    assert all(state.dtype == jnp.bfloat16 for state in ours)
    exact = their_states(models.oracle, waveforms())
    theirs = their_states(copy.deepcopy(models.oracle).bfloat16(), waveforms())
    for our, their, true in zip(ours, theirs, exact, strict=True):
        error = np.linalg.norm(our.astype(np.float32) - true) / np.linalg.norm(true)
        assert error < 2 * np.linalg.norm(their - true) / np.linalg.norm(true)
        assert error < 3e-2


@pytest.mark.parametrize("models", ["hubert base", "wavlm base"], indirect=True)
def test_softmax_and_statistics_of_norms_are_float32_in_bfloat16(models):
    half = EncoderModel(models.kind, models.oracle.config, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(half.apply)({"params": models.params}, waveforms(), LENGTHS)
    dtypes = re.findall(r":(\w+)\[[^\]]*\] = (?:exp|reduce_max|rsqrt)\b", str(jaxpr))
    assert len(dtypes) > 10
    assert set(dtypes) == {"f32"}


@pytest.mark.parametrize("models", ["hubert base", "whisper 80"], indirect=True)
def test_empty_clip_in_a_batch_stays_finite(models):
    output, _ = models.run(models.params, waveforms(), np.array([16_000, 0, 100]))
    assert output.frame_mask.sum(1).tolist()[:2] == [frames_of(models.kind)[0], 0]
    assert jnp.isfinite(output.last_hidden_state).all()


def test_waveform_without_a_frame_is_refused():
    for kind in ("hubert base", "whisper 80"):
        embed = find_encoder(kind.split()[0]).embed(tiny_config(kind))
        with pytest.raises(ValueError, match="399 samples"):
            embed.init(jax.random.key(0), jnp.zeros((1, 399)))


def test_num_frames():
    config = transformers.HubertConfig()
    lengths = [0, 1, 399, 400, 719, 720, 16_000, 71_760, 104_400]
    expected = [0, 0, 0, 1, 1, 2, 49, 224, 326]
    assert [conv_frames(config, n) for n in lengths] == expected
    np.testing.assert_array_equal(conv_frames(config, jnp.array(lengths)), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_counts_of_published_architectures(name):
    kind, (changes, count) = find_encoder(name.split()[0]), PUBLISHED[name]
    config = getattr(transformers, kind.config_name)(**changes)
    with torch.device("meta"):
        model = encoder_of(getattr(transformers, kind.model_name)(config))
    theirs = {without_weight_norm(name): tuple(p.shape) for name, p in model.named_parameters()}
    theirs.pop("masked_spec_embed", None)  # only pre-training uses it
    theirs.pop("encoder.pos_conv_embed.conv.parametrizations.weight.original0", None)
    shapes = _param_shapes(kind, config)
    ours = {
        kind.torch_name(path): shape[::-1] if path[-1] == "kernel" else shape
        for path, shape in shapes.items()
    }
    assert ours == theirs
    if count:
        assert sum(np.prod(shape) for shape in shapes.values()) == count


def test_parameter_counts_of_the_layers_of_hubert_large():
    def count(module) -> int:
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 1024)))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    config = transformers.HubertConfig(**LARGE | WIDE)
    assert count(Wav2Vec2Layers(config)) == 24 * 12_596_224 + 2 * 1024
    assert count(EncoderLayer(16, 4096, pre_norm=True)) == 12_596_224


@pytest.mark.slow
def test_hubert_large_at_full_size_equals_torch():
    config, kind = transformers.HubertConfig(**LARGE | WIDE), find_encoder("hubert")
    model = random_torch_model(config, noise=0.01)
    assert sum(p.numel() for p in model.parameters()) == 315_438_720
    clips = waveforms()[:2]
    alone = [their_states(model, clips[i : i + 1, :n]) for i, n in enumerate(LENGTHS[:2])]
    params = convert_params(kind, config, to_numpy(model))
    del model
    output = jax.jit(EncoderModel(kind, config).apply)({"params": params}, clips, LENGTHS[:2])
    for i, theirs in enumerate(alone):
        for our, their in zip(states(output), theirs, strict=True):
            frames = their.shape[1]
            np.testing.assert_allclose(our[i, :frames], their[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kernel_size", [3, 4])
def test_positional_conv_keeps_the_length(kernel_size):
    output, _ = jax.eval_shape(
        PositionalConv(
            tiny_config("hubert base", num_conv_pos_embeddings=kernel_size)
        ).init_with_output,
        jax.random.key(0),
        jnp.ones((2, 5, 32)),
        jnp.ones((2, 5), bool),
    )
    assert output.shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("hubert base", "hidden_act", "mish"),
        ("hubert base", "feat_extract_activation", "mish"),
        ("hubert base", "feat_extract_norm", "batch"),
        ("wav2vec2 base", "adapter_attn_dim", 16),
        ("wav2vec2 base", "add_adapter", True),
        ("wavlm base", "num_attention_heads", 5),
        ("hubert base", "num_conv_pos_embedding_groups", 5),
        ("whisper 80", "activation_function", "mish"),
        ("whisper 80", "encoder_attention_heads", 5),
    ],
)
def test_unsupported_configuration_is_named(kind, field, value):
    with pytest.raises(ValueError, match=field):
        find_encoder(kind.split()[0]).check_config(tiny_config(kind, **{field: value}))


# WavLM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "furthest"), [(320, 800), (16, 20)])
def test_buckets_of_distances_are_torchs(buckets, furthest):
    config = transformers.WavLMConfig(num_buckets=buckets, max_bucket_distance=furthest)
    attention = transformers.models.wavlm.modeling_wavlm.WavLMAttention(
        16, 2, num_buckets=config.num_buckets, max_distance=config.max_bucket_distance
    )
    distances = np.arange(-1600, 1601)
    theirs = attention._relative_positions_bucket(torch.from_numpy(distances))
    np.testing.assert_array_equal(distance_buckets(distances, buckets, furthest), theirs)


# Whisper ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_mels", [80, 128])
def test_log_mel_is_whispers_of_each_clip_alone(num_mels):
    """Loud, quiet, half silent and padded clips, whose ends are mirrored."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    clips = waveforms() * np.array([[1.0], [1e-3], [0.1]], np.float32)
    clips[1, :5000] = 0  # what is 80 dB below the loudest is raised to that
    mel = np.asarray(jax.jit(log_mel, static_argnums=2)(clips, LENGTHS, num_mels))
    for ours, clip, length in zip(mel, clips, LENGTHS, strict=True):
        theirs = extractor(clip[:length], sampling_rate=16_000, padding=False)["input_features"]
        frames = length // 160
        np.testing.assert_allclose(ours[:frames], np.squeeze(theirs).T[:frames], atol=1e-4)
        np.testing.assert_array_equal(ours[frames:], 0)


def test_padding_to_30_s_gives_what_transformers_gives():
    """Here 20480 samples, the tiny model's longest."""
    config, kind = tiny_config("whisper 80"), find_encoder("whisper")
    model = random_torch_model(config)
    params = convert_params(kind, config, to_numpy(model))
    padded = EncoderModel(kind, config, options=(("pad_to_30s", True),))
    output = jax.jit(padded.apply)({"params": params}, waveforms(), LENGTHS)
    assert output.frame_mask.shape == (3, 64)
    assert output.frame_mask.all()
    extractor = whisper_extractor(config)
    for i, length in enumerate(LENGTHS):
        clip = waveforms()[i, :length]
        mel = extractor(clip, sampling_rate=16_000, max_length=64 * 320, return_tensors="pt")
        with torch.no_grad():
            theirs = model.encoder(mel["input_features"]).last_hidden_state[0]
        np.testing.assert_allclose(output.last_hidden_state[i], theirs, atol=TOLERANCE)


def test_a_clip_longer_than_whisper_hears_is_refused():
    embed = find_encoder("whisper").embed(tiny_config("whisper 80"))
    longest = jnp.zeros((1, 64 * 320 + 399))  # whose last frame begins within
    hidden, mask = jax.eval_shape(embed.init_with_output, jax.random.key(0), longest)[0]
    assert hidden.shape == (1, 64, 32)
    assert mask.shape == (1, 64)
    with pytest.raises(ValueError, match="longer than 20480"):
        embed.init(jax.random.key(0), jnp.zeros((1, 64 * 320 + 400)))


WHISPER = Path(__file__).parents[2] / "shared" / "models" / "whisper-base-encoder"
RECORDINGS = Path(__file__).parents[2] / "shared" / "corpora" / "emodb" / "wav"


@pytest.mark.skipif(not WHISPER.is_dir(), reason="no ../shared/models beside the repository")
def test_the_real_whisper_base_equals_torch_on_real_recordings():
    checkpoint = load_encoder(WHISPER)
    assert sum(x.size for x in jax.tree.leaves(checkpoint.params)) == 20_590_592
    model = transformers.WhisperModel.from_pretrained(WHISPER).float().eval()
    paths = sorted(RECORDINGS.glob("*.wav"))[::180]
    clips = [soundfile.read(path, dtype="float32")[0] for path in paths]
    lengths = np.array([len(clips[0]), 20_000, 9_000])
    batch = np.stack(clips)
    output = jax.jit(checkpoint.encode)(checkpoint.params, batch, lengths)
    padded = jax.jit(lambda *inputs: checkpoint.encode(*inputs, pad_to_30s=True))
    in_30_s = padded(checkpoint.params, batch[:1], lengths[:1])
    mel = whisper_extractor(checkpoint.config)(clips[0], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        theirs = model.encoder(mel["input_features"]).last_hidden_state.numpy()
    assert relative(in_30_s.last_hidden_state, theirs) < TOLERANCE
    for i, length in enumerate(lengths):
        alone = their_states(model, batch[i : i + 1, :length])
        for our, their in zip(states(output), alone, strict=True):
            assert relative(our[i, : their.shape[1]], their[0]) < TOLERANCE


def relative(ours, theirs) -> float:
    """Some of the real model's states are thousands, so that 1e-4 is beyond float32."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
