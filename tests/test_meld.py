"""MELD: annotations, recordings in several layouts, the release's flaws, the real annotations."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from layouts import MELD_FOLDERS, MELD_TONES, SHARED, peak_hz, tone, write_meld_csv, write_mp4
from serkd_jax.data.corpora import MELD, CorpusError
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import load_table, read_examples

REAL = SHARED / "meld"
FLAWS = {"train_dia125_utt3", "dev_dia110_utt7"}
NO_UTTERANCES = {f"test/final_videos_testdia{n}_utt{n}.mp4" for n in (0, 1)}


@pytest.fixture
def copy(meld, tmp_path):
    return shutil.copytree(meld, tmp_path / "MELD.Raw")


@pytest.fixture(scope="module")
def built(meld, tmp_path_factory):
    """The records of the release."""
    return prepare_records(MELD(str(meld)), tmp_path_factory.mktemp("built"))


def lay_out(root, rows, csv="{part}_sent_emo.csv", folder="{name}", suffix=".mp4"):
    """Writes the annotations and, for listing, files that only look like recordings."""
    for part, name in MELD_FOLDERS.items():
        write_meld_csv(root / csv.format(part=part), rows)
        place = root / folder.format(part=part, name=name)
        place.mkdir(parents=True, exist_ok=True)
        for dialogue, utterance, *_ in rows:
            (place / f"dia{dialogue}_utt{utterance}{suffix}").write_bytes(b"audio")
    return MELD(str(root))


ROWS = [(0, 0, "Ross", "joy", "Hi!"), (12, 3, "Joey", "fear", "Oh.")]


# Annotations


def test_an_utterance_has_its_parts_name_speaker_text_and_sentiment(tmp_path):
    text = "It’s “lost”, you said, \"lost\" it — or… 'not'?"
    corpus = lay_out(tmp_path, [(0, 0, " Ross ", "Joy ", text), (12, 3, "Joey", "fear", "")])
    assert corpus.class_names == (*MELD_TONES,)
    listed = {u.id: u for u in corpus.utterances}
    assert list(listed) == [f"{s}_{u}" for s in MELD.SPLITS for u in ("dia0_utt0", "dia12_utt3")]
    first = listed["train_dia0_utt0"]
    assert (first.label, first.speaker, first.split) == ("joy", "Ross", "train")
    assert first.extras == {"text": text, "sentiment": "neutral"}
    assert listed["test_dia12_utt3"].label == "fear"
    assert corpus.skipped == corpus.notes == []


def test_text_and_sentiment_are_in_the_records(built):
    texts = list(read_examples(built, ("id", "text", "sentiment", "speaker")))
    assert {record["text"] for record in texts} == {"Oh, it’s “lost” it!"}
    assert {record["sentiment"] for record in texts} == {"neutral"}
    assert Counter(record["speaker"] for record in texts) == {"Ross": 12, "Phoebe": 9}


@pytest.mark.parametrize("column", ["Utterance", "Emotion", "Dialogue_ID"])
def test_annotations_without_a_column_are_told_before_audio_is_decoded(
    tmp_path, monkeypatch, column
):
    corpus = lay_out(tmp_path / "corpus", ROWS)
    monkeypatch.setattr(MELD, "read_waveform", lambda *_: pytest.fail("audio was read"))
    path = tmp_path / "corpus" / "test_sent_emo.csv"
    path.write_text(path.read_text().replace(f",{column},", ",Other,", 1))
    with pytest.raises(CorpusError, match=rf"test_sent_emo\.csv has no column {column}; it has .*"):
        prepare_records(corpus, tmp_path)


BAD_ROWS = {
    "unknown emotion": ((0, 1, "Ross", "bored", "Hm."), "'bored', '0, 1'"),
    "no emotion": ((0, 1, "Ross", "", "Hm."), "'', '0, 1'"),
    "no whole number": ((0, "1.5", "Ross", "joy", "Hm."), "'joy', '0, 1.5'"),
    "no number": (("x", 1, "Ross", "joy", "Hm."), "'joy', 'x, 1'"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_without_emotion_or_ids_is_skipped_and_named_with_its_line(tmp_path, kind):
    row, named = BAD_ROWS[kind]
    corpus = lay_out(tmp_path, ROWS)
    write_meld_csv(tmp_path / "dev_sent_emo.csv", [ROWS[0], row, ROWS[1]])
    assert len(corpus.utterances) == 6
    (skip,) = corpus.skipped
    assert skip["id"] == f"{tmp_path / 'dev_sent_emo.csv'}, line 3"
    assert skip["reason"].startswith(f"{skip['id']}: no emotion or no ids ({named})")


def test_a_missing_annotation_file_is_noted_and_the_rest_is_used(copy, tmp_path):
    (copy / "test_sent_emo.csv").unlink()
    corpus = MELD(str(copy))
    table = load_table(prepare_records(corpus, tmp_path))
    assert corpus.notes == ["test_sent_emo.csv is missing: the test part is not used."]
    assert Counter(table.splits.tolist()) == {"train": 7, "dev": 7}
    assert {skip["id"] for skip in table.skipped} == FLAWS


def test_a_folder_without_annotations_is_told_what_data_dir_must_be(tmp_path):
    for folder, problem in [
        ("", "needs data_dir, the folder MELD.Raw"),
        (tmp_path / "nowhere", r"nowhere is not a folder; data_dir must be MELD\.Raw"),
        (tmp_path, r"must hold train_sent_emo\.csv, dev_sent_emo\.csv and test_sent_emo\.csv"),
    ]:
        with pytest.raises(CorpusError, match=problem):
            MELD(str(folder)).utterances  # noqa: B018


# Recordings

LAYOUTS = {
    "all in one folder": {},
    "as the archives unpack": {"folder": "{part}/{name}"},
    "annotations beside the folders": {
        "csv": "{part}/{part}_sent_emo.csv",
        "folder": "{part}/{name}",
    },
    "folder that holds the release": {
        "csv": "MELD.Raw/{part}_sent_emo.csv",
        "folder": "MELD.Raw/{name}",
    },
    "three deep": {"csv": "data/MELD/{part}_sent_emo.csv", "folder": "a/MELD.Raw/{part}/{name}"},
    "ready-made WAVs": {"folder": "{part}", "suffix": ".wav"},
    "ready-made FLACs": {"folder": "audio/{part}", "suffix": ".flac"},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_annotations_and_recordings_are_found_where_they_usually_lie(tmp_path, kind):
    corpus = lay_out(tmp_path, ROWS, **LAYOUTS[kind])
    folder = LAYOUTS[kind].get("folder", "{name}")
    suffix = LAYOUTS[kind].get("suffix", ".mp4")
    assert {u.id: Path(u.path) for u in corpus.utterances} == {
        f"{part}_{stem}": tmp_path / folder.format(part=part, name=name) / (stem + suffix)
        for part, name in MELD_FOLDERS.items()
        for stem in ("dia0_utt0", "dia12_utt3")
    }
    assert corpus.skipped == corpus.notes == []
    for utterance in corpus.utterances:
        corpus.check_file(utterance)


def test_a_wav_then_a_flac_of_the_same_name_is_read_before_the_video(tmp_path):
    lay_out(tmp_path, ROWS[:1])
    video = tmp_path / MELD_FOLDERS["dev"] / "dia0_utt0.mp4"
    write_mp4(video, tone(200))
    for suffix, hertz in [(".mp4", 200), (".flac", 400), (".wav", 800)]:
        if suffix != ".mp4":
            soundfile.write(video.with_suffix(suffix), tone(hertz), 16_000)
        corpus = MELD(str(tmp_path))
        utterance = corpus.utterances[0]
        assert Path(utterance.path) == video.with_suffix(suffix)
        assert abs(peak_hz(corpus.read_waveform(utterance)) - hertz) <= 5
        assert corpus.skipped == []


def test_a_missing_folder_is_noted_its_utterances_are_skipped_and_the_rest_is_built(copy, tmp_path):
    shutil.rmtree(copy / "dev")
    corpus = MELD(str(copy))
    table = load_table(prepare_records(corpus, tmp_path))
    assert corpus.notes == [f"No folder dev_splits_complete below {copy}."]
    assert Counter(table.splits.tolist()) == {"train": 7, "test": 7}
    dev = [skip for skip in table.skipped if skip["id"].startswith("dev_")]
    assert len(dev) == 8
    assert all("no such audio file" in skip["reason"] for skip in dev)


def test_a_video_without_sound_is_skipped_with_that_reason(copy, tmp_path):
    video = write_mp4(copy / "dev" / MELD_FOLDERS["dev"] / "dia0_utt4.mp4", None)
    table = load_table(prepare_records(MELD(str(copy)), tmp_path))
    reasons = {skip["id"]: skip["reason"] for skip in table.skipped}
    assert reasons["dev_dia0_utt4"].startswith(f"{video}: has no audio track")
    assert reasons.keys() == FLAWS | {"dev_dia0_utt4"}
    assert len(table) == 20


def test_suffixes_in_upper_case_and_what_macos_unpacked_beside_are_understood(tmp_path):
    lay_out(tmp_path, ROWS, folder="{part}/{name}", suffix=".MP4")
    (tmp_path / "__MACOSX" / MELD_FOLDERS["dev"]).mkdir(parents=True)
    corpus = MELD(str(tmp_path))
    assert {Path(u.path).name for u in corpus.utterances} == {"dia0_utt0.MP4", "dia12_utt3.MP4"}
    assert all(Path(u.path).is_file() for u in corpus.utterances)
    assert corpus.skipped == corpus.notes == []


def test_annotations_without_rows_are_noted(tmp_path):
    corpus = lay_out(tmp_path, ROWS)
    write_meld_csv(tmp_path / "dev_sent_emo.csv", [])
    assert len(corpus.utterances) == 4
    assert corpus.notes == [f"{tmp_path / 'dev_sent_emo.csv'} lists no utterance."]


def test_the_report_is_of_the_files_that_are_there_now(copy, tmp_path):
    first = prepare_records(MELD(str(copy)), tmp_path)
    for path in copy.rglob("final_videos*"):
        path.unlink()
    corpus = MELD(str(copy))
    assert prepare_records(corpus, tmp_path) == first
    assert corpus.skipped == []


# The release's flaws


def test_the_records_have_the_three_official_splits_and_a_table_sorted_by_id(built):
    splits = tfds.builder_from_directory(built).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {
        "dev": 7,
        "test": 7,
        "train": 7,
    }
    table = load_table(built)
    assert table.ids.tolist() == sorted(table.ids.tolist())
    assert table.splits.tolist() == ["dev"] * 7 + ["test"] * 7 + ["train"] * 7
    assert [table.class_names[label] for label in table.labels] == [*MELD_TONES] * 3


def test_the_audio_of_each_utterance_is_its_own(built):
    for record in read_examples(built, ("id", "label", "audio")):
        assert abs(peak_hz(record["audio"]) - [*MELD_TONES.values()][record["label"]]) <= 5


def test_the_known_flaws_are_skipped_counted_and_named(built, meld):
    corpus = MELD(str(meld))
    assert len(corpus.utterances) == 23
    skipped = corpus.skipped + load_table(built).skipped
    reasons = {skip["id"]: skip["reason"] for skip in skipped}
    folders = {part: meld / part / name for part, name in MELD_FOLDERS.items()}
    for name, problem in [
        ("train/dia125_utt3", "truncated"),
        ("dev/dia110_utt7", "no such audio file"),
    ]:
        part, stem = name.split("/")
        reason = reasons.pop(f"{part}_{stem}")
        assert reason.startswith(f"{folders[part]}/{stem}.mp4: {problem}")
    assert reasons == {
        name: f"{folders['test']}/{name[5:]}: not an utterance, test_sent_emo.csv does not list it"
        for name in NO_UTTERANCES
    }


def test_litter_of_macos_is_neither_read_nor_reported(copy):
    for part, name in MELD_FOLDERS.items():
        assert (copy / part / name / "._dia0_utt0.mp4").is_file()
    (copy / "test" / MELD_FOLDERS["test"] / "dia0_utt0.mp4").unlink()
    corpus = MELD(str(copy))
    paths = {u.id: Path(u.path).name for u in corpus.utterances}
    assert paths["test_dia0_utt0"] == "dia0_utt0.mp4"
    assert {skip["id"] for skip in corpus.skipped} == NO_UTTERANCES


# The real annotations


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/corpora/meld beside the repository")
def test_the_real_annotations_of_train_and_dev_list_the_counts_of_table_2():
    corpus = MELD(str(REAL))
    counts = Counter((u.split, u.label) for u in corpus.utterances)
    assert counts == {
        (split, label): count
        for split in ("train", "dev")
        for label, count in zip(MELD.CLASSES, MELD.PUBLISHED.rows[split], strict=True)
    }
    assert corpus.skipped == []
    assert "test_sent_emo.csv is missing: the test part is not used." in corpus.notes
    listed = {u.id: (u.split, u.label) for u in corpus.utterances}
    assert {name: listed[name] for name in FLAWS} == dict(MELD.KNOWN_FLAWS)
    assert all(
        u.extras["sentiment"] in ("positive", "neutral", "negative") for u in corpus.utterances
    )


def test_a_clip_that_is_far_longer_than_its_annotation_is_told(meld, tmp_path):
    """As some of the release are: 300 s for an utterance of one second."""
    corpus = MELD(str(meld))
    usual = next(u for u in corpus.utterances if Path(u.path).exists())
    assert usual.seconds == pytest.approx(2.793)
    assert corpus.read_record(usual)["notice"] == ""
    long = np.resize(np.sin(np.arange(160)), 30 * 16_000).astype(np.float32)
    path = str(write_mp4(tmp_path / "long.mp4", long))
    told = corpus.read_record(dataclasses.replace(usual, path=path))["notice"]
    assert told == "it lasts 30.0 s, but its annotation says 2.8 s"
