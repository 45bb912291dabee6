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

from serkd_jax.errors import UserError, some_of

SEPARATORS = (",", ";", "\t", "|")
# Text that programs and people write where a value is missing.
NO_NAMES = ("nan", "none", "null", "n/a", "na", "n.a.", "<na>", "#n/a", "-", "?", "undefined")
NO_NAMES += ("unknown",)
DIFFER = "differ in case, width, accents, zeros or hyphens only"  # what `alike` finds
# Letters of Greek and Cyrillic that look like Latin ones, at least in capitals.
_SAME_SHAPES = str.maketrans("авекмнорстухіјѕαβεζηικμνορτυχı", "abekmhopctyxijsabezhikmnoptyxi")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # neither files nor records can have such names


class CorpusError(UserError):
    """A corpus or a list of files that cannot be used; the message says why and what to do."""


def tidy(name: str) -> str:
    """A name as people see it: composed (NFC), without invisible characters and outer spaces."""
    return " ".join(_visible(unicodedata.normalize("NFC", name)).split())


def _visible(text: str) -> str:
    """Text without characters that have no shape: of control, of format, variation selectors."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter
        for letter in text
        if letter.isspace()
        or not (unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f")
    )


def is_class_name(name: Any) -> bool:
    """Returns whether a class may have this name; a terminal would obey control characters."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 100


def markdown_cell(text: str) -> str:
    """Returns text that stays text, and within one cell, in a Markdown table."""
    return re.sub("[|<`]", r"\\\g<0>", text)


def markdown_code(text: str) -> str:
    """Returns text as code of one line in Markdown."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def is_no_name(name: str) -> bool:
    """Whether a name is empty or says that there is none."""
    return not name or name.lower() in NO_NAMES


def alike(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups of different names that people may take for the same, each sorted."""
    groups: dict[str, set[str]] = {}
    for name in filter(None, names):
        groups.setdefault(plain(name), set()).add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def plain(name: str) -> str:
    """A name without case, width, accents, zeros before a number, and with spaces for hyphens."""
    letters = unicodedata.normalize("NFKD", name).casefold().translate(_SAME_SHAPES)
    kept = "".join(
        str(unicodedata.decimal(letter, letter))
        for letter in letters
        if not unicodedata.combining(letter)
    )
    kept = re.sub(r"(?<=[^\W_])[\s_\u2010-\u2015-]+(?=[^\W_])", " ", tidy(kept))
    kept = re.sub(r"^(\d+)\.0+$", r"\1", kept)  # as tables write whole numbers beside missing ones
    return re.sub(r"(?<![\d.])0+(?=\d)", "", kept)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE, line N", {column: value}) for each row of a CSV or JSONL file.

    A CSV file may be separated by commas, semicolons, tabs or bars. Spaces around values and names
    of columns are dropped, as are empty rows; a missing value, JSON's null and NaN are empty.

    Raises:
        CorpusError: the file cannot be read, a column has two places, or a line makes no sense.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    if (kind := path.suffix.lower()) not in readers:
        raise CorpusError(f"{path}: unknown kind {kind!r}; use .csv, .tsv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if "\0" in file.read(1024):
                raise CorpusError(f"{path}: zero bytes, as in UTF-16; save it as UTF-8 text")
            file.seek(0)
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
    first = next(filter(str.strip, file), "")
    file.seek(0)
    told = re.fullmatch(r'"?sep=(.)"?\s*', first)  # Excel's first line
    # The one that makes the most columns of the first line.
    separator = max(SEPARATORS, key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
    separator = told[1] if told else separator
    rows = _filled_rows(file, path, separator)
    _, names = next(rows, ("", []))
    if told:
        _, names = next(rows, ("", []))
    names = [tidy(name) for name in names]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise CorpusError(f"{path}: two columns are named {twice[0]!r}; rename or remove one")
    for where, cells in rows:
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


def _filled_rows(file: TextIO, path: Path, separator: str) -> Iterator[tuple[str, list[str]]]:
    """Yields ("FILE, line N", cells without outer spaces) of each row that is not empty."""
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            if any(cells := [cell.strip() for cell in cells]):
                yield f"{path}, line {reader.line_num}", cells
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise CorpusError(f"{where}: {error}; check the quotes up to there") from error


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
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # in JSON, 1.0 is 1
    text = str(dict(value) if isinstance(value, Pairs) else value).strip()
    return text.encode("utf-8", "replace").decode()  # half a pair of surrogates is no letter


def locate(paths: Sequence[str], folder: Path, notes: list[str] | None = None) -> list[Path]:
    """The files below a folder that paths of a list name.

    Leading folders that are not there are left off, the same number for all paths: as many as it
    takes until the first part of one of them is there. Separators may be those of Windows, and
    letters composed or not.

    Args:
        paths: what a list says.
        folder: what relative paths begin at.
        notes: gets a sentence if different folders are left off.
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
    beginnings = sorted({"/".join(parts[:left_off]) for parts in split})
    if len(beginnings) > 1 and notes is not None:
        notes.append(
            f"WARNING: {folder} has no {some_of(beginnings, 3)}: the paths are read without these "
            "folders, so that files of other folders may be taken."
        )
    return [_find(folder, parts[min(left_off, len(parts) - 1) :]) for parts in split]


def _parts(path: str, folder: Path) -> tuple[str, ...]:
    if ("\\" in path or ".." in path) and not os.path.exists(folder / path):
        path = os.path.normpath(path.replace("\\", "/"))
    return PurePosixPath(path).parts or (path,)


def _find(folder: Path, parts: Sequence[str]) -> Path:
    """The path, in the first form of its letters that is there."""
    path = folder.joinpath(*parts)
    if os.path.exists(path):
        return path
    for form in ("NFC", "NFD"):
        for shown in (str, _visible):
            names = (unicodedata.normalize(form, shown(part)) for part in parts)
            if os.path.exists(other := folder.joinpath(*names)):
                return other
    return path
