"""Finds or makes the records and features of a corpus. Only making them imports TensorFlow.

Features are written into `incomplete.NAME`, which is renamed to `NAME` when all shards and their
description are written: a folder without the prefix is complete. TFDS does the same for records.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from serkd_jax.audio.logmel import num_frames
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.corpora.base import SpeechCorpus
from serkd_jax.data.examples import Examples, are_resident
from serkd_jax.data.reader import (
    RandomReader,
    RecordsError,
    Table,
    describe,
    load_arrays,
    load_lengths,
)
from serkd_jax.data.sources import Frontend, RecordsSource, Source
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError, differences
from serkd_jax.files import read_json, write_json

SETTINGS, LOCK = "settings.json", "lock"  # files of an unfinished folder
SHARD_FRAMES = 200_000  # 400 MB of HuBERT-large features, if all utterances have the full length


def prepare_records(
    corpus: SpeechCorpus, cache_dir: str | os.PathLike, beam_options: str = ""
) -> Path:
    """Writes the audio records of a corpus, unless they exist, and returns their folder.

    A script that calls this needs `if __name__ == "__main__":`, since large corpora are decoded in
    child processes.

    Args:
        corpus: the corpus to write.
        cache_dir: the folder below which to write, as in `--config.cache_dir`.
        beam_options: comma-separated options of a Beam pipeline, e.g. `runner=DirectRunner`; if
            empty, this machine's cores share the work.

    Raises:
        CorpusError: the corpus cannot be listed, or none of its files can be used.
        RecordsError: a process was killed, or Beam failed.
    """
    root = Path(cache_dir) / "records" / f"{corpus.name}-{corpus.fingerprint}"
    folder = root / corpus.name / corpus.VERSION  # TFDS's layout
    if parallel.is_first_process() and not folder.exists():
        from serkd_jax.data.audio_records import write_records

        write_records(corpus, root, beam_options)
    parallel.wait_for_file(folder, "records written", "--config.cache_dir")
    return folder


def open_examples(
    folder: Path, name: str, length: int, table: Table, devices: list[jax.Device], resident: bool
) -> Examples:
    """Makes examples of all utterances, with one array of the records as their inputs.

    Args:
        folder: the folder of audio records or feature records.
        name: `audio` or `features`.
        length: number of samples or frames; longer utterances are cut.
        table: the corpus's table.
        devices: the devices of all processes.
        resident: whether to put the inputs on the devices; otherwise they are read when needed.

    Raises:
        RecordsError: the folder does not hold the table's utterances, or is damaged.
    """
    ids, examples = _open(folder, name, length, devices, resident)
    if not np.array_equal(ids, table.ids):  # everything is indexed by row
        raise RecordsError(f"{folder} does not hold the utterances of the records: delete it")
    return examples.with_columns(label=table.labels)


def open_unlabelled(folder: Path, length: int, devices: list[jax.Device]) -> Examples:
    """Makes examples of all utterances of feature records, without labels.

    Args:
        folder: the folder of feature records.
        length: number of frames; longer utterances are cut.
        devices: the devices of all processes; the inputs are put on them if they fit.

    Raises:
        RecordsError: the folder is damaged.
    """
    described = describe(folder)
    width = described.fields["features"].shape[1]
    resident = are_resident("auto", 2 * described.num_examples * length * width, devices)
    return _open(folder, "features", length, devices, resident)[1]


def _open(
    folder: Path, name: str, length: int, devices: list[jax.Device], resident: bool
) -> tuple[np.ndarray, Examples]:
    """Returns ids, and examples with inputs, lengths and numbers; see `open_examples`."""
    if resident:
        ids, inputs, lengths = load_arrays(folder, name, length)
        columns, read = {"inputs": inputs}, None
    else:
        counted = {"features": "num_frames", "audio": "num_samples"}[name]
        ids, lengths = load_lengths(folder, counted, length)
        columns, read = {}, RandomReader(folder, name, length)
    columns |= {"length": lengths, "index": np.arange(len(ids), dtype=np.int32)}
    return ids, Examples({}, devices, read).with_columns(**columns)


def frames_of(max_seconds: float) -> int:
    """Returns the number of frames at which a command cuts recordings.

    Raises:
        UserError: that would be less than one, or more than an hour's.
    """
    if not 0.025 <= max_seconds <= 3600:
        raise UserError(f"max_seconds is {max_seconds:g}: use 0.025, one frame, to 3600")
    return num_frames(round(max_seconds * SAMPLE_RATE))


def prepare_features(
    records_dir: str | os.PathLike,
    frontend: Frontend,
    max_frames: int,
    cache_dir: str | os.PathLike,
    *,
    shard_size: int = 0,
) -> Path:
    """Writes the features of all utterances of a corpus, unless they exist.

    Args:
        records_dir: the folder of audio records, from `prepare_records`.
        frontend: the front-end, see `serkd_jax.encoders.frontends`.
        max_frames: T, at 50 frames a second.
        cache_dir: the features' folder is made in `cache_dir/features/`.
        shard_size: see `extract_features`.

    Returns:
        The features' folder.

    Raises:
        RecordsError: the front-end returned NaN, infinity or a wrong shape for the utterance that
            the message names.
    """
    source = RecordsSource(records_dir)
    settings = [source.fingerprint, frontend.fingerprint, max_frames, shard_size]
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / "features" / f"{source.name}-{frontend.name}-{digest}"
    extract_features(source, frontend, max_frames, folder, shard_size=shard_size)
    return folder


def extract_features(
    source: Source,
    frontend: Frontend,
    max_frames: int,
    folder: Path,
    *,
    shard_size: int = 0,
    skip_bad: bool = False,
) -> None:
    """Writes the features of all utterances of a source into a folder, unless they exist.

    Features are float16 (num_frames, frontend.width), cut at `max_frames` and not padded. A record
    also has `num_frames` and what the source says about the utterance. `metadata.json` says how
    the features were made and which utterances were skipped, with the reasons.

    Args:
        source: the utterances.
        frontend: the front-end, see `serkd_jax.encoders.frontends`.
        max_frames: the most frames of an utterance, at 50 a second; what follows is not read.
        folder: the folder to make; if it exists, it must be from an earlier call with the same
            arguments.
        shard_size: utterances per file; 0 means as many as make up 200,000 frames, at most 256.
        skip_bad: whether to skip utterances whose features are NaN, infinite or of a wrong shape.

    Raises:
        RecordsError: the folder holds something else, no utterance can be used, or there are bad
            features and `skip_bad` is not set.
    """
    shard_size = shard_size or int(np.clip(SHARD_FRAMES // max_frames, 1, 256))
    settings = {
        "source": source.fingerprint,
        "frontend": frontend.fingerprint,
        "max_frames": max_frames,
        "shard_size": shard_size,
    }
    folder = folder.absolute()
    if _is_done(folder, settings):
        return
    work = folder.with_name(f"incomplete.{folder.name}")
    with _claim(folder, work, settings):
        from serkd_jax.data.feature_records import write_features

        write_features(source, frontend, max_frames, work, settings, skip_bad)
        if jax.process_index() == 0:
            work.rename(folder)
            _clean(folder)
        parallel.wait_for_processes(f"features described: {folder.name}")


def _is_done(folder: Path, settings: dict) -> bool:
    """Returns whether a folder holds these features; refuses one that holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "metadata.json").exists():
        raise RecordsError(f"{folder} holds files that are not features: name another folder")
    _check_settings(folder, describe(folder).metadata, settings)
    _clean(folder)
    return True


