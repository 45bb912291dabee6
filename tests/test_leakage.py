"""No test label and no test clip reaches training, selection, features or the curriculum.

Whole runs on a corpus, and on the same corpus with its test part poisoned, agree in every bit of
what was fitted; and folds are drawn without their test labels. Of the other parts, each reaches
what it is for: features are standardised by the training part alone, the quiz part is for the
meta-teacher, and the reward part for the policy.
"""

import csv
import functools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import soundfile
from ml_collections import ConfigDict

from layouts import tone, write_wav
from serkd_jax import experiment
from serkd_jax.data.splits import PARTS, make_folds
from serkd_jax.experiment import ROWS, prepare_experiment
from serkd_jax.programs import Programs
from serkd_jax.results.predictions import read_predictions
from tiny_config import get_config

FITTED = ("train", "quiz", "reward", "validation")
EPOCHS = 4
CLASSES = {"calm": 200, "glad": 400, "sad": 800}  # Hz
LABELS = np.random.default_rng(0).choice(3, 96, p=[0.4, 0.35, 0.25])
# Some sound like another class, so that no model is perfect and selection has a choice.
SOUNDS = np.where(np.arange(96) % 5 < 2, np.random.default_rng(1).integers(3, size=96), LABELS)
TESTED = np.arange(96) % 3 == 1
# Every test label is another one, and the classes have other sizes.
OTHER_LABELS = np.where(TESTED, np.where(LABELS == 0, 1, 0), LABELS)

