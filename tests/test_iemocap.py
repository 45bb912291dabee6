"""IEMOCAP: what a turn's line and name say, what a damaged copy is told."""

import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from layouts import tone
from serkd_jax.data.corpora import IEMOCAP, CorpusError
from serkd_jax.data.counts import check_counts
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import load_table, read_examples


def evaluation(release, dialog):
    return release / f"Session{dialog[4]}" / "dialog" / "EmoEvaluation" / f"{dialog}.txt"


def wav(release, turn):
    dialog = turn.rpartition("_")[0]
    return release / f"Session{turn[4]}" / "sentences" / "wav" / dialog / f"{turn}.wav"


def line(turn, emotion="neu", attributes="2.5000, 3.0000, 3.5000"):
    return f"[6.2901 - 8.2357]\t{turn}\t{emotion}\t[{attributes}]"


def annotate(release, dialog, *lines):
    """Writes a dialog's annotations, without audio."""
    path = evaluation(release, dialog)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", *lines]))
    return IEMOCAP(str(release))


# Listing


def test_the_turns_of_four_classes_are_listed_and_happiness_and_excitement_are_one(iemocap):
    corpus = IEMOCAP(str(iemocap))
    assert corpus.class_names == ("angry", "happy", "neutral", "sad")
    labels = Counter((u.session, u.extras["emotion"], u.label) for u in corpus.utterances)
    classes = [("ang", "angry"), ("hap", "happy"), ("exc", "happy"), ("neu", "neutral")]
    classes += [("sad", "sad")]
    assert labels == {(s, *names): 4 for s in "12345" for names in classes}
    assert corpus.skipped == []
    for utterance in corpus.utterances:
        assert Path(utterance.path) == wav(iemocap, utterance.id)
        assert Path(utterance.path).is_file()


def test_speaker_is_the_end_of_a_turns_name_and_not_its_dialogs(tmp_path):
    expected = {
        "Ses01F_impro01_F000": ("1F", "1", "improvised"),
        "Ses01F_impro01_M000": ("1M", "1", "improvised"),
        "Ses04M_script02_1b_F012": ("4F", "4", "scripted"),
        "Ses04M_script02_1b_M012": ("4M", "4", "scripted"),
    }
    annotate(tmp_path, "Ses01F_impro01", *map(line, list(expected)[:2]))
    corpus = annotate(tmp_path, "Ses04M_script02_1b", *map(line, list(expected)[2:]))
    listed = {u.id: (u.speaker, u.session, u.extras["style"]) for u in corpus.utterances}
    assert listed == expected


def test_ten_speakers_of_two_dialogs_each_are_in_the_records(iemocap, tmp_path):
    table = load_table(prepare_records(IEMOCAP(str(iemocap)), tmp_path))
    assert Counter(table.speakers.tolist()) == {s + sex: 10 for s in "12345" for sex in "FM"}
    assert all(speaker[0] == s for speaker, s in zip(table.speakers, table.sessions, strict=True))
    assert table.ids.tolist() == sorted(table.ids.tolist())


def test_records_keep_the_original_emotion_the_style_and_the_three_attributes(tmp_path):
    turn = "Ses01F_impro01_M003"
    corpus = annotate(tmp_path / "corpus", turn[:14], line(turn, "exc", "1.6667, 2.0000, 4.2500"))
    wav(tmp_path / "corpus", turn).parent.mkdir(parents=True)
    soundfile.write(wav(tmp_path / "corpus", turn), tone(300), 16_000)
    (record,) = read_examples(
        prepare_records(corpus, tmp_path), ("id", "label", *IEMOCAP.EXTRAS, "audio")
    )
    assert (record["id"], record["label"]) == (turn, 1)  # happy
    assert (record["emotion"], record["style"]) == ("exc", "improvised")
    attributes = {"valence": 1.6667, "arousal": 2.0, "dominance": 4.25}
    for name, value in attributes.items():
        assert record[name].dtype == np.float32
        assert record[name] == np.float32(value)
    assert len(record["audio"]) == 4800


def test_other_labels_are_counted_in_a_note_and_not_listed(tmp_path):
    emotions = ["fru", "neu", "xxx", "fru", "fru"]
    turns = [line(f"Ses01F_impro01_F{n:03d}", emotion) for n, emotion in enumerate(emotions)]
    corpus = annotate(tmp_path, "Ses01F_impro01", *turns)
    assert [u.id for u in corpus.utterances] == ["Ses01F_impro01_F001"]
    assert "4 turns have a label outside the protocol: fru 3, xxx 1." in corpus.notes
    assert corpus.skipped == []


def test_litter_and_the_folders_of_single_annotators_are_no_annotations(tmp_path):
    corpus = annotate(tmp_path, "Ses01F_impro01", line("Ses01F_impro01_F000"))
    folder = evaluation(tmp_path, "Ses01F_impro01").parent
    (folder / "._Ses01F_impro01.txt").write_text(line("Ses01F_impro01_F001"))
    (folder / "Categorical").mkdir()
    (folder / "Categorical" / "Ses01F_impro01.txt").write_text(line("Ses01F_impro01_F002"))
    assert [u.id for u in corpus.utterances] == ["Ses01F_impro01_F000"]
    assert corpus.skipped == []


def test_data_dir_is_the_release_or_the_folder_that_holds_it(iemocap):
    inside, above = IEMOCAP(str(iemocap)), IEMOCAP(str(iemocap.parent))
    assert inside.utterances == above.utterances
    assert inside.fingerprint == above.fingerprint


