"""Sources of utterances for feature extraction: a corpus's audio records, or plain audio files."""

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
from serkd_jax.data.corpora.manifest import read_manifest
from serkd_jax.data.reader import UTTERANCE_TEXTS, describe, load_skipped, read_examples
from serkd_jax.data.tables import locate
from serkd_jax.errors import readable
from serkd_jax.files import content_hashes

COLUMNS = ("label", "speaker", "session", "split", "fold")  # of a manifest; they go into records


class Clip(NamedTuple):
    """The audio of one utterance."""

    values: dict[str, Any]  # the contents of its record, except features; always has "id"
    waveform: np.ndarray | None  # float32 (num_samples,), 16 kHz; None if it cannot be used
    problem: str = ""  # why it cannot be used


class Source(Protocol):
    """A fixed list of utterances."""

    name: str  # the name of the TFDS dataset: lower case and underscores
    fingerprint: str  # changes with the utterances
    texts: Sequence[str]  # names of the texts in `Clip.values`, with "id"
    class_names: Sequence[str]  # if "label" is a number there, the names of the classes; else empty

    def __len__(self) -> int:
        """Returns the number of utterances, including unusable ones."""

    def read(self, rows: range, max_samples: int) -> list[Clip]:
        """Reads the utterances `rows`, each cut at `max_samples`; called from only one thread."""


class Frontend(Protocol):
    """What feature extraction needs from a front-end."""

    name: str
    width: int  # N, the number of feature variates
    settings: dict[str, Any]  # for people, in JSON types
    fingerprint: str  # changes with everything that affects the output, except rounding
    num_devices: int  # number of devices on which it computes
    assumption: str  # made about the model where its files leave something open; else empty

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (i, features of waveform i), float16 (<= max_frames, width), in any order.

        Args:
            waveforms: float32 (num_samples,), 16 kHz; anything beyond `max_frames` is ignored.
            max_frames: the most frames of an utterance, at 50 frames a second.
            groups: the number of each waveform's group. Features do not depend, to the last bit, on
                the contents of other groups, nor on the number of devices of the same kind. None
                means one group.
        """


class RecordsSource:
    """The audio records that `prepare.prepare_records` wrote."""

    texts = UTTERANCE_TEXTS

    def __init__(self, records_dir: str | os.PathLike):
        """Opens the records.

        Raises:
            RecordsError: the folder is missing or damaged.
        """
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
    """Audio files of a folder or a manifest; an id is the path below the folder or in the manifest.

    The columns label, speaker, session, split and fold of a manifest go into the records as text.
    """

    name, class_names = "audio_files", ()

    def __init__(self, place: str | os.PathLike, data_dir: str | os.PathLike | None = None):
        """Lists the files without decoding any.

        Args:
            place: a folder, or a CSV or JSONL manifest with a column `path`.
            data_dir: the folder to which the paths of a manifest are relative; None means its own.

        Raises:
            CorpusError: there is nothing to list, a row has no path, or two have the same.
        """
        place = Path(place)
        if place.is_dir():
            self._rows, found = None, sorted(find_audio(place))
            names = [readable(path.relative_to(place).as_posix()) for path in found]
            self._files = dict(zip(names, found, strict=True))
            if len(self._files) < len(found):
                raise CorpusError(f"{place}: two names differ in bytes only that are not UTF-8")
        elif place.is_file():
            self._rows = _read_columns(place)
            files = locate([*self._rows], Path(data_dir or place.parent))
            self._files = dict(zip(self._rows, files, strict=True))
        else:
            raise CorpusError(f"{place}: no such folder or manifest")
        self.ids = sorted(self._files)
        if not self.ids:
            what = f"no audio file ({' '.join(SUFFIXES)})" if place.is_dir() else "no rows"
            raise CorpusError(f"{place} holds {what}")
        columns = {name for values in (self._rows or {}).values() for name in values}
        self._columns = [name for name in COLUMNS if name in columns]
        self.texts = ["id", *self._columns]
        hashes = content_hashes(self._files.values())
        self.fingerprint = _digest(
            (self._values(key), hashes[str(self._files[key])]) for key in self.ids
        )

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: range, max_samples: int) -> list[Clip]:
        """See `Source`; several threads decode, except with FFmpeg, where they would be slower."""

        def read_one(row: int) -> Clip:
            values = self._values(self.ids[row])
            try:
                return Clip(values, read_audio(self._path(values["id"]), max_samples))
            except (AudioError, OSError) as error:
                return Clip(values, None, readable(str(error)))

        suffixes = {Path(self.ids[row]).suffix.lower() for row in rows}
        threads = 1 if suffixes & set(FFMPEG_SUFFIXES) else os.cpu_count()
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(read_one, rows))

    def _values(self, key: str) -> dict[str, str]:
        row = self._rows[key] if self._rows else {}
        return {"id": key} | {name: row.get(name, "") for name in self._columns}

    def _path(self, key: str) -> Path:
        return self._files[key]


def _read_columns(manifest: Path) -> dict[str, dict[str, str]]:
    """Reads the columns of each path."""
    rows, places = {}, {}
    for where, values in read_manifest(manifest):
        if not (key := values.get("path")):
            raise CorpusError(f"{where}: no path; this row has {', '.join(values)}")
        if key in places:
            raise CorpusError(f"{where}: {key} is also at {places[key]}; remove one row")
        if values.get("start") or values.get("end"):
            raise CorpusError(
                f"{where}: features of parts of files are not supported; cut the file first"
            )
        places[key] = where
        rows[key] = {name: values[name] for name in COLUMNS if values.get(name)}
    return rows


def _digest(described: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for item in described:
        digest.update(json.dumps(item, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
