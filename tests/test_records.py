"""Audio records as TFDS users expect them: tfds build, splits, Beam; and written in parallel."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from layouts import ROOT, manifest_of, write_wav
from serkd_jax.data import audio_records
from serkd_jax.data.corpora import IEMOCAP, MELD, CorpusError, EmoDB, Synthetic
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import (
    RecordsError,
    load_arrays,
    load_skipped,
    load_table,
    read_examples,
)


class BuilderCase(tfds.testing.DatasetBuilderTestCase):
    """TFDS's own checks of a builder, on a corpus that the test makes in the real layout."""

    __test__ = False

    @pytest.fixture(autouse=True)
    def _corpus(self, request):
        type(self).EXAMPLE_DIR = request.getfixturevalue(self.DATASET_CLASS.name)


class IemocapBuilderTest(BuilderCase):
    __test__ = True
    DATASET_CLASS = audio_records.Iemocap
    SPLITS = {"utterances": 100}  # noqa: RUF012


class EmodbBuilderTest(BuilderCase):
    __test__ = True
    DATASET_CLASS = audio_records.Emodb
    SPLITS = {"utterances": 7}  # noqa: RUF012


class MeldBuilderTest(BuilderCase):
    __test__ = True
    DATASET_CLASS = audio_records.Meld
    SPLITS = {"dev": 7, "test": 7, "train": 7}  # noqa: RUF012


def test_every_real_corpus_has_what_a_tfds_catalogue_asks_for():
    for builder in (audio_records.Iemocap, audio_records.Meld, audio_records.Emodb):
        corpus = builder.CORPUS
        assert builder.name == corpus.name
        assert builder.MANUAL_DOWNLOAD_INSTRUCTIONS == corpus.HOW_TO_GET
        assert corpus.HOMEPAGE.startswith("http")
        assert corpus.CITATION.startswith("@")
        assert corpus.LICENSE
        assert tuple(sorted(corpus.PUBLISHED.classes)) == corpus.CLASSES


