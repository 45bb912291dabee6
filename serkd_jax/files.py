"""Files that are complete or do not exist. If there are several processes, the first writes."""

import io
import json
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes named arrays as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())


def read_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Reads named arrays from an .npz file, without pickles.

    Raises:
        UserError: the file is missing or damaged; the message ends with the remedy.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
