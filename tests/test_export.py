"""Exports of a finished run: what is written, and that every format does as the checkpoint did."""

import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from benchmarks import noise, tradeoff
from exported_models import STUDENT, logits_by_hand, write_model
from layouts import ROOT, SHARED, needs_corpora, write_wav
from serkd_jax.data.corpora import Synthetic, make_corpus
from serkd_jax.data.prepare import prepare_features, prepare_records
from serkd_jax.deploy.backends import at_most, load_classifier
from serkd_jax.deploy.card import Told
from serkd_jax.deploy.folder import FILES, read_config
from serkd_jax.deploy.trained import STUDENT_ROWS, load_test_inputs, load_trained, model_config
from serkd_jax.encoders.frontends import Pretrained, make_frontend
from serkd_jax.errors import UserError
from serkd_jax.experiment import prepare_experiment
from serkd_jax.export import BATCH, export
from serkd_jax.files import read_json
from serkd_jax.predict import load_model
from serkd_jax.results.comparison import group_runs, read_run
from serkd_jax.results.intervals import bootstrap
from serkd_jax.results.metrics import classification_metrics
from serkd_jax.results.predictions import read_predictions
from serkd_jax.results.systems_table import systems_table
from serkd_jax.stages.standardization import Statistics
from tiny_config import get_config

EXACT = {"safetensors": 1e-5, "stablehlo": 1e-5, "onnx": 1e-5, "tflite": 1e-5}
WINDOW = 23 * 320 + 400  # samples of 24 frames
# Of the logits' spread, for what is not float32: without standardisation they are 1.4 of it off.
CLOSE = 0.5


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A finished run of the tiny recipe, at rates so high that its students tell classes apart."""
    workdir, config = tmp_path_factory.mktemp("finished"), get_config()
    for stage in ("teacher", "student", "distill", "curriculum"):
        config[stage].learning_rate = 0.01
    prepare_experiment(config, workdir).run()
    return workdir


@pytest.fixture(scope="session")
def exported(workdir, tmp_path_factory):
    """The updated student of the second fold in all formats; how they compare; its test inputs."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    trained = load_trained(workdir, "2", "updated_student")
    inputs = load_test_inputs(trained, None)
    return folder, export(trained, folder, list(FILES), inputs), inputs


@pytest.fixture(scope="session")
def predictions(workdir):
    with np.load(workdir / "fold_2" / "predictions.npz") as arrays:
        return dict(arrays)