@pytest.mark.slow
def test_tfds_build_prepares_and_tfds_load_reads(meld, tmp_path):
    command = [Path(sys.executable).with_name("tfds"), "build", "meld"]
    command += ["--imports=serkd_jax.data.audio_records", f"--manual_dir={meld}"]
    done = subprocess.run(
        [*command, f"--data_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    examples, info = tfds.load("meld", split="train", data_dir=tmp_path, with_info=True)
    assert {split: info.splits[split].num_examples for split in info.splits} == {
        "dev": 7,
        "test": 7,
        "train": 7,
    }
    assert "poria2019meld" in info.citation
    (first, *_) = examples.as_numpy_iterator()
    assert first["id"] == b"train_dia0_utt0"
    assert first["text"].decode() == "Oh, it’s “lost” it!"
    assert len(first["audio"]) == first["num_samples"]


def test_without_the_corpus_tfds_says_how_to_get_it(tmp_path):
    with pytest.raises(AssertionError, match=r"sail\.usc\.edu/iemocap"):
        audio_records.Iemocap(data_dir=tmp_path).download_and_prepare()


@pytest.mark.slow
def test_beam_writes_the_same_records(meld, tmp_path):
    corpus = MELD(str(meld))
    alone = prepare_records(corpus, tmp_path / "alone")
    beam = prepare_records(corpus, tmp_path / "beam", "runner=DirectRunner")
    assert load_skipped(beam) == load_skipped(alone)
    assert [skip["id"] for skip in load_skipped(beam)] == [
        "dev_dia110_utt7",
        "train_dia125_utt3",
    ]
    names = ("id", "label", "split", "text", "audio", "num_samples")
    both = [list(read_examples(folder, names)) for folder in (beam, alone)]
    for by_beam, by_us in zip(*both, strict=True):
        np.testing.assert_array_equal(by_beam.pop("audio"), by_us.pop("audio"))
        assert by_beam == by_us


@pytest.mark.parametrize("runner", [None, "DirectRunner"])
def test_records_of_several_shards_are_in_the_order_of_the_ids(iemocap, tmp_path, runner):
    corpus = IEMOCAP(str(iemocap))
    builder = audio_records.AudioRecords(corpus, data_dir=tmp_path)
    config = tfds.download.DownloadConfig(num_shards=4, beam_runner=runner)
    builder.download_and_prepare(download_config=config)
    assert builder.info.splits["utterances"].num_shards > 2
    table = load_table(builder.data_path)
    assert table.ids.tolist() == [utterance.id for utterance in corpus.utterances]


def test_a_failure_of_beam_is_told_in_one_line(meld, tmp_path):
    shutil.copytree(meld / "dev", tmp_path / "MELD.Raw" / "dev")
    shutil.copy(meld / "dev_sent_emo.csv", tmp_path / "MELD.Raw")
    for path in (tmp_path / "MELD.Raw").rglob("dia*.mp4"):
        path.write_bytes(b"no video")
    with pytest.raises(RecordsError, match=r"meld: Apache Beam failed: .* 0 for split dev"):
        prepare_records(MELD(str(tmp_path / "MELD.Raw")), tmp_path, "runner=DirectRunner")


def test_a_killed_decoding_process_is_told_with_the_remedy(iemocap, tmp_path, monkeypatch):
    monkeypatch.setattr(audio_records, "PARALLEL_FROM", 1)
    monkeypatch.setattr(IEMOCAP, "read_record", kill_this_process)
    with pytest.raises(RecordsError, match="killed, probably for lack of memory"):
        prepare_records(IEMOCAP(str(iemocap)), tmp_path)


def kill_this_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_corpus_may_have_a_version_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Synthetic, "VERSION", "1.2.0")
    folder = prepare_records(Synthetic(1, 1, 0.2, 0.3), tmp_path)
    assert folder.name == "1.2.0"
    assert len(load_table(folder)) == 4


def test_many_recordings_are_decoded_by_processes_with_the_same_result(
    iemocap, tmp_path, monkeypatch
):
    alone = prepare_records(IEMOCAP(str(iemocap)), tmp_path / "alone")
    monkeypatch.setattr(audio_records, "PARALLEL_FROM", 1)
    monkeypatch.setattr(IEMOCAP, "read_waveform", lambda *_: pytest.fail("decoded here"))
    shared = prepare_records(IEMOCAP(str(iemocap)), tmp_path / "shared")
    names = ("id", "label", "speaker", "valence", "audio")
    for a, b in zip(read_examples(alone, names), read_examples(shared, names), strict=True):
        np.testing.assert_array_equal(a.pop("audio"), b.pop("audio"))
        assert a == b


def test_records_hold_the_corpus_sorted_by_id(tmp_path, emodb):
    corpus = EmoDB(str(emodb))
    folder = prepare_records(corpus, tmp_path / "cache")
    table = load_table(folder)
    assert table.ids.tolist() == [u.id for u in corpus.utterances]
    assert [table.class_names[label] for label in table.labels] == [
        u.label for u in corpus.utterances
    ]
    assert table.labels.dtype == np.int32
    assert table.speakers.tolist() == [u.speaker for u in corpus.utterances]
    assert table.num_samples.tolist() == [2000] * 7
    for name, audio in audio_of(folder).items():
        samples, _ = soundfile.read(emodb / "wav" / f"{name}.wav", dtype="int16")
        np.testing.assert_array_equal(audio, samples)


def test_records_open_with_tfds_as_one_split(tmp_path):
    folder = prepare_records(Synthetic(1, 1, 0.2, 0.3), tmp_path)
    builder = tfds.builder_from_directory(folder)
    assert list(builder.info.splits) == ["utterances"]
    (example, *others) = builder.as_dataset(split="all").as_numpy_iterator()
    assert len(others) == 3
    assert example["audio"].dtype == np.int16
    assert builder.info.features["label"].names == ["angry", "happy", "neutral", "sad"]


def test_records_are_written_once(tmp_path, emodb, monkeypatch):
    first = prepare_records(EmoDB(str(emodb)), tmp_path / "cache")
    monkeypatch.setattr(EmoDB, "read_waveform", lambda *_: pytest.fail("audio was read again"))
    assert prepare_records(EmoDB(str(emodb)), tmp_path / "cache") == first


def test_unusable_files_are_skipped_and_named_with_reasons(tmp_path, three_wavs):
    soundfile.write(three_wavs / "silent.wav", np.zeros(8000), 16_000)
    (three_wavs / "zero.wav").touch()
    (three_wavs / "broken.wav").write_bytes(b"RIFF")
    names = ("a", "silent", "zero", "broken", "missing")
    corpus = manifest_of(tmp_path, "path,label\n" + "".join(f"{n}.wav,x\n" for n in names))
    table = load_table(prepare_records(corpus, tmp_path / "cache"))
    assert table.ids.tolist() == ["a.wav"]
    reasons = {skip["id"]: skip["reason"] for skip in table.skipped}
    assert reasons.keys() == {f"{name}.wav" for name in names[1:]}
    for name, reason in [
        ("silent", "silent"),
        ("zero", "empty"),
        ("broken", "unreadable"),
        ("missing", "no such"),
    ]:
        assert reason in reasons[f"{name}.wav"]
        assert str(three_wavs / f"{name}.wav") in reasons[f"{name}.wav"]


def test_a_corpus_without_any_usable_file_is_an_error(tmp_path, three_wavs):
    corpus = manifest_of(tmp_path, "path,label\nx.wav,x\ny.wav,y\n")
    with pytest.raises(CorpusError, match=r"none of 2 audio files can be used; .*no such audio"):
        prepare_records(corpus, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_interrupted_records_are_not_taken_for_whole_and_are_cleaned(tmp_path, monkeypatch):
    corpus = Synthetic(1, 1, 0.2, 0.3)
    whole = prepare_records(corpus, tmp_path)
    leftover = whole.with_name(f"incomplete.ABCDEF_{whole.name}")  # as a killed process leaves it
    whole.rename(leftover)
    assert prepare_records(corpus, tmp_path) == whole
    assert not leftover.exists()
    assert len(load_table(whole)) == 4


def audio_of(folder):
    examples = read_examples(folder, ("id", "audio"))
    return {example["id"]: example["audio"] for example in examples}


def test_damaged_records_are_told_with_the_remedy(tmp_path):
    folder = prepare_records(Synthetic(1, 1, 0.2, 0.3), tmp_path)
    for name, text in (("skipped-missing.jsonl", "{"), ("metadata.json", "[]")):
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(RecordsError, match="delete this folder and run again"):
            load_table(folder)
        (folder / name).write_text(whole)
    (data,) = folder.glob("*.tfrecord*")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(RecordsError, match=r"damaged (?s:.*) delete this folder and run again"):
        load_table(folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(RecordsError, match="delete this folder"):
        load_table(folder)


def test_load_arrays_cuts_and_pads(tmp_path, three_wavs):
    write_wav(three_wavs / "c.wav", num_samples=500)
    corpus = manifest_of(tmp_path, "path,label\na.wav,x\nc.wav,y\n")
    folder = prepare_records(corpus, tmp_path / "cache")
    ids, audio, num_samples = load_arrays(folder, "audio", 1000)
    assert ids.tolist() == ["a.wav", "c.wav"]
    assert audio.shape == (2, 1000)
    assert audio.dtype == np.int16
    assert num_samples.tolist() == [1000, 500]
    np.testing.assert_array_equal(audio[1, :500], audio_of(folder)["c.wav"])
    assert not audio[1, 500:].any()
