"""Feature records: what they hold, and that an interrupted or shared extraction is the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import absl.flags
import numpy as np
import pytest
import soundfile
from absl.testing import flagsaver

from layouts import write_wav
from serkd_jax import features as cli
from serkd_jax.audio.decoding import read_audio
from serkd_jax.audio.waveform import to_float
from serkd_jax.data.audio_records import tf, tfds
from serkd_jax.data.corpora import CorpusError, Synthetic
from serkd_jax.data.prepare import extract_features, prepare_features, prepare_records
from serkd_jax.data.reader import (
    RandomReader,
    RecordsError,
    load_arrays,
    load_lengths,
    load_table,
    read_examples,
)
from serkd_jax.data.sources import AudioFiles
from serkd_jax.encoders import frontends

ROOT = Path(__file__).parent.parent
EMOBOX = ROOT.parent / "shared" / "corpora" / "emobox" / "emodb" / "emodb.jsonl"
EMODB = ROOT.parent / "shared" / "corpora" / "emodb" / "wav"
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

    def __init__(self, fail_at=None, spoil=None, num_devices=1):
        self.settings = {"name": "recorder"}
        self.fail_at, self.spoil, self.num_devices = fail_at, spoil, num_devices
        self.waveforms = 0

    def __call__(self, waveforms, max_frames, groups=None):
        for i, features in frontends.LogMel()(waveforms, max_frames):
            self.waveforms += 1
            if self.waveforms == self.fail_at:
                raise KeyboardInterrupt
            yield i, self.spoil(features) if self.spoil else features


def prepare(records_dir, frontend, cache, **settings):
    settings = {"max_frames": MAX_FRAMES, "shard_size": 6} | settings
    return prepare_features(records_dir, frontend, cache_dir=cache, **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_are_those_of_the_front_end_in_the_order_of_the_ids(records_dir, tmp_path):
    folder = prepare(records_dir, frontends.LogMel(), tmp_path)
    ids, features, num_frames = load_arrays(folder, "features", MAX_FRAMES)
    assert ids.tolist() == load_table(records_dir).ids.tolist() == sorted(ids)
    assert features.shape == (16, MAX_FRAMES, 80)
    assert features.dtype == np.float16
    assert num_frames.dtype == np.int32
    for row, example in enumerate(read_examples(records_dir, ("id", "audio"))):
        waveform = to_float(example["audio"])
        ((_, expected),) = frontends.LogMel()([waveform], MAX_FRAMES)
        assert example["id"] == ids[row]
        whole = frontends.num_frames(len(waveform))
        assert num_frames[row] == len(expected) == min(whole, MAX_FRAMES)
        np.testing.assert_array_equal(features[row, : num_frames[row]], expected)
        assert not features[row, num_frames[row] :].any()


def test_features_can_be_loaded_shorter_or_longer(records_dir, tmp_path):
    folder = prepare(records_dir, Recorder(), tmp_path)
    _, features, num_frames = load_arrays(folder, "features", MAX_FRAMES)
    _, short, num_short = load_arrays(folder, "features", 5)
    _, long, num_long = load_arrays(folder, "features", 30)
    np.testing.assert_array_equal(short, features[:, :5])
    np.testing.assert_array_equal(num_short, np.minimum(num_frames, 5))
    np.testing.assert_array_equal(long[:, :MAX_FRAMES], features)
    np.testing.assert_array_equal(num_long, num_frames)


def test_features_can_be_read_in_any_order(records_dir, tmp_path):
    folder = prepare(records_dir, Recorder(), tmp_path)
    ids, features, num_frames = load_arrays(folder, "features", 9)
    assert [array.tolist() for array in load_lengths(folder, "num_frames", 9)] == [
        ids.tolist(),
        num_frames.tolist(),
    ]
    rows = np.array([15, 0, 6, 6, 3])  # of all three shards
    np.testing.assert_array_equal(RandomReader(folder, "features", 9)(rows), features[rows])


def test_features_open_with_tfds_and_say_what_they_are(records_dir, tmp_path):
    folder = prepare(records_dir, frontends.LogMel(), tmp_path)
    builder = tfds.builder_from_directory(folder)
    table = load_table(records_dir)
    assert builder.info.splits["utterances"].num_examples == len(table) == 16
    assert builder.info.splits["utterances"].shard_lengths == [6, 6, 4]
    for row, example in enumerate(builder.as_dataset(split="all").as_numpy_iterator()):
        assert example["id"].decode() == table.ids[row]
        assert example["label"] == table.labels[row]
        assert example["speaker"].decode() == table.speakers[row]
        assert example["session"].decode() == table.sessions[row]
        assert example["features"].shape == (example["num_frames"], 80)
    assert builder.info.features["label"].names == list(table.class_names)
    metadata = builder.info.metadata
    assert metadata["frontend_settings"] == {"name": "logmel", "num_mels": 80}
    assert metadata["hours"] == pytest.approx(
        np.minimum(table.num_samples, frontends.num_samples(MAX_FRAMES)).sum() / 16_000 / 3600
    )
    assert metadata["num_cut"] == (frontends.num_frames(table.num_samples) > MAX_FRAMES).sum() > 0
    assert metadata["skipped"] == []
    assert metadata["versions"]["tensorflow-datasets"] == tfds.__version__


def test_second_call_computes_nothing(records_dir, tmp_path):
    first = prepare(records_dir, Recorder(), tmp_path)
    again = Recorder()
    assert prepare(records_dir, again, tmp_path) == first
    assert again.waveforms == 0


def test_other_settings_are_other_features(records_dir, tmp_path):
    other = Recorder()
    other.fingerprint = "recorder-2"
    another = prepare_records(Synthetic(2, 1, 0.2, 0.3, seed=1), tmp_path)
    folders = {
        prepare(records_dir, Recorder(), tmp_path),
        prepare(records_dir, Recorder(), tmp_path, max_frames=10),
        prepare(records_dir, other, tmp_path),
        prepare(another, Recorder(), tmp_path),
    }
    assert len(folders) == 4


@pytest.mark.parametrize("fail_at", [1, 6, 7, 12, 16])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_interrupted_extraction_resumes_and_equals_an_uninterrupted_one(
    records_dir, tmp_path, fail_at, num_devices
):
    """Three shards, of 6, 6 and 4 utterances; as many at once as there are devices."""
    whole = prepare(records_dir, Recorder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(records_dir, Recorder(fail_at, num_devices=num_devices), tmp_path / "resumed")
    folder = tmp_path / "resumed" / "features" / whole.name
    with pytest.raises(RecordsError, match="missing or damaged"):
        load_arrays(folder, "features", MAX_FRAMES)
    assert not list(folder.parent.glob("**/dataset_info.json"))

    second = Recorder(num_devices=num_devices)
    assert prepare(records_dir, second, tmp_path / "resumed") == folder
    at_once = 6 * num_devices
    assert second.waveforms == 16 - (fail_at - 1) // at_once * at_once
    assert contents(folder) == contents(whole)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_extraction_killed_while_writing_or_describing_resumes(records_dir, tmp_path):
    whole = prepare(records_dir, Recorder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(records_dir, Recorder(fail_at=7), tmp_path / "resumed")
    (work,) = (tmp_path / "resumed" / "features").iterdir()
    assert work.name == f"incomplete.{whole.name}"
    *_, last = sorted(path.name for path in whole.glob("*.tfrecord-*"))
    (work / f"{last}.tmp").write_bytes(b"half a shard")
    (work / f"{last}.json").write_text("{")
    (work / "dataset_info.json").write_text("{")
    assert contents(prepare(records_dir, Recorder(), tmp_path / "resumed")) == contents(whole)


def test_the_same_features_are_the_same_bytes_in_any_process(records_dir, tmp_path):
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
    for read in (load_arrays, lambda *place: RandomReader(*place)(np.arange(16))):
        with pytest.raises(RecordsError, match="delete this folder and run again") as error:
            read(folder, "features", MAX_FRAMES)
        assert str(folder) in str(error.value)


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory):
    """Twelve usable files in several formats and folders, and some that are not."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for i in range(12):
        path = folder / ("a", "b/c")[i % 2] / f"{i:02d}.{('wav', 'flac', 'WAV')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = (16_000, 22_050)[i // 6]
        soundfile.write(path, rng.normal(0, 0.1, (i + 1) * rate // 5), rate)
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16_000)
    (folder / "a" / "broken.flac").write_bytes(b"fLaC no more")
    (folder / "a" / "notes.txt").write_text("no audio")
    (folder / "a" / "._00.wav").write_bytes(b"macOS litter")
    return folder


def extract(source, frontend, folder, max_frames=MAX_FRAMES, **settings):
    extract_features(source, frontend, max_frames, folder, skip_bad=True, **settings)
    return {example["id"]: example for example in read_examples(folder, ("id", "features"))}


def test_a_folder_of_audio_gives_features_by_relative_path(audio_folder, tmp_path):
    examples = extract(AudioFiles(audio_folder), frontends.LogMel(), tmp_path / "out", shard_size=3)
    usable = sorted(p for p in audio_folder.rglob("[0-9]*") if p.is_file())
    assert list(examples) == sorted(str(path.relative_to(audio_folder)) for path in usable)
    for path in usable:
        ((_, expected),) = frontends.LogMel()([read_audio(path)], MAX_FRAMES)
        actual = examples[str(path.relative_to(audio_folder))]["features"]
        np.testing.assert_allclose(actual, expected, atol=2e-3)  # resampled from the beginning
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert [skip["id"] for skip in metadata["skipped"]] == ["a/broken.flac", "silent.wav"]
    assert "unreadable" in metadata["skipped"][0]["reason"]
    assert metadata["num_cut"] == 10  # those of more than 20 frames
    # The last shard held but one file, which cannot be used.
    lengths = tfds.builder_from_directory(tmp_path / "out").info.splits["utterances"].shard_lengths
    assert sum(lengths) == 12


def test_other_content_of_the_same_size_is_another_source(tmp_path):
    path = write_wav(tmp_path / "in" / "a.wav", seed=0)
    before = AudioFiles(tmp_path / "in").fingerprint
    write_wav(path, seed=1)
    assert AudioFiles(tmp_path / "in").fingerprint != before
    write_wav(path, seed=0)
    assert AudioFiles(tmp_path / "in").fingerprint == before


def test_a_shard_may_hold_nothing(audio_folder, tmp_path):
    """Fourteen files, one in each shard, two of them unusable."""
    examples = extract(AudioFiles(audio_folder), Recorder(), tmp_path / "out", shard_size=1)
    assert len(examples) == 12


def test_a_manifest_carries_its_columns_along(audio_folder, tmp_path):
    (tmp_path / "m.csv").write_text(
        "path,label,note,speaker\na/00.wav,glad,x,\nno/such.wav,sad,,s2\nb/c/01.flac,sad,,s1\n"
    )
    source = AudioFiles(tmp_path / "m.csv", audio_folder)
    extract(source, Recorder(), tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out")
    examples = list(builder.as_dataset(split="utterances").as_numpy_iterator())
    assert [(e["id"], e["label"], e["speaker"]) for e in examples] == [
        (b"a/00.wav", b"glad", b""),
        (b"b/c/01.flac", b"sad", b"s1"),
    ]
    (skip,) = builder.info.metadata["skipped"]
    assert skip["id"] == "no/such.wav"
    assert "no such audio file" in skip["reason"]


@pytest.mark.skipif(not EMOBOX.exists(), reason="needs the EmoBox manifests of the shared corpora")
def test_an_emobox_manifest_is_read_as_published():
    source = AudioFiles(EMOBOX, EMODB.parent)
    assert len(source) == 535
    assert source.ids[0] == "downloads/emodb/wav/03a01Fa.wav"
    (clip,) = source.read(range(1), 16_000)
    assert clip.values["label"] == "happy"  # the label map is another matter
    assert len(clip.waveform) == 16_000


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("label\nx\n", "line 2: no path"),
        ("path\na.wav\nb.wav\na.wav\n", "line 4: a.wav is also at .*line 2"),
        ("path\n", "holds no rows"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(manifest, message, tmp_path):
    (tmp_path / "m.csv").write_text(manifest)
    with pytest.raises(CorpusError, match=message):
        AudioFiles(tmp_path / "m.csv")


def test_places_without_audio_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="no such folder or manifest"):
        AudioFiles(tmp_path / "none")
    with pytest.raises(CorpusError, match=r"holds no audio file \(\.wav"):
        AudioFiles(tmp_path)


def test_a_name_that_is_no_text_stops_no_folder(tmp_path):
    for name in (b"/\xff.wav", b"/b.wav"):
        soundfile.write(tmp_path / "a.wav", np.resize([0.5, -0.5], 800), 16_000)
        os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + name)
    source = AudioFiles(tmp_path)
    assert source.ids == ["b.wav", "\ufffd.wav"]
    assert [len(clip.waveform) for clip in source.read(range(2), 800)] == [800, 800]
    os.rename(os.fsencode(tmp_path) + b"/b.wav", os.fsencode(tmp_path) + b"/\xfe.wav")
    with pytest.raises(CorpusError, match="differ in bytes only"):
        AudioFiles(tmp_path)


def test_bad_features_of_some_files_are_skipped_and_of_all_refused(audio_folder, tmp_path):
    calls = []

    def some(features):
        calls.append(features)
        return features * np.float16(np.nan) if len(calls) == 2 else features

    source = AudioFiles(audio_folder)
    assert len(extract(source, Recorder(spoil=some), tmp_path / "some")) == 11
    metadata = json.loads((tmp_path / "some" / "metadata.json").read_text())
    assert any("NaN" in skip["reason"] for skip in metadata["skipped"])
    with pytest.raises(RecordsError, match=r"none of 14 files can be used; the first: .*NaN"):
        extract(source, Recorder(spoil=poison(np.nan)), tmp_path / "all", max_frames=8)


def test_the_next_shard_is_read_and_the_last_one_written_while_one_is_computed(
    audio_folder, tmp_path
):
    """And no more than that: memory does not grow with the corpus."""
    source, folder = AudioFiles(audio_folder), tmp_path / "out"
    read, computed, ahead = [], [], []
    read_shard = source.read

    def watched_read(rows, max_samples):
        ahead.append(len(read) - len(computed))
        read.append(rows)
        return read_shard(rows, max_samples)

    class Waiting(Recorder):
        def __call__(self, waveforms, max_frames, groups=None):
            shards = list(tmp_path.glob("incomplete.out/*.tfrecord-*-of-00007"))
            deadline = time.monotonic() + 60
            while len(read) < min(7, len(computed) + 2) or len(shards) < len(computed) - 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
                shards = list(tmp_path.glob("incomplete.out/*.tfrecord-*-of-00007"))
            computed.append(len(waveforms))
            return super().__call__(waveforms, max_frames, groups)

    source.read = watched_read
    extract(source, Waiting(), folder, shard_size=2)
    assert len(read) == len(computed) == 7
    assert max(ahead) <= 2


def test_a_full_disk_is_told_and_costs_nothing_that_was_written(
    audio_folder, tmp_path, monkeypatch
):
    """Every write of the third shard on fails."""
    opened = []
    writer = tf.io.TFRecordWriter

    def full(path):
        opened.append(path)
        if len(opened) > 2:
            raise tf.errors.ResourceExhaustedError(None, None, "no space left on device")
        return writer(path)

    monkeypatch.setattr(tf.io, "TFRecordWriter", full)
    source = AudioFiles(audio_folder)
    with pytest.raises(RecordsError, match=r"no space left on device.*make room and run again"):
        extract(source, Recorder(), tmp_path / "out", shard_size=4)
    monkeypatch.undo()
    again = Recorder()
    assert len(extract(source, again, tmp_path / "out", shard_size=4)) == 12
    assert again.waveforms < 12 - 4


def test_a_folder_of_other_features_is_not_touched(audio_folder, tmp_path):
    source, folder = AudioFiles(audio_folder), tmp_path / "out"
    extract(source, Recorder(), folder)
    before = contents(folder)
    with pytest.raises(RecordsError, match=r"max_frames: 20 -> 10.*name another folder"):
        extract(source, Recorder(), folder, max_frames=10)
    with pytest.raises(KeyboardInterrupt):
        extract(source, Recorder(fail_at=2), tmp_path / "half")
    with pytest.raises(RecordsError, match=r"incomplete\.half holds .*max_frames: 20 -> 10"):
        extract(source, Recorder(), tmp_path / "half", max_frames=10)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    for other in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(RecordsError, match=f"{other.name} holds files that are not features"):
            extract(source, Recorder(), other)


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_computed(audio_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    frontend = Recorder()
    with pytest.raises(RecordsError, match="link cannot be made"):
        extract(AudioFiles(audio_folder), frontend, tmp_path / "link")
    assert frontend.waveforms == 0
    assert len(extract(AudioFiles(audio_folder), frontend, tmp_path / "empty")) == 12


def test_a_folder_that_another_process_is_writing_is_left_to_it(audio_folder, tmp_path):
    class Nested(Recorder):
        def __call__(self, *args):
            with pytest.raises(RecordsError, match="another process is writing"):
                extract(AudioFiles(audio_folder), Recorder(), tmp_path / "out")
            return super().__call__(*args)

    assert len(extract(AudioFiles(audio_folder), Nested(), tmp_path / "out")) == 12


def flags_for(hubert_folder, audio_folder, output):
    """Shards of six files: 30,000 frames are the longest that a file may have."""
    return {
        "model": hubert_folder,
        "input": audio_folder,
        "out": str(output),
        "max_seconds": 600.03,
    }


def command(flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "serkd_jax.features", *arguments]


def run(flags):
    return subprocess.run(command(flags), cwd=ROOT, capture_output=True, text=True, timeout=300)


def run_here(flags):
    absl.flags.FLAGS(["features"])
    with flagsaver.flagsaver(**flags | {"input": str(flags["input"])}):
        cli.main(["features"])


@pytest.fixture(scope="session")
def extracted(hubert_folder, audio_folder, tmp_path_factory):
    """(the folder that the command makes on eight devices, what it printed)."""
    folder = tmp_path_factory.mktemp("extracted") / "out"
    done = run(flags_for(hubert_folder, audio_folder, folder))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_command_gives_torchs_features(extracted, audio_folder, hubert_oracle):
    folder, done = extracted
    assert "2 files were skipped" in done.stdout
    assert "silent.wav" in done.stdout
    assert "14/14" in done.stderr
    assert "h of audio" in done.stderr
    examples = list(read_examples(folder, ("id", "features", "num_frames")))
    assert len(examples) == 12
    for example in examples:
        expected = hubert_oracle(read_audio(audio_folder / example["id"]))
        assert example["features"].dtype == np.float16
        assert example["num_frames"] == len(expected)
        np.testing.assert_allclose(example["features"], expected, atol=5e-3)


def test_the_command_started_again_has_nothing_to_do(extracted, hubert_folder, audio_folder):
    folder, _ = extracted
    before = contents(folder)
    run_here(flags_for(hubert_folder, audio_folder, folder))
    assert contents(folder) == before


def test_the_command_says_and_keeps_what_it_assumes_of_any_encoder(
    encoder_folder, audio_folder, tmp_path, capsys
):
    """A WavLM without a preprocessor's file; the mean of two layers."""
    model = shutil.copytree(encoder_folder("wavlm"), tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    flags = flags_for(str(model), audio_folder, tmp_path / "out") | {"layer": "1,2"}
    run_here(flags)
    assumed = f"{model} has no preprocessor_config.json: each waveform is brought to zero mean"
    assert f"assumed: {assumed}" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "metadata.json").read_text())["frontend_settings"]
    assert settings["assumption"].startswith(assumed)
    assert settings["name"] == "wavlm"
    assert settings["layer"] == [1, 2]
    assert settings["do_normalize"] is True


@pytest.mark.slow
def test_the_command_killed_and_started_again_gives_the_same(
    extracted, hubert_folder, audio_folder, tmp_path
):
    """Killed on one device when the first shard is there, which is kept; restarted on eight."""
    flags = flags_for(hubert_folder, audio_folder, tmp_path / "out")
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    with subprocess.Popen(
        command(flags), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        while not (first := list(tmp_path.glob("incomplete.out/*-00000-of-00003"))):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    inode = first[0].stat().st_ino
    run_here(flags)
    assert (tmp_path / "out" / first[0].name).stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(extracted[0])


@pytest.mark.slow
def test_two_processes_of_two_devices_share_the_files(
    extracted, hubert_folder, audio_folder, tmp_path, monkeypatch
):
    # All else as in the test's own environment: other code may round otherwise.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("count=8", "count=2"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = flags_for(hubert_folder, audio_folder, tmp_path / "out")
    flags |= {"coordinator": address, "num_processes": 2}
    processes = [
        subprocess.Popen(
            command(flags | {"process_id": i}), cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "[0]: 100%" in outputs[0]
    assert "8/8" in outputs[0]  # two shards of three, the last of which has two files
    assert "6/6" in outputs[1]
    assert contents(tmp_path / "out") == contents(extracted[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"input": "/no/such"}, "/no/such: no such folder"),
        ({"model": "/no/such"}, "'/no/such' is neither a local folder nor"),
        ({"layer": 9}, "layer 9 is not in -3 to 2"),
        ({"layer": "1,x"}, "layer is 1,x: use a number, or several like 8,9"),
        ({"pad_to_30s": True}, "is a hubert: only Whisper has pad_to_30s"),
        ({"max_seconds": 0.01}, "use 0.025, one frame, to 3600"),
        ({"max_seconds": float("nan")}, "max_seconds is nan"),
        ({"num_processes": 2}, "need a --coordinator"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "from 0 to N-1"),
    ],
)
def test_the_command_tells_what_is_wrong(
    flags, message, hubert_folder, audio_folder, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="1"):
        run_here(flags_for(hubert_folder, audio_folder, tmp_path / "out") | flags)
    assert message in capsys.readouterr().err
