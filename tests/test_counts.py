"""Counts of a copy beside those of the paper: what strict passes and refuses, and the command."""

import subprocess
import sys

import numpy as np
import pytest

from layouts import ROOT, SHARED, needs_corpora
from serkd_jax.data.corpora import IEMOCAP, MELD, Synthetic
from serkd_jax.data.counts import CountsError, check_counts
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import Table, load_table

# The sums that the paper prints, of rows and of classes; of sadness it prints 102.
SUMS = {
    IEMOCAP: {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241}
    | {"neutral": 1708, "happy": 1636, "sad": 1084, "angry": 1103},
    MELD: {"train": 9989, "dev": 1109, "test": 2610}
    | {"anger": 1607, "disgust": 361, "fear": 358, "joy": 2308}
    | {"neutral": 6436, "sadness": 1002, "surprise": 1636},
}
MENDED = [(name, *cell) for name, cell in MELD.KNOWN_FLAWS.items()]


def published(corpus):
    """(id, row, label) of the utterances as the paper counts them, less those no copy has."""
    utterances = [
        (f"{row}_{label}_{number:04d}", row, label)
        for row, counts in corpus.PUBLISHED.rows.items()
        for label, count in zip(corpus.PUBLISHED.classes, counts, strict=True)
        for number in range(count)
    ]
    return without(utterances, *corpus.KNOWN_FLAWS.values())


def without(utterances, *cells):
    """Less one utterance of each cell, a row and a label."""
    left = [*utterances]
    for cell in cells:
        left.remove(next(utterance for utterance in left if utterance[1:] == cell))
    return left


def check(corpus, utterances, strict=True):
    """The report on records of those utterances, without their audio."""
    ids, rows, labels = map(np.array, zip(*sorted(utterances), strict=True))
    columns = dict.fromkeys(("speakers", "sessions", "splits", "folds"), np.full(len(ids), ""))
    columns[f"{corpus.PUBLISHED.column}s"] = rows
    table = Table(
        ids=ids,
        labels=np.searchsorted(corpus.CLASSES, labels).astype(np.int32),
        class_names=corpus.CLASSES,
        num_samples=np.full(len(ids), 16_000, np.int32),
        skipped=[],
        **columns,
    )
    return check_counts(table, corpus("."), strict)


def refused(corpus, utterances):
    """What strict says of them."""
    source = corpus.PUBLISHED.source
    with pytest.raises(CountsError, match=f"does not have the counts of {source}\n") as error:
        check(corpus, utterances)
    return str(error.value)


def cells(report):
    """Row -> cells of the report's table."""
    rows = [text.strip("| ").split("|") for text in report.splitlines() if text[:1] == "|"]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def marked(report):
    """Row -> its cells that differ by more than what is known."""
    differing = {
        row: [cell for cell in texts if "(" in cell and "known" not in cell]
        for row, texts in cells(report).items()
    }
    return {row: texts for row, texts in differing.items() if texts}


def test_strict_needs_published_counts(tmp_path):
    corpus = Synthetic(1, 1, 0.2, 0.3)
    table = load_table(prepare_records(corpus, tmp_path))
    assert cells(check_counts(table, corpus, strict=False))["1"] == ["1", "1", "1", "1", "4"]
    with pytest.raises(CountsError, match="no published counts of synthetic"):
        check_counts(table, corpus, strict=True)


@pytest.mark.parametrize(("corpus", "number", "total"), [(IEMOCAP, 1, 5531), (MELD, 2, 13708)])
def test_the_published_counts_have_the_sums_that_the_paper_prints(corpus, number, total):
    assert corpus.PUBLISHED.source == f"Table {number} of the paper"
    counts = np.array([*corpus.PUBLISHED.rows.values()])
    names = [*corpus.PUBLISHED.rows, *corpus.PUBLISHED.classes]
    sums = [*counts.sum(axis=1), *counts.sum(axis=0)]
    assert dict(zip(names, sums, strict=True)) == SUMS[corpus]
    assert counts.sum() == total


@pytest.mark.parametrize(
    ("corpus", "row", "expected"),
    [
        (IEMOCAP, "3", ["320 / 320", "286 / 286", "305 / 305", "240 / 240", "1,151 / 1,151"]),
        (IEMOCAP, "sum", [f"{n:,} / {n:,}" for n in (1708, 1636, 1084, 1103, 5531)]),
        (MELD, "test", [f"{n:,} / {n:,}" for n in (345, 68, 50, 402, 1256, 208, 281, 2610)]),
    ],
)
def test_strict_passes_a_copy_with_the_published_counts(corpus, row, expected):
    report = check(corpus, published(corpus))
    assert cells(report)[row] == expected
    assert marked(report) == {}


