"""Any corpus that a CSV or JSONL manifest lists, including EmoBox's manifests."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import ClassVar

from serkd_jax.data.corpora.base import CorpusError, SpeechCorpus, Utterance
from serkd_jax.data.tables import Pairs, locate, plain, read_rows, tidy
from serkd_jax.errors import some_of

COLUMNS = ("path", "label", "id", "speaker", "session", "split", "fold", "start", "end")
COLUMNS += ("dialogue", "turn")
ALIASES = {"wav": "path", "emo": "label", "key": "id", "start_time": "start", "end_time": "end"}


class Manifest(SpeechCorpus):
    """Any corpus that a CSV or JSONL file lists, including EmoBox's published JSONL files.

    The columns are path, label and, optionally, id (by default the path), speaker, session, split,
    fold, dialogue and turn (a number that grows in it), and start and end in seconds if an
    utterance is a part of its file. EmoBox's names wav, emo, key, start_time and end_time work as
    well. Relative paths are looked up below `data_dir`, or beside the manifest if it is not given;
    leading folders that do not exist are dropped, the same number in all rows.

    A label map {label: class name} renames and merges labels; a `label_map.json` beside the
    manifest is used by default. The classes are the distinct labels after mapping, sorted. If there
    is no column speaker, the regular expression `speaker_pattern` finds the speaker in the id: it
    is the text of its groups, joined.

    For EmoBox, the folders `fold_K/` beside the manifest say which fold tests on an utterance or,
    if there is only `fold_1`, which split it is in; `data.seg.wrd.stm` has the speakers.
    """

    name = "manifest"
    # By EmoBox's column dataset; for IEMOCAP, its data.seg.wrd.stm has the dialog's speaker.
    SPEAKER_PATTERNS: ClassVar[dict[str, str]] = {
        "emodb": r"^emodb-(\d\d)",
        "iemocap": r"(Ses0\d)\w*_([FM])\d{3}$",
    }

    def __init__(
        self, manifest: str = "", data_dir: str = "", label_map: str = "", speaker_pattern: str = ""
    ):
        super().__init__()
        if not manifest:
            raise CorpusError("give `manifest`, a .csv or .jsonl file with the columns path, label")
        self.manifest = Path(manifest)
        self.data_dir = Path(data_dir) if data_dir else self.manifest.parent
        # EmoBox's label map for EMOVO has the second name.
        beside = [self.manifest.parent / name for name in ("label_map.json", "label_dict.json")]
        found = [Path(label_map)] if label_map else list(filter(Path.is_file, beside))
        self.label_map = found[0] if found else None
        self.speaker_pattern = speaker_pattern
        try:
            re.compile(speaker_pattern)
        except re.error as error:
            raise CorpusError(f"speaker_pattern {speaker_pattern!r}: {error}") from error

    def list_utterances(self) -> list[Utterance]:
        """Lists the rows of the manifest."""
        if not self.manifest.is_file():
            raise CorpusError(f"manifest {self.manifest}: no such file")
        if not self.data_dir.is_dir():
            raise CorpusError(f"data_dir {self.data_dir} is not a folder; it must hold the audio")
        self.notes = []
        rows = self._read_rows()
        if not rows:
            raise CorpusError(f"{self.manifest} lists no utterances; it needs rows of path, label")
        self._add_emobox_parts(rows)
        self._add_speakers(rows)
        if any(values.get("dialogue") for values in rows.values()):
            self.EXTRAS = {"dialogue": str, "turn": float}
        return [self._utterance(values) for values in rows.values()]

    def _read_rows(self) -> dict[str, dict[str, str]]:
        """Reads id -> the values of its row, with the class as label and the path of its file."""
        classes = self._read_label_map()
        rows, places = {}, {}
        listed = list(read_manifest(self.manifest))
        for where, values in listed:
            for column in ("path", "label"):
                if not values.get(column):
                    filled = some_of(name for name, value in values.items() if value)
                    raise CorpusError(
                        f"{where}: no {column}; each row needs path and label, "
                        f"this one has {filled}"
                    )
        files = locate([values["path"] for _, values in listed], self.data_dir, self.notes)
        for (where, values), file in zip(listed, files, strict=True):
            start, end = values.get("start", ""), values.get("end", "")
            part = f"#{start}-{end}" if start or end else ""
            values["id"] = tidy(values.get("id") or values["path"].replace("\\", "/") + part)
            values["label"] = self._class_of(tidy(values["label"]), classes, where)
            values["path"] = str(file)
            for what in (f"id {values['id']!r}", f"file {values['path']}{part}"):
                if what in places:
                    raise CorpusError(
                        f"{where}: {what} is also at {places[what]}; each row must be a recording "
                        "of its own"
                    )
                places[what] = where
            rows[values["id"]] = values | {"where": where}
        return rows

    def _utterance(self, values: dict[str, str]) -> Utterance:
        try:
            start = float(values.get("start") or 0)
            end = float(values["end"]) if values.get("end") else None
            if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
                raise ValueError(f"from {start:g} to {end} is not a part of a file")
        except ValueError as error:
            raise CorpusError(f"{values['where']}: start and end are seconds; {error}") from error
        extras = {}
        if self.EXTRAS:
            dialogue = tidy(values.get("dialogue", ""))
            try:
                turn = float(values.get("turn") or ("" if dialogue else 0))
            except ValueError as error:
                raise CorpusError(
                    f"{values['where']}: turn, the place in a dialogue, is a number; {error}"
                ) from error
            extras = {"dialogue": dialogue, "turn": turn}
        names = ("id", "label", "path", "speaker", "session", "split", "fold")
        texts = {name: values.get(name, "") for name in names}
        return Utterance(**texts, start=start, end=end, extras=extras)

    def _class_of(self, label: str, classes: dict[str, str] | None, where: str) -> str:
        if classes is None:
            return label
        if label in classes:
            return classes[label]
        # EmoBox's maps have "Neutral" where its data have "neutral".
        matches = {name for key, name in classes.items() if plain(key) == plain(label)}
        if len(matches) != 1:
            raise CorpusError(
                f"{where}: label {some_of([label])!r} is not in {self.label_map}; "
                f"it has {some_of(classes)}; add it there or correct the row"
            )
        return matches.pop()

    def _read_label_map(self) -> dict[str, str] | None:
        if self.label_map is None:
            return None
        try:
            text = self.label_map.read_text(encoding="utf-8-sig")
            pairs = json.loads(text, object_pairs_hook=Pairs)
        except (OSError, ValueError, RecursionError) as error:
            raise CorpusError(f"label map {self.label_map} cannot be read: {error}") from error
        if not isinstance(pairs, Pairs) or not all(
            isinstance(c, str) and tidy(c) for _, c in pairs
        ):
            raise CorpusError(f'label map {self.label_map} must be like {{"label": "class name"}}')
        classes: dict[str, str] = {}
        for label, name in ((tidy(label), tidy(name)) for label, name in pairs):
            if classes.setdefault(label, name) != name:
                raise CorpusError(
                    f"label map {self.label_map} has {label!r} twice, as {classes[label]!r} and "
                    f"{name!r}; remove one"
                )
        return classes

    def _add_emobox_parts(self, rows: dict[str, dict[str, str]]) -> None:
        """Adds EmoBox's folds or its split, unless the manifest has folds or splits of its own."""
        if any(values.get("fold") or values.get("split") for values in rows.values()):
            return
        folds = self._read_emobox_folds(rows)
        if list(folds) == ["1"]:
            self._add_split(rows, folds["1"])
        else:
            self._add_folds(rows, folds)

    def _add_split(self, rows: dict[str, dict[str, str]], parts: dict[str, str]) -> None:
        """Adds its part to each row; leaves out rows that are in no part."""
        unlisted = rows.keys() - parts.keys()
        for key in unlisted:
            del rows[key]
        for key, values in rows.items():
            values["split"] = parts[key]
        if unlisted:
            self.notes.append(f"{len(unlisted)} utterances are in no list of fold_1: left out.")

    def _add_folds(self, rows: dict[str, dict[str, str]], folds: dict[str, dict[str, str]]) -> None:
        """Adds the fold that tests on it to each row."""
        for fold, parts in folds.items():
            for key in (key for key, part in parts.items() if part == "test"):
                if other := rows[key].get("fold"):
                    place = self.manifest.parent / f"fold_{fold}"
                    raise CorpusError(f"{place}: {key!r} is also tested by fold {other}")
                rows[key]["fold"] = fold
            used = Counter(parts.values())
            if used["train"] and used["train"] + used["test"] < len(rows):
                self.notes.append(
                    f"Fold {fold} of EmoBox trains on {used['train']} utterances; here it trains "
                    f"on all {len(rows) - used['test']} that it does not test on."
                )

    def _read_emobox_folds(self, ids: Collection[str]) -> dict[str, dict[str, str]]:
        """Reads fold -> id -> train, valid or test from `fold_K/*_PART_fold_K.jsonl`."""
        folds = {}
        for path in sorted(self.manifest.parent.glob("fold_*/[!.]*_fold_*.jsonl")):
            fold, part = path.parent.name.removeprefix("fold_"), path.stem.split("_")[-3]
            if part not in ("train", "valid", "test"):  # MER2023 also lists parts of its test part
                continue
            parts = folds.setdefault(fold, {})
            for where, values in read_manifest(path):
                if (key := tidy(values.get("id", ""))) not in ids:
                    raise CorpusError(f"{where}: {key!r} is not in {self.manifest}")
                if key in parts:
                    raise CorpusError(f"{where}: {key!r} is also in the {parts[key]} part")
                parts[key] = part
        return folds

    def _add_speakers(self, rows: dict[str, dict[str, str]]) -> None:
        """Adds the speaker to rows without one."""
        known = _read_stm_speakers(self.manifest.parent / "data.seg.wrd.stm")
        for key, values in rows.items():
            if values.get("speaker"):
                continue
            default = self.SPEAKER_PATTERNS.get(values.get("dataset", ""), "")
            match = re.search(self.speaker_pattern or default, key)
            found = "".join(filter(None, match.groups())) or match[0] if match else ""
            if self.speaker_pattern and not found:
                raise CorpusError(
                    f"{values['where']}: speaker_pattern {self.speaker_pattern!r} finds no speaker "
                    f"in the id {key!r}"
                )
            values["speaker"] = found or known.get(key, "")


