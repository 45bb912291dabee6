"""The convolutional student, and its pretraining on the hidden states of a large encoder."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import common
from layouts import ROOT, write_wav
from serkd_jax.audio.logmel import log_mel, num_frames
from serkd_jax.config import check_config
from serkd_jax.encoders.distilled import CONFIG, WEIGHTS, load_distilled
from serkd_jax.encoders.frontends import LogMel, Pretrained
from serkd_jax.errors import UserError
from serkd_jax.experiment import prepare_experiment
from serkd_jax.files import read_json, write_json
from serkd_jax.models.students.convolutional import ConvolutionalStudent, FrameEncoder
from serkd_jax.stages.imitation import Pretraining, change_level
from serkd_jax.stages.standardization import Statistics
from tiny_config import get_config

SIZES = {"width": 6, "num_layers": 3, "kernel": 3, "outputs": 16}
BATCH, FRAMES, MELS = 4, 11, 8


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_frame_encoder_equals_convolutions_in_torch():
    encoder, features = FrameEncoder(**SIZES), noise(2, FRAMES, MELS)
    valid = jnp.ones((2, FRAMES), bool)
    params = encoder.init(jax.random.key(0), features, valid)["params"]
    params = jax.tree.map(lambda x: noise(*x.shape, seed=x.size), params)
    x = torch.tensor(features).mT  # (B, channels, T)
    for i in range(SIZES["num_layers"]):
        dense, norm = params[f"conv_{i}"], params[f"norm_{i}"]
        kernel = torch.tensor(dense["kernel"]).reshape(SIZES["kernel"], x.shape[1], -1)
        found = torch.conv1d(x, kernel.permute(2, 1, 0), torch.tensor(dense["bias"]), padding=1)
        scale, bias = torch.tensor(norm["scale"]), torch.tensor(norm["bias"])
        found = torch.layer_norm(found.mT, (SIZES["width"],), scale, bias, 1e-6)
        added = torch.nn.functional.gelu(found).mT
        x = x + added if i else added
    expected = x.mT @ torch.tensor(params["out"]["kernel"]) + torch.tensor(params["out"]["bias"])
    encoded = encoder.apply({"params": params}, features, valid)
    np.testing.assert_allclose(encoded, expected, rtol=1e-3, atol=1e-4)


def test_the_students_vector_is_mean_and_deviation_of_the_valid_frames_alone():
    student = ConvolutionalStudent(3, (5,), (4,), **SIZES)
    features = noise(2, FRAMES, MELS)
    variables = student.init(jax.random.key(0), features, np.array([FRAMES, 7]))
    out = student.apply(variables, features, np.array([FRAMES, 7]))
    encoder = FrameEncoder(**SIZES)
    for i, length in enumerate((FRAMES, 7)):
        alone = features[i : i + 1, :length]
        frames = encoder.apply(
            {"params": variables["params"]["encoder"]}, alone, alone[..., 0] > -99
        )
        expected = np.concatenate([frames[0].mean(0), frames[0].std(0)])
        expected /= np.sqrt(1 + 1e-5)  # new running statistics are 0 and 1
        np.testing.assert_allclose(out.hidden[i], expected, atol=3e-3)  # 1e-5 under the root
        np.testing.assert_allclose(
            out.logits[i : i + 1],
            student.apply(variables, alone, np.array([length])).logits,
            atol=1e-5,
        )
    features[1, 7:] = 1e3
    np.testing.assert_array_equal(
        out.hidden, student.apply(variables, features, np.array([FRAMES, 7])).hidden
    )


def test_a_changed_level_is_that_of_the_louder_waveform():
    waveform = 0.1 * noise(16_000)
    waveform[8000:] = 0
    quiet, loud = log_mel(waveform, MELS), log_mel(2 * waveform, MELS)
    beside = np.concatenate([quiet, quiet], axis=1)[None]
    changed = change_level(beside, MELS, jnp.array([20 * np.log10(2)]))[0]
    np.testing.assert_allclose(changed[:, :MELS], loud, atol=2e-3)
    np.testing.assert_array_equal(changed[:, MELS:], quiet)
    assert (changed[-20:, :MELS] == 0).all()


def test_the_error_is_that_of_standardised_hidden_states_over_valid_frames():
    encoder = FrameEncoder(**SIZES)
    pretraining = Pretraining(encoder, MELS, optax.sgd(0.1))
    width = MELS + SIZES["outputs"]
    statistics = Statistics(noise(width, seed=1), 1 + np.abs(noise(width, seed=2)))
    state = pretraining.init(jax.random.key(0), statistics)
    frames, length = noise(BATCH, FRAMES, width), np.array([FRAMES, 4, 9, 1])
    batch = {"inputs": frames, "length": length, "index": np.arange(BATCH)}
    expected = []
    for x, count in zip(frames, length, strict=True):
        z = (x[:count] - statistics.mean) / statistics.spread
        valid = np.ones((1, count), bool)
        predicted = encoder.apply({"params": state.params}, z[None, :, :MELS], valid)[0]
        expected.append(np.square(predicted - z[:, MELS:]).mean())
    np.testing.assert_allclose(pretraining.errors(state, batch), expected, rtol=1e-5)
    after, metrics = pretraining.step(state, batch, jax.random.key(1))
    assert pretraining.errors(after, batch).mean() < np.mean(expected)
    assert metrics["loss"] > 0


def command_for(folder, model):
    command = [sys.executable, "-m", "serkd_jax.pretrain", f"--model={model}", "--layer=1"]
    command += [f"--input={folder / 'speech'}", f"--out={folder / 'out'}", "--max_seconds=0.5"]
    command += [f"--num_mels={MELS}", "--width=6", "--num_layers=3", "--kernel=3", "--epochs=20"]
    return command


@pytest.fixture(scope="module")
def pretrained(encoder_folder, tmp_path_factory):
    """What the command makes of sixteen recordings, and what it printed."""
    folder = tmp_path_factory.mktemp("pretrained")
    for seed in range(16):
        write_wav(folder / "speech" / f"{seed}.wav", seed, 4000 + 500 * seed)
    (folder / "speech" / "broken.wav").write_text("not audio")
    command = command_for(folder, encoder_folder("whisper"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / "out", done.stdout


@pytest.mark.slow
def test_the_command_learns_to_predict_hidden_states_and_says_how_well(pretrained):
    folder, told = pretrained
    described = read_json(folder / CONFIG, "")
    assert (described["num_mels"], described["outputs"]) == (MELS, 16)
    lines = (folder / "training" / "metrics.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    assert last["train/loss"] < 0.9 * first["train/loss"]
    assert last["validation/r2"] > first["validation/r2"] + 0.05
    assert described["r2"] == pytest.approx(last["validation/r2"], abs=1e-4)
    assert f"{100 * described['r2']:.1f} %" in told
    assert "1 of 17" in told
    found = load_distilled(folder)
    assert found.params["conv_0"]["kernel"].shape == (3 * MELS, 6)
    assert (len(found.sha256), found.sizes.width) == (16, 6)


def test_the_preset_for_devices_takes_what_the_command_makes_by_default():
    config = common.with_preset(common.paper(), "device")
    config.corpus = "emodb"
    check_config(config)
    names = ["width", "num_layers", "kernel", "num_mels"]
    # In another process, since other tests import commands with flags of the same names.
    code = "from absl.flags import FLAGS; import serkd_jax.pretrain; "
    code += f"print(*(FLAGS[name].default for name in {names}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    made = dict(zip(names, map(int, done.stdout.split()), strict=True))
    assert config.frontend.num_mels == made.pop("num_mels")
    assert {name: config.student[name] for name in made} == made
    assert config.student.outputs == 512  # as Whisper-base's hidden states


@pytest.mark.slow
def test_a_folder_of_another_pretraining_is_refused(pretrained, encoder_folder):
    folder, _ = pretrained
    command = command_for(folder.parent, encoder_folder("whisper"))
    done = subprocess.run([*command, "--seed=4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds another pretraining (seed: 0 -> 4): use" in done.stderr.splitlines()[-1]


def student_of(folder, **changes):
    config = get_config()
    config.student = {"kind": "convolutional", "pretrained": str(folder), **SIZES}
    config.student.update({"standardize": True, "label_smoothing": 0.0, "focus": 0.0})
    config.student.update({"learning_rate": 1e-3, "epochs": 1})
    config.student.update({"classifier_dims": (6,), "projection_dims": (4,), "dropout": 0.1})
    config.student.update(changes)
    config.stages = "student"
    return config


@pytest.mark.slow
def test_a_student_starts_from_it_and_trains_on(pretrained, tmp_path):
    folder, _ = pretrained
    experiment = prepare_experiment(student_of(folder), tmp_path)
    found = load_distilled(folder)
    jax.tree.map(
        np.testing.assert_array_equal,
        experiment.programs.new_student(jax.random.key(5))["params"]["encoder"],
        found.params,
    )
    assert read_json(tmp_path / "run.json", "")["the student's weights"] == found.sha256
    state = experiment.train_student(experiment.folds[0])
    np.testing.assert_array_equal(state.frozen.mean, found.mean)
    np.testing.assert_array_equal(state.frozen.spread, found.spread)
    moved = state.params["encoder"]["conv_0"]["kernel"] - found.params["conv_0"]["kernel"]
    assert 0 < np.abs(moved).max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "cannot be read"),
        (lambda folder: (folder / WEIGHTS).unlink(), "cannot be read"),
        (lambda folder: (folder / CONFIG).unlink(), "is missing"),
        (lambda folder: write_json(folder / CONFIG, {"width": 6}), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_named_with_the_remedy(pretrained, tmp_path, damage, told):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (CONFIG, WEIGHTS):
        (copy / name).write_bytes((pretrained[0] / name).read_bytes())
    load_distilled(copy)
    damage(copy)
    with pytest.raises(UserError, match=told) as error:
        load_distilled(copy)
    assert "serkd_jax.pretrain" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 8}, "has width 6, but student.width is 8: set --config.student.width=6"),
        ({"kernel": 5}, "--config.student.kernel=3"),
    ],
)
def test_a_student_of_other_sizes_is_refused_with_both(pretrained, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        prepare_experiment(student_of(pretrained[0], **changes), tmp_path)


def test_a_front_end_beside_an_encoder_puts_its_frames_before_the_hidden_states(encoder_folder):
    first, second = LogMel(MELS), Pretrained(encoder_folder("whisper"), layer=1)
    clips = [0.1 * noise(n, seed=n) for n in (4000, 9000, 6500)]
    both = dataclasses.replace(second, beside=first)
    assert both.width == MELS + second.width
    found = dict(both(clips, 20))
    alone = dict(second(clips, 20))
    for i, clip in enumerate(clips):
        assert len(found[i]) == min(num_frames(len(clip)), 20)
        np.testing.assert_array_equal(found[i][:, :MELS], log_mel(clip, MELS)[:20])
        np.testing.assert_array_equal(found[i][:, MELS:], alone[i])
