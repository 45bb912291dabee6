"""Compares the contents of a copy of a corpus with the counts that were published."""

from collections.abc import Sequence

import numpy as np

from serkd_jax.audio.logmel import num_samples
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.corpora.base import SpeechCorpus
from serkd_jax.data.reader import Table
from serkd_jax.data.splits import Fold, speaker_note
from serkd_jax.data.tables import markdown_cell, markdown_code
from serkd_jax.errors import UserError


class CountsError(UserError):
    """A copy of a corpus that differs from what was published; a report may follow the message."""

    def __init__(self, message: str, report: str = ""):
        super().__init__(message)
        self.args = (f"{self}\n\n{report}".rstrip(),)


def check_counts(
    table: Table, corpus: SpeechCorpus, strict: bool, most_named: int | None = None
) -> str:
    """Reports on a corpus: counts as a Markdown table, then what was left out and why.

    Args:
        table: the table of the corpus's audio records.
        corpus: the corpus from which the records were made; it must have been listed.
        strict: whether counts that differ from the published ones are an error. Utterances that no
            copy of the corpus has (`KNOWN_FLAWS`) do not count as a difference.
        most_named: how many skipped files the report names at most; None means all.

    Raises:
        CountsError: `strict` is set, and the counts differ or none are published.
    """
    if corpus.PUBLISHED:
        lines, differ = _compared_counts(table, corpus)
    elif strict:
        raise CountsError(f"strict: there are no published counts of {corpus.name} to compare with")
    else:
        lines, differ = _plain_counts(table), False
    skipped = [*corpus.skipped, *table.skipped]
    notes = [*corpus.notes, *_noticed(table, most_named), *_copies(table)]
    report = "\n\n".join(["\n".join(lines), *notes, *_skipped(skipped, most_named)])
    if strict and differ:
        raise CountsError(
            f"strict: this copy of {corpus.name} does not have the counts of "
            f"{corpus.PUBLISHED.source}",
            report,
        )
    return report