def test_a_folder_without_the_release_is_told_what_data_dir_must_be(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "Session1").mkdir(parents=True)
    for folder, problem in [
        ("", "needs data_dir, the folder IEMOCAP_full_release"),
        (tmp_path / "nowhere", r"neither .*nowhere nor .*data_dir must be the unpacked release"),
        (tmp_path / "empty", r"neither .*empty nor .*data_dir must be the unpacked release"),
        (tmp_path / "bare", r"no turn of the classes .*Session1/dialog/EmoEvaluation is missing"),
    ]:
        with pytest.raises(CorpusError, match=problem):
            IEMOCAP(str(folder)).utterances  # noqa: B018


def test_a_turn_that_is_listed_twice_is_an_error(tmp_path):
    corpus = annotate(tmp_path, "Ses01F_impro01", *[line("Ses01F_impro01_F000")] * 2)
    with pytest.raises(CorpusError, match=r"listed more than once, .*'Ses01F_impro01_F000'"):
        corpus.utterances  # noqa: B018


BROKEN_LINES = {
    "cut": "[6.2901 - 8.2357]\tSes01F_impro01_F001\tne",
    "spaces for tabs": line("Ses01F_impro01_F001").replace("\t", " "),
    "two attributes": line("Ses01F_impro01_F001", attributes="2.5000, 3.0000"),
    "no number": line("Ses01F_impro01_F001", attributes="2.5000, nan, 3.0000"),
    "two points": line("Ses01F_impro01_F001", attributes="2.5.0, 3.0000, 3.5000"),
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_annotation_line_is_skipped_and_named(tmp_path, kind):
    corpus = annotate(
        tmp_path, "Ses01F_impro01", line("Ses01F_impro01_F000"), BROKEN_LINES[kind], "A-E3:\tval 3;"
    )
    assert [u.id for u in corpus.utterances] == ["Ses01F_impro01_F000"]
    (skip,) = corpus.skipped
    assert f"{evaluation(tmp_path, 'Ses01F_impro01')}, line 3: " in skip["reason"]
    assert "not a complete annotation" in skip["reason"]
    assert "Ses01F_impro01_F001" in skip["reason"]


# A damaged copy


@pytest.fixture(scope="module")
def damaged(iemocap, tmp_path_factory):
    """A release with a flaw of every kind: its corpus, table and all that was skipped."""
    folder = shutil.copytree(iemocap, tmp_path_factory.mktemp("damaged") / "release")
    wav(folder, "Ses01F_impro01_F000").unlink()
    cut = wav(folder, "Ses01F_impro01_F001")
    cut.write_bytes(cut.read_bytes()[:5000])
    soundfile.write(wav(folder, "Ses01F_impro01_F002"), np.zeros(8000), 16_000)
    wav(folder, "Ses01F_impro01_F003").write_bytes(b"")
    with evaluation(folder, "Ses01F_impro01").open("a") as file:
        file.write("\n[9.0000 - 9.5000]\tSes01F_impro01_F099\tneu\n")
        file.write(line("Ses05F_impro01_F099") + "\n")
    shutil.rmtree(folder / "Session2")
    shutil.rmtree(folder / "Session3" / "dialog" / "EmoEvaluation")
    shutil.rmtree(folder / "Session4" / "sentences" / "wav")
    corpus = IEMOCAP(str(folder))
    table = load_table(prepare_records(corpus, folder.parent))
    return SimpleNamespace(corpus=corpus, table=table, skipped=corpus.skipped + table.skipped)


DAMAGES = {
    "Ses01F_impro01_F000": r"impro01/Ses01F_impro01_F000\.wav: no such audio file",
    "Ses01F_impro01_F001": r"impro01/Ses01F_impro01_F001\.wav: truncated, 4956 of 9600 bytes",
    "Ses01F_impro01_F002": r"impro01/Ses01F_impro01_F002\.wav: silent",
    "Ses01F_impro01_F003": r"impro01/Ses01F_impro01_F003\.wav: the file is empty",
    "Ses05F_impro01_F099": r"EmoEvaluation/Ses01F_impro01\.txt, line \d+: not a turn of this",
    "Ses01F_impro01.txt, line": r"Ses01F_impro01\.txt, line \d+: not a complete annotation",
    "Ses04M_script02_1b_M004": r"Session4/sentences/wav/.*M004\.wav: no such audio file",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_skipped_once_with_its_file_and_the_reason(damaged, name):
    (reason,) = [skip["reason"] for skip in damaged.skipped if name in skip["id"]]
    assert str(damaged.corpus.data_dir) in reason
    assert re.search(DAMAGES[name], reason)


def test_sessions_that_are_missing_or_have_no_annotations_are_noted(damaged):
    notes = damaged.corpus.notes
    assert "Session2 is missing or empty: no turn of session 2 is used." in notes
    assert (
        "Session3/dialog/EmoEvaluation is missing or empty: no turn of session 3 is used." in notes
    )
    assert "Session4/sentences/wav is missing." in notes
    assert len(notes) == 4  # and the other labels


def test_the_rest_of_a_damaged_copy_is_built(damaged, iemocap):
    whole = {u.id for u in IEMOCAP(str(iemocap)).utterances if u.session in "15"}
    assert set(damaged.table.ids) == whole - set(DAMAGES)
    assert len(damaged.table) == 36
    assert len(damaged.skipped) == 6 + 20  # the audio of session 4


def test_the_report_of_a_damaged_copy_has_its_counts_notes_and_files(damaged):
    report = check_counts(damaged.table, damaged.corpus, strict=False, most_named=20)
    assert "| 2       | 0 / 362 (-362)" in report
    assert "Session2 is missing or empty" in report
    assert "26 files or lines were skipped:" in report
    assert "Ses01F_impro01_F001.wav: truncated" in report
    assert "- and 6 more; `python -m serkd_jax.records` names them all" in report