@contextlib.contextmanager
def _claim(folder: Path, work: Path, settings: dict) -> Iterator[None]:
    """Locks the folder to work in: a new one, or that of an earlier run with the same settings."""
    path = work / SETTINGS
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                work.mkdir(parents=True, exist_ok=True)
                if folder.exists():
                    folder.rmdir()  # it is empty; better to fail now than after the computation
                lock = held.enter_context((work / LOCK).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecordsError(
                    f"another process is writing into {work}: wait for it"
                ) from error
            except OSError as error:
                raise RecordsError(
                    f"{folder} cannot be made ({error.strerror}): name another folder"
                ) from error
            if not path.exists():
                write_json(path, settings)
        parallel.wait_for_file(path, f"features claimed: {folder.name}", "the features' folder")
        _check_settings(work, read_json(path, f"delete {work}"), settings)
        yield


def _check_settings(folder: Path, theirs: dict, mine: dict) -> None:
    if differ := differences(theirs, mine, mine):
        raise RecordsError(
            f"{folder} holds features of other files or settings ({'; '.join(differ)}): "
            "name another folder, or delete this one"
        )


def _clean(folder: Path) -> None:
    """Removes what only an unfinished folder needs."""
    for leftover in (*folder.glob("*.tfrecord-*.json"), folder / SETTINGS, folder / LOCK):
        leftover.unlink(missing_ok=True)
