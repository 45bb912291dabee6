"""Manifests, and EmoBox's: rows and what is wrong with them, parts, speakers, folds."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

from layouts import SHARED, manifest_of, needs_corpora
from serkd_jax.data.corpora import CorpusError, Manifest, make_corpus
from serkd_jax.data.splits import make_folds, speaker_note


def touch(path):
    """Makes an empty file: listing looks only whether it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Rows


def test_csv_manifest_with_all_columns(tmp_path, three_wavs):
    corpus = manifest_of(
        tmp_path,
        "id,path,label,speaker,session,split,fold,comment\n"
        'u2,a.wav,sad,s1,1,train,2,"long, quiet"\n'
        "u1,b.wav,happy,s2,2,test,1,\n",
    )
    first, second = corpus.utterances
    assert (first.id, first.label, first.speaker) == ("u1", "happy", "s2")
    assert (second.session, second.split, second.fold) == ("1", "train", "2")
    assert corpus.class_names == ("happy", "sad")
    assert Path(first.path) == three_wavs / "b.wav"


def test_csv_and_jsonl_of_the_same_rows_are_the_same_corpus(tmp_path, three_wavs):
    csv = manifest_of(tmp_path, "\ufeffpath,label\na.wav,sad\nb.wav,happy\n")
    jsonl = manifest_of(
        tmp_path,
        '{"path": "a.wav", "label": "sad"}\n\n{"path": "b.wav", "label": "happy", "fold": null}\n',
        "m.jsonl",
    )
    assert csv.utterances == jsonl.utterances
    assert csv.fingerprint == jsonl.fingerprint


def test_paths_are_relative_to_the_manifest_without_data_dir_and_may_be_absolute(tmp_path):
    first, second = (touch(tmp_path / "sub" / name) for name in ("a.wav", "b.wav"))
    (tmp_path / "m.csv").write_text(f"path,label,id\nsub/a.wav,x,1\n{second},y,2\n")
    paths = [u.path for u in Manifest(str(tmp_path / "m.csv")).utterances]
    assert paths == [str(first), str(second)]


def test_two_rows_that_find_the_same_file_are_refused(tmp_path):
    touch(tmp_path / "a.wav")
    (tmp_path / "m.csv").write_text("path,label\ns1/a.wav,x\ns2/a.wav,y\n")
    with pytest.raises(CorpusError, match=r"line 3: file .*a\.wav is also at .*line 2"):
        _ = Manifest(str(tmp_path / "m.csv")).utterances


def test_a_missing_file_is_not_taken_from_another_folder(tmp_path):
    """Which leading folders are left off is decided once, for all rows."""
    touch(tmp_path / "data" / "001.wav")
    (tmp_path / "data" / "s1").mkdir()
    corpus = manifest_of(tmp_path, "path,label\ns1/001.wav,x\nelsewhere/001.wav,y\n")
    paths = {u.id: Path(u.path).relative_to(tmp_path / "data") for u in corpus.utterances}
    assert paths == {
        "s1/001.wav": Path("s1/001.wav"),  # missing, and reported when it is read
        "elsewhere/001.wav": Path("elsewhere/001.wav"),
    }


def test_label_map_merges_labels_and_forgives_case(tmp_path, three_wavs):
    (tmp_path / "map.json").write_text('{"exc": "happy", "hap": "happy", "Neutral": "neutral"}')
    rows = "path,label\na.wav,exc\nb.wav,hap\nc.wav,neutral\n"
    corpus = manifest_of(tmp_path, rows, label_map=str(tmp_path / "map.json"))
    assert [u.label for u in corpus.utterances] == ["happy", "happy", "neutral"]


BAD_MANIFESTS = {
    r"line 3: id 'a\.wav' is also at .*line 2": "path,label\na.wav,x\na.wav,y\n",
    "line 3: no label": "path,label\na.wav,x\nb.wav,\n",
    "line 2: no path; .*this one has file, label": "file,label\na.wav,x\n",
    "lists no utterances": "path,label\n",
    "line 2: more values than columns": "path,label\na.wav,x,y\n",
}


@pytest.mark.parametrize("problem", BAD_MANIFESTS)
def test_faulty_csv_manifest_is_told_with_its_line(tmp_path, three_wavs, problem):
    with pytest.raises(CorpusError, match=problem):
        manifest_of(tmp_path, BAD_MANIFESTS[problem]).utterances  # noqa: B018


BAD_JSONL = {
    "line 2: not JSON": '{"path": "a.wav", "label": "x"}\n{"path"\n',
    "line 1: .* is not a JSON object": "[1, 2]\n",
    "line 3: no label": '{"path": "a.wav", "label": "x"}\n\n{"path": "b.wav"}\n',
    "lists no utterances": "",
}