STAGES = [kind.name for kind in experiment.STAGES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three manifests of the same ids: `clean`; test labels, or test clips, replaced.

    The other clips are loud noise of other lengths, some shorter and some longer than max_frames.
    """
    folder = tmp_path_factory.mktemp("corpus")
    for i, sound in enumerate(SOUNDS):
        clip = tone(list(CLASSES.values())[sound], i, seconds=0.3 + i / 400)
        soundfile.write(folder / f"{i}.wav", clip, 16_000)
        write_wav(folder / "noise" / f"{i}.wav", i, num_samples=800 + 100 * i)
    for name, labels in {"clean": LABELS, "labels": OTHER_LABELS, "clips": LABELS}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "path", "label", "speaker", "split"])
            for i, (label, tested) in enumerate(zip(labels, TESTED, strict=True)):
                path = f"noise/{i}.wav" if tested and name == "clips" else f"{i}.wav"
                split = "test" if tested else "train"
                table.writerow([f"u{i:02d}", path, list(CLASSES)[label], f"s{i % 3}", split])
    return folder


@pytest.fixture(scope="module")
def prepare(corpus, tmp_path_factory):
    """Makes an Experiment on one of the manifests; those alike share their programs."""
    made = {}

    def shared_programs(config, *shapes):
        alike = f"{[config[stage] for stage in STAGES]} {shapes}"
        return made.setdefault(alike, Programs(config, *shapes))

    def prepare(manifest, **changes):
        config = get_config()
        del config.synthetic
        config.update(
            corpus="manifest",
            manifest=str(corpus / f"{manifest}.csv"),
            cache_dir=str(corpus / "cache"),
            selection_metric="ua",
            seed=1,  # one by which the rewards vary, so that the policy learns
        )
        config.protocol.update(split_by="split", groups_per_fold=1, validation=0.3)
        config.student.update(time_pooling=1, readout="tokens")  # which needs an adapter
        config.curriculum.num_tasks = 4
        for stage in STAGES:
            config[stage].update(epochs=EPOCHS, learning_rate=1e-2)
        config.update_from_flattened_dict(changes)
        return prepare_experiment(config, tmp_path_factory.mktemp(manifest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "Programs", shared_programs)
        yield prepare


@pytest.fixture(scope="module")
def run(prepare):
    """Runs the whole pipeline on one of the manifests, once."""

    @functools.cache
    def run(manifest):
        done = prepare(manifest)
        done.run()
        return done

    return run


@pytest.fixture(scope="module")
def clean(run):
    return fitted(run("clean"))


def fitted(done):
    """Name -> bytes of what fitting reads, and of all that it has left in the workdir."""
    (fold,) = done.folds
    workdir = done.workdir / f"fold_{fold.name}"
    rows = np.concatenate([fold.parts[part] for part in FITTED])
    arrays = {f"splits/{part}": ids for part, ids in fold.parts.items()}
    columns = done.features.columns
    arrays |= {f"batches/{name}": np.asarray(columns[name])[rows] for name in columns}
    for log in workdir.glob("*/metrics.jsonl"):
        stage = log.parent.name
        for row in map(json.loads, log.open()):
            arrays |= {f"{stage}/{row['epoch']}/{k}": row[k] for k in row if "second" not in k}
        with ocp.CheckpointManager(log.parent / "checkpoints") as checkpoints:
            for step in checkpoints.all_steps():  # the last and the selected one
                items = ocp.args.Composite(state=ocp.args.StandardRestore())
                state = checkpoints.restore(step, args=items).state
                epoch = step // done.steps_per_epoch
                for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                    arrays[f"{stage}/{epoch}/{jax.tree_util.keystr(path)}"] = leaf
    with np.load(workdir / "teacher" / "outputs.npz") as outputs:
        arrays |= {f"teacher/{name}": outputs[name][rows] for name in outputs.files}
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def different(first, second):
    """The names of what only one of them has, or what differs in any bit."""
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def tasks(done):
    """The rows of each curriculum task; what was trained is restored."""
    (fold,) = done.folds
    teacher, outputs = done.train_teacher(fold)
    distilled = done.distill(fold, teacher, outputs.hidden)
    return done._tasks(fold, distilled, outputs.hidden)


def predictions(done):
    return read_predictions(done.workdir, probe=True)["1"]


def count_classes(done):
    """(C,) how many of each class results.json says were tested."""
    results = json.loads((done.workdir / "results.json").read_text())
    return np.sum(results["overall"]["student"]["confusion"], axis=1)


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["labels", "clips"])
def test_a_poisoned_test_part_changes_no_bit_of_what_is_fitted(poison, clean, run):
    for stage in STAGES:
        assert any(name.startswith(f"{stage}/{EPOCHS}/") and "params" in name for name in clean)
    epochs = {name.split("/")[1] for name in clean if "opt_state" in name}
    assert len(epochs) > 1, "selection took the last epoch everywhere: this shows little of it"
    assert not different(clean, fitted(run(poison)))


@pytest.mark.slow
def test_poisoned_labels_are_scored_but_predictions_stay_the_same(run):
    before, after = predictions(run("clean")), predictions(run("labels"))
    assert not (before.pop("label") == after.pop("label")).any()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for name, labels in {"clean": LABELS, "labels": OTHER_LABELS}.items():
        assert np.array_equal(count_classes(run(name)), np.bincount(labels[TESTED], minlength=3))


@pytest.mark.slow
def test_poisoned_clips_are_predicted_otherwise(run):
    before, after = predictions(run("clean")), predictions(run("clips"))
    assert np.array_equal(before["label"], after["label"])
    for row in (*ROWS, "linear_probe"):
        assert not (before[row] == after[row]).all(1).any()


@pytest.mark.slow
def test_the_curriculum_ranks_the_training_rows_alone(run):
    ranked = tasks(run("clean"))
    assert np.array_equal(np.sort(np.concatenate(ranked)), run("clean").folds[0].train)
    for poison in ("labels", "clips"):
        assert all(map(np.array_equal, ranked, tasks(run(poison))))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "validation"])
def test_one_other_label_that_is_fitted_does_show(part, clean, prepare):
    """Without this, the comparisons above could be blind."""
    poisoned = prepare("clean")
    (fold,) = poisoned.folds
    row = fold.parts[part][0]
    poisoned.table.labels[row] = (poisoned.table.labels[row] + 1) % 3
    poisoned.teacher_inputs = poisoned.features.with_columns(label=poisoned.table.labels)
    poisoned.train_teacher(fold)
    seen = {name for name in different(clean, fitted(poisoned)) if name.startswith("teacher")}
    last = {name for name in clean if name.startswith(f"teacher/{EPOCHS}/[")}
    assert f"teacher/{EPOCHS}/validation/loss" in seen
    params = {name for name in last if "['params']" in name}
    assert params <= seen if part == "train" else not last & seen


# Parts


def poison(done, rows):
    """Other labels of the rows, and noise of full length in place of their features."""
    features = done.features.columns
    inputs, length = np.array(features["inputs"]), np.array(features["length"])
    rng = np.random.default_rng(0)
    inputs[rows] = rng.normal(5, 9, inputs[rows].shape)
    length[rows] = inputs.shape[1]
    done.table.labels[rows] = (done.table.labels[rows] + 1) % 3
    done.features = done.teacher_inputs = done.features.with_columns(
        inputs=inputs, length=length, label=done.table.labels
    )
    return done


@pytest.mark.parametrize("part", PARTS)
def test_features_are_standardised_by_the_training_part_alone(part, prepare):
    """Of every fold: what is a test clip in one is a training clip in others."""
    clean, poisoned = (prepare("clean", **{"protocol.split_by": "speaker"}) for _ in range(2))
    rows = clean.folds[0].parts[part]
    rows = rows[:1] if part == "train" else rows
    poison(poisoned, rows)
    for kind in ("statistics", "_teacher_statistics"):
        before, after = (getattr(done, kind) for done in (clean, poisoned))
        for fold in clean.folds:
            equal = [
                np.array_equal(getattr(before[fold.name], name), getattr(after[fold.name], name))
                for name in ("mean", "spread")
            ]
            assert equal == [not np.isin(rows, fold.train).any()] * 2
    assert (part == "train") == np.isin(rows, clean.folds[0].train).any()


def test_each_stage_draws_its_batches_from_its_parts(prepare, monkeypatch):
    done, drawn = prepare("clean"), {}
    (fold,) = done.folds

    def look(stage, folder):
        rows = stage.take(range(stage.steps_per_dispatch))[1]
        rows = rows if isinstance(rows, dict) else {"train": rows}
        drawn[folder.name] = {name: set(np.unique(r).tolist()) for name, r in rows.items()}
        return stage.init()

    monkeypatch.setattr(experiment, "train", look)
    done.run_fold(fold)
    train, quiz, reward = (set(fold.parts[part].tolist()) for part in ("train", "quiz", "reward"))
    assert drawn == {
        "teacher": {"train": train},
        "student": {"train": train},
        "distill": {"train": train, "quiz": quiz},
        "curriculum": {"train": train, "quiz": reward},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "reached", "first"),
    [
        ("quiz", {"distill", "curriculum"}, "meta_params"),
        ("reward", {"curriculum"}, "policy_params"),
    ],
)
def test_quiz_and_reward_reach_only_the_stages_that_they_are_for(
    part, reached, first, clean, prepare
):
    """No student is trained on them, and the meta-teacher does not see how it will be judged."""
    poisoned = prepare("clean")
    (fold,) = poisoned.folds
    poison(poisoned, fold.parts[part])
    poisoned.run()
    seen = different(clean, fitted(poisoned))
    trained = {name for name in seen if name.count("/") >= 2}  # not the teacher's outputs of them
    assert {name.split("/")[0] for name in trained} == reached
    assert any(first in name for name in trained)


# Folds. Of random none of this holds: it deals all rows by their class, before any is a test row.


def folds_of(labels, **protocol):
    n = len(labels)
    columns = {
        "id": [f"u{i:03d}" for i in range(n)],
        "speaker": [f"s{i // 10}" for i in range(n)],
        "session": [str(i // 30) for i in range(n)],
        "fold": [str(i % 4) for i in range(n)],
        "split": ["test" if i < 30 else "train" for i in range(n)],
    }
    settings = {"groups_per_fold": 1, "num_folds": 5, "validation": 0.2, "quiz": 0.2}
    settings |= {"seed": 0, "training_share": 1.0}
    return make_folds(labels, columns, ConfigDict(settings | protocol))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("split_by", ["speaker", "session", "fold", "split"])
def test_a_fold_is_drawn_without_its_test_labels(split_by, apart):
    labels = np.random.default_rng(0).choice(3, 120, p=[0.5, 0.3, 0.2])
    for k, fold in enumerate(folds_of(labels, split_by=split_by, speakers_apart=apart)):
        poisoned = labels.copy()
        poisoned[fold.test] = (labels[fold.test] + 1) % 3
        other = folds_of(poisoned, split_by=split_by, speakers_apart=apart)[k]
        for part, rows in fold.parts.items():
            assert np.array_equal(rows, other.parts[part]), f"{part} of fold {fold.name}"


@pytest.mark.parametrize("split_by", ["split", "speaker"])
def test_the_length_of_training_does_not_depend_on_the_test_labels(split_by, prepare):
    # A share of 0.3, and steps of one row: the rounding of each class shows.
    changes = {"protocol.split_by": split_by, "protocol.quiz": 0.3, "batch_size": 1}
    before, after = (prepare(manifest, **changes) for manifest in ("clean", "labels"))
    assert any(np.array_equal(fold.test, np.flatnonzero(TESTED)) for fold in before.folds)
    assert before.steps_per_epoch == after.steps_per_epoch
