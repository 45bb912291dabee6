"""Whole runs on every kind of encoder: front-end, teacher, export and prediction."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import soundfile
import torch
import transformers

from serkd_jax.deploy.folder import FRONTEND
from serkd_jax.deploy.trained import load_test_inputs, load_trained
from serkd_jax.encoders import ENCODERS
from serkd_jax.encoders.checkpoint import load_encoder, save_encoder
from serkd_jax.experiment import ROWS, STAGES, prepare_experiment
from serkd_jax.export import export
from serkd_jax.predict import load_model
from tiny_config import get_config
from tiny_encoders import torch_states

LAYERS = {"hubert": -1, "wav2vec2": 1, "wavlm": [1, 2], "whisper": 1}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """24 recordings at 8 and 22.05 kHz, high and low, of four speakers; two that are unusable."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    with (folder / "corpus.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "speaker"])
        for i in range(24):
            rate, pitch = (8000, 22050)[i % 2], (150, 300)[i // 2 % 2]
            t = np.arange(rate // 2) / rate
            wave = 0.3 * np.sin(2 * np.pi * pitch * t) + 0.01 * rng.normal(size=t.size)
            soundfile.write(folder / f"{i}.wav", wave, rate)
            rows.writerow([f"{i}.wav", ("calm", "glad")[i // 2 % 2], f"s{i // 6}"])
        soundfile.write(folder / "silent.wav", np.zeros(8000), 8000)
        rows.writerow(["silent.wav", "calm", "s0"])
        rows.writerow(["missing.wav", "glad", "s0"])
    return folder / "corpus.csv"


def tiny_run(manifest: Path, workdir: Path, **changes):
    """A run of all stages, an epoch each."""
    config = get_config()
    config.corpus, config.manifest = "manifest", str(manifest)
    del config.synthetic
    config.batch_size = 8
    for stage in (kind.name for kind in STAGES):
        config[stage].epochs = 1
    config.update_from_flattened_dict(changes)
    prepare_experiment(config, workdir).run()
    return json.loads((workdir / "results.json").read_text())


def encoder(kind: str, folder: str) -> dict:
    """The front-end's part of a recipe."""
    return {"name": kind, "model": folder, "layer": LAYERS[kind]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_features_and_a_teacher_on_waveforms_through_all_stages(
    kind, encoder_folder, manifest, tmp_path
):
    folder, workdir = encoder_folder(kind), tmp_path / "run"
    results = tiny_run(
        manifest,
        workdir,
        frontend=encoder(kind, folder),
        **{"teacher.input": "waveform", "teacher.model": folder},
        **{"teacher.patch_frames": 0, "teacher.standardize": False},
    )
    assert tuple(results["overall"]) == (*ROWS, "linear_probe")
    assert results["overall"]["teacher"]["n"] == 24
    report = (workdir / "results.md").read_text()
    for words in ("2 files or lines were skipped", "silent.wav", "missing.wav"):
        assert words in report
    assert_teacher_saves_back(workdir, folder, tmp_path / "fine-tuned")
    assert_exported_student_hears_the_same(workdir, kind, manifest.parent, tmp_path / "exported")


def assert_teacher_saves_back(workdir: Path, start: str, folder: Path) -> None:
    """The teacher's encoder becomes a model for transformers, other than what it started from."""
    saved = (workdir / "fold_1" / "teacher" / "checkpoints").absolute()
    with ocp.CheckpointManager(saved) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=items).state
    before = load_encoder(start)
    params = {"embed": before.params["embed"], "encoder": state["params"]["encoder"]}
    after = dataclasses.replace(before, params=params, do_normalize=False)
    save_encoder(after, folder)
    waveform = np.random.default_rng(0).normal(size=(1, 8000)).astype(np.float32)
    ours = after.encode(params, waveform).last_hidden_state
    model = getattr(transformers, before.kind.model_name).from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = torch_states(model, waveform)[-1]
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.abs(ours - after.encode(before.params, waveform).last_hidden_state).max() > 1e-4


def assert_exported_student_hears_the_same(
    workdir: Path, kind: str, recordings: Path, folder: Path
) -> None:
    """From the files on, it gives the run's own probabilities; the encoder comes with it."""
    trained = load_trained(workdir, "1", "updated_student")
    for checked in export(trained, folder, ["safetensors"], load_test_inputs(trained, None)):
        assert checked.difference < 1e-4
    assert sorted(path.name for path in (folder / FRONTEND).iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    card = " ".join((folder / "README.md").read_text().split())
    assert f"the {kind} encoder in `frontend/`" in card
    arrays = trained.predictions["1"]
    logits = arrays["updated_student"]
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    model = load_model(folder)
    for key, row in zip(arrays["ids"], expected, strict=True):
        heard = model(recordings / key).windows[0].probabilities  # the run cuts at one window
        np.testing.assert_allclose(list(heard.values()), row, atol=1e-3)


@pytest.mark.slow
def test_a_log_mel_student_of_a_teacher_with_a_front_end_of_its_own(
    encoder_folder, manifest, tmp_path
):
    """A Whisper's upper layer reads what its lower one gives; the student needs neither."""
    folder, workdir = encoder_folder("whisper"), tmp_path / "run"
    settings = {
        "teacher.frontend": encoder("whisper", folder),
        "teacher.model": folder,
        "teacher.patch_frames": 0,
        "teacher.standardize": False,
    }
    results = tiny_run(manifest, workdir, **settings)
    assert tuple(results["overall"]) == (*ROWS, "linear_probe")
    made = {path.name.split("-")[1] for path in (workdir / "data" / "features").iterdir()}
    assert made == {"logmel", "whisper"}
    run = json.loads((workdir / "run.json").read_text())
    assert run["the front-end"].startswith("logmel")
    assert run["the teacher's front-end"].startswith("whisper")
    trained = load_trained(workdir, "1", "updated_student")
    assert trained.config.frontend["name"] == "logmel"
    export(trained, tmp_path / "exported", ["safetensors"], load_test_inputs(trained, None))
    assert not (tmp_path / "exported" / FRONTEND).exists()