@pytest.mark.parametrize("problem", BAD_JSONL)
def test_faulty_jsonl_manifest_is_told_with_its_line(tmp_path, three_wavs, problem):
    with pytest.raises(CorpusError, match=problem):
        manifest_of(tmp_path, BAD_JSONL[problem], "m.jsonl").utterances  # noqa: B018


def test_faulty_manifest_files_and_maps_are_told(tmp_path, three_wavs):
    rows = "path,label\na.wav,x\n"
    (tmp_path / "map.json").write_text('{"sad": "Sad"}')
    for name, text in {
        "list.json": "[]",
        "null.json": '{"x": null}',
        "deep.json": "[" * 99_999,
        "twice.json": '{"x": "a", "x ": "b"}',
    }.items():
        (tmp_path / name).write_text(text)
    latin = tmp_path / "latin.csv"
    latin.write_bytes("path,label\na.wav,fröhlich\n".encode("latin-1"))
    for make, problem in [
        (lambda: manifest_of(tmp_path, rows, "m.xlsx"), "unknown kind '.xlsx'"),
        (lambda: Manifest(str(tmp_path / "none.csv")), "no such file"),
        (lambda: Manifest(""), "give `manifest`"),
        (lambda: Manifest(str(latin)), "save it as UTF-8"),
        (lambda: Manifest(str(latin), data_dir="/nowhere"), "/nowhere is not a folder"),
        (
            lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "map.json")),
            r"line 2: label 'x' is not in .*map\.json; it has sad",
        ),
        (
            lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "no.json")),
            "cannot be read",
        ),
        (lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "list.json")), "must be"),
        (lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "null.json")), "must be"),
        (lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "deep.json")), "recursion"),
        (lambda: manifest_of(tmp_path, rows, label_map=str(tmp_path / "twice.json")), "'x' twice"),
    ]:
        with pytest.raises(CorpusError, match=problem):
            make().utterances  # noqa: B018


# Parts of files


def test_rows_are_parts_of_files(tmp_path, three_wavs):
    soundfile.write(three_wavs / "a.wav", np.linspace(-0.5, 0.5, 32_000), 16_000)
    corpus = manifest_of(
        tmp_path,
        "id,path,label,start,end\n1,a.wav,x,,0.5\n2,a.wav,x,0.5,1.25\n3,a.wav,y,1.25,\n"
        "4,b.wav,y,,\n",
    )
    assert [(u.start, u.end) for u in corpus.utterances] == [
        (0, 0.5),
        (0.5, 1.25),
        (1.25, None),
        (0, None),
    ]
    whole, _ = soundfile.read(three_wavs / "a.wav", dtype="float32")
    parts = [corpus.read_waveform(u) for u in corpus.utterances[:3]]
    assert [len(part) for part in parts] == [8_000, 12_000, 12_000]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_emobox_start_time_and_end_time_are_the_part(tmp_path):
    """As its PAVOQUE has them: hundreds of utterances in one recording."""
    common = {"dataset": "pavoque", "wav": "downloads/pavoque/pavoque-poker.flac", "length": 4.46}
    times = [(0.0, 4.46), (4.46, 9.58), (1917.34, 1925.26)]
    rows = [
        common | {"key": f"pavoque-{k}", "emo": "poker", "start_time": start, "end_time": end}
        for k, (start, end) in enumerate(times)
    ]
    corpus = Manifest(write_jsonl(tmp_path / "pavoque.jsonl", rows))
    assert [(u.start, u.end) for u in corpus.utterances] == times
    assert len({u.path for u in corpus.utterances}) == 1


def test_parts_without_ids_are_named_by_their_file_and_times(tmp_path, three_wavs):
    corpus = manifest_of(tmp_path, "path,label,start,end\na.wav,x,0,0.5\na.wav,y,0.5,\n")
    assert [u.id for u in corpus.utterances] == ["a.wav#0-0.5", "a.wav#0.5-"]


def test_a_moved_part_changes_the_fingerprint(tmp_path, three_wavs):
    rows = "path,label,start,end\na.wav,x,0.5,1\nb.wav,y,,\n"
    fingerprints = {
        manifest_of(tmp_path, text).fingerprint
        for text in (rows, rows.replace("0.5", "0.6"), rows.replace(",1", ",2"))
    }
    assert len(fingerprints) == 3


