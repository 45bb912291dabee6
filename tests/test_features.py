"""Feature records: what they hold, and that an interrupted extraction resumes."""

import numpy as np
import pytest

from serkd_jax import frontends
from serkd_jax.audio import to_float
from serkd_jax.data.corpora import Synthetic
from serkd_jax.data.features import load_features, prepare_features
from serkd_jax.data.records import RecordsError, iterate_audio, load_table, prepare_records

CORPUS = Synthetic(num_speakers=2, utterances_per_class=2, min_seconds=0.2, max_seconds=0.5)
MAX_FRAMES = 20


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory):
    return prepare_records(CORPUS, tmp_path_factory.mktemp("records"))


class Recorder:
    """A log-mel front-end that counts what it is given, and can fail."""

    name = "recorder"
    width = 80
    fingerprint = "recorder"

    def __init__(self, fail_at_call=None, spoil=None):
        self.fail_at_call, self.spoil = fail_at_call, spoil
        self.calls = self.waveforms = 0

    def __call__(self, waveforms, max_frames):
        self.calls += 1
        if self.calls == self.fail_at_call:
            raise KeyboardInterrupt
        self.waveforms += len(waveforms)
        features = frontends.LogMel()(waveforms, max_frames)
        return [self.spoil(f) for f in features] if self.spoil else features


def prepare(records_dir, frontend, cache, **settings):
    settings = {"max_frames": MAX_FRAMES, "shard_size": 6, "batch_size": 3} | settings
    return prepare_features(
        records_dir,
        frontend,
        cache_dir=cache,
        corpus_fingerprint=CORPUS.fingerprint,
        **settings,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_are_those_of_the_front_end_in_the_order_of_the_ids(records_dir, tmp_path):
    folder = prepare(records_dir, frontends.LogMel(), tmp_path)
    ids, features, num_frames = load_features(folder, MAX_FRAMES)
    assert ids.tolist() == load_table(records_dir).ids.tolist() == sorted(ids)
    assert features.shape == (16, MAX_FRAMES, 80)
    assert features.dtype == np.float16
    assert num_frames.dtype == np.int32
    for row, (name, audio) in enumerate(iterate_audio(records_dir)):
        (expected,) = frontends.LogMel()([to_float(audio)], MAX_FRAMES)
        assert name == ids[row]
        assert num_frames[row] == len(expected) == min(frontends.num_frames(len(audio)), MAX_FRAMES)
        np.testing.assert_array_equal(features[row, : num_frames[row]], expected)
        assert not features[row, num_frames[row] :].any()


def test_features_can_be_loaded_shorter_or_longer(records_dir, tmp_path):
    folder = prepare(records_dir, Recorder(), tmp_path)
    _, features, num_frames = load_features(folder, MAX_FRAMES)
    _, short, num_short = load_features(folder, 5)
    _, long, num_long = load_features(folder, 30)
    np.testing.assert_array_equal(short, features[:, :5])
    np.testing.assert_array_equal(num_short, np.minimum(num_frames, 5))
    np.testing.assert_array_equal(long[:, :MAX_FRAMES], features)
    np.testing.assert_array_equal(num_long, num_frames)


def test_features_open_with_tfds(records_dir, tmp_path):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepare(records_dir, Recorder(), tmp_path))
    table = load_table(records_dir)
    assert builder.info.splits["utterances"].num_examples == len(table) == 16
    assert builder.info.splits["utterances"].shard_lengths == [6, 6, 4]
    for row, example in enumerate(builder.as_dataset(split="all").as_numpy_iterator()):
        assert example["id"].decode() == table.ids[row]
        assert example["label"] == table.labels[row]
        assert example["session"].decode() == table.sessions[row]
        assert example["features"].shape == (example["num_frames"], 80)


def test_second_call_computes_nothing(records_dir, tmp_path):
    first = prepare(records_dir, Recorder(), tmp_path)
    again = Recorder(fail_at_call=1)
    assert prepare(records_dir, again, tmp_path) == first
    assert again.calls == 0


