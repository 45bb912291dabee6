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
    protocol |= {"speakers_apart": False, "seed": 0, "training_share": 1.0}
    return ConfigDict(protocol | shares)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " , ", " ;\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("empty", ["", ",,", ";;;;", "\t\t"])
@pytest.mark.parametrize("before", [[], ["", " "], ["sep={}"]])
def test_a_table_is_read_with_any_separator_spaces_and_empty_rows(
    tmp_path, separator, end, empty, before
):
    empty = empty if not empty or empty[0] in separator else separator.strip(" ") * 2
    lines = [separator.join(row) for row in ROWS]
    before = [line.format(separator.strip(" ")[:1]) for line in before]
    text = "\ufeff" + end.join([*before, *lines[:2], empty, *lines[2:], empty, ""])
    expected = [dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:]]
    assert rows_of(tmp_path, text) == expected


def test_a_separator_in_a_value_is_one_only_unquoted(tmp_path):
    text = 'path;label;text\na.wav;sad;"well; yes, no"\n'
    assert rows_of(tmp_path, text)[0]["text"] == "well; yes, no"
    assert rows_of(tmp_path, 'path, text\na.wav, "well, no"\n')[0]["text"] == "well, no"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("path,label,label\na,x,y\n", "m.csv", "two columns are named 'label'"),
        ("path,label, label \na,x,y\n", "m.csv", "two columns are named 'label'"),
        ("path,label,\na,x,7\n", "m.csv", "line 2: '7' is in a column without a name"),
        ("path,label\na,x,7\n", "m.csv", "line 2: more values than columns"),
        ('{"path": "a", "label": "x", "label": "y"}\n', "m.jsonl", "line 1: two values are named"),
        ("path,label\nä,x\n", "m.csv", "save it as UTF-8"),
        ("p\0a\0t\0h\0,\0l\0", "m.csv", "as in UTF-16; save it as UTF-8"),
        ('path,label\na,"x\nb,y\n', "m.csv", "line 3: unexpected end of data; check the quotes"),
        ("a", "m.xlsx", r"use \.csv, \.tsv or \.jsonl"),
        ("path,label\na\0b,x\n", "m.csv", "zero bytes"),
    ],
)
def test_what_has_two_meanings_is_refused_with_its_name(tmp_path, text, name, message):
    encoding = "latin-1" if "ä" in text else "utf-8"
    with pytest.raises(CorpusError, match=message):
        rows_of(tmp_path, text, name, encoding)


@pytest.mark.parametrize("label", ["\ue000", "a" * 101])
def test_a_class_that_no_export_could_name_is_refused(tmp_path, three_wavs, label):
    with pytest.raises(CorpusError, match="cannot be shown"):
        _ = manifest_of(tmp_path, f"path,label\na.wav,{label}\nb.wav,happy\n").utterances


def test_a_path_that_no_system_has_is_a_file_that_is_missing(tmp_path, three_wavs):
    corpus = manifest_of(tmp_path, f"path,label\n{'a' * 300}.wav,sad\nb.wav,happy\n")
    (skip,) = [record for u in corpus.utterances if "reason" in (record := corpus.read_record(u))]
    assert "File name too long" in skip["reason"]


def test_a_message_is_one_line_that_a_terminal_can_show(tmp_path):
    told = str(UserError(f"{tmp_path}/a\nb\x1b[31m: {'x' * 9999} is not a name; use another"))
    assert told.startswith(rf"{tmp_path}/a\nb\x1b[31m: xxx")
    assert told.endswith("xxx is not a name; use another")
    assert len(told) < 1000


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
    with pytest.raises(CorpusError, match="two columns are the label, 'label' and 'Label'"):
        _ = manifest_of(tmp_path, "path,label,Label\na.wav,sad,0\n").utterances
    text = "wav,emo,Label,PATH\nb.wav,0,sad,a.wav\na.wav,1,happy,b.wav\n"
    corpus = manifest_of(tmp_path, text)
    assert [(u.id, u.label) for u in corpus.utterances] == [("a.wav", "sad"), ("b.wav", "happy")]


