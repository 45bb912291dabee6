"""Random halves of the speakers, and the differences over them."""

import json

import numpy as np
import pytest

from benchmarks.divisions import compare, difference, make
from serkd_jax.errors import UserError
from test_compare import make_predictions, write_run

PEOPLE = [f"{k:02}" for k in range(7)]


@pytest.fixture
def run(tmp_path):
    """A run's predictions of seven speakers, with two rows for each utterance."""
    lines = ["id,speaker,row,label"]
    for speaker in PEOPLE:
        for i in range(24):
            key = f"{speaker}-{i},{speaker}"
            lines += [f"{key},{row},{'abc'[i % 3]}" for row in ("teacher", "student")]
    (tmp_path / "predictions.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_each_speaker_is_tested_once_by_models_that_have_not_heard_him(run):
    make(run, run / "divisions", 20)
    halves = set()
    for k in range(1, 21):
        folds = json.loads((run / "divisions" / f"{k}.json").read_text())
        tested = []
        for fold in folds.values():
            parts = {
                part: {key.split("-")[0] for key in ids}
                for part, ids in fold.items()
                if part != "held_out"
            }
            assert not parts["test"] & set.union(*(v for p, v in parts.items() if p != "test"))
            assert sum(len(ids) for p, ids in fold.items() if p != "held_out") == 7 * 24
            tested.append(tuple(sorted(parts["test"])))
        assert sorted(sum(tested, ())) == PEOPLE
        assert [len(each) for each in tested] == [4, 3]
        halves.add(frozenset(tested))
    assert len(halves) == 20
    with pytest.raises(UserError, match="7 speakers can only be divided in 35 ways"):
        make(run, run / "divisions", 36)


def test_an_interval_is_that_of_other_divisions_and_other_speakers():
    rng = np.random.default_rng(0)
    of_division, of_draw = rng.normal(0.02, 0.03, 8), rng.normal(0, 0.01, 4000)
    scores = {"a": of_division, "b": np.zeros(8)}
    drawn = {"a": of_division[:, None] + of_draw, "b": np.zeros((8, 4000))}
    line = difference("gain", (scores, drawn), "a", (scores, drawn), "b")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == f"{100 * of_division.mean():+.1f} ± {100 * of_division.std(ddof=1):.1f}"
    assert cells[2:5] == [
        f"{100 * of_division.min():+.1f}",
        f"{100 * of_division.max():+.1f}",
        "8/8",
    ]
    low, high = (float(x) for x in cells[5].split(" to "))
    spread = 100 * 1.96 * np.sqrt(of_draw.var() + of_division.var() / 8)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.06)
    assert spread > 1.05 * 196 * of_draw.std()


def test_a_setting_is_compared_with_the_whole_on_the_divisions_that_both_have(tmp_path):
    right = {"teacher": 0.9, "student": 0.5, "distilled_student": 0.6, "updated_student": 0.7}
    every = [(part, k) for part in ("first_order", "whole") for k in (1, 2, 3)]
    for part, k in every[:-1]:
        better = right | {"updated_student": 0.95} if part == "first_order" else right
        predictions = make_predictions(400, seed=k, **better)
        write_run(tmp_path / f"division={k},{part}", predictions, seed=k, probe=0.4)
    table = {x.split("|")[1].strip(): x.split("|")[2:] for x in compare(tmp_path).splitlines()}
    assert "2 divisions" in table
    gain = {
        row: float(table[f"{row}: first_order − whole"][0].split()[0])
        for row in ("student", "distilled_student", "updated_student")
    }
    means = [float(table[f"{x}: updated_student"][0].split()[0]) for x in ("first_order", "whole")]
    assert gain["student"] == gain["distilled_student"] == 0 < 10 < gain["updated_student"]
    assert gain["updated_student"] == pytest.approx(means[0] - means[1], abs=0.11)
    with pytest.raises(UserError, match="no 'none': --to may be first_order, whole"):
        compare(tmp_path, "none")
