"""What reaches each equation: a tiny whole run, compared with `plain_run`.

The rows of each step and their part and task, the weights that a stage starts from, the epoch that
is selected, and the parameters, logits and labels of each row of the results and each export.
"""

import csv
import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import soundfile

import plain_run
from layouts import tone
from serkd_jax import experiment
from serkd_jax.audio.logmel import log_mel, num_samples
from serkd_jax.deploy.trained import STUDENT_ROWS, load_trained
from serkd_jax.experiment import prepare_experiment
from serkd_jax.export import export
from serkd_jax.predict import load_model
from tiny_config import get_config

CLASSES = {"calm": 250, "glad": 400, "sad": 640}  # Hz
N = 72
EPOCHS = {"teacher": 3, "student": 4, "distill": 5, "curriculum": 4}
RATES = {"teacher": 1e-3, "student": 1e-2, "distill": 7e-3, "curriculum": 3e-3}
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.arange(N) % 3)
# Some sound like another class, so that no model is perfect and selection has a choice.
SOUNDS = np.where(np.arange(N) % 4 == 1, RNG.integers(3, size=N), LABELS)
TESTED = np.arange(N) % 3 == 0
STAGES = [kind.name for kind in experiment.STAGES]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A manifest whose ids are in another order than its lines."""
    folder = tmp_path_factory.mktemp("recordings")
    with (folder / "corpus.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "path", "label", "speaker", "split"])
        for i, sound in enumerate(SOUNDS):
            clip = tone(list(CLASSES.values())[sound], i, seconds=0.3 + i / 300)
            soundfile.write(folder / f"{i}.wav", clip, 16_000)
            split, label = ("test" if TESTED[i] else "train"), list(CLASSES)[LABELS[i]]
            table.writerow([f"u{i * 31 % N:02d}", f"{i}.wav", label, f"s{i % 3}", split])
    return folder


def recipe(recordings, encoder):
    """Everything that is random within a step is off, and what could be 0 or 1 is not."""
    config = get_config()
    del config.synthetic
    config.corpus, config.manifest = "manifest", str(recordings / "corpus.csv")
    config.protocol.update(split_by="split", validation=0.3)
    config.selection_metric, config.steps_per_dispatch, config.batch_size = "ua", 1, 8
    config.optimizer.update(weight_decay=0.2, clip_norm=0.4, schedule="cosine", warmup=0.2)
    config.teacher.update(input="waveform", model=encoder, patch_frames=0, standardize=False)
    config.student.update(readout="tokens", time_pooling=1)  # which needs an adapter
    for stage in STAGES:
        config[stage].update(epochs=EPOCHS[stage], learning_rate=RATES[stage])
    config.teacher.dropout = config.student.dropout = 0.0
    config.contrastive.update(weight=0.4, momentum=0.8, max_frequency_mask=0, max_time_mask=0)
    config.meta.update(learning_rate=1e-2, pilot_learning_rate=0.5, quiz_batch_size=4)
    config.distill.beta = 5.0
    config.curriculum.easy_bias = 1.0
    return config


@pytest.fixture(scope="module")
def ran(recordings, hubert_folder, tmp_path_factory):
    """The run, with what its stages saw and drew."""
    config = recipe(recordings, hubert_folder)
    done = prepare_experiment(config, tmp_path_factory.mktemp("run"))
    seen = {}

    def watched(training, folder):
        saw = seen[folder.name] = SimpleNamespace(rows=[], tasks=[], start=None, columns=None)

        def steps(state, data, rows, count, rng):
            if saw.columns is None:
                saw.start, saw.columns = jax.device_get((state.params, data))
            saw.rows.append(jax.tree.map(lambda x: x[0, 0], rows))  # of one device and step
            saw.tasks.append(int(getattr(state, "task", 0)))
            return training.steps(state, data, rows, count, rng)

        return train(dataclasses.replace(training, steps=steps), folder)

    train = experiment.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "train", watched)
        done.run()
    return SimpleNamespace(
        run=done, config=config, workdir=done.workdir, fold=done.workdir / "fold_1", seen=seen,
        ids=done.table.ids.tolist(), drawn={name: drawn(saw) for name, saw in seen.items()},
    )  # fmt: skip


def drawn(saw):
    rows = saw.rows if isinstance(saw.rows[0], dict) else [{"train": r} for r in saw.rows]
    train, quiz = (np.array([r.get(part) for r in rows]) for part in ("train", "quiz"))
    return plain_run.Drawn(saw.start, train, quiz, np.array(saw.tasks))


@pytest.fixture(scope="module")
def corpus(ran, recordings):
    """The recordings in the order of the run's rows, by their ids; the parts as the run says."""
    samples = num_samples(ran.config.max_frames)
    with (recordings / "corpus.csv").open() as file:
        lines = {line["id"]: line for line in csv.DictReader(file)}
    lines = [lines[i] for i in ran.ids]
    waveforms = [soundfile.read(recordings / line["path"])[0][:samples] for line in lines]
    split = json.loads((ran.workdir / "splits.json").read_text())["1"]
    return plain_run.Corpus(
        waveforms,
        [log_mel(clip.astype(np.float32), ran.config.frontend.num_mels) for clip in waveforms],
        np.array([sorted(CLASSES).index(line["label"]) for line in lines]),
        {k: np.array([ran.ids.index(i) for i in v]) for k, v in split.items() if k != "held_out"},
    )


