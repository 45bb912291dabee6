"""The recipes of the paper's corpora, from a release's folder to the report, on small corpora."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from transformers import HubertConfig

from layouts import ROOT, make_iemocap, make_meld, tone
from serkd_jax.experiment import STAGES
from serkd_jax.models.students.inverted import InvertedStudent

SMALL = {
    "num_devices": 1,
    "batch_size": 16,
    "max_frames": 14,
    "student.width": 16,
    "student.mlp_dim": 16,
    "student.num_layers": 1,
    "student.num_heads": 2,
    "contrastive.queue_size": 32,
    "curriculum.num_tasks": 2,
    "curriculum.episode_steps": 3,
    **{f"{kind.name}.epochs": 1 for kind in STAGES},
}


def run(recipe, data_dir, workdir, **settings):
    """The command line of the README, made small."""
    command = [sys.executable, "-m", "serkd_jax.main", f"--config=configs/{recipe}"]
    command += [f"--config.data_dir={data_dir}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in (SMALL | settings).items()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def hubert(folder):
    return {"frontend.model": folder, "teacher.model": folder, "teacher.projector": 16}


LOGMEL = {
    "frontend.num_mels": 8,
    "teacher.width": 16,
    "teacher.mlp_dim": 16,
    "teacher.num_layers": 1,
    "teacher.num_heads": 2,
}


@pytest.mark.slow
def test_iemocap_with_hubert_leaves_one_session_out(hubert_folder, tmp_path):
    release = make_iemocap(tmp_path)
    settings = hubert(hubert_folder) | {"stages": "student"}
    done = run("iemocap.py", release, tmp_path / "run", **settings)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["folds"]) == [*"12345"]
    assert all(tuple(rows) == ("student", "linear_probe") for rows in results["folds"].values())
    assert results["overall"]["student"]["n"] == 100
    assert results["classes"] == ["angry", "happy", "neutral", "sad"]
    confusion = np.array(results["overall"]["student"]["confusion"])
    assert confusion.sum(axis=1).tolist() == [20, 40, 20, 20]
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    for number, fold in splits.items():
        assert {name[3:5] for name in fold["test"]} == {f"0{number}"}
        trained = fold["train"] + fold["quiz"] + fold["reward"] + fold["validation"]
        assert f"0{number}" not in {name[3:5] for name in trained}
        assert len(trained) + len(fold["test"]) == 100
    report = (tmp_path / "run" / "results.md").read_text()
    assert "4 / 384 (-380)" in report
    assert "the scores are speaker-independent" in report
    assert "fru 20, xxx 20" in report


@pytest.mark.slow
def test_meld_with_hubert_runs_its_official_split(hubert_folder, tmp_path):
    release = make_meld(tmp_path, dialogues=4)
    settings = hubert(hubert_folder) | {"stages": "teacher,student"}
    done = run("meld.py", release, tmp_path / "run", **settings)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert tuple(results["overall"]) == ("teacher", "student", "linear_probe")
    assert results["overall"]["teacher"]["n"] == 28
    assert len(results["classes"]) == 7
    (fold,) = json.loads((tmp_path / "run" / "splits.json").read_text()).values()
    for part in ("train", "quiz", "reward"):
        assert {name.split("_")[0] for name in fold[part]} == {"train"}
    assert {name.split("_")[0] for name in fold["validation"]} == {"dev"}
    assert {name.split("_")[0] for name in fold["test"]} == {"test"}
    report = (tmp_path / "run" / "results.md").read_text()
    for flaw in ("train_dia125_utt3", "dev_dia110_utt7", "final_videos_testdia1_utt1.mp4"):
        assert flaw in report
    assert "2 of 2): the scores are not speaker-independent" in report


def test_strict_stops_before_anything_is_trained(tmp_path):
    release = make_iemocap(tmp_path, sessions=[1, 2])
    done = run("iemocap.py:logmel", release, tmp_path / "run", strict=True)
    assert done.returncode == 1
    assert "Table 1 of the paper" in done.stderr
    assert "Session3 is missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("fold_*"))


@pytest.mark.slow
def test_the_page_on_the_paper_makes_a_row_of_table_4(hubert_folder, tmp_path):
    """The command of the student that is not inverted, by cross-entropy alone."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`python (.*table4/row1)`", page)
    release = make_iemocap(tmp_path, sessions=[1, 2])
    command = command.replace("IEMOCAP", str(release)).replace("runs/", f"{tmp_path}/")
    settings = SMALL | hubert(hubert_folder)
    command = [
        sys.executable,
        *command.split(),
        *(f"--config.{k}={v}" for k, v in settings.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "table4" / "row1" / "results.json").read_text())
    assert list(results["overall"]) == ["student", "linear_probe"]
    inverted = InvertedStudent(4, width=16, mlp_dim=16, num_layers=1, num_heads=2, readout="tokens")
    frames, width = 14, HubertConfig.from_pretrained(hubert_folder).hidden_size
    params = jax.eval_shape(
        inverted.init, jax.random.key(0), jnp.zeros((1, frames, width)), jnp.ones(1)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # A token is a frame, and embeds the features at a time rather than the course of one.
    assert results["params"]["student"] == count + 16 * (width - frames)
    for log in tmp_path.glob("table4/row1/fold_*/student/metrics.jsonl"):
        (row,) = map(json.loads, log.open())
        assert row["train/loss"] == pytest.approx(row["train/cross_entropy"])


@pytest.mark.slow
def test_the_page_on_corpora_goes_from_a_folder_to_a_trained_student(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    look, train = re.findall(r"```bash\npython (.*?)\n```", page)
    monkeypatch.chdir(tmp_path)
    Path("recordings").mkdir()
    for speaker in ("anna", "bert"):
        for take in range(12):
            emotion, hertz = (("happy", 400), ("sad", 800))[take % 2]
            audio = tone(hertz, take)
            soundfile.write(f"recordings/{speaker}_{emotion}_{take:02d}.wav", audio, 16_000)
    exec(script, {})

    def python(command, **settings):
        command = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert re.search(r"all +\| 12 +\| 12 +\| 24 ", python(look))
    assert "24 test utterances in 2 fold(s)" in python(train, **SMALL, **LOGMEL)
    assert list(Path("runs/mine/fold_2/curriculum/checkpoints").iterdir())
    assert not list(Path("runs/mine").glob("data"))  # the records of the first command were used
