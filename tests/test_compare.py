"""Intervals, tests and the comparison of runs, against loops, known examples and the truth."""

import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, f1_score, recall_score

from layouts import ROOT
from serkd_jax.compare import main
from serkd_jax.errors import UserError
from serkd_jax.files import write_arrays, write_json
from serkd_jax.results import intervals, paper, typeset
from serkd_jax.results.comparison import compare, group_runs, read_runs
from serkd_jax.results.comparison_tables import tables_of
from serkd_jax.results.html_comparison import comparison_page
from serkd_jax.results.intervals import bootstrap, holm, mcnemar, paired, resample
from serkd_jax.results.metrics import classification_metrics
from serkd_jax.results.predictions import pooled, score

CLASSES = np.array(["angry", "happy", "rare", "never"])


def predict(labels, right, seed):
    """Logits that are right with a probability of `right`, which may differ by utterance."""
    rng = np.random.default_rng(seed)
    guess = np.where(rng.random(len(labels)) < right, labels, rng.integers(0, 3, len(labels)))
    return np.eye(len(CLASSES))[guess]


def make_predictions(size=60, speakers=8, seed=0, **right):
    """Two folds of half of the speakers each; the class `never` does not occur."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size, p=[0.5, 0.45, 0.05])
    number = np.arange(size) % speakers if speakers else np.zeros(size, int)
    rows = {row: predict(labels, share, i) for i, (row, share) in enumerate(right.items())}
    folds = {}
    for fold, members in (("1", number < speakers / 2), ("2", number >= speakers / 2)):
        if members.any():
            folds[fold] = {
                "ids": np.array([f"u{i:03d}" for i in np.flatnonzero(members)]),
                "speaker": np.array([f"s{i}" if speakers else "" for i in number[members]]),
                "label": labels[members],
                "classes": CLASSES,
                **{row: logits[members] for row, logits in rows.items()},
            }
    return folds


def write_run(workdir, predictions, corpus="synthetic", seed=0, probe=None, **settings):
    """What a finished run leaves, as far as a comparison reads it."""
    known = {"the corpus": "c", "the splits": "s", "corpus": corpus, "student.inverted": True}
    write_json(
        workdir / "run.json", known | {"contrastive.weight": 0.1} | settings | {"seed": seed}
    )
    params = {"teacher": 300 * 2**20, "student": 12 * 2**20}
    results = {"corpus": corpus, "config": {}, "params": params, **score(predictions)}
    write_json(workdir / "results.json", results)
    for fold, arrays in predictions.items():
        write_arrays(workdir / f"fold_{fold}" / "predictions.npz", **arrays)
        if probe is not None:
            decided = {name: arrays[name] for name in ("ids", "speaker", "label", "classes")}
            decided["linear_probe"] = predict(arrays["label"], probe, 99)
            write_arrays(workdir / f"fold_{fold}" / "probe.npz", **decided)
    return workdir


# Intervals


@pytest.mark.parametrize("by", ["utterance", "speaker"])
def test_a_draw_is_scored_as_scikit_learn_scores_what_was_drawn(by):
    """In a loop, with the same draws; in many of them, the rare class does not occur."""
    tested = make_predictions(teacher=0.6, student=0.4)
    for arrays in tested.values():  # who are drawn one by one
        arrays["speaker"][arrays["speaker"] == "s0"] = ""
    label, unit = pooled(tested, "label"), pooled(tested, "ids")
    if by == "speaker":
        speaker = pooled(tested, "speaker")
        unit = np.where(speaker == "", np.char.add("", unit), speaker)
        names = sorted(set(unit), key=lambda name: (name[0] == "s", name))  # those without first
    else:
        names = sorted(set(unit))
    rng, absent = np.random.default_rng(3), 0
    found = resample(tested, by, draws=50, seed=3)
    for k in range(50):
        drawn = rng.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(unit == names[i]) for i in drawn])
        absent += 2 not in label[rows]
        for row in ("teacher", "student"):
            predicted = pooled(tested, row).argmax(-1)[rows]
            expected = recall_score(
                label[rows], predicted, average=None, labels=[*set(label[rows])]
            )
            assert found[row]["ua"][k] == pytest.approx(expected.mean())
            assert found[row]["wa"][k] == pytest.approx(accuracy_score(label[rows], predicted))
            expected = f1_score(label[rows], predicted, average="weighted", zero_division=0)
            assert found[row]["wf1"][k] == pytest.approx(expected)
    assert 0 < absent < 50
    low, high = bootstrap(tested, by, draws=50, seed=3)["student"]["wf1"]
    assert (low, high) == tuple(np.percentile(found["student"]["wf1"], [2.5, 97.5]))


def test_counts_are_scored_as_the_results_are():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(4, (2, 90), p=[0.5, 0.3, 0.2, 0])
    predicted[:9] = 3  # which does not occur in the labels
    expected = classification_metrics(labels, predicted, 4)
    scores = intervals.confusion_scores(np.array(expected["confusion"]))
    assert {name: float(value) for name, value in scores.items()} == pytest.approx(
        {name: expected[name] for name in ("ua", "wa", "wf1")}
    )


def test_an_utterance_that_two_folds_test_is_drawn_once():
    tested = make_predictions(student=0.5)
    twice = {"1": tested["1"], "2": dict(tested["1"])}
    assert bootstrap(twice) == bootstrap({"1": tested["1"]})


def test_where_speakers_differ_only_the_interval_by_speaker_covers():
    """Simulated corpora of 20 speakers, each of which is recognised with a rate of their own."""
    rng, covered = np.random.default_rng(0), {"utterance": 0, "speaker": 0}
    for _ in range(100):
        rates = np.clip(rng.normal(0.6, 0.15, 20), 0, 1).repeat(30)
        labels = np.arange(600) % 3
        right = rng.random(600) < rates
        tested = {
            "ids": np.arange(600).astype(str),
            "speaker": np.arange(20).repeat(30).astype(str),
            "label": labels,
            "classes": CLASSES[:3],
            "student": np.eye(3)[np.where(right, labels, (labels + 1) % 3)],
        }
        for by in covered:
            low, high = bootstrap({"1": tested}, by, draws=200)["student"]["wa"]
            covered[by] += low <= 0.6 <= high
    assert covered["speaker"] >= 85
    assert covered["utterance"] <= 80


def test_few_speakers_have_no_interval():
    tested = make_predictions(speakers=intervals.LEAST_SPEAKERS - 1, student=0.5, teacher=0.9)
    assert np.isnan(bootstrap(tested, "speaker")["student"]["ua"]).all()
    assert np.isnan(paired(tested, "teacher", tested, "student", "speaker")["ua"].p)
    nobody = make_predictions(speakers=0, student=0.5)
    assert np.isnan(bootstrap(nobody, "speaker")["student"]["ua"]).all()
    enough = make_predictions(speakers=intervals.LEAST_SPEAKERS, student=0.5)
    assert not np.isnan(bootstrap(enough, "speaker")["student"]["ua"]).any()


# Paired tests


@pytest.mark.parametrize("by", ["utterance", "speaker"])
def test_equal_rows_do_not_differ_and_shuffled_ones_do(by):
    tested = make_predictions(size=200, student=0.7)
    shuffled = {}
    for fold, arrays in tested.items():
        order = np.random.default_rng(0).permutation(len(arrays["ids"]))
        shuffled[fold] = arrays | {"student": arrays["student"][order]}
    for difference in paired(tested, "student", tested, "student", by).values():
        assert difference == (0, (0, 0), 1)
    for difference in paired(tested, "student", shuffled, "student", by).values():
        assert difference.value > 0.2
        assert difference.p < 0.01
        assert 0 < difference.interval[0] < difference.value < difference.interval[1]


def test_utterances_are_paired_by_their_ids_in_whatever_order_or_fold():
    tested = make_predictions(student=0.5, teacher=0.6)
    order = np.random.default_rng(0).permutation(60)
    names = ("ids", "speaker", "label", "student", "teacher")
    mixed = {name: pooled(tested, name)[order] for name in names} | {"classes": CLASSES}
    mixed = {"1": mixed}
    expected = paired(tested, "student", tested, "teacher")
    assert paired(tested, "student", mixed, "teacher") == expected
    assert paired(mixed, "student", mixed, "teacher") == expected


@pytest.mark.parametrize(("name", "told"), [("ids", "ids"), ("label", "labels"), ("x", "no x")])
def test_runs_that_cannot_be_paired_are_named(name, told):
    tested = make_predictions(student=0.5)
    other = {fold: dict(arrays) for fold, arrays in tested.items()}
    if name in other["1"]:
        other["1"][name] = other["1"][name][::-1].copy()
        other["1"][name][0] = tested["2"][name][0]
    row = "student" if name in other["1"] else "x"
    with pytest.raises(UserError, match=f"theirs .*{told}"):
        paired(tested, "student", other, row, names=("mine", "theirs"))


def test_p_is_that_of_the_normal_test_where_many_utterances_make_it_so():
    tested = make_predictions(size=1000, student=0.5, teacher=0.55)
    right, other = (
        pooled(tested, row).argmax(-1) == pooled(tested, "label") for row in ("teacher", "student")
    )
    differences = right.astype(float) - other
    z = differences.mean() / (differences.std() / np.sqrt(1000))
    found = paired(tested, "teacher", tested, "student", draws=4000)["wa"]
    assert found.value == pytest.approx(differences.mean())
    assert found.p == pytest.approx(2 * norm.sf(abs(z)), abs=0.02)
    half = 1.96 * differences.std() / np.sqrt(1000)
    bounds = [differences.mean() - half, differences.mean() + half]
    np.testing.assert_allclose(found.interval, bounds, atol=0.002)


def test_the_data_needed_would_find_the_difference_four_times_in_five():
    """Drawn from a normal distribution of the difference, as narrow as so much data makes it."""
    value, error = 0.02, 0.03
    interval = (value - norm.ppf(0.975) * error, value + norm.ppf(0.975) * error)
    narrower = error / intervals.Difference(value, interval, 0.5).times_needed ** 0.5
    drawn = np.random.default_rng(0).normal(value, narrower, 100_000)
    assert (np.abs(drawn) > norm.ppf(0.975) * narrower).mean() == pytest.approx(0.8, abs=0.01)
    assert np.isnan(intervals.Difference(0.0, (0.0, 0.0), 1.0).times_needed)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    """Of 8 pairs, 7 favour one side: p = 2 (8 + 1) / 2^8. Of 10, 1: p = 2 (10 + 1) / 2^10."""
    label = np.zeros(30, int)
    first, second = np.zeros((2, 30), int)
    first[:1], second[1:8] = 1, 1
    assert mcnemar(label, first, second) == pytest.approx(2 * 9 / 2**8)
    second[1:10] = 1
    assert mcnemar(label, first, second) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar(label, first, second) == mcnemar(label, second, first)
    assert mcnemar(label, first, first) == 1


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1]
    np.testing.assert_allclose(holm([0.01, np.nan, 0.02]), [0.02, np.nan, 0.02])
    assert holm([]) == []


# Comparisons


def test_seeds_are_averaged_and_each_is_paired_with_itself(tmp_path):
    tested = make_predictions(student=0.6, teacher=0.8)
    for seed in range(3):
        for weight in (0.1, 0.0):
            for fold in tested.values():
                fold["student"] = predict(fold["label"], 0.5 + weight, (seed, int(weight * 10)))
            folder = tmp_path / f"w{weight}" / f"{seed}"
            write_run(folder, tested, seed=seed, **{"contrastive.weight": weight})
    runs, problems = read_runs(
        [tmp_path / "w0.1", tmp_path / "w0.0" / "1", tmp_path / "w0.0" / "2"]
    )
    assert not problems
    found = compare(runs)
    assert [group.name for group in found.groups] == [
        "contrastive.weight=0.1",
        "contrastive.weight=0",
    ]
    assert [list(group.runs) for group in found.groups] == [[0, 1, 2], [1, 2]]
    first, second = (group.runs for group in found.groups)
    (student,) = (s for s in found.scores if s[1:3] == ("student", "wf1") and s.group.letter == "A")
    values = [run.scores["student"]["wf1"] for run in first.values()]
    assert student.mean == pytest.approx(np.mean(values))
    assert student.spread == pytest.approx(np.std(values, ddof=1))
    assert student.intervals["speaker"][0] < student.mean < student.intervals["speaker"][1]
    (test,) = (test for test in found.between_runs if test.row == "student")
    assert test.seeds == [1, 2]
    sides = [(second[seed].predictions, first[seed].predictions) for seed in (1, 2)]
    each = [paired(mine, "student", theirs, "student")["ua"] for mine, theirs in sides]
    mean = np.mean([difference.value for difference in each])
    assert test.differences["utterance"].value == pytest.approx(mean)
    assert set(test.mcnemar) == {(1, "1"), (1, "2"), (2, "1"), (2, "2")}
    p = [each.differences["speaker"].p for each in found.between_runs]
    assert [each.adjusted["speaker"] for each in found.between_runs] == holm(p)


@pytest.mark.parametrize("speakers", [8, 5])
def test_equal_probes_are_one_line_and_the_page_draws_them_once(speakers, tmp_path):
    for i, probe in enumerate((0.6, 0.6, 0.9)):
        predictions = make_predictions(student=0.5, speakers=speakers)
        write_run(tmp_path / f"{i}", predictions, probe=probe, **{"contrastive.weight": i})
    comparison = compare(read_runs([tmp_path])[0])
    _, scores, *_ = tables_of(comparison)
    names = [tuple(row[:2]) for row in scores.rows]
    students = [("A", "student"), ("B", "student"), ("C", "student")]
    assert names == [*students, ("A, B", "linear probe"), ("C", "linear probe")]
    page = comparison_page(comparison)
    assert page.count("A: linear probe") == page.count("C: linear probe") == 1
    assert "B: linear probe" not in page


def test_two_equal_runs_do_not_differ_and_are_told_apart_by_their_folders(tmp_path):
    tested = make_predictions(student=0.6, teacher=0.6)
    workdirs = [write_run(tmp_path / name, tested, probe=0.5) for name in "ab"]
    found = compare(read_runs(workdirs)[0])
    assert [group.name for group in found.groups] == [*map(str, workdirs)]
    assert {test.row for test in found.between_runs} == {"teacher", "student"}
    for test in found.between_runs:
        assert set(test.adjusted.values()) == set(test.adjusted_mcnemar.values()) == {1}


def test_rows_and_probes_that_not_all_runs_have_are_left_out(tmp_path):
    tested = make_predictions(student=0.6, teacher=0.6)
    for name in "ab":
        for seed in (0, 1):
            probe = None if name == "b" and not seed else 0.5
            settings = {"contrastive.weight": 0.2} if name == "b" else {}
            write_run(tmp_path / f"{name}{seed}", tested, seed=seed, probe=probe, **settings)
    found = compare(read_runs([tmp_path])[0])
    assert not found.notes
    assert {test.row for test in found.between_runs} == {"teacher", "student"}, "equal probes"
    write_run(tmp_path / "c", make_predictions(meta_teacher=0.6), **{"meta.order": "none"})
    found = compare(read_runs([tmp_path])[0])
    told = [f"{name} and C have no row of the same seed in common: not tested." for name in "AB"]
    assert sorted(found.notes) == told


def test_a_workdir_that_is_named_twice_is_one_and_nothing_within_it_is_another(tmp_path):
    for name in ("a", "b", "a/data/c"):
        write_run(tmp_path / name, make_predictions(student=0.6))
    shutil.copytree(tmp_path / "a" / "fold_1", tmp_path / "a" / "fold_1_copy")
    runs, problems = read_runs([tmp_path, tmp_path / "b" / ".." / "a"])
    assert not problems
    assert [run.workdir.name for run in runs] == ["a", "b"]


def test_of_rows_the_later_is_compared_with_the_earlier_and_each_with_the_probe(tmp_path):
    write_run(tmp_path, make_predictions(size=600, teacher=1, student=0.7), probe=0)
    found = compare(read_runs([tmp_path])[0]).between_rows
    values = {(test.row, test.other_row): test.differences["utterance"].value for test in found}
    assert values.keys() == {
        ("student", "teacher"), ("student", "linear_probe"), ("teacher", "linear_probe")
    }  # fmt: skip
    assert values["student", "teacher"] < 0 < values["student", "linear_probe"]
    assert all(test.adjusted["utterance"] < 0.01 for test in found)
    assert all(max(test.adjusted_mcnemar.values()) < 0.01 for test in found)


def test_runs_on_other_utterances_are_shown_but_not_tested_against_each_other(tmp_path):
    write_run(tmp_path / "a", make_predictions(student=0.6))
    write_run(tmp_path / "b", make_predictions(size=50, student=0.6), **{"the splits": "t"})
    write_run(tmp_path / "c", make_predictions(student=0.7), **{"student.width": 8})
    found = compare(read_runs([tmp_path])[0])
    assert len(found.groups) == 3
    compared = {(test.group.letter, test.other.letter) for test in found.between_runs}
    assert compared == {("C", "A")}
    (note,) = found.notes
    assert note.startswith("A, C and B were not tested on the same utterances: their ids differ")


def damage(workdir, kind):
    if kind == "unfinished":
        (workdir / "results.json").unlink()
    elif kind == "without a fold":
        (workdir / "fold_2" / "predictions.npz").unlink()
    elif kind == "cut":
        path = workdir / "fold_2" / "predictions.npz"
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "older":
        write_arrays(
            workdir / "fold_1" / "predictions.npz", ids=np.array(["u"]), label=np.array([0])
        )
    elif kind == "other probe":
        path = workdir / "fold_1" / "probe.npz"
        write_arrays(path, ids=np.array(["u"]), linear_probe=np.eye(4)[:1])
    elif kind == "not JSON":
        (workdir / "run.json").write_text('{"seed": ')
    elif kind == "other JSON":
        (workdir / "results.json").write_text("[]")
    elif kind == "not finite":
        with np.load(workdir / "fold_1" / "predictions.npz") as saved:
            arrays = dict(saved)
        arrays["student"][0] = np.nan
        write_arrays(workdir / "fold_1" / "predictions.npz", **arrays)


DAMAGES = (
    "unfinished",
    "without a fold",
    "cut",
    "older",
    "not JSON",
    "other JSON",
    "not finite",
    "other probe",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_workdir_is_named_in_a_line_and_the_others_are_read(kind, tmp_path):
    for name in "ab":
        write_run(tmp_path / name, make_predictions(student=0.6))
    damage(tmp_path / "b", kind)
    runs, (problem,) = read_runs([tmp_path])
    assert [run.workdir for run in runs] == [tmp_path / "a"]
    assert str(tmp_path / "b") in problem
    assert "\n" not in problem


def test_groups_are_named_by_what_differs_as_briefly_as_is_clear(tmp_path):
    tested = make_predictions(student=0.6)
    for i, (model, width) in enumerate([("openai/whisper-base", 4), ("hubert", 4), ("hubert", 8)]):
        settings = {
            "frontend.model": model,
            "teacher.frontend.model": model,
            "student.width": width,
        }
        write_run(tmp_path / str(i), tested, **settings, **{"the splits": str(i)})
    names = [group.name for group in group_runs(read_runs([tmp_path])[0])]
    assert names == [
        "frontend.model=whisper-base, teacher.frontend.model=whisper-base, student.width=4",
        "frontend.model=hubert, teacher.frontend.model=hubert, student.width=4",
        "frontend.model=hubert, teacher.frontend.model=hubert, student.width=8",
    ]


def test_tables_4_to_9_have_the_papers_figures_beside_ours(tmp_path):
    rows = dict.fromkeys(paper.ROWS["iemocap"], 0.7)
    tested = make_predictions(**rows)
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", tested, "iemocap", seed, probe=0.5)
    write_run(tmp_path / "ce", tested, "iemocap", **{"contrastive.weight": 0.0})
    write_run(tmp_path / "meld", tested, "meld")
    tables = {table.name: table for table in tables_of(compare(read_runs([tmp_path])[0]))}
    wa, ua, wf1 = (100 * score(tested)["overall"]["student"][m] for m in ("wa", "ua", "wf1"))
    assert tables["table4"].rows == [
        ["(−) inverted", "CE", "68.89", "–", "42.63", "–"],
        ["(+) inverted", "CE", "69.69", f"{ua:.1f} (B)", "45.92", "–"],
        ["(+) inverted", "CE + Sup", "70.38", f"{ua:.1f} ± 0.0 (A)", "46.59", f"{wf1:.1f} (C)"],
    ]
    student = ["student", "69.41", "70.38", f"{wa:.1f} ± 0.0", f"{ua:.1f} ± 0.0", f"{wa:.1f}"]
    assert tables["table5"].rows[1] == [*student, f"{ua:.1f}"]
    assert tables["table6"].rows[1] == ["student", "52.43", "46.59", f"{wa:.1f}", f"{wf1:.1f}"]
    assert tables["table5"].rows[-1][:3] == ["linear probe", "–", "–"]
    assert tables["table7"].rows[1][:4] == ["student", "11.92M", "11.87M", "12.00M"]
    assert tables["table8"].rows[3] == ["ShiftCNN, paper", "99.03M", "70.40", "71.31"]
    assert tables["table8"].rows[-3][:2] == ["updated student, A", "12.00M"]
    assert tables["table9"].rows[-1][:2] == ["updated student, C", "12.00M"]
    scores = tables["comparison"]
    assert scores.header[-1] == "paper"
    assert scores.rows[1][-1] == "WA 69.41, UA 70.38"


def test_the_papers_figures_agree_with_each_other():
    for corpus, rows in paper.ROWS.items():
        (metric, figure), *_ = paper.ABLATION[True, True][corpus].items()
        assert rows["student"][metric] == figure
        ours = dict(paper.BASELINES[corpus]["updated student"])
        assert ours.pop("params") == paper.PARAMETERS["student"][corpus]
        assert ours == rows["updated_student"]


def test_latex_prints_text_as_it_is():
    told = r"50 % of a_b & c#d {x} \ ~ ^ $ < > | [1] ± − –"
    table = typeset.Table("t", told, ["model", "UA"], [[told, "−1.0"], ["", "+2"]], ["A note."])
    escaped = r"50 \% of a\_b \& c\#d \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{} "
    escaped += r"\$ \textless{} \textgreater{} \textbar{} {[}1] $\pm$ $-$ --"
    assert typeset.latex(table).splitlines() == [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped}. A note.}}",
        r"\label{tab:t}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"model & UA \\",
        r"\midrule",
        rf"{escaped} & $-$1.0 \\",
        r" & +2 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_the_command_prints_and_writes_the_tables(tmp_path):
    tested = make_predictions(size=200, student=0.7)
    write_run(tmp_path / "runs" / "a", tested, "iemocap")
    for arrays in tested.values():
        arrays["student"] = np.roll(arrays["student"], 1, axis=0)
    write_run(tmp_path / "runs" / "b", tested, "iemocap", **{"student.width": 8})
    write_run(tmp_path / "runs" / "c", tested)
    damage(tmp_path / "runs" / "c", "unfinished")
    command = [sys.executable, "-m", "serkd_jax.compare", str(tmp_path / "runs"), "nowhere"]
    command += [f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith(f"left out: {tmp_path}/runs/c/results.json is missing")
    assert second.startswith("left out: nowhere holds no run")
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert report in done.stdout
    assert "student: B − A | 1 | UA | −" in report
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "comparison.html", "comparison.md", "comparison.tex", "comparison.csv", "tests.csv",
        "mcnemar.csv", "table4.csv", "table5.csv", "table7.csv",
    }  # fmt: skip
    with (tmp_path / "out" / "tests.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["run"], line["other_run"], line["row"]) == ("B", "A", "student")
    assert float(line["adjusted_p_by_speaker"]) < 0.01 > float(line["adjusted_p_by_utterance"])
    assert float(line["high_by_speaker"]) < 0
    tex = (tmp_path / "out" / "comparison.tex").read_text()
    assert tex.count(r"\toprule") == tex.count(r"\end{table}") == report.count("\n## ")


def test_without_a_run_the_command_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: no run to compare: name workdirs of finished"):
        main(["", str(tmp_path)])
