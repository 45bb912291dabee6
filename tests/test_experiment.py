"""The pipeline through its public entry points, on tiny synthetic and manifest corpora."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.common import with_student
from finished_runs import final_arrays
from serkd_jax import experiment
from serkd_jax.data.reader import read_examples
from serkd_jax.errors import UserError
from serkd_jax.experiment import ROWS, STAGES, prepare_experiment
from serkd_jax.results import probe
from serkd_jax.results.predictions import pooled, read_predictions
from serkd_jax.results.probe import decide, pool
from tiny_config import get_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workdir in which a tiny experiment has run to its end, and the report."""
    workdir = tmp_path_factory.mktemp("finished")
    report = prepare_experiment(get_config(), workdir, profile=True).run()
    return workdir, report


def test_every_fold_gives_the_five_rows_over_its_test_utterances(finished):
    workdir, report = finished
    results = json.loads((workdir / "results.json").read_text())
    assert list(results["folds"]) == ["1", "2"]
    for scores in [results["overall"], *results["folds"].values()]:
        assert tuple(scores) == (*ROWS, "linear_probe")
    assert results["overall"]["student"]["n"] == 96
    for row in (*ROWS, "linear_probe"):
        confusions = [np.array(results["folds"][k][row]["confusion"]) for k in "12"]
        total = np.array(results["overall"][row]["confusion"])
        assert np.array_equal(sum(confusions), total)
        assert results["overall"][row]["wa"] == pytest.approx(np.trace(total) / 96)
        recalls = np.diag(total) / total.sum(1)
        assert results["overall"][row]["ua"] == pytest.approx(recalls.mean())
    assert results["corpus"] == "synthetic"
    assert results["params"]["student"] > 0
    assert (workdir / "results.md").read_text().startswith(report)
    assert all(f"| {row.replace('_', ' ')} |" in report for row in (*ROWS, "linear_probe"))


def test_the_linear_probe_is_trained_on_the_features_that_a_fold_does_not_test(finished):
    """By hand from the records; it is a baseline, so no predicted table has its probabilities."""
    workdir, report = finished
    (folder,) = workdir.glob("data/features/*")
    read = sorted(read_examples(folder, ["id", "features"]), key=lambda example: example["id"])
    ids = np.array([example["id"] for example in read])
    vectors = np.stack([pool(example["features"]) for example in read])
    folds = read_predictions(workdir, probe=True)
    labels = dict(zip(pooled(folds, "ids"), pooled(folds, "label"), strict=True))
    labels = np.array([labels[key] for key in ids])
    for arrays in folds.values():
        test = np.searchsorted(ids, arrays["ids"])
        train = np.setdiff1d(np.arange(len(ids)), test)
        assert len(train) == len(test) == 48
        expected = decide(vectors, labels, train, test)
        np.testing.assert_allclose(arrays["linear_probe"], expected, atol=1e-6)
    assert "The linear probe is a baseline" in report
    assert "Confusion of the updated student" in report
    assert "linear_probe" not in (workdir / "predictions.csv").read_text()
    assert "linear_probe" not in read_predictions(workdir)["1"]


