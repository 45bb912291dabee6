"""Dialogues as examples: their utterances, in which order, and a student that reads them."""

import csv

import jax
import numpy as np
import pytest

from configs.common import with_preset
from layouts import make_iemocap, make_meld, make_split, manifest_of
from serkd_jax.data.corpora.iemocap import IEMOCAP
from serkd_jax.data.corpora.meld import MELD
from serkd_jax.data.dialogues import Dialogues, dialogue_examples
from serkd_jax.data.examples import Examples
from serkd_jax.deploy.trained import load_trained
from serkd_jax.errors import UserError
from serkd_jax.experiment import prepare_experiment
from serkd_jax.files import read_json
from tiny_config import get_config


def test_the_dialogues_of_meld_are_those_of_its_annotations(tmp_path):
    corpus = MELD(str(make_meld(tmp_path)))
    turns = {each.id: corpus.turn_of(each) for each in corpus.utterances}
    assert turns["train_dia2_utt5"] == ("train_dia2", 5)
    assert turns["test_dia2_utt5"] == ("test_dia2", 5)


def test_the_dialogues_of_iemocap_are_in_the_names_of_its_turns(tmp_path):
    corpus = IEMOCAP(str(make_iemocap(tmp_path, [2])))
    turns = {each.id: corpus.turn_of(each) for each in corpus.utterances}
    assert turns["Ses02M_script02_1b_F003"] == ("Ses02M_script02_1b", 3)
    assert {dialogue for dialogue, _ in turns.values()} == {
        "Ses02F_impro01",
        "Ses02M_script02_1b",
    }


def test_an_example_has_the_whole_dialogue_its_speakers_and_a_mark():
    rng = np.random.default_rng(0)
    lengths = np.array([4, 2, 3], np.int32)
    inputs = rng.normal(size=(3, 4, 5)).astype(np.float16)
    inputs[np.arange(4) >= lengths[:, None]] = 0
    devices = jax.devices()[:1]
    frames = Examples({}, devices).with_columns(inputs=inputs, length=lengths)
    dialogues = Dialogues(  # of the first and the last utterance; the other one is alone
        np.array([[2, 0], [1, -1], [2, 0]], np.int32), np.array([[0, 1], [0, 0], [0, 1]], np.int32)
    )
    made = dialogue_examples(dialogues, frames, [7, 8, 9], devices, resident=True)
    means = [x[:n].astype(np.float32).mean(0) for x, n in zip(inputs, lengths, strict=True)]
    expected = np.zeros((3, 2, 7))
    expected[0, 0, :5], expected[0, 0, 5:] = means[2], (0, 0)
    expected[0, 1, :5], expected[0, 1, 5:] = means[0], (1, 1)
    expected[1, 0, :5], expected[1, 0, 5:] = means[1], (0, 1)
    expected[2] = expected[0]
    expected[2, :, 6] = (1, 0)
    np.testing.assert_allclose(made.columns["inputs"], expected, atol=2e-3)
    assert dialogues.shape(5) == (2, 7)
    np.testing.assert_array_equal(made.columns["length"], [2, 1, 2])
    np.testing.assert_array_equal(made.columns["label"], [7, 8, 9])
    read = dialogue_examples(dialogues, frames, [7, 8, 9], devices, resident=False).read
    np.testing.assert_array_equal(read(np.array([2, 1])), made.columns["inputs"][np.array([2, 1])])


def talk(folder):
    """The manifest of `make_split` in which eight utterances are a dialogue, the last one first."""
    path = make_split(folder)
    rows = list(csv.reader(path.open()))
    with path.open("w", newline="") as file:
        write = csv.writer(file).writerow
        write([*rows[0], "dialogue", "turn"])
        for i, row in enumerate(rows[1:]):
            write([*row, f"d{i // 8}", 100 - i])
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in which MM-DFN learns from a teacher of single utterances."""
    folder = tmp_path_factory.mktemp("dialogues")
    config = with_preset(get_config("manifest"), "mmdfn")
    config.manifest = str(talk(folder))
    config.student.update({"width": 6, "graph_width": 4, "num_layers": 2})
    config.stages, config.meta.order = "teacher,distill", "first_order"  # quick to compile
    run = prepare_experiment(config, folder / "run")
    run.run()
    return run


@pytest.mark.slow
def test_a_student_of_dialogues_is_taught_and_tested(finished):
    rows = read_json(finished.workdir / "results.json", "")["folds"]["1"]
    assert rows.keys() == {"teacher", "meta_teacher", "distilled_student", "linear_probe"}
    costs = read_json(finished.workdir / "costs.json", "")
    assert costs["operations"]["student"] > 0
    assert "the dialogues" in read_json(finished.workdir / "run.json", "")


@pytest.mark.slow
def test_turns_are_in_their_order_and_speakers_are_told_apart(finished):
    table, inputs = finished.table, np.asarray(finished.features.columns["inputs"])
    assert inputs.shape == (48, 8, 8 + 2)
    row = table.ids.tolist().index("12.wav")  # of the dialogue 15, 14, 13, 12, 11, ...
    np.testing.assert_array_equal(inputs[row, :, -1], [0, 0, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(inputs[row, :, -2], [0, 1, 2, 3] * 2)  # s3, s2, s1, s0, s3, ...
    first = table.ids.tolist().index("15.wav")
    frames, length = (np.asarray(finished.frames.columns[k][first]) for k in ("inputs", "length"))
    mean = frames[:length].astype(np.float32).mean(0)
    np.testing.assert_allclose(inputs[row, 0, :-2], mean, atol=2e-3)


@pytest.mark.slow
def test_it_is_not_exported_since_models_hear_single_recordings(finished):
    with pytest.raises(UserError, match="'mmdfn' classifies an utterance by its whole dialogue"):
        load_trained(finished.workdir, "1", "distilled_student")


def test_a_corpus_without_dialogues_and_settings_for_frames_are_refused(tmp_path):
    config = with_preset(get_config("manifest"), "mmdfn")
    config.manifest = str(make_split(tmp_path))
    with pytest.raises(UserError, match=r"0\.wav has no dialogue.*columns speaker, dialogue and"):
        prepare_experiment(config, tmp_path / "run")
    config.student.standardize = True
    with pytest.raises(UserError, match=r"set student\.standardize=False and contrastive"):
        prepare_experiment(config, tmp_path / "run")


@pytest.mark.parametrize("turn", ["first", ""])
def test_a_turn_of_a_dialogue_that_is_no_number_is_named(turn, tmp_path):
    corpus = manifest_of(tmp_path, f"path,label,dialogue,turn\nb.wav,x,,\na.wav,x,d1,{turn}\n")
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=rf"m\.csv, line 3: turn, .* is a number; .*'{turn}'"):
        _ = corpus.utterances
