"""The study of students, through its command: who is tested, what is kept, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import students
from benchmarks.students import PARTS, SPEAKER_PARTS, Corpus
from serkd_jax.data.prepare import extract_features
from serkd_jax.data.sources import AudioFiles
from serkd_jax.encoders.frontends import LogMel

ROOT = Path(__file__).resolve().parents[1]
FRAMES = {"inverted": False, "readout": "tokens", "norm": "pre"}
FRAMES |= {"time_pooling": 5, "standardize": True, "learning_rate": 0.003, "steps": 40}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Low and high notes of five speakers, as log-mel frames."""
    folder, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    rows = ["path,label,speaker"]
    for i in range(30):
        wave = np.sin(2 * np.pi * (200, 900)[i % 2] * np.arange(6000) / 16_000)
        soundfile.write(folder / f"{i:02d}.wav", 0.3 * wave + 0.02 * rng.normal(size=6000), 16_000)
        rows.append(f"{i:02d}.wav,{('low', 'high')[i % 2]},s{i // 6}")
    (folder / "corpus.csv").write_text("\n".join(rows))
    extract_features(AudioFiles(folder / "corpus.csv"), LogMel(16), 30, folder / "features")
    return folder / "features"


def flags(features: Path, out: Path, *more: str) -> list[str]:
    small = ["--max_frames=25", "--stride=2"]
    return [f"--features={features}", f"--out={out}", *small, *more]


@pytest.fixture
def run(monkeypatch):
    """The command, here."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["students", *flags(*arguments)])
        students.main()

    return run


def test_a_kind_of_student_is_run_once_and_stands_beside_the_probe(run, features, capsys, tmp_path):
    kind = "--runs=2", f"--only={json.dumps(FRAMES)}"
    arguments = features, tmp_path / "study.jsonl", *kind
    command = [sys.executable, "-m", "benchmarks.students", *flags(*arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    header, _, student, probe = done.stdout.splitlines()
    assert header == f"| {' | '.join(FRAMES)} | train UA | validation UA | test UA |"
    assert student.startswith("| False | tokens | pre | 5 | True | 0.003 | 40 | 100.0 ± 0.0 |")
    assert probe.startswith("| linear probe |  |")
    assert probe.endswith("| 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |")
    kept = (tmp_path / "study.jsonl").read_text()
    assert [len(json.loads(kept)["ua"][part]) for part in PARTS] == [2, 2, 2]
    run(*arguments)
    assert capsys.readouterr().out == done.stdout
    assert (tmp_path / "study.jsonl").read_text() == kept


def test_every_run_tests_and_validates_on_speakers_that_it_does_not_train_on():
    speakers = np.repeat([f"s{i}" for i in range(9)], 4)
    rows = np.arange(len(speakers))
    runs = list(Corpus(rows, rows, rows, speakers, SPEAKER_PARTS).runs())
    for parts in runs:
        assert sorted(np.concatenate([parts[name] for name in PARTS])) == list(rows)
        assert sum(len(set(speakers[parts[name]])) for name in PARTS) == 9
    for held_out in ("test", "validation"):
        assert sorted(np.concatenate([parts[held_out] for parts in runs])) == list(rows)


def test_too_few_speakers_or_runs_are_refused(run, features, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --only has step: use inverted, readout"):
        run(features, tmp_path / "study.jsonl", '--only={"step": 3}')
    with pytest.raises(SystemExit, match=r"^error: --runs is 1: use 2 to 5$"):
        run(features, tmp_path / "study.jsonl", "--runs=1")
    ids = "\n".join(f"{i:02d}.wav,{'ab'[i % 2]},s{i % 3}" for i in range(30))
    (tmp_path / "few.csv").write_text(f"path,label,speaker\n{ids}")
    with pytest.raises(SystemExit, match="has 3 speakers: the study needs 5 or more"):
        run(features, tmp_path / "study.jsonl", f"--manifest={tmp_path / 'few.csv'}")
