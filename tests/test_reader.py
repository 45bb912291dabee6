"""What is read without TensorFlow is what TensorFlow and TFDS read, and damage does not pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from serkd_jax.data import reader
from serkd_jax.data.corpora import MELD
from serkd_jax.data.prepare import extract_features, prepare_records
from serkd_jax.data.sources import AudioFiles
from serkd_jax.encoders.frontends import LogMel
from serkd_jax.experiment import prepare_experiment
from tiny_config import get_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(meld, tmp_path_factory):
    """Records with splits, text, numbers and audio, and features of which the labels are text."""
    folder = tmp_path_factory.mktemp("records")
    audio = prepare_records(MELD(str(meld)), folder)
    paths = sorted(path.relative_to(meld).as_posix() for path in meld.rglob("*.mp4"))[:5]
    rows = [f"{path},Zorn,größte {i}" for i, path in enumerate(paths)]
    (folder / "list.csv").write_text("path,label,speaker\n" + "\n".join(rows))
    source = AudioFiles(folder / "list.csv", meld)
    extract_features(source, LogMel(8), 20, folder / "features", shard_size=2, skip_bad=True)
    return {"audio": audio, "features": folder / "features"}


@pytest.mark.parametrize("kind", ["audio", "features"])
def test_every_value_and_the_order_are_those_of_tfds(folders, kind):
    builder = tfds.builder_from_directory(folders[kind])
    info, described = builder.info, reader.describe(folders[kind])
    assert described.name == info.name
    assert list(described.fields) == sorted(info.features)
    assert described.num_examples == info.splits.total_num_examples > 0
    assert described.metadata == dict(info.metadata)
    if kind == "audio":
        assert list(described.class_names) == info.features["label"].names
        assert set(info.splits) == {"train", "dev", "test"}
    theirs = builder.as_dataset(split="+".join(sorted(info.splits)))
    ours = reader.read_examples(folders[kind], described.fields)
    for expected, actual in zip(theirs.as_numpy_iterator(), ours, strict=True):
        for name, value in expected.items():
            if isinstance(value, bytes):
                assert actual[name] == value.decode()
                continue
            assert actual[name].dtype == value.dtype
            np.testing.assert_array_equal(actual[name], value)


def test_any_rows_are_those_of_the_whole(folders):
    _, everything, _ = reader.load_arrays(folders["audio"], "audio", 3000)
    read = reader.RandomReader(folders["audio"], "audio", 3000)
    rows = np.random.default_rng(0).integers(0, len(everything), 40)
    np.testing.assert_array_equal(read(rows), everything[rows])


RECORDS = [b"", b"\x00" * 7, bytes(range(256)) * 9]


@pytest.fixture
def file(tmp_path):
    """Written by TensorFlow."""
    with tf.io.TFRecordWriter(str(tmp_path / "file")) as writer:
        for record in RECORDS:
            writer.write(record)
    return tmp_path / "file"


def read(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return list(reader._records(file))


def test_records_are_those_that_tensorflow_wrote(file):
    assert read(file) == RECORDS
    with file.open("rb") as opened:
        places = list(reader._record_places(opened))
    assert [file.read_bytes()[start : start + size] for start, size in places] == RECORDS


def test_no_damage_passes(file):
    """Every byte turned, and every length: each is found, or leaves whole records behind it."""
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read(file)
    ends = {0, *(sum(16 + len(record) for record in RECORDS[:k]) for k in (1, 2))}
    for length in set(range(len(data))) - ends:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read(file)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("skipped-missing.jsonl", b"\xff"),
        ("skipped-missing.jsonl", b'{"id": "a"}'),
        ("skipped-missing.jsonl", b"[" * 99_999),
        ("features.json", b'{"featuresDict": {"features": {"label": 3}}}'),
        ("dataset_info.json", b'{"name": "a", "splits": []}'),
    ],
)
def test_what_was_written_beside_the_examples_is_told_where_it_is_damaged(
    folders, tmp_path, file, content
):
    folder = shutil.copytree(folders["audio"], tmp_path / "audio")
    (folder / file).write_bytes(content)
    with pytest.raises(reader.RecordsError, match=r"damaged .* delete this folder and run again"):
        reader.load_table(folder)


@pytest.mark.parametrize("found", [1, 3])
def test_a_shard_that_ends_early_or_late_is_told(folders, tmp_path, found):
    folder = tmp_path / "features"
    shutil.copytree(folders["features"], folder)
    shard = next(path for path, count in reader.describe(folder).shards if count == 2)
    with shard.open("rb") as opened:
        start, size = next(reader._record_places(opened))
    whole = shard.read_bytes()
    one = whole[: start + size + reader.FOOTER]
    shard.write_bytes({1: one, 3: whole + one}[found])
    message = rf"has {found} of 2 examples.*delete this folder"
    for use in (reader.load_arrays, reader.RandomReader):
        with pytest.raises(reader.RecordsError, match=message):
            use(folder, "features", 20)


def test_a_run_on_records_that_are_there_needs_no_tensorflow(tmp_path):
    """Nor does exporting: `tests/test_export.py`."""
    for package in ("tensorflow", "tensorflow_datasets"):
        text = f"raise ImportError('{package} is not here')"
        (tmp_path / f"{package}.py").write_text(text)

    def run(command: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", *command.split()]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    train = f"serkd_jax.main --config=tests/tiny_config.py --workdir={tmp_path}/without"
    train += f" --config.cache_dir={tmp_path}/cache --config.stages=student"
    train += " --config.examples=records"
    assert "tensorflow is not here" in run(train).stderr
    config = get_config()
    config.cache_dir = f"{tmp_path}/cache"
    prepare_experiment(config, tmp_path / "with")  # makes what is read
    done = run(train)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| student |" in done.stdout
    assert done.stdout.endswith("results.json, results.md, report.html\n")
