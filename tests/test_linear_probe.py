"""The linear probe: what it reads, whom it holds out, and that it is scikit-learn's SVM."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.svm import LinearSVC

from benchmarks import linear_probe
from serkd_jax.data.prepare import extract_features
from serkd_jax.data.sources import AudioFiles
from serkd_jax.data.splits import Fold
from serkd_jax.encoders.frontends import LogMel, Pretrained
from serkd_jax.results.probe import decide, pool_all, probe_fold

ROOT = Path(__file__).resolve().parents[1]


def write_manifest(folder: Path, name: str, columns=("path", "label", "speaker")) -> Path:
    """18 notes, high and low, of three speakers."""
    with (folder / name).open("w", newline="") as file:
        rows = csv.DictWriter(file, columns, extrasaction="ignore")
        rows.writeheader()
        for i in range(18):
            label = ("low", "high")[i % 2]
            rows.writerow({"path": f"{i:02d}.wav", "label": label, "speaker": f"s{i // 6}"})
    return folder / name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    for i in range(18):
        wave = np.sin(2 * np.pi * (200, 900)[i % 2] * np.arange(6000) / 16_000)
        wave = 0.3 * wave + 0.02 * rng.normal(size=6000)
        soundfile.write(folder / f"{i:02d}.wav", wave, 16_000)
    write_manifest(folder, "corpus.csv")
    write_manifest(folder, "bare.csv", ("path",))
    return folder


@pytest.fixture(scope="module")
def features(corpus, encoder_folder):
    frontend = Pretrained(encoder_folder("whisper"), layer=1)
    extract_features(AudioFiles(corpus / "corpus.csv"), frontend, 60, corpus / "features")
    extract_features(AudioFiles(corpus / "bare.csv"), LogMel(8), 60, corpus / "bare")
    return corpus / "features"


def run(features: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.linear_probe", f"--features={features}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_holds_one_speaker_out_at_a_time(features):
    done = run(features, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean and deviation of 16 features; 18 utterances, 3 folds, 2 classes" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 18
    assert json.loads(done.stdout.splitlines()[-1])["ua"] > 0.9


def test_labels_and_speakers_come_from_a_manifest_where_the_records_have_none(features, corpus):
    done = run(corpus / "bare")
    assert done.returncode == 1
    assert "00.wav has no label or speaker: name a --manifest" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(corpus / "bare", f"--manifest={corpus / 'corpus.csv'}", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["ua"] == 1


def test_folds_are_those_of_a_run_or_the_speakers(tmp_path):
    ids, speakers = np.array(["a", "b", "c", "d"]), np.array(["x", "y", "x", "z"])
    folds = [tuple(map(list, fold)) for fold in linear_probe.folds(ids, speakers, "")]
    assert folds == [([1, 3], [0, 2]), ([0, 2, 3], [1]), ([0, 1, 2], [3])]
    splits = {"1": {"test": ["d", "a"], "train": ["b"]}, "2": {"test": ["c"]}}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    folds = linear_probe.folds(ids, speakers, str(tmp_path / "splits.json"))
    assert [tuple(map(list, fold)) for fold in folds] == [([1, 2], [0, 3]), ([0, 1, 3], [2])]


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_a_linear_svm_on_standardised_means_and_deviations(classes):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    sizes = 5 + np.arange(60) % 4
    clips = [
        rng.normal(0.2 * c, 1, (size, 7)).astype(np.float16)
        for c, size in zip(labels, sizes, strict=True)
    ]
    padded = np.stack([np.pad(clip, ((0, 9 - len(clip)), (0, 0))) for clip in clips])
    chunks = [
        (np.arange(at, at + 20), padded[at : at + 20], sizes[at : at + 20])
        for at in range(0, 60, 20)
    ]
    vectors = pool_all(chunks)
    by_hand = [[*clip.astype(float).mean(0), *clip.astype(float).std(0)] for clip in clips]
    np.testing.assert_allclose(vectors, by_hand)
    parts = np.split(np.random.default_rng(1).permutation(60), [30, 33, 36, 40])
    train, test = np.sort(np.concatenate(parts[:4])), parts[4]
    mean, spread = vectors[train].mean(0), vectors[train].std(0)
    svm = LinearSVC(C=0.001, random_state=0).fit((vectors[train] - mean) / spread, labels[train])
    decided = probe_fold(vectors, labels, Fold("1", "", *parts), classes)
    expected = svm.decision_function((vectors[test] - mean) / spread)
    np.testing.assert_allclose(decided if classes > 2 else decided[:, 1], expected, atol=1e-9)
    predicted = svm.predict((vectors[test] - mean) / spread)
    np.testing.assert_array_equal(decided.argmax(-1), predicted)
    assert 0.3 < (predicted == labels[test]).mean() < 1


def test_a_class_that_is_not_trained_on_is_never_predicted():
    labels = np.array([0, 2, 0, 2, 0, 2, 1])
    vectors = np.eye(7)
    decided = decide(vectors, labels, np.arange(6), np.array([6]))
    assert decided.shape == (1, 3)
    assert decided.argmin() == 1
    parts = [np.arange(4), np.array([4]), np.array([5]), np.array([], int), np.array([6])]
    decided = probe_fold(vectors, labels, Fold("1", "", *parts), 5)
    assert decided.shape == (1, 5), "the last classes may have no utterance"
    assert set(decided.argsort()[0, :3]) == {1, 3, 4}
