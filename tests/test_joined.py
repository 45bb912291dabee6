"""EMO-DB and nEMO in one manifest."""

import subprocess
import sys

import pytest

from benchmarks.joined import join
from layouts import ROOT, write_wav
from serkd_jax.data.corpora import EmoDB
from serkd_jax.data.corpora.manifest import Manifest
from serkd_jax.errors import UserError


def run(emodb, manifest, out, *speakers):
    command = [sys.executable, "-m", "benchmarks.joined", f"--emodb={emodb}", f"--nemo={manifest}"]
    command += [f"--out={out}", "--held_out", *speakers]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def nemo(tmp_path):
    rows = ["path,label,speaker"]
    for i, label in enumerate(("anger", "surprised", "sadness", "fear")):
        write_wav(tmp_path / "nemo" / f"{i}.wav", 100 + i)
        rows.append(f"{i}.wav,{label},{'AB'[i % 2]}")
    (tmp_path / "nemo" / "manifest.csv").write_text("\n".join(rows))
    return tmp_path / "nemo" / "manifest.csv"


def test_the_classes_that_both_have_are_listed_and_a_manifest_lacks_the_held_out(
    emodb, nemo, tmp_path
):
    done = run(emodb, nemo, tmp_path / "out", "emodb-16", "nemo-B")
    assert done.returncode == 0, done.stderr
    assert "classes: anger, fear, sadness" in done.stdout
    every = Manifest(str(tmp_path / "out" / "all.csv")).utterances
    told = {(u.speaker, u.label, u.session, u.split) for u in every}
    assert told == {
        ("emodb-03", "anger", "emodb", "train"),
        ("emodb-08", "fear", "emodb", "train"),
        ("emodb-16", "sadness", "emodb", "test"),
        ("nemo-A", "anger", "nemo", "train"),
        ("nemo-A", "sadness", "nemo", "train"),
        ("nemo-B", "fear", "nemo", "test"),
    }
    train = Manifest(str(tmp_path / "out" / "train.csv")).utterances
    assert {u.path for u in train} == {u.path for u in every if u.split == "train"}


def test_an_unknown_speaker_is_refused_with_those_that_there_are(emodb, nemo, tmp_path):
    done = run(emodb, nemo, tmp_path / "out", "emodb-17")
    assert done.returncode == 1
    assert done.stderr.startswith("error: held_out has emodb-17, but the speakers are emodb-03")
    assert not (tmp_path / "out").exists()


def test_corpora_without_common_classes_are_refused(emodb):
    corpora = {"emodb": EmoDB(str(emodb)).list_utterances(), "other": []}
    with pytest.raises(UserError, match="emodb and other have 0 classes in common, not two"):
        join(corpora, [])
