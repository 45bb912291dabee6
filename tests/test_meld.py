"""MELD: annotations, recordings in several layouts, the release's flaws, the paper's Table 2."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from layouts import MELD_TONES, make_meld, make_table, tone, write_meld_csv, write_mp4
from serkd_jax.data.corpora import MELD, CorpusError
from serkd_jax.data.counts import CountsError, check_counts
from serkd_jax.data.records import load_table, prepare_records, read_examples

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "corpora" / "meld"
# Table 2 as the paper prints it, with its sums; of sadness it prints 102.
TABLE_2 = {
    "train": (1109, 271, 268, 1743, 4710, 683, 1205, 9989),
    "dev": (153, 22, 40, 163, 470, 111, 150, 1109),
    "test": (345, 68, 50, 402, 1256, 208, 281, 2610),
    "sum": (1607, 361, 358, 2308, 6436, 1002, 1636, 13708),
}
FLAWS = {"train_dia125_utt3", "dev_dia110_utt7"}
NO_UTTERANCES = {f"test/final_videos_testdia{n}_utt{n}.mp4" for n in (0, 1)}
PARTS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A dialogue of all emotions in each part, and all the flaws of the real release."""
    return make_meld(tmp_path_factory.mktemp("whole"), dialogues=1)


@pytest.fixture
def copy(release, tmp_path):
    return shutil.copytree(release, tmp_path / "MELD.Raw")


@pytest.fixture(scope="module")
def built(release, tmp_path_factory):
    """The records of the release."""
    return prepare_records(MELD(str(release)), tmp_path_factory.mktemp("built"))


def lay_out(root, rows, csv="{part}_sent_emo.csv", folder="{name}", suffix=".mp4"):
    """Writes the annotations and, for listing, files that only look like recordings."""
    for part, name in PARTS.items():
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


def test_a_row_that_is_there_twice_is_an_error(tmp_path):
    corpus = lay_out(tmp_path, ROWS)
    write_meld_csv(tmp_path / "dev_sent_emo.csv", [*ROWS, ROWS[0]])
    with pytest.raises(CorpusError, match=r"listed more than once, .*'dev_dia0_utt0'"):
        corpus.utterances  # noqa: B018


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
        (tmp_path / "nowhere", r"nowhere is no folder; data_dir must be MELD\.Raw"),
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
        for part, name in PARTS.items()
        for stem in ("dia0_utt0", "dia12_utt3")
    }
    assert corpus.skipped == corpus.notes == []
    for utterance in corpus.utterances:
        corpus.check_file(utterance)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (48_000, 3), (48_000, 6)])
def test_the_audio_of_a_video_keeps_frequency_level_and_duration(tmp_path, rate, channels):
    corpus = lay_out(tmp_path, ROWS)
    utterance = next(u for u in corpus.utterances if u.id == "dev_dia12_utt3")
    write_mp4(Path(utterance.path), tone(440, seconds=1.5, rate=rate), rate, channels=channels)
    audio = corpus.read_waveform(utterance)
    assert audio.dtype == np.float32
    assert abs(len(audio) / 16_000 - 1.5) < 0.1
    peak = np.abs(np.fft.rfft(audio)).argmax() * 16_000 / len(audio)
    assert abs(peak - 440) <= 1
    level = np.sqrt(np.mean(audio[2000:-2000] ** 2))
    assert level == pytest.approx(0.3 / np.sqrt(2), rel=0.1)


def test_a_wav_then_a_flac_of_the_same_name_is_read_before_the_video(tmp_path):
    lay_out(tmp_path, ROWS[:1])
    video = tmp_path / PARTS["dev"] / "dia0_utt0.mp4"
    write_mp4(video, tone(200))
    for suffix, hertz in [(".mp4", 200), (".flac", 400), (".wav", 800)]:
        if suffix != ".mp4":
            soundfile.write(video.with_suffix(suffix), tone(hertz), 16_000)
        corpus = MELD(str(tmp_path))
        utterance = corpus.utterances[0]
        assert Path(utterance.path) == video.with_suffix(suffix)
        audio = corpus.read_waveform(utterance)
        peak = np.abs(np.fft.rfft(audio)).argmax() * 16_000 / len(audio)
        assert abs(peak - hertz) <= 5
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
    video = write_mp4(copy / "dev" / PARTS["dev"] / "dia0_utt4.mp4", None)
    table = load_table(prepare_records(MELD(str(copy)), tmp_path))
    reasons = {skip["id"]: skip["reason"] for skip in table.skipped}
    assert reasons["dev_dia0_utt4"].startswith(f"{video}: has no audio track")
    assert reasons.keys() == FLAWS | {"dev_dia0_utt4"}
    assert len(table) == 20


def test_suffixes_in_upper_case_and_what_macos_unpacked_beside_are_understood(tmp_path):
    lay_out(tmp_path, ROWS, folder="{part}/{name}", suffix=".MP4")
    (tmp_path / "__MACOSX" / PARTS["dev"]).mkdir(parents=True)
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
        spectrum = np.abs(np.fft.rfft(record["audio"]))
        peak = spectrum.argmax() * 16_000 / len(record["audio"])
        assert abs(peak - [*MELD_TONES.values()][record["label"]]) <= 5


def test_the_known_flaws_are_skipped_counted_and_named(built, release):
    corpus = MELD(str(release))
    assert len(corpus.utterances) == 23
    skipped = corpus.skipped + load_table(built).skipped
    reasons = {skip["id"]: skip["reason"] for skip in skipped}
    folders = {part: release / part / name for part, name in PARTS.items()}
    for name, problem in [
        ("train/dia125_utt3", "unreadable"),
        ("dev/dia110_utt7", "no such audio file"),
    ]:
        part, stem = name.split("/")
        reason = reasons.pop(f"{part}_{stem}")
        assert reason.startswith(f"{folders[part]}/{stem}.mp4: {problem}")
    assert reasons == {
        name: f"{folders['test']}/{name[5:]}: no utterance, test_sent_emo.csv does not list it"
        for name in NO_UTTERANCES
    }