@pytest.fixture(scope="module")
def plain(ran, corpus, hubert_folder):
    """The plain run's epochs by stage; each stage starts from the best ones before it."""
    epochs, config = {}, ran.config

    def best(stage):
        """The plain run's; where several are best, the one that the run took."""
        found = [epoch.scores["ua"] for epoch in epochs[stage]]
        taken = selected(ran, stage)
        assert found[taken] == max(found), f"{stage}: epoch {taken} of {found}"
        return epochs[stage][taken]

    epochs["teacher"] = plain_run.fine_tune(config, corpus, hubert_folder, ran.drawn["teacher"])
    teacher = best("teacher")
    students = plain_run.Students(config, corpus, teacher.state["hidden"])
    epochs["student"] = students.train_student(ran.drawn["student"])
    epochs["distill"] = students.distill(ran.drawn["distill"], teacher.state["classifier"])
    distilled = best("distill")
    epochs["curriculum"] = students.follow_curriculum(ran.drawn["curriculum"], distilled.state)
    meta = distilled.state["meta"]
    return SimpleNamespace(
        epochs=epochs,
        hidden=teacher.state["hidden"],
        tiers=students.tiers(meta),
        rows={
            "teacher": teacher.logits,
            "student": best("student").logits,
            "meta_teacher": students.judge(meta),
            "distilled_student": distilled.logits,
            "updated_student": best("curriculum").logits,
        },
    )