def read_manifest(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE, line N", {column: value}) of a CSV or JSONL file, with our names of columns.

    Where a column is there under our name, in any case, and under EmoBox's, ours is read.

    Raises:
        CorpusError: the file cannot be read, a line makes no sense, or two columns are the same.
    """
    for where, row in read_rows(path):
        there = {column.lower() for column in row}
        columns: dict[str, str] = {}  # our name -> theirs
        for column in row:
            name = column.lower() if column.lower() in {*COLUMNS, *ALIASES} else column
            name = ALIASES.get(name, name) if ALIASES.get(name) not in there else name
            if name in columns:
                raise CorpusError(
                    f"{where}: two columns are the {name}, {columns[name]!r} and {column!r}; "
                    "rename or remove one"
                )
            columns[name] = column
        yield where, {name: row[column] for name, column in columns.items()}


def _read_stm_speakers(path: Path) -> dict[str, str]:
    """Reads id -> speaker from EmoBox's `data.seg.wrd.stm`, if it exists.

    Its lines end in `<id=emodb-15a07Nc,lang=en,spk=male_15,emotion=neutral> neutral`.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    speakers = dict(re.findall(r"<id=(.*?),lang=[^,]*,spk=(.*?),emotion=", text))
    # In MER2023 and RESD, these are not speakers but the names of the files.
    return speakers if len(set(speakers.values())) < len(speakers) else {}
