"""Reads audio and feature records: TFRecord files, and TFDS's description of them.

This needs no TensorFlow, whose import takes seconds and hundreds of megabytes; only the modules
that write records (`audio_records`, `feature_records`) do. A TFRecord file is a sequence of records
of 8 bytes for a length, 4 for their checksum, a serialised `tf.train.Example` of that length and 4
bytes for its checksum. `tests/test_reader.py` compares all of this with TensorFlow and TFDS.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from serkd_jax.errors import UserError

HEADER, FOOTER = 12, 4  # bytes around a record
UTTERANCE_TEXTS = ("id", "speaker", "session", "split", "fold")  # in every audio record


class RecordsError(UserError):
    """Records that cannot be written or read; the message names the place and the remedy."""


@dataclass(frozen=True)
class Field:
    """How the values of one name are stored.

    Attributes:
        list_name: the field of `tf.train.Feature`: bytes_list, int64_list or float_list.
        dtype: the dtype of the array or number; None for text.
        shape: the shape of an array, -1 where it differs between examples; None for a number or
            text.
    """

    list_name: str
    dtype: np.dtype | None
    shape: tuple[int, ...] | None = None

    def decode(self, feature: Any) -> Any:
        """Reads a `tf.train.Feature` as a str, a NumPy number or a read-only array."""
        (value,) = getattr(feature, self.list_name).value
        if self.dtype is None:
            return value.decode()
        if self.shape is None:
            return self.dtype.type(value)
        return np.frombuffer(value, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Description:
    """The contents of the JSON files of a folder.

    Attributes:
        name: the name of the dataset.
        fields: the fields of each example, by name.
        class_names: the names of the numbers in `label`; empty if `label` is text or missing.
        shards: the TFRecord files and the number of examples in each, in the stored order: by the
            name of the split, then by number.
        metadata: what the writer added.
    """

    name: str
    fields: Mapping[str, Field]
    class_names: tuple[str, ...]
    shards: tuple[tuple[Path, int], ...]
    metadata: Mapping[str, Any]

    @property
    def num_examples(self) -> int:
        """The number of examples in all shards."""
        return sum(count for _, count in self.shards)


@dataclass(frozen=True)
class Table:
    """What the records say about each utterance, except its audio; columns are sorted by id."""

    ids: np.ndarray  # (n,) str
    labels: np.ndarray  # (n,) int32, index into class_names
    class_names: tuple[str, ...]
    speakers: np.ndarray  # (n,) str, as are the next three; empty where the corpus has none
    sessions: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    num_samples: np.ndarray  # (n,) int32, at 16 kHz
    skipped: list[dict[str, str]]  # {"id", "reason"} of files that could not be used
    # (n,) str: the start of the hash of the samples, and what their reader noticed; or empty arrays
    hashes: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], str))
    notices: np.ndarray = dataclasses.field(default_factory=lambda: np.array([], str))

    def __len__(self) -> int:
        return len(self.ids)

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the columns of `serkd_jax.data.splits.make_folds`, by the names it uses."""
        return {
            "id": self.ids,
            "speaker": self.speakers,
            "session": self.sessions,
            "fold": self.folds,
            "split": self.splits,
        }


def describe(folder: str | os.PathLike) -> Description:
    """Reads what TFDS has written beside the examples.

    Raises:
        RecordsError: the folder holds no complete dataset.
    """
    folder = Path(folder)
    with _readable_errors(folder):
        info, features, metadata = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("dataset_info.json", "features.json", "metadata.json")
        )
        if not isinstance(metadata, dict):
            raise TypeError("metadata.json is not an object")
        stored = features["featuresDict"]["features"]
        names = []
        if "classLabel" in stored.get("label", {}):
            names = (folder / "label.labels.txt").read_text(encoding="utf-8").splitlines()
        shards = tuple(_shards(folder, info))
        if not shards:
            raise ValueError("dataset_info.json lists no files")
        fields = {name: _field(name, kind) for name, kind in stored.items()}
        return Description(info["name"], fields, tuple(names), shards, metadata)


