"""Files that are complete or do not exist. If there are several processes, the first writes."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import sqlite3
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError


def write_file(path: Path, content: str | bytes, by_each: bool = False) -> None:
    """Writes a file, making its folders; with `by_each`, every process writes its own file."""
    if not (by_each or parallel.is_first_process()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Claims a folder for this process.

    The system takes the claim back when the process ends, however it does. On file systems without
    locks, and in all processes except the first, nothing is claimed.

    Args:
        folder: an existing folder.
        wait: whether to wait while another process is working in the folder.

    Raises:
        UserError: another process is working in the folder, and this one does not wait.
    """
    if not parallel.is_first_process():
        yield
        return
    with (folder / ".lock").open("a+") as file:
        if _claim(file, folder, wait):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def _claim(file: IO[str], folder: Path, wait: bool) -> bool:
    """Returns whether a folder could be claimed by its lock file; see `locked`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        told = f"{folder} is in use by {file.read() or 'another process'}"
        if not wait:
            raise UserError(f"{told}: wait until it ends, or use another --workdir") from None
        print(f"{told}: waiting", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def content_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """Hashes the contents of files; a file that is not there has the hash "missing".

    Hashes are kept in the user's cache, `$XDG_CACHE_HOME/serkd-jax` or `~/.cache/serkd-jax`,
    and computed again when a file's size or times change. Copies of a file have the same hash.

    Returns:
        path -> 16 hexadecimal digits.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serkd-jax"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(root / "hashes.sqlite", timeout=60)) as database:
            database.execute("CREATE TABLE IF NOT EXISTS hashes (file PRIMARY KEY, hash)")
            known = dict(database.execute("SELECT file, hash FROM hashes"))
            found = {str(path): _content_hash(path, known) for path in paths}
            new = [(key, value) for key, value in found.values() if key and key not in known]
            with database:
                database.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?)", new)
    except (OSError, sqlite3.Error):  # such as no home; then nothing is kept
        found = {str(path): _content_hash(path, {}) for path in paths}
    return {path: value for path, (_, value) in found.items()}


def _content_hash(path: str | Path, known: Mapping[str, str]) -> tuple[str, str]:
    """Returns what a hash is kept by, and the hash."""
    try:
        stat = os.stat(path)
        times = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        key = json.dumps([os.path.realpath(path), *times])
        if key in known:
            return key, known[key]
        with open(path, "rb") as file:
            return key, hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return "", "missing"


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, remedy: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Reads a JSON file that holds an object with these keys.

    Raises:
        UserError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
        _check_keys(value, keys)
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes named arrays as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())


def read_arrays(path: Path, remedy: str, keys: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Reads named arrays, among them these keys, from an .npz file, without pickles.

    Raises:
        UserError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _check_keys(arrays, keys)
            return dict(arrays)
    except Exception as error:  # what zipfile and NumPy raise for damaged bytes has no base class
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error


def _check_keys(found: Collection[str], keys: Collection[str]) -> None:
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"it has no {', '.join(missing)}")