def test_features_of_another_corpus_with_the_same_ids_are_not_taken(workdir, exported, tmp_path):
    cache = shutil.copytree(workdir / "data", tmp_path / "cache")
    trained = load_trained(workdir, "2", "updated_student")
    (ours,), seed = cache.glob("features/*"), 0
    while min(cache.glob("features/*")) == ours:  # until another one comes first
        seed += 1
        settings = {**get_config().synthetic, "seed": seed}
        records = prepare_records(make_corpus("synthetic", **settings), cache)
        prepare_features(records, trained.frontend, trained.config.max_frames, cache)
    for found, expected in zip(load_test_inputs(trained, cache), exported[2], strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("row", STUDENT_ROWS)
def test_the_exported_student_is_the_one_that_was_tested(row, workdir, predictions, tmp_path):
    trained = load_trained(workdir, "2", row)
    assert np.abs(trained.variables.statistics.mean).min() > 0.1  # not those that change nothing
    export(trained, tmp_path / "out", [], None)
    classify = load_classifier(tmp_path / "out", read_config(tmp_path / "out"), "safetensors")
    logits = classify(*load_test_inputs(trained, None))
    np.testing.assert_allclose(logits, predictions[row], atol=1e-5)


def test_the_exported_student_names_the_classes_as_the_corpus_does(workdir, predictions, tmp_path):
    """An id of the corpus, such as 03_happy_007, says its class."""
    export(load_trained(workdir, "2", "updated_student"), tmp_path / "out", [], None)
    model, corpus = load_model(tmp_path / "out"), Synthetic(**get_config().synthetic)
    names = ["angry", "happy", "neutral", "sad"]
    ids, labels = predictions["ids"].tolist(), predictions["label"]
    assert [name.split("_")[1] for name in ids] == [names[label] for label in labels]
    utterances = {utterance.id: utterance for utterance in corpus.list_utterances()}
    chosen, rows = np.unique(predictions["updated_student"].argmax(1), return_index=True)
    assert len(chosen) > 1
    for label, row in zip(chosen, rows, strict=True):
        waveform = corpus.read_waveform(utterances[ids[row]])[:WINDOW]
        heard = model(waveform)
        assert heard.label == names[label]
        logits = predictions["updated_student"][row].astype(float)
        expected = np.exp(logits) / np.exp(logits).sum()
        assert heard.probabilities == pytest.approx(
            dict(zip(names, expected, strict=True)), abs=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", FILES)
def test_every_format_gives_the_students_logits_for_any_batch(form, exported):
    folder, _, (features, num_frames) = exported
    config = read_config(folder)
    expected = load_classifier(folder, config, "safetensors")(features, num_frames)
    assert len(set(expected.argmax(1))) > 1
    close = 0.1 * expected.std(axis=0).max()
    classify = load_classifier(folder, config, form, threads=1)
    for rows in (slice(0, 1), slice(1, 4), slice(None)):
        got = classify(features[rows], num_frames[rows])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[rows], rtol=1e-5, atol=EXACT.get(form, close))


@pytest.mark.slow
def test_the_comparison_says_how_far_each_format_is(exported, predictions):
    folder, checked, (features, num_frames) = exported
    config, labels = read_config(folder), predictions["label"]
    assert [each.form for each in checked] == [*FILES, "run"]
    logits = {}
    for form in FILES:  # in the same batches: in bfloat16 they change the rounding
        classify = at_most(BATCH, load_classifier(folder, config, form))
        logits[form] = classify(features, num_frames)
    logits["run"] = predictions["updated_student"]
    for each in checked:
        exact, mine = logits["safetensors"], logits[each.form]
        assert each.difference == pytest.approx(np.abs(mine - exact).max(), abs=1e-5)
        assert each.agreement == pytest.approx((mine.argmax(1) == exact.argmax(1)).mean())
        assert each.ua == classification_metrics(labels, mine.argmax(1), 4)["ua"]
    by_form = {each.form: each for each in checked}
    for form in ("stablehlo-bf16", "onnx-int8", "tflite-int8"):
        assert by_form[form].difference > 0  # they are not the float32 model under another name
        size = (folder / FILES[form]).stat().st_size
        assert size < (folder / FILES[form.split("-")[0]]).stat().st_size


@needs_corpora
@pytest.mark.slow
def test_every_format_gives_the_same_on_real_recordings(exported):
    files = sorted((SHARED / "emodb" / "wav").glob("*.wav"))[::50]
    expected = list(load_model(exported[0]).predict(files))
    exact = np.array([list(each.probabilities.values()) for each in expected])
    for form in FILES:
        got = [each.probabilities for each in load_model(exported[0], form).predict(files)]
        atol = 1e-5 if form in EXACT else CLOSE * exact.std(axis=0).max()
        got = np.array([list(each.values()) for each in got])
        np.testing.assert_allclose(got, exact, atol=atol, err_msg=form)


@pytest.mark.slow
def test_only_what_prediction_needs_is_in_the_folder(exported):
    folder = exported[0]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", *FILES.values()
    }  # fmt: skip
    trained = json.loads((folder / "config.json").read_text())["trained"]["config"]
    assert trained["seed"] == 0
    assert "cache_dir" not in trained  # nor any other place on this machine
    assert "file" not in trained["protocol"]
    names = load_file(folder / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {
        "embed", "layers_0", "classifier_0", "classifier_1", "statistics"
    }  # fmt: skip


@pytest.mark.slow
def test_the_card_is_one_of_the_hub_and_has_the_runs_scores(exported, workdir):
    folder, checked, _ = exported
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "audio-classification"
    results = json.loads((workdir / "results.json").read_text())
    fold = results["folds"]["2"]["updated_student"]
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    for name, metric in {"UA": "ua", "WA": "wa", "weighted F1": "wf1"}.items():
        assert scores[name] == pytest.approx(100 * fold[metric], abs=0.01)
    tested = {"2": read_predictions(workdir)["2"]}
    low, high = bootstrap(tested)["updated_student"]["ua"]
    assert f"| {100 * fold['ua']:.1f} ({100 * low:.1f} to {100 * high:.1f}) |" in card.content
    overall = results["overall"]["updated_student"]
    pooled = f"all 2 folds, a model each | {overall['n']} | {100 * overall['ua']:.1f} ("
    assert pooled in card.content
    for each in checked[:-1]:
        row = rf"\| {each.form} \| `{FILES[each.form]}` \|.* {100 * each.ua:.1f} \|\n"
        assert re.search(row, card.content)


@pytest.mark.slow
def test_the_commands_export_and_predict_without_tensorflow(workdir, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*command):
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    flags = [f"--workdir={workdir}", "--fold=2", "--row=student", f"--out={tmp_path / 'out'}"]
    done = run("serkd_jax.export", *flags, "--format=stablehlo")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| stablehlo | `model.stablehlo` |" in done.stdout
    assert "Compared with the float32 student in Flax on the fold's test" in done.stdout
    wav = write_wav(tmp_path / "a.wav", num_samples=9000)
    done = run("serkd_jax.predict", f"--model={tmp_path / 'out'}", "--format=stablehlo", str(wav))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{wav}: ")


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_the_code_in_the_docs_runs(page, tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "emotions", ("safetensors", "onnx"))
    write_wav(tmp_path / "a.wav", num_samples=20_000)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for code in (block for block in blocks if "serkd_jax.predict" in block):
        exec(code, {})
        assert capsys.readouterr().out.split()[0] in ("anger", "joy", "sadness")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: shutil.rmtree(w), "name the workdir of a finished run"),
        (lambda w: (w / "results.json").unlink(), "name the workdir of a finished run"),
        (lambda w: (w / "results.json").write_text("{"), "is damaged"),
        (lambda w: (w / "results.json").write_text("[]"), r"is damaged \(not an object\)"),
        (lambda w: (w / "run.json").write_text("{}"), "is damaged .it has no the front-end"),
        (
            lambda w: shutil.copy(w / "fold_1/statistics.npz", w / "fold_1/predictions.npz"),
            r"predictions\.npz cannot be read \(it has no ids, label\)",
        ),
        (lambda w: (w / "results.json").write_text("[" * 99_999), "is damaged"),
        (lambda w: (w / "results.json").write_text("3"), "is damaged"),
        (lambda w: shutil.rmtree(w / "fold_1" / "curriculum"), "has no checkpoints"),
        (lambda w: (w / "fold_2" / "predictions.npz").write_bytes(b""), "cannot be read"),
        (lambda w: (w / "results.json").write_text(
            (w / "results.json").read_text().replace('"readout"', '"pooling"')), "another version"),
        (lambda w: (w / "run.json").write_text('{"the front-end": "v0"}'), "its weights changed"),
    ],
)  # fmt: skip
def test_a_workdir_that_is_not_whole_is_refused(change, message, workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    change(copy)
    with pytest.raises(UserError, match=message):
        load_trained(copy, "1", "updated_student")


def test_a_fold_or_row_that_the_run_has_not_is_named(workdir):
    with pytest.raises(UserError, match="has no fold 7: use one of 1, 2"):
        load_trained(workdir, "7", "student")
    with pytest.raises(UserError, match="has no tutor; it has teacher"):
        load_trained(workdir, "1", "tutor")


def test_features_that_are_gone_are_told_with_the_way_round(workdir, tmp_path):
    trained = load_trained(workdir, "1", "student")
    with pytest.raises(UserError, match="export with --nocheck"):
        load_test_inputs(trained, tmp_path)


def test_a_folder_with_something_else_is_left_alone(workdir, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    trained = load_trained(workdir, "1", "student")
    with pytest.raises(UserError, match="holds something else"):
        export(trained, tmp_path, [], None)
    with pytest.raises(UserError, match="there is no format 'pt'"):
        export(trained, tmp_path / "new", ["pt"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "options",
    [
        {"time_pooling": 3, "variates": 4, "deviations": True},
        {"readout": "tokens", "norm": "post", "classifier_dims": []},
        {"readout": "flatten", "norm": "post"},
        {"readout": "tokens", "inverted": False, "classifier_dims": [8, 4]},
        {"readout": "flatten", "inverted": False},
        {"use_norm": True},
    ],
)
@pytest.mark.slow
def test_every_kind_of_student_can_be_exported(options, tmp_path):
    folder = write_model(tmp_path / "m", tuple(FILES), student=STUDENT | options)
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (3, 25, 8)).astype(np.float32)  # also where there is no speech
    num_frames = np.array([25, 10, 3], np.int32)
    config = read_config(folder)
    expected = logits_by_hand(folder, features, num_frames)
    for form in FILES:
        got = load_classifier(folder, config, form)(features, num_frames)
        atol = 1e-4 if form in EXACT else CLOSE * expected.std(axis=0).max()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol, err_msg=form)


def test_bfloat16_begins_after_the_standardisation(tmp_path):
    """Here of differences that bfloat16 does not know: near 300 its numbers are 2 apart."""
    far = Statistics(np.full(8, 301, np.float32), np.full(8, 0.1, np.float32))
    folder = write_model(tmp_path / "m", ("safetensors", "stablehlo-bf16"), far)
    features = np.random.default_rng(0).normal(301, 0.1, (3, 25, 8)).astype(np.float32)
    num_frames = np.array([25, 20, 15], np.int32)
    expected = logits_by_hand(folder, features, num_frames)
    got = load_classifier(folder, read_config(folder), "stablehlo-bf16")(features, num_frames)
    np.testing.assert_allclose(got, expected, atol=CLOSE * expected.std(axis=0).max())


def test_a_hubert_from_the_hub_is_named_and_a_local_one_comes_along(workdir, hubert_folder):
    results = json.loads((workdir / "results.json").read_text())
    local = make_frontend(ConfigDict({"name": "hubert", "model": hubert_folder}))
    config = model_config(results, "1", "student", local)
    assert config.frontend["model"] is None
    assert config.num_features == 16

    class OnHub(Pretrained):
        checkpoint = local.checkpoint

    config = model_config(results, "1", "student", OnHub("facebook/some-hubert", "main"))
    assert config.frontend["model"] == "facebook/some-hubert"
    assert config.frontend["revision"] == "main"


@pytest.mark.slow
def test_without_noise_the_noise_benchmark_gives_the_scores_of_the_run(workdir):
    """Here, since this needs a finished run."""
    results = read_json(workdir / "results.json", "")
    heard = noise.measure(workdir, 0.0)
    first, second = noise.tables([heard, heard]).split("\n\n")
    clean, white = first.splitlines()[2:4]
    scores = {row: 100 * each["ua"] for row, each in results["overall"].items()}
    told = [float(cell.split()[0]) for cell in clean.split("|")[2:-1]]
    np.testing.assert_allclose(told, [*scores.values()], atol=0.0501)
    assert [cell.split()[0] for cell in white.split("|")[2:-1]] != [f"{x:.1f}" for x in told]
    head, _, line, *_ = second.splitlines()
    differences = [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
    for name, difference in zip(head.split("|")[2:-1], differences, strict=True):
        a, b = (scores[row.strip().replace(" ", "_")] for row in name.split("−"))
        assert difference == pytest.approx(a - b, abs=0.0501)


@pytest.mark.slow
def test_the_tradeoff_has_the_scores_of_the_run_and_of_its_int8_exports(workdir, exported):
    (group,) = group_runs([read_run(workdir)])
    lines = {line["row"]: line for line in tradeoff.measure(group, 0.0)}
    rows = ["linear_probe", "student", "distilled_student", "updated_student"]
    assert list(lines) == [*rows, "updated_student, int8"]
    results = read_json(workdir / "results.json", "")
    assert all(lines[row]["ua"] == results["overall"][row]["ua"] for row in rows)
    assert lines["linear_probe"]["parameters"] == 0  # log-mel
    assert 0 < lines["linear_probe"]["seconds"] < lines["updated_student, int8"]["seconds"]
    told = {line[0]: line for line in systems_table([read_run(workdir)]).rows}
    for row in ("student", "updated_student"):
        ua = told[f"ours, {row.replace('_', ' ')}"][10]
        assert ua.startswith(f"{100 * results['overall'][row]['ua']:.1f} (")
    # The export compares every format on the utterances of the second fold.
    folder, checked, _ = exported
    (int8,) = (each for each in checked if each.form == "onnx-int8")
    logits = tradeoff.classify_test(workdir, "2", "updated_student")
    label = read_predictions(workdir)["2"]["label"]
    scores = classification_metrics(label, logits.argmax(-1), logits.shape[1])
    assert scores["ua"] == int8.ua
    stored = load_file(folder / "model.safetensors")
    weights = [x.size for name, x in stored.items() if not name.startswith("statistics")]
    assert lines["updated_student, int8"]["parameters"] == sum(weights)


def test_the_card_says_what_its_user_tells(workdir, exported, tmp_path):
    trained = load_trained(workdir, "2", "updated_student")
    told = Told("tiny", "vowels of nobody", "cc-by-nc-sa-4.0", "Share alike.")
    export(trained, tmp_path / "told", [], None, told)
    card = huggingface_hub.ModelCard.load(tmp_path / "told" / "README.md")
    assert (card.data.model_name, card.data.license) == ("tiny", "cc-by-nc-sa-4.0")
    assert "license_name" not in card.data.to_dict()
    words = " ".join(card.text.split())
    assert "Trained on vowels of nobody;" in words
    assert "licensed under cc-by-nc-sa-4.0. Share alike." in words
    untold = " ".join((exported[0] / "README.md").read_text().split())
    assert "name the licence that fits above" in untold