def _field(name: str, stored: Mapping[str, Any]) -> Field:
    if "text" in stored:
        return Field("bytes_list", None)
    if "classLabel" in stored:
        return Field("int64_list", np.dtype(np.int64))
    tensor = stored["tensor"]
    dtype = np.dtype(tensor["dtype"])
    if tensor["encoding"] == "bytes":
        return Field("bytes_list", dtype, tuple(map(int, tensor["shape"]["dimensions"])))
    if tensor["shape"]:
        raise ValueError(f"{name} is an array that is not stored as bytes")
    return Field("float_list" if dtype.kind == "f" else "int64_list", dtype)


def _shards(folder: Path, info: Mapping[str, Any]) -> Iterator[tuple[Path, int]]:
    for split in sorted(info["splits"], key=lambda split: split["name"]):
        counts = [int(count) for count in split["shardLengths"]]
        for number, count in enumerate(counts):
            file = f"{info['name']}-{split['name']}.tfrecord-{number:05d}-of-{len(counts):05d}"
            yield folder / file, count


def read_examples(folder: str | os.PathLike, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Streams the named values of each example, in the stored order.

    Raises:
        RecordsError: the folder is damaged.
    """
    description = describe(folder)
    with _readable_errors(folder):
        fields = {name: description.fields[name] for name in names}
        for path, whole in description.shards:
            count = 0
            with path.open("rb") as file:
                for record in _records(file):
                    yield _parse(record, fields)
                    count += 1
            _check_count(path, count, whole)


def load_skipped(folder: str | os.PathLike) -> list[dict[str, str]]:
    """Reads {"id", "reason"} of the utterances whose audio could not be used, sorted by id.

    Raises:
        RecordsError: the folder is damaged.
    """
    with _readable_errors(folder):
        skipped = [
            json.loads(line)
            for path in Path(folder).glob("skipped-*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        return sorted(
            ({"id": str(skip["id"]), "reason": str(skip["reason"])} for skip in skipped),
            key=lambda skip: skip["id"],
        )


def load_table(folder: str | os.PathLike) -> Table:
    """Reads everything except the audio from audio records.

    Raises:
        RecordsError: the folder does not hold audio records, or is damaged.
    """
    names = ("id", "label", "speaker", "session", "split", "fold", "num_samples")
    names += ("sha256", "notice")
    examples = list(read_examples(folder, names))

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([example[name] for example in examples], dtype)

    return Table(
        ids=column("id", str),
        labels=column("label", np.int32),
        class_names=describe(folder).class_names,
        speakers=column("speaker", str),
        sessions=column("session", str),
        splits=column("split", str),
        folds=column("fold", str),
        num_samples=column("num_samples", np.int32),
        skipped=load_skipped(folder),
        hashes=column("sha256", str),
        notices=column("notice", str),
    )


def load_arrays(
    folder: str | os.PathLike, name: str, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads one array of every example, cut or zero-padded to one length.

    Args:
        folder: the folder of audio or feature records.
        name: `audio` or `features`.
        length: number of samples or frames.

    Returns:
        Ids (n,) str, sorted; arrays (n, length, ...) in their stored dtype; and their lengths (n,)
        int32, at most `length`.

    Raises:
        RecordsError: the folder is missing or damaged.
    """
    description = describe(folder)
    field, count = description.fields[name], description.num_examples
    ids, lengths = [], np.zeros(count, np.int32)
    arrays = np.zeros((count, length, *field.shape[1:]), field.dtype)
    for row, example in enumerate(read_examples(folder, ("id", name))):
        ids.append(example["id"])
        lengths[row] = min(len(example[name]), length)
        arrays[row, : lengths[row]] = example[name][:length]
    return np.array(ids, str), arrays, lengths


def load_lengths(
    folder: str | os.PathLike, name: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loads ids and lengths as `load_arrays` does; `name` is `num_samples` or `num_frames`."""
    examples = list(read_examples(folder, ("id", name)))
    ids = np.array([example["id"] for example in examples], str)
    return ids, np.array([min(example[name], length) for example in examples], np.int32)


class RandomReader:
    """Reads one array of any examples in any order, for corpora that do not fit in memory.

    It is called with row numbers (m,), as `read_examples` counts them, and returns their arrays
    (m, length, ...), cut or zero-padded.
    """

    def __init__(self, folder: str | os.PathLike, name: str, length: int):
        """Finds where each example begins.

        Raises:
            RecordsError: the folder is missing or damaged.
        """
        self._folder, self._name, self._length = folder, name, length
        description = describe(folder)
        self._field = description.fields[name]
        self._places: list[tuple[BinaryIO, int, int]] = []  # file, start of the record, its size
        with _readable_errors(folder):
            for path, whole in description.shards:
                file = path.open("rb", buffering=0)  # stays open
                places = [(file, start, size) for start, size in _record_places(file)]
                _check_count(path, len(places), whole)
                self._places += places
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Reads the arrays of these rows.

        Raises:
            RecordsError: a file is damaged.
        """
        shape = (len(rows), self._length, *self._field.shape[1:])
        out = np.zeros(shape, self._field.dtype)
        with _readable_errors(self._folder):
            for i, array in enumerate(self._threads.map(self._read, rows)):
                out[i, : len(array)] = array[: self._length]
        return out

    def _read(self, row: int) -> np.ndarray:
        file, start, size = self._places[row]
        record = _check_record(os.pread(file.fileno(), size + FOOTER, start), size)
        return _parse(record, {self._name: self._field})[self._name]


def _records(file: BinaryIO) -> Iterator[bytes]:
    """Yields the records from the file's current position on."""
    while header := file.read(HEADER):
        size = _record_size(header)
        yield _check_record(file.read(size + FOOTER), size)


def _record_places(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields the start and the size of each record."""
    while header := file.read(HEADER):
        start, size = file.tell(), _record_size(header)
        yield start, size
        file.seek(start + size + FOOTER)


def _record_size(header: bytes) -> int:
    if len(header) < HEADER or header[8:] != _checksum(header[:8]):
        raise ValueError("damaged length of a record")
    return int.from_bytes(header[:8], "little")


def _check_record(stored: bytes, size: int) -> bytes:
    """Returns the record from a record with its checksum, after checking it."""
    if len(stored) < size + FOOTER:
        raise ValueError("truncated record")
    if stored[size:] != _checksum(stored[:size]):
        raise ValueError("damaged record")
    return stored[:size]


def _checksum(data: bytes) -> bytes:
    """Returns the CRC-32C, masked as in TensorFlow."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def _check_count(path: Path, count: int, whole: int) -> None:
    if count != whole:
        raise ValueError(f"{path.name} has {count} of {whole} examples")


def _parse(record: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    stored = _example_class().FromString(record).features.feature
    missing = [name for name in fields if name not in stored]
    if missing:
        raise ValueError(f"an example has no {', '.join(missing)}")
    return {name: field.decode(stored[name]) for name, field in fields.items()}


@functools.cache
def _example_class() -> type[message.Message]:
    """Makes the class of `tf.train.Example`, in its own pool in case TensorFlow is loaded too."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="serkd")
    kinds = descriptor_pb2.FieldDescriptorProto
    optional, repeated = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED

    def add(name: str, *fields: tuple, parent: Any = file.message_type) -> Any:
        made = parent.add(name=name)
        for number, (field, label, kind) in enumerate(fields, start=1):
            added = made.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".serkd.{kind}"
            else:
                added.type = kind
        return made

    add("BytesList", ("value", repeated, kinds.TYPE_BYTES))
    add("FloatList", ("value", repeated, kinds.TYPE_FLOAT))
    add("Int64List", ("value", repeated, kinds.TYPE_INT64))
    lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    add("Feature", *((name, optional, kind) for name, kind in lists))
    features = add("Features", ("feature", repeated, "Features.FeatureEntry"))
    entry = ("key", optional, kinds.TYPE_STRING), ("value", optional, "Feature")
    add("FeatureEntry", *entry, parent=features.nested_type).options.map_entry = True
    add("Example", ("features", optional, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("serkd.Example"))


_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
_DAMAGE += (RecursionError, message.DecodeError)


@contextlib.contextmanager
def _readable_errors(folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        problem = " ".join(str(error).split())[:200]
        raise RecordsError(
            f"{folder} is missing or damaged ({type(error).__name__}: {problem}); "
            "delete this folder and run again to rebuild it"
        ) from error