def test_every_stage_leaves_metrics_events_and_at_most_two_checkpoints(finished):
    workdir, _ = finished
    for stage in (kind.name for kind in STAGES):
        folder = workdir / "fold_1" / stage
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert {"train/loss", "validation/ua", "validation/loss"} <= set(rows[0])
        rates = [row["train/learning_rate"] / get_config()[stage].learning_rate for row in rows]
        assert rates == pytest.approx([(1 + np.cos(x * np.pi)) / 2 for x in (1 / 4, 3 / 4)])
        assert rows[0]["train/gradient_norm"] > 0
        assert ("train/meta_gradient_norm" in rows[0]) == (stage == "distill")
        assert rows[0]["seconds"] * rows[0]["steps_per_second"] > 0
        assert list(folder.glob("plugins/profile/*/*.trace.json.gz"))
        assert not list((workdir / "fold_2" / stage).glob("plugins"))
        assert list(folder.glob("events.out.tfevents.*"))
        kept = [path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
        assert 1 <= len(kept) <= 2


def test_the_quiz_batch_may_have_a_size_of_its_own(finished, tmp_path, monkeypatch):
    config = get_config()
    config.cache_dir = str(finished[0] / "data")
    run = prepare_experiment(config, tmp_path)
    rows = []
    monkeypatch.setattr(experiment, "train", lambda stage, _: rows.append(stage.take(range(2))[1]))
    teacher = SimpleNamespace(params={"classifier": None})
    run.distill(run.folds[0], teacher, np.zeros((len(run.table), 8), np.float32))
    shapes = {part: taken.shape[1:] for part, taken in rows[0].items()}
    assert shapes == {"train": (2, 16), "quiz": (2, 8)}
    assert set(rows[0]["quiz"].ravel()) <= set(run.folds[0].quiz)


@pytest.mark.parametrize("stages", ["teacher,student,distill,curriculum", "student"])
def test_a_second_start_reuses_everything_and_forgets_nothing(finished, stages, monkeypatch):
    workdir, report = finished
    monkeypatch.setattr(experiment, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(probe, "decide", lambda *_: pytest.fail("trained again"))
    config = get_config()
    config.stages = stages
    assert prepare_experiment(config, workdir).run() == report


@pytest.mark.slow
def test_chosen_stages_alone_are_run_and_the_others_can_follow(finished, tmp_path):
    """Table 4 needs the student alone; its numbers are those of a whole run."""
    config = get_config()
    config.cache_dir = str(finished[0] / "data")
    config.stages = "student"
    report = prepare_experiment(config, tmp_path).run()
    assert "Confusion of the student" in report
    assert [path.name for path in (tmp_path / "fold_1").iterdir() if path.is_dir()] == ["student"]
    config.stages = "teacher"
    prepare_experiment(config, tmp_path).run()
    whole, part = (json.loads((w / "results.json").read_text()) for w in (finished[0], tmp_path))
    for rows, all_rows in zip(part["folds"].values(), whole["folds"].values(), strict=True):
        assert rows == {row: all_rows[row] for row in ("teacher", "student", "linear_probe")}


def test_the_splits_of_a_workdir_can_be_used_again(finished, tmp_path):
    written = finished[0] / "splits.json"
    config = get_config()
    config.protocol.seed = 1  # draws other splits
    config.cache_dir = str(finished[0] / "data")
    drawn = prepare_experiment(config, tmp_path / "drawn")
    assert (tmp_path / "drawn" / "splits.json").read_text() != written.read_text()
    config.protocol.update({"split_by": "file", "file": str(written)})
    read = prepare_experiment(config, tmp_path / "read")
    assert (tmp_path / "read" / "splits.json").read_text() == written.read_text()
    for fold, other in zip(read.folds, drawn.folds, strict=True):
        assert np.array_equal(fold.test, other.test)
        assert not np.array_equal(fold.quiz, other.quiz)


def test_a_workdir_that_was_trained_on_other_splits_is_refused(finished, tmp_path):
    splits = json.loads((finished[0] / "splits.json").read_text())
    splits["1"]["train"], splits["1"]["quiz"] = splits["1"]["quiz"], splits["1"]["train"]
    (tmp_path / "swapped.json").write_text(json.dumps(splits))
    config = get_config()
    config.protocol.update({"split_by": "file", "file": str(tmp_path / "swapped.json")})
    with pytest.raises(UserError, match="the splits: "):
        prepare_experiment(config, finished[0])


def test_another_config_in_the_same_workdir_is_refused_and_named(finished):
    config = get_config()
    config.student.width = 32
    with pytest.raises(UserError, match=r"student\.width: 16 -> 32"):
        prepare_experiment(config, finished[0])


def test_a_refused_config_does_not_claim_the_workdir(tmp_path, monkeypatch):
    config = get_config()
    config.protocol.groups_per_fold = 4
    with pytest.raises(UserError, match="has only 4"):
        prepare_experiment(config, tmp_path)
    assert len(prepare_experiment(get_config(), tmp_path).folds) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("meta.order", "third_order", "first_order or none"),
        ("optimizer.name", "lion", "adamw or adam or sgd"),
        ("optimizer.schedule", "linear", "constant or cosine"),
        ("optimizer.decayed", "biases", "kernels or all"),
        ("student.readout", "mean", "variates or tokens or flatten"),
        ("student.norm", "none", "pre or post"),
        ("student.kind", "linear", "student.kind is 'linear': use inverted"),
        ("student.depth", 3, "depth is none of them"),
        ("student", {"kind": "inverted"}, r"the recipe has no student\.standardize"),
        ("optimizer", {}, r"the recipe has no optimizer\.name"),
        ("synthetic.speakers", 3, r"the recipe has synthetic\.speakers, which nothing reads"),
        ("synthetic.utterances_per_class", 10**9, "an integer, 1 to 10000"),
        ("corpus", None, "corpus is None: use text"),
        ("cache_dir", "a\0b", "use text"),
        ("remat", None, "remat is None: use True or False"),
        ("student.learning_rate", float("inf"), r"student\.learning_rate is inf: use 0 to 1e"),
        ("teacher.classifier_dims", ((1,),), r"classifier_dims is \(\(1,\),\): use a list"),
        ("teacher.frontend.layer", "last", "use a number, or a list of numbers"),
        ("student.inverted", False, "its tokens are frames: use readout=tokens"),
        ("student.projection_dims", (), "needs a width"),
        ("teacher.patch_frames", 0, "changes what the encoder's layers read"),
        ("student.time_pooling", 1000, "more than max_frames .*: nothing would be left"),
        ("teacher.time_pooling", 1000, "more than max_frames .*: nothing would be left"),
        ("curriculum.sampling", "greedy", "policy or uniform"),
        ("stages", "student,teachers", "'teachers': use teacher, student"),
        ("stages", "student,distill", "distill but not teacher"),
        ("contrastive.queue_size", 8, "at least the batch_size 16"),
        ("teacher.input", "waveform", "needs a pretrained encoder"),
        ("steps_per_dispatch", 0, "an integer, 1 to 1000000"),
        ("batch_size", 0, "batch_size is 0: use an integer, 1 to 65536"),
        ("max_frames", 0, "max_frames is 0: use an integer, 1 to 10000"),
        ("seed", -1, "seed is -1: use an integer, 0 to 4294967295"),
        ("seed", 2**70, "use an integer, 0 to 4294967295"),
        ("student.dropout", 1.5, r"student\.dropout is 1\.5: use 0 to 0\.99"),
        ("num_devices", -1, "num_devices is -1: use an integer, 0 to"),
        ("distill.temperature", 0.0, r"distill\.temperature is 0\.0: use 0\.001 to"),
        ("contrastive.momentum", float("nan"), r"contrastive\.momentum is nan: use 0 to 1"),
        ("examples", "disk", "auto or device or records"),
        ("dtype", "float16", "float32 or bfloat16"),
        ("student.num_heads", 3, "not divisible"),
        ("frontend.name", "fbank", "logmel, mfcc, spectra, hubert, wav2vec2, wavlm, whisper"),
        ("teacher.frontend.name", "fbank", "logmel, mfcc, spectra, hubert"),
        ("teacher.model", "/no/such/model", "/no/such/model"),
    ],
)
def test_a_config_that_no_stage_could_run_is_refused_at_the_start(key, value, message, tmp_path):
    config = get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        prepare_experiment(config, tmp_path)
    assert not list((tmp_path).rglob("features"))


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("dwformer", {"num_heads": 3}, "8 dimensions, which is not divisible by student.num_heads"),
        ("shiftcnn", {}, r"8 dimensions, less than student\.shift 16: nothing would be shifted"),
        ("speechformer", {"num_heads": 7}, "no even width: use fewer heads, an even number"),
        ("speechformer", {"windows": (3, 10, 9)}, "windows has 10: use odd numbers"),
        ("speechformer", {"merges": (2,)}, "must have 3 numbers, one less than"),
        ("timnet", {"num_levels": 17}, r"student\.num_levels is 17: use an integer, 1 to 16"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_at_the_start(kind, sizes, message, tmp_path):
    config = with_student(get_config(), kind)
    config.student.update(sizes)
    with pytest.raises(UserError, match=message):
        prepare_experiment(config, tmp_path)
    assert not list((tmp_path).rglob("features"))


@pytest.mark.parametrize("examples", ["device", "records"])
def test_features_are_standardised_by_each_folds_training_part(finished, tmp_path, examples):
    """As read from the records here; they are kept beside the checkpoints, which are without."""
    config = get_config()
    config.cache_dir = str(finished[0] / "data")
    config.examples = examples
    config.teacher.frontend = config.frontend.copy_and_resolve_references()
    config.teacher.frontend.num_mels = 5
    prepared = prepare_experiment(config, tmp_path)
    for seen, measured in (
        (prepared.features, prepared.statistics),
        (prepared.teacher_inputs, prepared._teacher_statistics),
    ):
        _, inputs, lengths = map(np.concatenate, zip(*seen.chunks(), strict=True))
        for fold in prepared.folds:
            clips = [inputs[row][: lengths[row]].astype(np.float64) for row in fold.train]
            frames = np.concatenate(clips)
            statistics = measured[fold.name]
            np.testing.assert_allclose(statistics.mean, frames.mean(0), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(statistics.spread, frames.std(0), rtol=1e-5)
    assert prepared._teacher_statistics["1"].mean.shape == (5,)
    for fold in prepared.folds:
        kept = np.load(finished[0] / f"fold_{fold.name}" / "statistics.npz")
        for name in ("mean", "spread"):
            measured = getattr(prepared.statistics[fold.name], name)
            np.testing.assert_array_equal(kept[name], measured)
    assert not [name for name in final_arrays(finished[0]) if "frozen" in name]


def test_a_recipe_that_does_not_standardise_reads_features_as_they_are(finished, tmp_path):
    config = get_config()
    config.cache_dir = str(finished[0] / "data")
    config.student.standardize = config.teacher.standardize = False
    prepared = prepare_experiment(config, tmp_path)
    for measured in (prepared.statistics, prepared._teacher_statistics):
        for fold in prepared.folds:
            np.testing.assert_array_equal(measured[fold.name].mean, np.zeros(8))
            np.testing.assert_array_equal(measured[fold.name].spread, np.ones(8))


def test_examples_read_from_records_give_the_same_run_bit_for_bit(finished, tmp_path):
    config = get_config()
    config.examples = "records"
    config.cache_dir = str(finished[0] / "data")
    prepare_experiment(config, tmp_path).run()
    for path in finished[0].glob("fold_*/predictions.npz"):
        with np.load(path) as expected, np.load(tmp_path / path.relative_to(finished[0])) as actual:
            for name in expected.files:
                np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def test_a_damaged_checkpoint_is_named_with_the_remedy(finished, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished[0], workdir)
    (workdir / "fold_1" / "predictions.npz").unlink()
    (checkpoints,) = (workdir / "fold_1").glob("student/checkpoints")
    for path in checkpoints.rglob("d/*"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"student.*Delete .*fold_1"):
        prepare_experiment(get_config(), workdir).run()


def test_a_loss_that_is_not_finite_stops_the_stage_with_the_remedy(tmp_path):
    config = get_config()
    config.teacher.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    config.optimizer.warmup = 0.0
    with pytest.raises(UserError, match=r"not finite.*learning rate"):
        prepare_experiment(config, tmp_path).run()


def test_a_batch_that_the_devices_do_not_divide_is_refused(tmp_path):
    config = get_config()
    config.num_devices, config.batch_size = 3, 16
    with pytest.raises(UserError, match="batch_size 16 is not divisible by the 3 devices"):
        prepare_experiment(config, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/emodb.py:logmel", "--config.data_dir=/no/such"], "/no/such"),
        (["--config=tests/tiny_config.py", "--config.corpus=imaginary"], "imaginary"),
    ],
)
def test_the_command_line_tells_what_is_wrong_in_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "serkd_jax.main", f"--workdir={tmp_path}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