@pytest.mark.parametrize(
    ("corpus", "row", "label", "in_row", "in_sum"),
    [
        (
            *(IEMOCAP, "3", "sad"),
            ["304 / 305 (-1)", "1,150 / 1,151 (-1)"],
            ["1,083 / 1,084 (-1)", "5,530 / 5,531 (-1)"],
        ),
        (
            *(MELD, "train", "neutral"),
            ["4,708 / 4,710 (-2)", "9,987 / 9,989 (-2)"],
            ["6,433 / 6,436 (-3)", "13,705 / 13,708 (-3)"],
        ),
        (
            *(MELD, "test", "neutral"),
            ["1,255 / 1,256 (-1)", "2,609 / 2,610 (-1)"],
            ["6,433 / 6,436 (-3)", "13,705 / 13,708 (-3)"],
        ),
    ],
)
def test_strict_refuses_a_copy_that_lacks_one_utterance_and_marks_its_cell(
    corpus, row, label, in_row, in_sum
):
    utterances = without(published(corpus), (row, label))
    report = refused(corpus, utterances)
    assert report.endswith(check(corpus, utterances, strict=False))
    assert marked(report) == {row: in_row, "sum": in_sum}


@pytest.mark.parametrize("corpus", [IEMOCAP, MELD])
def test_strict_sees_a_label_that_is_another_where_all_sums_are_right(corpus):
    first, second, *_ = corpus.PUBLISHED.rows
    a, b = corpus.PUBLISHED.classes[-2:]
    utterances = without(published(corpus), (first, a), (second, b))
    utterances += [("another", first, b), ("one more", second, a)]
    marks = {
        row: [text.split()[-1] for text in texts]
        for row, texts in marked(refused(corpus, utterances)).items()
    }
    assert marks == {first: ["(-1)", "(+1)"], second: ["(+1)", "(-1)"]}


# Flaws that every copy of MELD has


def test_known_flaws_are_marked_and_counted():
    report = check(MELD, published(MELD))
    assert "2 of them are known: no copy of the corpus has them." in report
    assert {row: texts[4] for row, texts in cells(report).items() if row in ("train", "dev")} == {
        "train": "4,709 / 4,710 (-1 known)",
        "dev": "469 / 470 (-1 known)",
    }
    assert cells(report)["sum"][4] == "6,434 / 6,436 (-2 known)"
    assert cells(report)["sum"][-1] == "13,706 / 13,708 (-2 known)"
    assert report.count("known)") == 6  # with the totals of train, dev and all


def test_strict_passes_a_copy_that_has_what_the_others_lack():
    report = check(MELD, published(MELD) + MENDED)
    assert cells(report)["sum"][-1] == "13,708 / 13,708"
    assert "known" not in report


def test_other_losses_are_not_taken_for_the_known_ones():
    """Both known flaws are there, two other neutral utterances are not."""
    others = without(published(MELD), ("train", "neutral"), ("dev", "neutral"))
    assert marked(refused(MELD, others + MENDED))["dev"] == ["469 / 470 (-1)", "1,108 / 1,109 (-1)"]


# python -m serkd_jax.records


def run_command(*flags):
    command = [sys.executable, "-m", "serkd_jax.records", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@needs_corpora
def test_the_command_with_strict_passes_the_whole_of_emodb(tmp_path):
    data_dir = SHARED / "emodb"
    done = run_command(
        "--corpus=emodb", "--strict", f"--data_dir={data_dir}", f"--cache_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout)["all"][-1] == "535 / 535"
    assert marked(done.stdout) == {}


def test_the_command_with_strict_fails_on_a_part_of_the_corpus(iemocap, tmp_path):
    done = run_command(
        "--corpus=iemocap", "--strict", f"--data_dir={iemocap}", f"--cache_dir={tmp_path}"
    )
    assert done.returncode == 1
    assert "error: strict: this copy of iemocap does not have the counts of Table 1" in done.stderr
    assert "4 / 384 (-380)" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_command_builds_a_part_of_the_corpus_and_names_what_it_left_out(meld, tmp_path):
    done = run_command("--corpus=meld", f"--data_dir={meld}", f"--cache_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout)["dev"][0] == "1 / 153 (-152)"
    assert "4 files or lines were skipped:" in done.stdout
    videos = [f"test/final_videos_testdia{n}_utt{n}.mp4" for n in (0, 1)]
    for name in [*MELD.KNOWN_FLAWS, *videos]:
        assert f"- `{name}`: {meld}" in done.stdout
    assert "21 utterances, 0.00 h of audio, are in" in done.stdout
    assert len(load_table(done.stdout.split()[-1])) == 21
    assert "Traceback" not in done.stderr