BAD_PARTS = {
    r"line 3: file .*a\.wav#0\.5-1 is also at": "1,a.wav,x,0.5,1\n2,a.wav,y,0.5,1",
    r"line 3: file .*a\.wav#-1 is also at .*line 2": "1,a.wav,x,,1\n2,a.wav,y,,1",
    "line 3: start and end are seconds; .*'0:30'": "1,a.wav,x,,1\n2,b.wav,y,0:30,",
    "line 2: start and end are seconds; .*'1,5'": '1,a.wav,x,,"1,5"',
}


@pytest.mark.parametrize("problem", BAD_PARTS)
def test_a_part_listed_twice_or_of_no_numbers_is_told_with_its_line(tmp_path, three_wavs, problem):
    rows = f"id,path,label,start,end\n{BAD_PARTS[problem]}\n"
    with pytest.raises(CorpusError, match=problem):
        manifest_of(tmp_path, rows).utterances  # noqa: B018


# Speakers


@pytest.mark.parametrize(
    ("pattern", "speakers"),
    [
        (r"^s(\d+)", ["1", "12"]),
        (r"^s(\d+)\w*_([FM])\d", ["1F", "12M"]),
        (r"^s\d+", ["s1", "s12"]),
        (r"(?P<who>[FM]\d)", ["F7", "M8"]),
    ],
)
def test_a_pattern_finds_speakers_in_ids(tmp_path, three_wavs, pattern, speakers):
    rows = "id,path,label\ns1a_F7,a.wav,x\ns12b_M8,b.wav,y\n"
    corpus = manifest_of(tmp_path, rows, speaker_pattern=pattern)
    assert {u.id: u.speaker for u in corpus.utterances} == dict(
        zip(("s1a_F7", "s12b_M8"), speakers, strict=True)
    )


def test_the_speaker_column_goes_before_the_pattern(tmp_path, three_wavs):
    rows = "path,label,speaker\na.wav,x,Ann\nb.wav,y,\n"
    corpus = manifest_of(tmp_path, rows, speaker_pattern="^.")
    assert [u.speaker for u in corpus.utterances] == ["Ann", "b"]


def test_a_pattern_that_finds_nothing_or_is_none_is_refused(tmp_path, three_wavs):
    rows = "path,label\na.wav,x\nb.wav,y\n"
    with pytest.raises(
        CorpusError, match=r"line 3: speaker_pattern '\^a' finds no speaker in the id 'b\.wav'"
    ):
        manifest_of(tmp_path, rows, speaker_pattern="^a").utterances  # noqa: B018
    with pytest.raises(CorpusError, match=r"speaker_pattern '\(\\\\d': .*unterminated"):
        manifest_of(tmp_path, rows, speaker_pattern=r"(\d")


def test_emobox_says_who_speaks_in_data_seg_wrd_stm(tmp_path):
    (tmp_path / "data.seg.wrd.stm").write_text(
        "emodb-15a07Nc 1 male_15 0 1.88 "
        "<id=emodb-15a07Nc,lang=en,spk=male_15,emotion=neutral> neutral\n"
        "emodb-15b01Na 1 male_15 0 2.36 "
        "<id=emodb-15b01Na,lang=en,spk=male_15,emotion=neutral> neutral\n"
        "pavoque-m0001-poker 1 STEFAN-RÖTTIG 334.1 338.32 "
        "<id=pavoque-m0001-poker,lang=en,spk=STEFAN-RÖTTIG,emotion=poker> poker\n",
        encoding="utf-8",
    )
    keys = ("emodb-15a07Nc", "pavoque-m0001-poker", "pavoque-m0001")
    rows = [{"key": key, "wav": f"{key}.wav", "emo": "neutral"} for key in keys]
    corpus = Manifest(write_jsonl(tmp_path / "all.jsonl", rows))
    assert {u.id: u.speaker for u in corpus.utterances} == dict(
        zip(keys, ("male_15", "STEFAN-RÖTTIG", ""), strict=True)
    )


def test_the_speaker_of_an_emobox_turn_of_iemocap_is_not_that_of_the_dialog(tmp_path):
    """Lines of the published files, which name the dialog's speaker."""
    turns = {"Ses01F_impro04_M000": "Ses01M", "Ses01M_script01_1_F004": "Ses01F"}
    turns |= {"Ses03M_impro05a_M003": "Ses03M"}
    rows = [
        {"key": f"iemocap-{turn}", "dataset": "iemocap", "wav": f"{turn}.wav", "emo": "neu"}
        for turn in turns
    ]
    (tmp_path / "data.seg.wrd.stm").write_text(
        "".join(
            f"iemocap-{turn} 1 {turn[:6]} 0 2.1 "
            f"<id=iemocap-{turn},lang=en,spk={turn[:6]},emotion=neu> neu\n"
            for turn in turns
        )
    )
    corpus = Manifest(write_jsonl(tmp_path / "iemocap.jsonl", rows))
    speakers = {u.id.removeprefix("iemocap-"): u.speaker for u in corpus.utterances}
    assert speakers == turns