def _count(table: Table, column: str, rows: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Counts utterances by the values `rows` of a column and by class; "" has one value, "all"."""
    values = _values(table, column)
    names = np.array(table.class_names, str)[table.labels]
    return np.array([[np.sum((values == r) & (names == c)) for c in classes] for r in rows])


def _values(table: Table, column: str) -> np.ndarray:
    columns = {"session": table.sessions, "split": table.splits, "": np.full(len(table), "all")}
    return columns[column]


def _plain_counts(table: Table) -> list[str]:
    column = "split" if any(table.splits) else "session" if any(table.sessions) else ""
    rows = sorted(set(_values(table, column).tolist()))
    counts = _with_sums(_count(table, column, rows, table.class_names))
    cells = [[f"{count:,}" for count in row] for row in counts]
    return _markdown(column, rows, table.class_names, cells)


def _compared_counts(table: Table, corpus: SpeechCorpus) -> tuple[list[str], bool]:
    """Makes the table "here / published"; also returns whether unknown differences remain."""
    published = corpus.PUBLISHED
    rows, classes = list(published.rows), list(published.classes)
    expected = np.array(list(published.rows.values()))
    known = np.zeros_like(expected)
    for name in set(corpus.KNOWN_FLAWS) - set(table.ids.tolist()):
        row, label = corpus.KNOWN_FLAWS[name]
        known[rows.index(row), classes.index(label)] += 1

    def cell(here: int, there: int, flaws: int) -> str:
        mark = " known" if here + flaws == there else ""
        return f"{here:,} / {there:,}" + (f" ({here - there:+,}{mark})" if here != there else "")

    counts = _count(table, published.column, rows, classes)
    sums = (_with_sums(array).tolist() for array in (counts, expected, known))
    cells = [list(map(cell, *row)) for row in zip(*sums, strict=True)]
    lines = _markdown(published.column, rows, classes, cells)
    lines += ["", f"Utterances in this copy / in {published.source}; differences in brackets."]
    if known.any():
        lines.append(f"{known.sum()} of them are known: no copy of the corpus has them.")
    return lines, not np.array_equal(counts + known, expected)


def _skipped(skipped: list[dict[str, str]], most_named: int | None) -> list[str]:
    if not skipped:
        return []
    reasons = [(skip["id"], skip["reason"]) for skip in skipped]
    more = "; `python -m serkd_jax.records` names them all"
    return [f"{len(skipped):,} files or lines were skipped:", _listed(reasons, most_named, more)]


def _noticed(table: Table, most_named: int | None) -> list[str]:
    """Returns what was noticed when recordings were read, if anything."""
    noticed = [
        (name, notice) for name, notice in zip(table.ids, table.notices, strict=False) if notice
    ]
    if not noticed:
        return []
    return [f"{len(noticed):,} recordings were not used as they are:", _listed(noticed, most_named)]


def _listed(reasons: Sequence[tuple[str, str]], most_named: int | None, more: str = "") -> str:
    """Lists ids with what is said about each, and after the most to name the number of the rest."""
    named = [
        f"- {markdown_code(name)}: {markdown_cell(' '.join(reason.split()))}"
        for name, reason in reasons[:most_named]
    ]
    if len(named) < len(reasons):
        named.append(f"- and {len(reasons) - len(named):,} more{more}")
    return "\n".join(named)


def _copies(table: Table) -> list[str]:
    """Returns a warning if recordings hold the same samples."""
    groups = copies(table)
    if not groups:
        return []
    first = groups[0]
    labels = sum(len(set(table.labels[rows].tolist())) > 1 for rows in groups)
    differ = f"; {labels} of these groups have different labels" if labels else ""
    return [
        f"WARNING: {sum(map(len, groups)):,} recordings hold the same samples as another one, e.g. "
        f"{' and '.join(table.ids[first[:3]])}{differ}."
    ]


def copies(table: Table) -> list[np.ndarray]:
    """Returns the rows of each group of recordings that hold the same samples."""
    _, group, sizes = np.unique(table.hashes, return_inverse=True, return_counts=True)
    return [np.flatnonzero(group == k) for k in np.flatnonzero(sizes > 1)]


def _with_sums(counts: np.ndarray) -> np.ndarray:
    """Adds a column of totals to (rows, classes) and, if there are several rows, a row of sums."""
    if len(counts) > 1:
        counts = np.vstack([counts, counts.sum(axis=0)])
    return np.hstack([counts, counts.sum(axis=1, keepdims=True)])


def _markdown(
    column: str, rows: Sequence[str], classes: Sequence[str], cells: list[list[str]]
) -> list[str]:
    """Makes a Markdown table that is also readable on a terminal."""
    titles = [row or f"no {column}" for row in rows] + ["sum"] * (len(rows) > 1)
    titles, classes = ([*map(markdown_cell, names)] for names in (titles, classes))
    lines = [[column, *classes, "total"]]
    lines += [[title, *row] for title, row in zip(titles, cells, strict=True)]
    widths = [max(3, *map(len, texts)) for texts in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]


def data_notes(
    table: Table, folds: Sequence[Fold], max_frames: int, strict: bool = False
) -> list[str]:
    """Returns what a reader of the results must know about speakers, parts, classes and lengths.

    Raises:
        CountsError: `strict` is set, and a recording is both tested and trained on.
    """
    notes = [speaker_note(folds, table.speakers)]
    shared = _trained_on(table, folds)
    if shared and strict:
        raise CountsError(f"strict: {shared[0]}")
    notes += shared
    for fold in folds:
        if unused := len(table) - sum(map(len, fold.parts.values())):
            notes.append(f"{unused} utterances are in no part of fold {fold.name}.")
    sizes = np.bincount(table.labels, minlength=len(table.class_names))
    empty = [n for n, size in zip(table.class_names, sizes, strict=True) if size == 0]
    if empty:
        notes.append(f"No utterance could be used of: {', '.join(empty)}.")
    limit = num_samples(max_frames)
    if cut := int((table.num_samples > limit).sum()):
        notes.append(
            f"{cut} utterances are longer than max_frames={max_frames} "
            f"({limit / SAMPLE_RATE:.1f} s) and were cut there."
        )
    return notes


def _trained_on(table: Table, folds: Sequence[Fold]) -> list[str]:
    """Returns a warning if a test part holds the same samples as another part of its fold."""
    groups, found, pair = copies(table), 0, ()
    for fold in folds:
        tested = np.zeros(len(table), bool)
        tested[fold.test] = True
        others = np.zeros(len(table), bool)
        others[np.concatenate([x for part, x in fold.parts.items() if part != "test"])] = True
        for rows in groups:
            if tested[rows].any() and others[rows].any():
                found += int(tested[rows].sum())
                pair = pair or (fold.name, rows[tested[rows]][0], rows[others[rows]][0])
    if not found:
        return []
    name, test, other = pair
    return [
        f"WARNING: {found} test recordings hold the same samples as one that is trained on (fold "
        f"{name}: {table.ids[test]} and {table.ids[other]}): remove one of each."
    ]