def test_other_settings_are_other_features(records_dir, tmp_path):
    other = Recorder()
    other.fingerprint = "recorder-2"
    folders = {
        prepare(records_dir, Recorder(), tmp_path),
        prepare(records_dir, Recorder(), tmp_path, max_frames=10),
        prepare(records_dir, other, tmp_path),
        prepare_features(records_dir, Recorder(), MAX_FRAMES, tmp_path, "another corpus"),
    }
    assert len(folders) == 4


@pytest.mark.parametrize("fail_at_call", [1, 4, 6])
def test_interrupted_extraction_resumes_and_equals_an_uninterrupted_one(
    records_dir, tmp_path, fail_at_call
):
    """Six calls: two batches for each of three shards."""
    whole = prepare(records_dir, Recorder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(records_dir, Recorder(fail_at_call), tmp_path / "resumed")
    folder = tmp_path / "resumed" / "features" / whole.name
    with pytest.raises(RecordsError, match="missing or damaged"):
        load_features(folder, MAX_FRAMES)
    assert not list(folder.parent.glob("**/dataset_info.json"))

    second = Recorder()
    assert prepare(records_dir, second, tmp_path / "resumed") == folder
    finished_shards = (fail_at_call - 1) // 2
    assert second.waveforms == 16 - 6 * finished_shards
    assert contents(folder) == contents(whole)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_extraction_killed_while_writing_resumes(records_dir, tmp_path):
    whole = prepare(records_dir, Recorder(), tmp_path / "whole")
    work = tmp_path / "resumed" / "features" / f"incomplete.{whole.name}"
    work.mkdir(parents=True)
    first, *_ = sorted(whole.glob("*.tfrecord-*"))
    (work / first.name).write_bytes(first.read_bytes())
    (work / "synthetic_recorder-utterances.tmp").write_bytes(b"half a shard")
    (work / "dataset_info.json").write_text("{")  # killed in the last moment
    folder = prepare(records_dir, Recorder(), tmp_path / "resumed")
    assert contents(folder) == contents(whole)


def test_the_same_features_are_the_same_bytes_in_any_process(records_dir, tmp_path):
    import tensorflow as tf

    shards = sorted(prepare(records_dir, Recorder(), tmp_path).glob("*.tfrecord-*"))
    for record in tf.data.TFRecordDataset(list(map(str, shards))).as_numpy_iterator():
        example = tf.train.Example.FromString(record)
        assert record == example.SerializeToString(deterministic=True)


def poison(value):
    def spoil(features):
        features[3, 7] = value
        return features

    return spoil


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_features_name_the_utterance(records_dir, tmp_path, value):
    with pytest.raises(RecordsError, match=r"utterance 0\d_\w+: NaN or infinite"):
        prepare(records_dir, Recorder(spoil=poison(value)), tmp_path)


@pytest.mark.parametrize(
    "spoil", [lambda f: f[:0], lambda f: f[:, :79], lambda f: f[0], lambda f: np.tile(f, (9, 1))]
)
def test_features_of_a_wrong_shape_name_the_utterance(records_dir, tmp_path, spoil):
    with pytest.raises(RecordsError, match=r"utterance 0\d_\w+: features of shape"):
        prepare(records_dir, Recorder(spoil=spoil), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "description"])
def test_damaged_features_are_told_with_the_remedy(records_dir, tmp_path, damage):
    folder = prepare(records_dir, Recorder(), tmp_path)
    shard = sorted(folder.glob("*.tfrecord-*"))[1]
    data = shard.read_bytes()
    match damage:
        case "truncated":
            shard.write_bytes(data[:-50])
        case "missing":
            shard.unlink()
        case "flipped":
            shard.write_bytes(data[:2000] + bytes([data[2000] ^ 255]) + data[2001:])
        case "description":
            (folder / "features.json").write_text("{")
    with pytest.raises(RecordsError, match="delete this folder and run again") as error:
        load_features(folder, MAX_FRAMES)
    assert str(folder) in str(error.value)