def test_speakers_that_are_names_of_files_are_no_speakers(tmp_path):
    names = [f"sample_{n:08d}" for n in range(4)]
    rows = [{"key": f"mer2023-{n}.mp4", "wav": f"{n}.mp4", "emo": "sad"} for n in names]
    (tmp_path / "data.seg.wrd.stm").write_text(
        "".join(
            f"mer2023-{n}.mp4 1 {n} 0 2 <id=mer2023-{n}.mp4,lang=en,spk={n},emotion=sad> sad\n"
            for n in names
        )
    )
    corpus = Manifest(write_jsonl(tmp_path / "mer2023.jsonl", rows))
    assert {u.speaker for u in corpus.utterances} == {""}


# EmoBox

NAMES = {"03a01Lb": "boredem", "08b02Ea": "neutral", "16b10Na": "neutral"}


def emobox(folder, lists):
    """EmoBox's EMO-DB as published: the list, the map with its flaws, and lists of the folds.

    `lists` are of names, of each part of each fold: {1: {"test": ["03a01Lb"]}}.
    """
    rows = {
        name: {
            "key": f"emodb-{name}",
            "dataset": "emodb",
            "wav": f"downloads/emodb/wav/{name}.wav",
            "emo": emotion,
        }
        for name, emotion in NAMES.items()
    }
    for fold, parts in lists.items():
        for part, names in parts.items():
            path = folder / f"fold_{fold}" / f"emodb_{part}_fold_{fold}.jsonl"
            write_jsonl(path, [rows.get(name, {"key": name}) for name in names])
    (folder / "label_map.json").write_text('{"boredem": "Boredom", "Neutral": "Neutral"}')
    return Manifest(write_jsonl(folder / "emodb.jsonl", rows.values()))


def folds_of(corpus):
    return [u.fold for u in corpus.utterances]


def splits_of(corpus):
    return [u.split for u in corpus.utterances]


def test_emobox_manifest_with_its_map_folds_speakers_and_paths(tmp_path, emodb):
    manifest = emobox(tmp_path, {1: {"test": ["03a01Lb"]}, 2: {"test": ["16b10Na"]}}).manifest
    for data_dir in (emodb, emodb.parent, emodb / "wav"):
        corpus = Manifest(str(manifest), data_dir=str(data_dir))
        assert [(u.id, u.label, u.fold, u.speaker) for u in corpus.utterances] == [
            ("emodb-03a01Lb", "Boredom", "1", "03"),
            ("emodb-08b02Ea", "Neutral", "", "08"),
            ("emodb-16b10Na", "Neutral", "2", "16"),
        ]
        assert all(Path(u.path).is_file() for u in corpus.utterances)
        assert corpus.notes == []  # there are no training lists to leave anything out


def test_emobox_folds_are_folds(tmp_path):
    first, second, third = NAMES
    corpus = emobox(
        tmp_path,
        {
            1: {"train": [second, third], "test": [first]},
            2: {"train": [first], "valid": [third], "test": [second]},
            10: {"train": [first, second], "test": [third]},
        },
    )
    assert folds_of(corpus) == ["1", "2", "10"]
    assert splits_of(corpus) == [""] * 3
    (note,) = corpus.notes  # on the validation list, which has no place in the other folds
    assert note.startswith("Fold 2 of EmoBox trains on 1 utterances; here it trains on all 2")


@pytest.mark.parametrize("left_out", [0, 1])
def test_the_only_fold_of_emobox_is_the_official_split(tmp_path, left_out):
    first, second, third = NAMES
    lists = {"train": [third][left_out:], "valid": [second], "test": [first]}
    corpus = emobox(tmp_path, {1: lists})
    assert splits_of(corpus) == ["test", "valid", "train"][: 3 - left_out]
    assert set(folds_of(corpus)) == {""}
    notes = ["1 utterances are in no list of fold_1: left out."]
    assert corpus.notes == notes[:left_out]


def test_lists_of_parts_of_a_test_part_are_not_parts_of_their_own(tmp_path):
    first, second, third = NAMES
    lists = {"train": [third], "test": [first, second], "test1": [first], "test2": [second]}
    assert splits_of(emobox(tmp_path, {1: lists})) == ["test", "test", "train"]  # as MER2023 is


