"""Encoders as front-ends: batches, devices, layers; log-mel frames are in test_audio.py."""

import itertools
import math

import jax
import numpy as np
import pytest
import torch
import transformers

from serkd_jax.audio.logmel import num_frames
from serkd_jax.encoders.frontends import (
    ACCELERATOR_BATCHING,
    CPU_BATCHING,
    Batching,
    Pretrained,
    bucket_lengths,
    plan_batches,
)
from serkd_jax.errors import UserError
from tiny_encoders import torch_states, whisper_extractor

MAX_FRAMES = 100
FLOAT16 = {"atol": 5e-3}  # states are a few units at most


def clips(count=24, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(400, 40_000, count)
    return [rng.normal(0.05, 0.1, n).astype(np.float32) for n in lengths]


def extract(frontend, waveforms, groups=None, max_frames=MAX_FRAMES):
    features = dict(frontend(waveforms, max_frames, groups))
    return [features[i] for i in range(len(waveforms))]


@pytest.mark.parametrize("growth", [1.05, 1.25])
def test_bucket_lengths(growth):
    assert bucket_lengths(326, 1.25) == [56, 70, 87, 108, 135, 168, 209, 261, 326]
    for longest in (1, 49, 50, 51, 100, 326, 1499):
        lengths = bucket_lengths(longest, growth)
        assert lengths[-1] == longest
        assert lengths == sorted(set(lengths))
        # As many as the growth asks for, and some more for rounding up.
        assert len(lengths) <= 1 + 1.25 * math.log(max(1, longest / 50), growth)
        assert all(b / a <= growth for a, b in itertools.pairwise(lengths))
        assert len(lengths) == 1 or 50 <= lengths[0] < 50 * growth + 1


@pytest.mark.parametrize("batching", [CPU_BATCHING, ACCELERATOR_BATCHING, Batching(1, 1.25)])
@pytest.mark.parametrize("max_frames", [326, 1499])
@pytest.mark.parametrize("seconds", [(1, 7), (1, 1.1), (3, 3), (1, 30)])
def test_batches_hold_every_clip_once_with_little_padding_and_few_shapes(
    batching, max_frames, seconds
):
    """In groups as large as the extractor's shards."""
    rng, shapes, computed, wanted = np.random.default_rng(0), set(), 0, 0
    for _ in range(5):
        frames = np.minimum(50 * rng.uniform(*seconds, 133), max_frames).astype(int)
        batches = plan_batches(frames, max_frames, batching)
        assert sorted(np.concatenate([batch.clips for batch in batches])) == list(range(133))
        for batch in batches:
            assert batch.frames / batching.growth**2 <= max(frames[batch.clips].min(), 50)
            assert frames[batch.clips].max() <= batch.frames
            full = max(1, batching.frames // batch.frames)
            assert len(batch.clips) <= batch.size <= min(full, 2 * len(batch.clips))
            shapes.add((batch.frames, batch.size))
        computed += sum(batch.frames * batch.size for batch in batches)
        wanted += frames.sum()
    assert computed / wanted < (1.04 if batching == CPU_BATCHING else 1.4)
    lengths = bucket_lengths(max_frames, batching.growth)
    assert len(shapes) <= sum(
        1 + int(math.log2(max(1, batching.frames // length))) for length in lengths
    )


def test_features_are_those_of_torch_on_the_clip_up_to_the_limit(hubert_folder, hubert_oracle):
    waveforms = clips()
    assert any(num_frames(len(w)) > MAX_FRAMES for w in waveforms)
    for waveform, features in zip(
        waveforms, extract(Pretrained(hubert_folder), waveforms), strict=True
    ):
        expected = hubert_oracle(waveform[: 99 * 320 + 400])
        assert features.dtype == np.float16
        assert features.shape == expected.shape
        np.testing.assert_allclose(features, expected, **FLOAT16)


@pytest.mark.parametrize("layer", [0, 1, 2, -2, -1])
def test_any_layer_can_be_had(layer, hubert_folder, hubert_oracle):
    waveform = clips(1)[0][:20_000]
    (features,) = extract(Pretrained(hubert_folder, layer=layer), [waveform])
    np.testing.assert_allclose(features, hubert_oracle(waveform, layer), **FLOAT16)


def test_of_several_layers_the_mean_is_taken(hubert_folder, hubert_oracle):
    waveform = clips(1)[0][:20_000]
    (features,) = extract(Pretrained(hubert_folder, layer=[0, 2, -1]), [waveform])
    expected = np.mean([hubert_oracle(waveform, layer) for layer in (0, 2, -1)], axis=0)
    np.testing.assert_allclose(features, expected, **FLOAT16)


@pytest.mark.parametrize(
    "settings",
    [
        {"layer": 3},
        {"layer": -4},
        {"layer": []},
        {"layer": [1, 1]},
        {"layer": [1, 3]},
        {"layer": "1"},
        {"dtype": "float16"},
        {"pad_to_30s": True},
        {"kind": "wavlm"},
    ],
)
def test_settings_that_the_model_does_not_have_are_refused(settings, hubert_folder):
    with pytest.raises(UserError, match=r"layer|dtype|pad_to_30s|is a hubert, not a wavlm"):
        Pretrained(hubert_folder, **settings).checkpoint  # noqa: B018


def test_fingerprint_tells_layers_types_and_weights_apart(hubert_folder, encoder_folder):
    kinds = [{}, {"layer": 1}, {"layer": [1, 2]}, {"dtype": "bfloat16"}]
    made = {Pretrained(hubert_folder, **kind).fingerprint for kind in kinds}
    whisper = encoder_folder("whisper")
    made |= {Pretrained(whisper, pad_to_30s=pad).fingerprint for pad in (False, True)}
    assert len(made) == 6


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_whispers_features_are_those_of_torch_for_the_frames_of_the_grid(
    pad_to_30s, encoder_folder
):
    """The tiny one pads to 1.28 s, its longest clip; a clip's first frames are kept."""
    folder = encoder_folder("whisper")
    model = transformers.WhisperModel.from_pretrained(folder).eval()
    waveforms = [waveform[:20_000] for waveform in clips()]
    features = extract(Pretrained(folder, pad_to_30s=pad_to_30s), waveforms, max_frames=64)
    for waveform, ours in zip(waveforms, features, strict=True):
        assert len(ours) == num_frames(len(waveform))
        if pad_to_30s:
            extractor = whisper_extractor(model.config)
            mel = extractor(waveform, sampling_rate=16_000, max_length=64 * 320)["input_features"]
            with torch.no_grad():
                theirs = model.encoder(torch.tensor(mel)).last_hidden_state
        else:
            with torch.no_grad():
                theirs = torch_states(model, waveform[None])[-1]
        np.testing.assert_allclose(ours, theirs[0, : len(ours)], **FLOAT16)


def test_clips_beyond_what_whisper_hears_are_refused_before_any_is_computed(encoder_folder):
    with pytest.raises(UserError, match=r"takes at most 64 frames, 1\.28 s, not 65"):
        extract(Pretrained(encoder_folder("whisper")), clips(1), max_frames=65)


def test_features_are_the_same_bits_on_any_devices_in_any_order_beside_any_group(hubert_folder):
    waveforms = clips()
    groups = np.arange(24) % 3
    one = Pretrained(hubert_folder, devices=tuple(jax.devices()[:1]))
    expected = extract(one, waveforms, groups)

    eight = Pretrained(hubert_folder, devices=tuple(jax.devices()))
    assert (one.num_devices, eight.num_devices) == (1, 8)
    backwards = np.arange(24)[::-1]
    shuffled = extract(eight, [waveforms[i] for i in backwards], groups[backwards])
    alone = extract(one, [w for w, group in zip(waveforms, groups, strict=True) if group == 1])
    for ours, theirs in [
        (extract(eight, waveforms, groups), expected),
        (shuffled[::-1], expected),
        (alone, expected[1::3]),
    ]:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch_frames", [500, 3000])
def test_features_depend_on_the_size_of_batches_by_rounding_alone(batch_frames, hubert_folder):
    waveforms = clips()
    for a, b in zip(
        extract(Pretrained(hubert_folder, batching=Batching(batch_frames, 1.25)), waveforms),
        extract(Pretrained(hubert_folder), waveforms),
        strict=True,
    ):
        assert np.abs(a - b).max() <= 2 * np.spacing(np.abs(b).max())


def test_bfloat16_is_close(hubert_folder):
    waveforms = clips(4)
    for a, b in zip(
        extract(Pretrained(hubert_folder, dtype="bfloat16"), waveforms),
        extract(Pretrained(hubert_folder), waveforms),
        strict=True,
    ):
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.05


def test_no_more_programs_are_compiled_than_there_are_lengths(hubert_folder):
    frontend = Pretrained(hubert_folder, devices=tuple(jax.devices()[:1]))
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    for seed in range(3):
        extract(frontend, clips(seed=seed))
    compiled = sum("backend_compile" in name for name in events)
    assert 1 < compiled <= len(bucket_lengths(MAX_FRAMES, CPU_BATCHING.growth))
