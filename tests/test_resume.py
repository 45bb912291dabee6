"""A run that is killed or told to end in every stage ends with the same parameters, bit for bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import quick_xla
from finished_runs import final_arrays
from layouts import make_split
from serkd_jax import training
from serkd_jax.errors import UserError
from serkd_jax.experiment import STAGES
from serkd_jax.stages.finetune import TeacherState

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of the corpus, its records and features, and what the runs print."""
    make_split(folder := tmp_path_factory.mktemp("corpus"))
    return folder


def start(workdir, corpus, *flags):
    """The tiny experiment in a process of its own, on one device."""
    command = [sys.executable, "-m", "serkd_jax.main", "--config=tests/tiny_config.py:manifest"]
    command += [f"--workdir={workdir}", f"--config.cache_dir={corpus}/data"]
    command += [f"--config.manifest={corpus}/corpus.csv"]
    command += [f"--config.{kind.name}.epochs={EPOCHS}" for kind in STAGES]
    command += ["--config.steps_per_dispatch=1", *flags]
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}
    output = (corpus / "output.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def epochs_logged(stage_dir):
    log = stage_dir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def end_in(stage_dir, process, epoch, how):
    """Sends a signal while the stage is in ``epoch``, wherever in it that happens to be."""
    deadline = time.monotonic() + 300
    while not (stage_dir / "checkpoints").is_dir() or epochs_logged(stage_dir) < epoch - 1:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(60)


@pytest.mark.slow
def test_a_run_ended_in_every_stage_ends_bit_for_bit_as_one_left_alone(corpus, tmp_path):
    alone = start(tmp_path / "alone", corpus)
    assert alone.wait() == 0, (corpus / "output.log").read_text()[-3000:]
    for i, stage in enumerate(kind.name for kind in STAGES):
        stage_dir = tmp_path / "ended" / "fold_1" / stage
        epoch, how = random.randint(1, EPOCHS), [signal.SIGTERM, signal.SIGKILL][i % 2]
        print(f"{stage} gets {how.name} in epoch {epoch} of {EPOCHS}")
        run = start(tmp_path / "ended", corpus)
        assert end_in(stage_dir, run, epoch, how) == (75 if how == signal.SIGTERM else -how)
    assert start(tmp_path / "ended", corpus).wait() == 0
    assert_same_bits(tmp_path / "ended", tmp_path / "alone")


def assert_same_bits(workdir, other):
    actual, expected = final_arrays(workdir), final_arrays(other)
    assert expected.keys() == actual.keys()
    assert not [k for k in expected if not np.array_equal(expected[k], actual[k])]


def test_a_checkpoint_keeps_the_losses_of_its_step_whatever_comes_while_it_is_written(
    tmp_path, monkeypatch
):
    """It is written in the background, while the next steps are taken."""
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **kw: time.sleep(0.1) or dumps(*args, **kw))
    with training._checkpoint_manager(tmp_path) as checkpoints:
        history = {"loss": [2.0]}
        training._save(checkpoints, 1, TeacherState(1, {"x": np.ones(2)}, {}, None), history, None)
        history["loss"] = [2.0, 1.0]
        checkpoints.wait_until_finished()
        _, saved = training._restore(checkpoints, "stage", 1)
    assert saved == {"loss": [2.0]}


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        ("*/state/d/*", "cannot read the checkpoint"),
        ("*/history/*", "cannot read the checkpoint"),
        ("*/metrics/*", "the score of a checkpoint cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_a_short_line(tmp_path, damaged, told):
    stage = tmp_path / "fold_1" / "student"
    state = TeacherState(1, {"x": np.arange(2000.0)}, {}, None)
    with training._checkpoint_manager(stage) as checkpoints:
        training._save(checkpoints, 1, state, {}, {"score": 0.5})
        checkpoints.wait_until_finished()
    for path in (stage / "checkpoints").glob(damaged):
        path.write_bytes(b"{")
    with pytest.raises(UserError, match=rf"{told}.*Delete {tmp_path}/fold_1 to train") as error:
        training.load_selected(stage)
    assert len(str(error.value)) < 700


@pytest.mark.slow
def test_a_run_told_to_end_in_the_middle_of_an_epoch_goes_on_from_the_last_step(corpus, tmp_path):
    flags = ["--config.stages=student", "--config.student.epochs=1", "--config.batch_size=2"]
    alone = start(tmp_path / "alone", corpus, *flags)
    assert alone.wait() == 0, (corpus / "output.log").read_text()[-3000:]
    run = start(tmp_path / "run", corpus, *flags)
    student = tmp_path / "run" / "fold_1" / "student"
    assert end_in(student, run, 1, signal.SIGTERM) == 75
    log = (corpus / "output.log").read_text()
    step = re.search(r"told to end: .* student: step (\d+) is saved; start again", log)[1]
    saved = [path.name for path in (student / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == [step]
    assert epochs_logged(student) == 0
    assert start(tmp_path / "run", corpus, *flags).wait() == 0
    assert_same_bits(tmp_path / "run", tmp_path / "alone")


def test_a_stage_ends_when_its_patience_does_and_a_resumed_one_with_it(tmp_path):
    scores, taken = [0.1, 0.5, 0.5, 0.3, 0.4, 0.9], []

    def steps(state, data, rows, count, rng):
        taken.append(int(state.step))
        return state.replace(step=state.step + count), {"loss": np.zeros(1)}

    def validate(state):
        return {"loss": 0.0, "ua": scores[int(state.step) // 2 - 1]}

    def run(folder, epochs):
        stage = training.Training(
            title="stage",
            epochs=epochs,
            steps_per_epoch=2,
            steps_per_dispatch=1,
            devices=jax.devices()[:1],
            init=lambda: TeacherState(np.int32(0), {}, {}, None),
            frozen=None,
            steps=steps,
            take=lambda steps: (None, None),
            validate=validate,
            selection_metric="ua",
            rng=None,
            learning_rate=lambda step: 0.1,
            patience=2,
        )
        return int(training.train(stage, folder).step), taken.copy(), taken.clear()

    folder = tmp_path / "stage"
    assert run(folder, 6)[:2] == (6, [*range(10)]), "the best is the last of equals"
    assert run(folder, 6)[:2] == (6, [])
    other = tmp_path / "ended"
    assert run(other, 4)[:2] == (6, [*range(8)])
    assert run(other, 6)[:2] == (6, [8, 9])
    assert epochs_logged(other) == epochs_logged(folder) == 5
