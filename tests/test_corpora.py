"""EMO-DB and the synthetic corpus: what is listed; make_corpus; what a fingerprint sees."""

import hashlib
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from layouts import SHARED, manifest_of, needs_corpora, write_wav
from serkd_jax.data.corpora import CorpusError, EmoDB, Synthetic, make_corpus
from serkd_jax.data.counts import check_counts
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import load_table

# EMO-DB


@pytest.mark.parametrize("sub", ["", "wav"])
def test_emodb_names_tell_speaker_and_emotion(emodb, sub):
    corpus = EmoDB(str(emodb / sub))
    assert [(u.id, u.speaker, u.label) for u in corpus.utterances] == [
        ("03a01Lb", "03", "boredom"),
        ("03a01Wa", "03", "anger"),
        ("08a05Ab", "08", "fear"),
        ("08b02Ea", "08", "disgust"),
        ("16b10Fa", "16", "happiness"),
        ("16b10Na", "16", "neutral"),
        ("16b10Tc", "16", "sadness"),
    ]
    assert corpus.skipped == []


def test_emodb_classes_are_the_seven_emotions_even_in_a_part_of_it(emodb):
    (emodb / "wav" / "16b10Tc.wav").unlink()
    assert EmoDB(str(emodb)).class_names == (
        *("anger", "boredom", "disgust", "fear", "happiness", "neutral", "sadness"),
    )


def test_emodb_file_of_another_name_is_skipped_and_reported(emodb, tmp_path):
    write_wav(emodb / "wav" / "copy of 03a01Wa.wav")
    corpus = EmoDB(str(emodb))
    assert len(corpus.utterances) == 7
    assert [skip["id"] for skip in corpus.skipped] == ["copy of 03a01Wa"]
    assert "not an EMO-DB file name" in corpus.skipped[0]["reason"]
    assert "copy of 03a01Wa" in check_counts(
        load_table(prepare_records(corpus, tmp_path)), corpus, False
    )


def test_emodb_folder_that_is_missing_empty_or_not_given_is_an_error(tmp_path):
    for folder, problem in [
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path, "holds no file named like"),
        ("", "needs data_dir"),
    ]:
        with pytest.raises(CorpusError, match=problem):
            EmoDB(str(folder)).utterances  # noqa: B018


@needs_corpora
def test_the_real_emodb_has_the_published_counts():
    corpus = make_corpus("emodb", data_dir=str(SHARED / "emodb"))
    assert Counter(u.label for u in corpus.utterances) == {
        "anger": 127,
        "boredom": 81,
        "disgust": 46,
        "fear": 69,
        "happiness": 71,
        "neutral": 79,
        "sadness": 62,
    }
    assert len({u.speaker for u in corpus.utterances}) == 10


# Synthetic


def test_synthetic_corpus_is_a_function_of_its_seed():
    corpus, again, other = Synthetic(2, 2), Synthetic(2, 2), Synthetic(2, 2, seed=1)
    assert corpus.utterances == again.utterances
    for utterance in corpus.utterances:
        waveform = corpus.read_waveform(utterance)
        np.testing.assert_array_equal(waveform, again.read_waveform(utterance))
        assert not np.array_equal(waveform, other.read_waveform(utterance))
        assert waveform.dtype == np.float32
        assert 16_000 <= len(waveform) <= 32_000
        assert 0.01 < np.abs(waveform).max() <= 1
    assert corpus.fingerprint == again.fingerprint != other.fingerprint


def test_synthetic_corpus_has_the_size_asked_for():
    corpus = Synthetic(num_speakers=4, utterances_per_class=3, min_seconds=0.2, max_seconds=0.3)
    cells = Counter((u.speaker, u.label) for u in corpus.utterances)
    assert cells == {(f"0{s}", c): 3 for s in (1, 2, 3, 4) for c in corpus.class_names}
    assert {u.session for u in corpus.utterances} == {"1", "2"}
    assert 3200 <= len(corpus.read_waveform(corpus.utterances[0])) <= 4800


def test_synthetic_classes_can_be_learned_but_overlap():
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from serkd_jax.encoders.frontends import LogMel

    corpus = Synthetic(utterances_per_class=6)
    waveforms = [corpus.read_waveform(u) for u in corpus.utterances]
    features = [f for _, f in LogMel()(waveforms, 100)]
    means = np.array([f.astype(np.float32).mean(axis=0) for f in features])
    accuracy = cross_val_score(
        make_pipeline(StandardScaler(), RidgeClassifier(alpha=30)),
        means,
        [u.label for u in corpus.utterances],
        groups=[u.speaker for u in corpus.utterances],
        cv=LeaveOneGroupOut(),
    ).mean()
    assert 0.55 < accuracy < 0.85


def test_impossible_synthetic_corpus_is_an_error():
    for settings in ({"num_speakers": 0}, {"min_seconds": 3.0}, {"utterances_per_class": 0}):
        with pytest.raises(CorpusError, match="synthetic corpus"):
            Synthetic(**settings)


# make_corpus


def test_make_corpus_ignores_empty_settings_and_refuses_unknown_ones(emodb):
    corpus = make_corpus("emodb", data_dir=str(emodb), manifest="", label_map="")
    assert len(corpus.utterances) == 7
    assert make_corpus("synthetic", data_dir="", num_speakers=2).parameters["num_speakers"] == 2
    with pytest.raises(CorpusError, match="no corpus is named 'ravdess'; there are iemocap"):
        make_corpus("ravdess")
    with pytest.raises(CorpusError, match="has no setting seed; it has data_dir"):
        make_corpus("emodb", data_dir=str(emodb), seed=1)


# Fingerprints


@pytest.mark.parametrize("change", ["size", "content", "label", "removed", "fold"])
def test_fingerprint_sees_every_change(tmp_path, three_wavs, change):
    rows = "path,label,fold\na.wav,x,1\nb.wav,y,2\n"
    before = manifest_of(tmp_path, rows).fingerprint
    assert manifest_of(tmp_path, rows).fingerprint == before
    match change:
        case "size":
            stat = (three_wavs / "a.wav").stat()
            write_wav(three_wavs / "a.wav", num_samples=2001)
            os.utime(three_wavs / "a.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "content":  # as many bytes, and an old time
            content = bytearray((three_wavs / "a.wav").read_bytes())
            content[-1] ^= 1
            (three_wavs / "a.wav").write_bytes(content)
            os.utime(three_wavs / "a.wav", ns=(0, 12345))
        case "label":
            rows = rows.replace("a.wav,x", "a.wav,y")
        case "removed":
            (three_wavs / "a.wav").unlink()
        case "fold":
            rows = rows.replace("y,2", "y,1")
    assert manifest_of(tmp_path, rows).fingerprint != before


def test_fingerprint_does_not_depend_on_where_the_corpus_lies(tmp_path, emodb):
    moved = shutil.copytree(emodb, tmp_path / "elsewhere")
    for path in moved.rglob("*.wav"):
        os.utime(path, ns=(0, 12345))  # as a copy has another time
    assert EmoDB(str(moved)).fingerprint == EmoDB(str(emodb)).fingerprint


def test_a_file_is_hashed_once_and_where_there_is_no_home_each_time(tmp_path, emodb, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected, read = EmoDB(str(emodb)).fingerprint, []
    hashed = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: read.append(0) or hashed(*args))
    assert EmoDB(str(emodb)).fingerprint == expected
    assert not read
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert EmoDB(str(emodb)).fingerprint == expected
    assert len(read) == 7
