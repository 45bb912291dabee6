"""Tables as people write them, the names in them, and the files that they list."""

import csv
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from serkd_jax.errors import UserError

SEPARATORS = (",", ";", "\t")
# Text that programs write where a value is missing.
NO_NAMES = ("nan", "none", "null", "n/a")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # neither files nor records can have such names
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


class CorpusError(UserError):
    """A corpus or a list of files that cannot be used; the message says why and what to do."""


def tidy(name: str) -> str:
    """A name as people see it: composed (NFC), without invisible characters and outer spaces."""
    return " ".join(unicodedata.normalize("NFC", name).translate(_INVISIBLE).split())


def is_class_name(name: Any) -> bool:
    """Returns whether a class may have this name; a terminal would obey control characters."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 100


def markdown_cell(text: str) -> str:
    """Returns text that stays within one cell of a Markdown table."""
    return text.replace("|", r"\|")


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of different names that differ in case, width or accents only, each sorted."""
    groups: dict[str, set[str]] = {}
    for name in filter(None, names):
        groups.setdefault(plain(name), set()).add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def plain(name: str) -> str:
    """A name without case, width and accents."""
    letters = unicodedata.normalize("NFKD", name)
    kept = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return tidy(kept.casefold())


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE, line N", {column: value}) for each row of a CSV or JSONL file.

    A CSV file may be separated by commas, semicolons or tabs. Spaces around values and names of
    columns are dropped, as are empty rows; a missing value, JSON's null and NaN are empty.

    Raises:
        CorpusError: the file cannot be read, a column has two places, or a line makes no sense.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    if (kind := path.suffix.lower()) not in readers:
        raise CorpusError(f"{path}: unknown kind {kind!r}; use .csv, .tsv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for where, row in readers[kind](file, path):
                for name, value in row.items():
                    if _NO_TEXT.search(name + value):
                        raise CorpusError(f"{where}: {name!r} is no text: {value!r}; correct it")
                yield where, row
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path}: {error}; save it as UTF-8 text") from error


def _read_csv(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    first = file.readline()
    file.seek(0)
    # The one that makes the most columns of the first line.
    separator = max(SEPARATORS, key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
    reader = csv.reader(file, delimiter=separator)
    names = [tidy(name) for name in next(reader, [])]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise CorpusError(f"{path}: two columns are named {twice[0]!r}; rename or remove one")
    for cells in reader:
        where, cells = f"{path}, line {reader.line_num}", [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if any(cells[len(names) :]):
            raise CorpusError(
                f"{where}: more values than columns; quote values that hold {separator!r}"
            )
        cells += [""] * (len(names) - len(cells))
        if nameless := [
            cell for name, cell in zip(names, cells, strict=False) if cell and not name
        ]:
            raise CorpusError(f"{where}: {nameless[0]!r} is in a column without a name; name it")
        yield where, {name: cell for name, cell in zip(names, cells, strict=False) if name}


def _read_jsonl(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=Pairs)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not JSON ({error}); put one object on a line") from error
        if not isinstance(pairs, Pairs):
            raise CorpusError(f"{where}: {line.strip()[:40]!r} is not a JSON object")
        row: dict[str, str] = {}
        for name, value in pairs:
            if (name := tidy(name)) in row:
                raise CorpusError(f"{where}: two values are named {name!r}; remove one")
            row[name] = _as_text(value)
        yield where, row


class Pairs(list):
    """The names and values of a JSON object, also those that have the same name."""


def _as_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(dict(value) if isinstance(value, Pairs) else value).strip()


def locate(paths: Sequence[str], folder: Path) -> list[Path]:
    """The files below a folder that paths of a list name.

    Leading folders that are not there are left off, the same number for all paths: as many as it
    takes until the first part of one of them is there. Separators may be those of Windows, and
    letters composed or not.
    """
    split = [_parts(path, folder) for path in paths]
    known: dict[str, bool] = {}

    def exists(part: str) -> bool:
        if part not in known:
            known[part] = os.path.exists(_find(folder, (part,)))
        return known[part]

    depth = max(map(len, split), default=1)
    there = (k for k in range(depth) if any(exists(parts[k]) for parts in split if k < len(parts)))
    left_off = next(there, 0)
    return [_find(folder, parts[min(left_off, len(parts) - 1) :]) for parts in split]


def _parts(path: str, folder: Path) -> tuple[str, ...]:
    if "\\" in path and not os.path.exists(folder / path):
        path = path.replace("\\", "/")
    return PurePosixPath(path).parts or (path,)


def _find(folder: Path, parts: Sequence[str]) -> Path:
    """The path, in the first form of its letters that is there."""
    path = folder.joinpath(*parts)
    if os.path.exists(path):  # False for names that are too long, unlike Path.exists
        return path
    for form in ("NFC", "NFD"):
        other = folder.joinpath(*(unicodedata.normalize(form, part) for part in parts))
        if os.path.exists(other):
            return other
    return path
