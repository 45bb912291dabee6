"""Utterances to extract features from: the audio records of a corpus, or plain audio files."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from serkd_jax.audio.decoding import FFMPEG_SUFFIXES, SUFFIXES, find_audio, read_audio
from serkd_jax.audio.waveform import AudioError, to_float
from serkd_jax.data.corpora import CorpusError
from serkd_jax.data.corpora.manifest import find_file, read_manifest
from serkd_jax.data.reader import UTTERANCE_TEXTS, describe, load_skipped, read_examples

COLUMNS = ("label", "speaker", "session", "split", "fold")  # of a manifest, carried along


class Clip(NamedTuple):
    """The audio of one utterance."""

    values: dict[str, Any]  # what its record says, features apart; always has "id"
    waveform: np.ndarray | None  # float32 (num_samples,), 16 kHz; None if it cannot be used
    problem: str = ""  # why not


class Source(Protocol):
    """A fixed list of utterances."""

    name: str  # of the TFDS dataset: lower case and underscores
    fingerprint: str  # changes with the utterances
    texts: Sequence[str]  # names in `Clip.values`, "id" among them
    class_names: Sequence[str]  # of the number "label" there; empty where it is text, or not there

    def __len__(self) -> int:
        """How many there are, unusable ones included."""

    def read(self, rows: range, max_samples: int) -> list[Clip]:
        """The utterances `rows`, each cut at `max_samples`. Called from one thread."""


class Frontend(Protocol):
    """What feature extraction needs of a front-end."""

    name: str
    width: int  # N, the number of feature variates
    settings: dict[str, Any]  # for people, in JSON types
    fingerprint: str  # changes with everything that the output depends on, rounding apart
    num_devices: int  # how many it computes on
    assumption: str  # about the model, where its files leave something open; else empty

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (i, features of waveform i), float16 (<= max_frames, width), in any order.

        Args:
            waveforms: float32 (num_samples,), 16 kHz; what is beyond max_frames is not looked at.
            max_frames: at 50 frames a second.
            groups: of the waveforms; features do not depend, to the last bit, on what is in other
                groups, nor on how many devices of a kind there are. None means one group.
        """


class RecordsSource:
    """The audio records that `prepare.prepare_records` has written."""

    texts = UTTERANCE_TEXTS

    def __init__(self, records_dir: str | os.PathLike):
        """Raises a RecordsError if the folder is missing or damaged."""
        described = describe(records_dir)
        self.records_dir, self.name = records_dir, described.name
        self.class_names = described.class_names
        self._size = described.num_examples
        self._stream, self._next = iter(()), self._size  # examples, and the row of the next one
        skipped = [skip["id"] for skip in load_skipped(records_dir)]
        self.fingerprint = _digest([described.metadata["corpus_fingerprint"], skipped])

    def __len__(self) -> int:
        return self._size

    def read(self, rows: range, max_samples: int) -> list[Clip]:
        """See `Source`."""
        if rows.start < self._next:
            names = [*self.texts, "label", "audio"]
            self._stream = read_examples(self.records_dir, names)
            self._next = 0
        examples = itertools.islice(self._stream, rows.start - self._next, rows.stop - self._next)
        clips = [Clip(e, to_float(e.pop("audio")[:max_samples])) for e in examples]
        self._next = rows.stop
        return clips


class AudioFiles:
    """Audio files below a folder, or of a manifest; the id of each is its path as seen from there.

    The columns label, speaker, session, split and fold of a manifest go into the records as text.
    """

    name, class_names = "audio_files", ()

    def __init__(self, place: str | os.PathLike, data_dir: str | os.PathLike | None = None):
        """Lists the files; decodes nothing.

        Args:
            place: a folder, or a CSV or JSONL manifest with a column path.
            data_dir: where the relative paths of a manifest begin; None means beside it.

        Raises:
            CorpusError: there is nothing to list, a row has no path, two have the same, or a name
                is not UTF-8.
        """
        place = Path(place)
        if place.is_dir():
            self._folder, self._rows = place, None
            self.ids = sorted(path.relative_to(place).as_posix() for path in find_audio(place))
        elif place.is_file():
            self._folder, self._rows = Path(data_dir or place.parent), _read_columns(place)
            self.ids = sorted(self._rows)
        else:
            raise CorpusError(f"{place}: no such folder or manifest")
        if not self.ids:
            what = f"no audio file ({' '.join(SUFFIXES)})" if place.is_dir() else "no rows"
            raise CorpusError(f"{place} holds {what}")
        columns = {name for values in (self._rows or {}).values() for name in values}
        self._columns = [name for name in COLUMNS if name in columns]
        self.texts = ["id", *self._columns]
        try:
            self.fingerprint = _digest((self._values(key), self._size(key)) for key in self.ids)
        except UnicodeEncodeError as error:
            raise CorpusError(f"{error.object!r}: not UTF-8; rename the file") from error

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: range, max_samples: int) -> list[Clip]:
        """See `Source`; several threads decode, except what FFmpeg reads: they would be slower."""

        def read_one(row: int) -> Clip:
            values = self._values(self.ids[row])
            try:
                return Clip(values, read_audio(self._path(values["id"]), max_samples))
            except (AudioError, OSError) as error:
                return Clip(values, None, str(error))

        suffixes = {Path(self.ids[row]).suffix.lower() for row in rows}
        threads = 1 if suffixes & set(FFMPEG_SUFFIXES) else os.cpu_count()
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(read_one, rows))

    def _values(self, key: str) -> dict[str, str]:
        row = self._rows[key] if self._rows else {}
        return {"id": key} | {name: row.get(name, "") for name in self._columns}

    def _path(self, key: str) -> Path:
        return find_file(key, self._folder) if self._rows else self._folder / key

    def _size(self, key: str) -> int:
        try:
            return self._path(key).stat().st_size
        except OSError:
            return -1


def _read_columns(manifest: Path) -> dict[str, dict[str, str]]:
    """The columns of each path."""
    rows, places = {}, {}
    for where, values in read_manifest(manifest):
        if not (key := values.get("path")):
            raise CorpusError(f"{where}: no path; this row has {', '.join(values)}")
        if key in places:
            raise CorpusError(f"{where}: {key} is also at {places[key]}; leave one row away")
        if values.get("start") or values.get("end"):
            raise CorpusError(f"{where}: parts of files have no features here; cut the file first")
        places[key] = where
        rows[key] = {name: values[name] for name in COLUMNS if values.get(name)}
    return rows


def _digest(described: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in described:
        digest.update(json.dumps(item, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