def test_the_label_map_of_emovo_has_another_name(tmp_path, three_wavs):
    (tmp_path / "label_dict.json").write_text('{"gio": "Happy", "tri": "Sad"}')
    assert manifest_of(tmp_path, "path,label\na.wav,gio\nb.wav,tri\n").class_names == (
        "Happy",
        "Sad",
    )


def test_training_lists_that_leave_utterances_out_are_noted(tmp_path):
    first, second, third = NAMES
    corpus = emobox(
        tmp_path,
        {1: {"train": [second], "test": [first]}, 2: {"train": [first, second], "test": [third]}},
    )
    assert folds_of(corpus) == ["1", "", "2"]
    (note,) = corpus.notes
    assert note.startswith("Fold 1 of EmoBox trains on 1 utterances; here it trains on all 2")
    del corpus.utterances
    assert folds_of(corpus) == ["1", "", "2"]
    assert corpus.notes == [note]  # not twice


BAD_FOLDS = {
    "'emodb-03a01Lb' is also tested by fold 1": {
        1: {"test": ["03a01Lb"]},
        2: {"test": ["03a01Lb"]},
    },
    r"test_fold_1\.jsonl, line 2: 'emodb-99a01Lb' is not in .*emodb\.jsonl": {
        1: {"test": ["03a01Lb", "emodb-99a01Lb"]}
    },
    r"train_fold_2\.jsonl, line 1: 'emodb-16b10Na' is also in the test part": {
        1: {"test": ["03a01Lb"]},
        2: {"test": ["16b10Na"], "train": ["16b10Na"]},
    },
    r"test_fold_1\.jsonl, line 2: 'emodb-03a01Lb' is also in the test part": {
        1: {"test": ["03a01Lb", "03a01Lb"]}
    },
}


@pytest.mark.parametrize("problem", BAD_FOLDS)
def test_faulty_lists_of_emobox_are_told_with_their_place(tmp_path, problem):
    with pytest.raises(CorpusError, match=problem):
        emobox(tmp_path, BAD_FOLDS[problem]).utterances  # noqa: B018


@pytest.mark.parametrize("column", ["fold", "split"])
def test_a_manifest_with_folds_or_splits_of_its_own_ignores_the_folders(tmp_path, column):
    emobox(tmp_path, {1: {"test": ["03a01Lb"]}, 2: {"test": ["no such key"]}})
    rows = [
        {"key": f"emodb-{name}", "wav": f"{name}.wav", "emo": emotion, column: "test"}
        for name, emotion in NAMES.items()
    ]
    corpus = Manifest(write_jsonl(tmp_path / "own.jsonl", rows))
    own = (["test"] * 3, [""] * 3)
    assert (folds_of(corpus), splits_of(corpus)) == (own if column == "fold" else own[::-1])


@pytest.fixture
def real_emodb():
    manifest = SHARED / "emobox" / "emodb" / "emodb.jsonl"
    return make_corpus("manifest", manifest=str(manifest), data_dir=str(SHARED))


@needs_corpora
def test_the_real_emobox_manifest_of_emodb(real_emodb):
    corpus = real_emodb
    assert Counter(u.fold for u in corpus.utterances) == dict.fromkeys("12345", 107)
    assert corpus.notes == []
    assert corpus.class_names == (
        *("Angry", "Boredom", "Disgust", "Fear", "Happy", "Neutral", "Sad"),
    )
    emodb = {u.id: u for u in make_corpus("emodb", data_dir=str(SHARED / "emodb")).utterances}
    for utterance in corpus.utterances:
        twin = emodb[utterance.id.removeprefix("emodb-")]
        assert Path(utterance.path).samefile(twin.path)
        assert utterance.label[:3].lower() == twin.label[:3]
        assert utterance.speaker == twin.speaker


@needs_corpora
def test_the_folds_of_the_real_emobox_are_not_speaker_independent(real_emodb):
    utterances = real_emodb.utterances
    columns = {
        name: [getattr(u, name) for u in utterances]
        for name in ("id", "speaker", "session", "fold", "split")
    }
    labels = np.array([real_emodb.class_names.index(u.label) for u in utterances])
    protocol = {"groups_per_fold": 1, "num_folds": 5, "speakers_apart": False, "file": ""}
    protocol |= {"validation": 0.1, "quiz": 0.1, "seed": 0, "training_share": 1.0}

    def note(split_by):
        config = ConfigDict(protocol | {"split_by": split_by})
        return speaker_note(make_folds(labels, columns, config), columns["speaker"])

    assert "In 5 of 5 fold(s), test speakers are also trained on (fold 1: 10 of 10)" in note("fold")
    assert note("speaker").startswith("No test speaker is trained on")