def test_litter_of_macos_is_neither_read_nor_reported(copy):
    for part, name in PARTS.items():
        assert (copy / part / name / "._dia0_utt0.mp4").is_file()
    (copy / "test" / PARTS["test"] / "dia0_utt0.mp4").unlink()
    corpus = MELD(str(copy))
    paths = {u.id: Path(u.path).name for u in corpus.utterances}
    assert paths["test_dia0_utt0"] == "dia0_utt0.mp4"
    assert {skip["id"] for skip in corpus.skipped} == NO_UTTERANCES


# The paper's Table 2


def published():
    """Utterances as the paper counts them, the two that no copy has apart."""
    utterances = [
        (f"{split}_dia{1000 + number}_utt0", split, label)
        for split in PARTS
        for number, label in enumerate(
            label
            for label, count in zip(MELD.CLASSES, TABLE_2[split], strict=False)
            for _ in range(count)
        )
    ]
    for split in ("train", "dev"):
        utterances.remove(next(u for u in utterances if u[1:] == (split, "neutral")))
    return utterances


def cells(report):
    """Row -> cells of the report's table."""
    rows = [text.strip("| ").split("|") for text in report.splitlines() if text[:1] == "|"]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_published_counts_are_table_2():
    assert MELD.PUBLISHED.source == "Table 2 of the paper"
    order = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
    assert MELD.PUBLISHED.classes == order
    rows = dict(MELD.PUBLISHED.rows)
    rows["sum"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    assert {row: (*counts, sum(counts)) for row, counts in rows.items()} == TABLE_2


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/corpora/meld beside the repository")
def test_the_real_annotations_of_train_and_dev_list_the_counts_of_table_2():
    corpus = MELD(str(REAL))
    counts = Counter((u.split, u.label) for u in corpus.utterances)
    assert counts == {
        (split, label): count
        for split in ("train", "dev")
        for label, count in zip(MELD.CLASSES, TABLE_2[split], strict=False)
    }
    assert corpus.skipped == []
    assert "test_sent_emo.csv is missing: the test part is not used." in corpus.notes
    listed = {u.id: (u.split, u.label) for u in corpus.utterances}
    assert {name: listed[name] for name in FLAWS} == dict(MELD.KNOWN_FLAWS)
    assert all(
        u.extras["sentiment"] in ("positive", "neutral", "negative") for u in corpus.utterances
    )


def test_strict_passes_table_2_less_the_two_known_flaws_and_marks_them():
    report = check_counts(make_table(MELD, published()), MELD("."), strict=True)
    assert "2 of them are known: no copy of the corpus has them." in report
    neutral = {row: row_cells[4] for row, row_cells in cells(report).items()}
    assert neutral["train"] == "4,709 / 4,710 (-1 known)"
    assert neutral["dev"] == "469 / 470 (-1 known)"
    assert neutral["test"] == "1,256 / 1,256"
    assert neutral["sum"] == "6,434 / 6,436 (-2 known)"
    assert cells(report)["sum"][-1] == "13,706 / 13,708 (-2 known)"
    assert report.count("known)") == 6  # with the totals of train, dev and all


def test_strict_passes_a_copy_that_has_what_the_others_lack():
    mended = [(name, *row) for name, row in MELD.KNOWN_FLAWS.items()]
    report = check_counts(make_table(MELD, published() + mended), MELD("."), strict=True)
    assert cells(report)["sum"][-1] == "13,708 / 13,708"
    assert "known" not in report


@pytest.mark.parametrize("split", ["train", "test"])
def test_strict_refuses_a_copy_that_lacks_one_more(split):
    utterances = published()
    utterances.remove(next(u for u in utterances if u[1:] == (split, "neutral")))
    with pytest.raises(CountsError, match="has not the counts of Table 2 of the paper") as error:
        check_counts(make_table(MELD, utterances), MELD("."), strict=True)
    table = cells(str(error.value))
    cell = {"train": "4,708 / 4,710 (-2)", "test": "1,255 / 1,256 (-1)"}[split]
    assert table[split][4] == cell
    assert table["dev"][4] == "469 / 470 (-1 known)"
    assert table["sum"][4] == "6,433 / 6,436 (-3)"


def test_other_losses_are_not_taken_for_the_known_ones():
    """Both known flaws are there, two other neutral utterances are not."""
    mended = [(name, *row) for name, row in MELD.KNOWN_FLAWS.items()]
    utterances = published() + mended
    for split in ("train", "dev"):
        utterances.remove(next(u for u in utterances if u[1:] == (split, "neutral")))
    with pytest.raises(CountsError, match=r"469 / 470 \(-1\)"):
        check_counts(make_table(MELD, utterances), MELD("."), strict=True)


def test_the_command_builds_a_part_of_the_corpus_and_names_what_it_left_out(release, tmp_path):
    command = [sys.executable, "-m", "serkd_jax.records", "--corpus=meld"]
    command += [f"--data_dir={release}", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout)["dev"][0] == "1 / 153 (-152)"
    assert "4 files or lines were skipped:" in done.stdout
    for name in FLAWS | NO_UTTERANCES:
        assert f"- `{name}`: {release}" in done.stdout
    assert "21 utterances, 0.00 h of audio, are in" in done.stdout
    assert len(load_table(done.stdout.split()[-1])) == 21
    assert "Traceback" not in done.stderr