def test_a_label_map_has_one_class_for_a_label(tmp_path, three_wavs):
    text = "path,label\na.wav,ＳＡＤ\nb.wav,hap\n"

    def classes(labels):
        (tmp_path / "map.json").write_text(labels)
        return manifest_of(tmp_path, text, label_map=str(tmp_path / "map.json")).class_names

    assert classes('{"sad ": "sad", "sad": " sad", "hap": "happy"}') == ("happy", "sad")
    with pytest.raises(CorpusError, match="has 'hap' twice, as 'happy' and 'glad'; remove one"):
        classes('{"sad": "sad", "hap": "happy", "hap ": "glad"}')
    with pytest.raises(CorpusError, match="must be like"):
        classes('{"sad": " ", "hap": "happy"}')


def test_messages_name_a_few_of_many(tmp_path, three_wavs):
    columns = ",".join(f"feature_{k}" for k in range(2000))
    with pytest.raises(CorpusError, match=r"feature_9 and 1,990 more") as error:
        _ = manifest_of(tmp_path, f"{columns}\n{'1,' * 1999}1\n").utterances
    assert len(str(error.value)) < 500
    speakers = "".join(f"{name}.wav,sad,{name * 90}\n" for name in "abc")
    corpus = manifest_of(tmp_path, "path,label,speaker\n" + speakers)
    protocol = by_speaker(groups_per_fold=9)
    columns = {"id": "abc", "speaker": [u.speaker for u in corpus.utterances]}
    with pytest.raises(UserError, match="only 3 ") as error:
        make_folds(np.array([0, 1, 1]), columns, protocol, 0)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "other", ["s1 ", " s1", "s1\u00a0", "\u200bs1", "s1\ufeff", "s\u00ad1", "\u200es1", "s1\ufe0f"]
)
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


@pytest.mark.parametrize("other", ["S1", "s1", "s１", "s01", "ѕ1", "s١"])
def test_names_that_look_alike_are_found(other):
    names = {"s1", "s2", other}
    assert alike(names) == ([] if other == "s1" else [tuple(sorted(("s1", other)))])
    assert plain("Zoë") == plain("ZOE")


def test_numbers_and_hyphens_are_read_as_people_mean_them():
    for one, other in (("1", "001"), ("7", "7.0"), ("a_b", "a-b"), ("a b", "a–b"), ("0", "00")):
        assert plain(one) == plain(other)
    names = ["1", "10", "-1", "1.5", "1.05", "11", "1_1", "s1", "s10", "s100", "a", "ab"]
    assert alike(names) == []


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
    unnamed = np.where(speakers == "S1", "NaN", "s2")
    unnamed[:3] = "s3"
    folds = make_folds(labels, columns | {"speaker": unnamed}, protocol, 0)
    assert "could not be checked" in speaker_note(folds, unnamed)
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
    notes = []
    assert locate(["s1/u1.wav"], tmp_path / "wav", notes) == [tmp_path / "wav/s1/u1.wav"]
    assert notes == []
    locate(listed, tmp_path, notes)
    assert notes == []
    assert locate(["s1/u9.wav", "s2/u9.wav"], tmp_path, notes) == [tmp_path / "u9.wav"] * 2
    assert notes[0].startswith(f"WARNING: {tmp_path} has no s1, s2: the paths are read without")
    assert locate(["x/../wav/u1.wav"], tmp_path) == [tmp_path / "wav/u1.wav"]


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
    (tmp_path / "data" / "c`<b>.wav").write_text("no audio <b> here")
    text = "path,label\na.wav,sad|low\nb.wav,<b>happy\nc`<b>.wav,<b>happy\n"
    corpus = manifest_of(tmp_path, text)
    table = load_table(prepare_records(corpus, tmp_path / "cache"))
    header, _, row, *_, skipped = check_counts(table, corpus, strict=False).splitlines()
    assert r"\<b>happy" in header
    assert skipped.startswith("- `` c`<b>.wav ``: ")
    assert r"\<b> here" in skipped
    assert r"sad\|low" in header
    assert header.replace(r"\|", "").count("|") == row.count("|")