def metrics(ran, stage):
    with (ran.fold / stage / "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def selected(ran, stage):
    """The number of the epoch whose checkpoint is kept beside the last."""
    steps = sorted(int(p.name) for p in (ran.fold / stage / "checkpoints").iterdir())
    return steps[0] * EPOCHS[stage] // len(ran.drawn[stage].train) - 1


# The order of training


def test_a_row_is_the_same_recording_everywhere(ran, corpus, plain):
    index = np.arange(N)
    for stage, saw in ran.seen.items():
        columns = {name: np.asarray(column) for name, column in saw.columns.items()}
        assert np.array_equal(columns["index"], index)
        assert np.array_equal(columns["label"], corpus.labels)
        scale = 32768 if stage == "teacher" else 1
        clips = corpus.waveforms if stage == "teacher" else corpus.features
        assert columns["length"].tolist() == list(map(len, clips))
        for ours, clip in zip(columns["inputs"], clips, strict=True):
            assert np.abs(ours[: len(clip)] / scale - clip).max() < 2e-3
            assert not ours[len(clip) :].any()
        if stage in ("distill", "curriculum"):
            np.testing.assert_allclose(columns["teacher_hidden"], plain.hidden, atol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_each_part_is_passed_through_in_ever_new_order(stage, ran, corpus):
    """The curriculum's train rows are another matter."""
    rows = {"train": ran.drawn[stage].train, "quiz": ran.drawn[stage].quiz}
    parts = {"train": "train", "quiz": "reward" if stage == "curriculum" else "quiz"}
    wanted = {"teacher": ["train"], "student": ["train"], "curriculum": ["quiz"]}
    assert rows["train"].shape[-1] == 8
    assert stage != "distill" or rows["quiz"].shape[-1] == 4
    for name in wanted.get(stage, ["train", "quiz"]):
        part, taken = corpus.parts[parts[name]], rows[name].ravel()
        passes = [taken[i : i + len(part)] for i in range(0, len(taken), len(part))]
        whole = [p for p in passes if len(p) == len(part)]
        assert len(whole) > 1
        assert all(np.array_equal(np.sort(p), np.sort(part)) for p in whole)
        assert len({p.tobytes() for p in whole}) >= min(len(whole), 6)


def test_a_tasks_batch_is_drawn_from_its_tier_anew_in_each_step(ran, plain):
    """Tier 0 has what T' is surest of."""
    rows = ran.drawn["curriculum"].train
    for k, tier in enumerate(plain.tiers):
        assert set(rows[:, k].ravel()) == set(tier)
        counts = [np.bincount(batch, minlength=N)[tier] for batch in rows[:, k]]
        assert np.ptp(counts, axis=1).max() <= 1
        assert len({batch.tobytes() for batch in rows[:, k]}) == len(rows)
    assert len(set(ran.drawn["curriculum"].tasks)) > 1


def test_no_two_stages_draw_alike(ran):
    """Neither their batches, nor the weights of a new student."""
    first = [ran.drawn[stage].train[0].tobytes() for stage in STAGES]
    assert len(set(first)) == len(first)
    new = [ran.drawn["student"].start, ran.drawn["distill"].start["student"]]
    kernels = [start["embed"]["kernel"] for start in new]
    assert not np.isin(*kernels).any()


def test_another_key_gives_other_weights_wherever_they_are_new(ran):
    (statistics,), programs = ran.run.statistics.values(), ran.run.programs
    teacher = ran.drawn["teacher"].start["classifier"]
    starts = {"student": (statistics,), "distill": (statistics, teacher)}
    for kind in experiment.STAGES:
        if kind.name in starts:
            init = programs.stage(kind).init
            one, other = (init(jax.random.key(k), *starts[kind.name]).params for k in (0, 1))
            kernels = [kind.student_params(p)["embed"]["kernel"] for p in (one, other)]
            assert not np.isin(*kernels).any()


# Scores and results


@pytest.mark.parametrize("stage", STAGES)
def test_every_epoch_has_the_scores_of_the_plain_run(stage, ran, plain):
    for ours, theirs in zip(metrics(ran, stage), plain.epochs[stage], strict=True):
        assert ours["validation/loss"] == pytest.approx(theirs.scores["loss"], rel=1e-3)
        assert ours["validation/ua"] == pytest.approx(theirs.scores["ua"])
        if stage == "curriculum":
            for name in ("reward", "consistency"):
                assert ours[f"train/{name}"] == pytest.approx(theirs.scores[name], abs=1e-4)


def test_the_best_epoch_is_selected_and_it_is_not_always_the_same(ran, plain):
    """`plain` has checked that it is the best."""
    taken = {stage: selected(ran, stage) for stage in STAGES}
    assert any(0 < epoch < EPOCHS[stage] - 1 for stage, epoch in taken.items())
    for stage in STAGES:
        assert len({epoch.scores["ua"] for epoch in plain.epochs[stage]}) > 1


def test_each_row_of_the_results_has_the_logits_of_the_plain_run(ran, corpus, plain):
    test = corpus.parts["test"]
    with np.load(ran.fold / "predictions.npz") as saved:
        assert saved["ids"].tolist() == [ran.ids[row] for row in test]
        assert np.array_equal(saved["label"], corpus.labels[test])
        for row, logits in plain.rows.items():
            np.testing.assert_allclose(saved[row], logits[test], atol=2e-3, err_msg=row)
    rows = list(plain.rows.values())
    for i, logits in enumerate(rows):  # else the comparison could not tell them apart
        assert all(np.abs(logits - other)[test].max() > 0.2 for other in rows[:i])
    results = json.loads((ran.workdir / "results.json").read_text())["overall"]
    for row, logits in plain.rows.items():
        confusion = np.zeros((3, 3), int)
        np.add.at(confusion, (corpus.labels[test], logits[test].argmax(1)), 1)
        assert results[row]["confusion"] == confusion.tolist()


@pytest.mark.parametrize("row", STUDENT_ROWS)
def test_an_exported_student_names_the_classes_of_its_row(row, ran, plain, recordings, tmp_path):
    export(load_trained(ran.workdir, "1", row), tmp_path / "model", ["safetensors"], None)
    model = load_model(tmp_path / "model")
    tested = np.flatnonzero(TESTED)[:18]  # those that fit into one window
    logits = plain.rows[row][[ran.ids.index(f"u{i * 31 % N:02d}") for i in tested]]
    expected = np.exp(logits - np.logaddexp.reduce(logits, 1)[:, None])
    predictions = [model(recordings / f"{i}.wav") for i in tested]
    for name, column in zip(sorted(CLASSES), expected.T, strict=True):
        ours = [p.probabilities[name] for p in predictions]
        np.testing.assert_allclose(ours, column, atol=2e-3)
    assert len({p.label for p in predictions}) > 1
