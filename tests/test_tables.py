"""Tables as people write them: separators, spaces, letters, columns, and the files they list."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from layouts import SHARED, manifest_of, write_wav
from serkd_jax.audio.decoding import find_audio
from serkd_jax.data.corpora import CorpusError, Manifest
from serkd_jax.data.counts import check_counts
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import load_table
from serkd_jax.data.splits import make_folds, speaker_note
from serkd_jax.data.tables import alike, locate, plain, read_rows, tidy
from serkd_jax.errors import UserError

FAULTS = SHARED.parent / "faults"
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Jürgen") for form in ("NFC", "NFD"))
ROWS = [("path", "label", "speaker"), ("a.wav", "sad", "s1"), ("b.wav", "happy", "s2")]


def rows_of(tmp_path, text, name="m.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return [row for _, row in read_rows(path)]


def by_speaker(**shares):
    """The protocol that holds out one speaker at a time."""
    protocol = {"split_by": "speaker", "groups_per_fold": 1, "num_folds": 5, "file": ""}
    return ConfigDict(protocol | {"speakers_apart": False, "seed": 0, **shares})


@pytest.mark.parametrize("separator", [",", ";", "\t", " , ", " ;\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("empty", ["", ",,", ";;;;", "\t\t"])
def test_a_table_is_read_with_any_separator_spaces_and_empty_rows(tmp_path, separator, end, empty):
    empty = empty if not empty or empty[0] in separator else separator.strip(" ") * 2
    lines = [separator.join(row) for row in ROWS]
    text = "\ufeff" + end.join([*lines[:2], empty, *lines[2:], empty, ""])
    expected = [dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:]]
    assert rows_of(tmp_path, text) == expected


def test_a_separator_in_a_value_is_one_only_unquoted(tmp_path):
    text = 'path;label;text\na.wav;sad;"well; yes, no"\n'
    assert rows_of(tmp_path, text)[0]["text"] == "well; yes, no"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("path,label,label\na,x,y\n", "m.csv", "two columns are named 'label'"),
        ("path,label, label \na,x,y\n", "m.csv", "two columns are named 'label'"),
        ("path,label,\na,x,7\n", "m.csv", "line 2: '7' is in a column without a name"),
        ("path,label\na,x,7\n", "m.csv", "line 2: more values than columns"),
        ('{"path": "a", "label": "x", "label": "y"}\n', "m.jsonl", "line 1: two values are named"),
        ("path,label\nä,x\n", "m.csv", "save it as UTF-8"),
        ("a", "m.xlsx", r"use \.csv, \.tsv or \.jsonl"),
    ],
)
def test_what_has_two_meanings_is_refused_with_its_name(tmp_path, text, name, message):
    encoding = "latin-1" if "ä" in text else "utf-8"
    with pytest.raises(CorpusError, match=message):
        rows_of(tmp_path, text, name, encoding)


def test_missing_values_of_json_are_empty(tmp_path):
    text = '{"path": "a", "fold": null, "label": NaN, "start": 1.5, "speaker": " s1 "}\n'
    expected = {"path": "a", "fold": "", "label": "", "start": "1.5", "speaker": "s1"}
    assert rows_of(tmp_path, text, "m.jsonl") == [expected]


def test_our_name_of_a_column_wins_over_emoboxs(tmp_path, three_wavs):
    text = "path,wav,label,emo\na.wav,b.wav,sad,0\nb.wav,a.wav,happy,1\n"
    corpus = manifest_of(tmp_path, text)
    assert {Path(u.path).name: u.label for u in corpus.utterances} == {
        "a.wav": "sad", "b.wav": "happy"
    }  # fmt: skip
    text = "Path,LABEL\na.wav,sad\nb.wav,happy\n"
    assert manifest_of(tmp_path, text).class_names == ("happy", "sad")
    with pytest.raises(CorpusError, match="two columns are the label"):
        _ = manifest_of(tmp_path, "path,label,Label\na.wav,sad,0\n").utterances


@pytest.mark.parametrize("other", ["s1 ", " s1", "s1\u00a0", "\u200bs1", "s1\ufeff"])
def test_spaces_and_invisible_letters_make_no_other_name(tmp_path, three_wavs, other):
    text = f"path,label,speaker\na.wav,sad,s1\nb.wav, sad ,{other}\nc.wav,happy\u00a0,s2\n"
    corpus = manifest_of(tmp_path, text)
    assert [u.speaker for u in corpus.utterances] == ["s1", "s1", "s2"]
    assert corpus.class_names == ("happy", "sad")


def test_letters_composed_or_not_are_the_same(tmp_path):
    assert COMPOSED != DECOMPOSED
    assert tidy(DECOMPOSED) == COMPOSED
    folder = tmp_path / "data"
    write_wav(folder / f"{DECOMPOSED}.wav", 0)
    found = locate([f"{COMPOSED}.wav", f"{DECOMPOSED}.wav"], folder)
    assert all(path.exists() for path in found)


@pytest.mark.parametrize("other", ["S1", "s1", "s１"])
def test_names_that_look_alike_are_found(other):
    names = {"s1", "s2", other}
    assert alike(names) == ([] if other == "s1" else [tuple(sorted(("s1", other)))])
    assert plain("Zoë") == plain("ZOE")


def test_speakers_that_look_alike_are_not_called_independent(tmp_path):
    speakers = np.array(["S1", "S1", "s1", "s1", "s2", "s2"] * 10)
    labels = np.array([0, 1] * 30)
    ids = [f"{k:02d}" for k in range(60)]
    protocol = by_speaker(validation=0.1, quiz=0.2)
    columns = {"id": ids, "speaker": speakers}
    folds = make_folds(labels, columns, protocol)
    note = speaker_note(folds, speakers)
    assert "speaker-independent:" in note
    assert "tests 'S1' and trains on 's1'" in note
    independent = np.array(["s1", "s1", "s3", "s3", "s2", "s2"] * 10)
    folds = make_folds(labels, columns | {"speaker": independent}, protocol)
    assert "No test speaker is trained on" in speaker_note(folds, independent)


def test_names_that_may_not_be_names_are_warned_of(tmp_path, three_wavs):
    corpus = manifest_of(
        tmp_path, "path,label,speaker\na.wav,sad,nan\nb.wav,None,S1\nc.wav,sad,s1\n"
    )
    assert len(corpus.utterances) == 3
    told = "\n".join(corpus.notes)
    assert "the speakers 'S1' and 's1' differ in case" in told
    assert "1 utterances have the speaker 'nan'" in told
    assert "1 utterances have the label 'None'" in told
    with pytest.raises(CorpusError, match="the classes 'Sad' and 'sad' differ in case"):
        _ = manifest_of(tmp_path, "path,label\na.wav,sad\nb.wav,Sad\n").utterances


def test_windows_separators_are_read(tmp_path):
    for name in ("s1/a.wav", "s1/b.wav"):
        write_wav(tmp_path / "data" / name, 0)
    corpus = manifest_of(tmp_path, "path,label\ns1\\a.wav,sad\nC:\\x\\s1\\b.wav,happy\n")
    assert [Path(u.path).exists() for u in corpus.utterances] == [False, True]
    corpus = manifest_of(tmp_path, "path,label\ns1\\a.wav,sad\ns1\\b.wav,happy\n")
    assert all(Path(u.path).exists() for u in corpus.utterances)
    assert [u.id for u in corpus.utterances] == ["s1/a.wav", "s1/b.wav"]


def test_leading_folders_are_left_off_for_all_rows_or_none(tmp_path):
    for name in ("wav/s1/u1.wav", "wav/s1/u2.wav", "wav/u1.wav", "u9.wav"):
        write_wav(tmp_path / name, 0)
    listed = ["downloads/x/wav/s1/u1.wav", "downloads/x/wav/s1/u2.wav", "downloads/x/wav/s9/u1.wav"]
    found = [path.relative_to(tmp_path).as_posix() for path in locate(listed, tmp_path)]
    assert found == ["wav/s1/u1.wav", "wav/s1/u2.wav", "wav/s9/u1.wav"]  # the last is missing
    found = [
        path.relative_to(tmp_path).as_posix()
        for path in locate(["wav/u1.wav", "s9/u9.wav"], tmp_path)
    ]
    assert found == ["wav/u1.wav", "s9/u9.wav"]
    absolute = str(tmp_path / "u9.wav")
    assert locate([absolute], tmp_path / "wav") == [Path(absolute)]


def test_each_real_folder_is_walked_once(tmp_path):
    write_wav(tmp_path / "corpus" / "s1" / "a.wav", 0)
    (tmp_path / "corpus" / "s1" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus" / "s1")
    write_wav(tmp_path / "elsewhere" / "b.wav", 0)
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    found = sorted(find_audio(tmp_path / "corpus"))
    assert found == [tmp_path / "corpus" / name for name in ("more/b.wav", "s1/a.wav")]


def test_a_class_that_is_not_trained_on_is_named():
    labels = np.array([0, 1] * 10 + [2] * 2)
    speakers = ["s1"] * 10 + ["s2"] * 10 + ["s3"] * 2
    protocol = by_speaker(validation=0.2, quiz=0.4)
    columns = {"id": [str(k) for k in range(22)], "speaker": speakers}
    with pytest.raises(UserError, match="no training example of the classes sad, which"):
        make_folds(labels, columns, protocol, ("happy", "neutral", "sad"))


@pytest.mark.skipif(not FAULTS.is_dir(), reason="no shared inputs")
@pytest.mark.parametrize(
    ("name", "classes", "told"),
    [
        ("spk_space.csv", 3, ""),
        ("spk_case.csv", 3, "the speakers 'S1' and 's1' differ"),
        ("spaces_val.csv", 3, ""),
        ("both_cols2.csv", 3, ""),
        ("nan.csv", 4, "8 utterances have the label 'nan'"),
        ("semi.csv", 3, ""),
        ("tab.csv", 3, ""),
        ("spaces_hdr.csv", 3, ""),
        ("trailing_commas.csv", 3, ""),
        ("backslash.csv", 3, ""),
    ],
)
def test_tables_that_people_sent(name, classes, told):
    corpus = Manifest(str(FAULTS / name))
    assert len(corpus.utterances) == 72
    assert all(os.path.exists(u.path) for u in corpus.utterances)
    assert len(corpus.class_names) == classes
    assert len({u.speaker.lower() for u in corpus.utterances} - {"nan"}) == 4
    assert told in "\n".join(corpus.notes)


def test_a_bar_in_a_label_breaks_no_table(tmp_path, three_wavs):
    corpus = manifest_of(tmp_path, "path,label\na.wav,sad|low\nb.wav,happy\n")
    table = load_table(prepare_records(corpus, tmp_path / "cache"))
    header, _, row, *_ = check_counts(table, corpus, strict=False).splitlines()
    assert r"sad\|low" in header
    assert header.replace(r"\|", "").count("|") == row.count("|")
