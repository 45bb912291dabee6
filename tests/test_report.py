"""The report of a run: its numbers, its pictures, and what it must survive."""

import csv
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser
from itertools import pairwise, product

import numpy as np
import pytest
from sklearn import metrics

from serkd_jax.errors import UserError
from serkd_jax.files import write_arrays, write_json
from serkd_jax.results import figures, html, predictions
from serkd_jax.results.comparison import compare, read_runs
from serkd_jax.results.html import SECTIONS, write_report
from serkd_jax.results.html_comparison import comparison_page

CHROMIUM = shutil.which("chromium")
CLASSES = ("angry", "happy", "sad")
ROWS = ("teacher", "student", "meta_teacher", "distilled_student", "updated_student")
HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a|b `c` $x^2$ & \\",
    "\u202eعربي😀", "_\x00\x1b\x7f</title></svg>-->",
)  # fmt: skip
PARTS = ("train", "quiz", "reward", "validation", "test")


def write_run(
    folder,
    classes=CLASSES,
    rows=ROWS,
    folds=2,
    speakers=6,
    logs=True,
    seed=0,
    names="s{}",
    **config,
):
    """Writes what a run leaves: random predictions, which are right more often than not."""
    rng, made = np.random.default_rng(seed), {}
    for fold in map(str, range(1, folds + 1)):
        n = 8 * len(classes)
        label = np.minimum(np.arange(n) % (len(classes) + 1), len(classes) - 1)
        who = [names.format(int(fold) * 10 + i % max(1, speakers // folds)) for i in range(n)]
        arrays = {
            "ids": np.array([f"{fold}_{classes[c]}_{i}" for i, c in enumerate(label)]),
            "speaker": np.array(who if speakers else [""] * n),
            "label": label,
            "classes": np.array(classes),
        }
        if set(rows) - {"teacher"}:
            arrays["vectors"] = rng.normal(size=(n, 4)).astype(np.float32)
        right = 2 * np.eye(len(classes))[label]
        arrays |= {row: (right + rng.normal(size=right.shape)).astype(np.float32) for row in rows}
        write_arrays(folder / f"fold_{fold}" / "predictions.npz", **arrays)
        decided = {name: arrays[name] for name in ("ids", "speaker", "label", "classes")}
        decided["linear_probe"] = right + rng.normal(size=right.shape)
        write_arrays(folder / f"fold_{fold}" / "probe.npz", **decided)
        made[fold] = arrays | {"linear_probe": decided["linear_probe"]}
        if logs:
            write_logs(folder / f"fold_{fold}", rows, rng)
    predictions.write_table(folder / "predictions.csv", made)
    settings = {"corpus": "synthetic", "seed": seed, "contrastive.weight": 0.05} | config
    write_json(folder / "run.json", settings)
    splits = {fold: {part: ["a"] * (i + 2) for i, part in enumerate(PARTS)} for fold in made}
    write_json(folder / "splits.json", {k: v | {"held_out": classes[0]} for k, v in splits.items()})
    results = {
        "corpus": settings["corpus"],
        "config": {"seed": seed, "contrastive": {"weight": settings["contrastive.weight"]}},
        "classes": list(classes),
        "params": {"teacher": 3_000_000, "student": 400_000},
        "data": f"| | {classes[0]} |\n|---|---|\n| sum | 8 |\n\n- `{classes[1]}`: {classes[-1]}",
        **predictions.score(made),
    }
    write_json(folder / "results.json", results)
    if logs:
        params = results["params"] | {"encoder": 600_000}
        seconds = {"frontend": 0.004, "student": 0.001}
        write_json(
            folder / "costs.json", {"device": classes[0], "params": params, "seconds": seconds}
        )
        start = {"time": "2026-01-02T03:04:05+00:00", "command": classes[0], "devices": [1, "cpu"]}
        (folder / "starts.jsonl").write_text(json.dumps(start) + '\n{"time": "cut off')
    return folder


def write_logs(folder, rows, rng, epochs=3):
    stages = {"teacher": "teacher", "student": "student", "distill": "distilled_student"}
    for stage, row in (stages | {"curriculum": "updated_student"}).items():
        if row not in rows:
            continue
        lines = []
        for epoch in range(1, epochs + 1):
            names = ("train/loss", "train/accuracy", "validation/loss", "validation/ua", "seconds")
            line = {"epoch": epoch, "step": epoch, "steps_per_second": 2.0, "validation/wa": 0.5}
            line |= {name: float(rng.random()) for name in names}
            if stage == "curriculum":
                line |= {"train/reward": float(rng.random()), "train/task": [epoch, 4 - epoch]}
            lines.append(json.dumps(line))
        path = folder / stage / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + '\n{"epoch": 4, "tr')


class Page(HTMLParser):
    """What a page consists of: elements, tables by caption, and the text of its sections."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.tables, self.sections, self.open = [], {}, {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("meta", "br"):
            return
        self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        elif tag == "tbody":
            self.tables[self.caption] = []
        elif tag == "tr" and "tbody" in self.open:
            self.tables[self.caption].append([])
        elif tag in ("td", "th") and "tbody" in self.open:
            self.tables[self.caption][-1].append("")
        elif tag == "h2":
            self.heading = ""

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "h2":
            self.sections[self.heading] = ""

    def handle_data(self, text):
        if "caption" in self.open:
            self.caption += text
        elif "tbody" in self.open and self.open[-1] in ("td", "th"):
            self.tables[self.caption][-1][-1] += text
        elif "h2" in self.open:
            self.heading += text
        elif "section" in self.open and "svg" not in self.open:
            self.sections[self.heading] += text

    def table(self, start):
        (found,) = (rows for caption, rows in self.tables.items() if caption.startswith(start))
        return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(workdir):
    return Page(write_report(workdir))


@pytest.fixture(scope="module")
def lines(workdir):
    """The lines of predictions.csv, and the probe's, by row as it is named in the report."""
    found = defaultdict(list)
    with (workdir / "predictions.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found[line["row"].replace("meta_", "meta-").replace("_", " ")].append(line)
    # The CSV file has the rows with probabilities only.
    for fold in ("1", "2"):
        with np.load(workdir / f"fold_{fold}" / "probe.npz") as probe:
            for label, decided in zip(probe["label"], probe["linear_probe"], strict=True):
                about = found["teacher"][len(found["linear probe"])]
                assert about["label"] == CLASSES[label]
                found["linear probe"].append(about | {"prediction": CLASSES[decided.argmax()]})
    return dict(found)


def columns(lines, *names):
    return [[line[name] for line in lines] for name in names]


def first_number(cell):
    return float(re.match(r"[−\d.,]+", cell)[0].replace("−", "-").replace(",", ""))


def test_the_scores_are_those_of_scikit_learn_on_the_csv(page, lines):
    table = {row[0]: [first_number(cell) for cell in row[1:4]] for row in page.table("Scores in %")}
    assert [*table] == [*lines]
    for row, shown in table.items():
        true, said = columns(lines[row], "label", "prediction")
        expected = [
            metrics.recall_score(true, said, average="macro"),
            metrics.accuracy_score(true, said),
            metrics.f1_score(true, said, average="weighted"),
        ]
        assert np.allclose(shown, 100 * np.array(expected), atol=0.051)


def test_the_scores_of_folds_and_the_differences_fit_the_csv(page, lines):
    def ua(row, fold=""):
        kept = [line for line in lines[row] if fold in ("", line["fold"])]
        return 100 * metrics.recall_score(*columns(kept, "label", "prediction"), average="macro")

    for row, name, everything, *_, one, two in page.table("Scores of all test utterances"):
        if name == "UA":
            shown = [float(x) for x in (everything, one, two)]
            assert np.allclose(shown, [ua(row), ua(row, "1"), ua(row, "2")], atol=0.051)
    for pair, shown, *_ in page.table("Differences in points"):
        first, second = pair.split(" − ")
        assert first_number(shown.replace("+", "")) == pytest.approx(
            ua(first) - ua(second), abs=0.051
        )


def test_confusions_and_scores_by_class_and_speaker_fit_the_csv(page, lines):
    for row, each in lines.items():
        true, said, who = columns(each, "label", "prediction", "speaker")
        counts = metrics.confusion_matrix(true, said, labels=CLASSES)
        shown = [line[1:] for line in page.table(f"Confusion of the {row}")]
        assert [[int(cell.split()[0]) for cell in line] for line in shown] == counts.tolist()
        percent = [[float(cell.split("(")[1].split()[0]) for cell in line] for line in shown]
        assert np.allclose(percent, 100 * counts / counts.sum(1, keepdims=True), atol=0.051)
        for name, model, n, recall, precision, f1 in page.table("Scores by class"):
            if model == row:
                hit, c = counts[CLASSES.index(name)], CLASSES.index(name)
                found, kept = hit[c] / hit.sum(), hit[c] / counts[:, c].sum()
                assert int(n) == hit.sum()
                expected = [found, kept, 2 * found * kept / (found + kept)]
                assert np.allclose([float(x) for x in (recall, precision, f1)],
                                   100 * np.array(expected), atol=0.051)  # fmt: skip
        place = 2 + 2 * [*lines].index(row)
        for line in page.table("Scores by speaker"):
            kept = [w == line[0] for w in who]
            assert int(line[1]) == sum(kept)
            own = [[x for x, k in zip(each, kept, strict=True) if k] for each in (true, said)]
            expected = [metrics.balanced_accuracy_score(*own), metrics.accuracy_score(*own)]
            shown = [float(x) for x in line[place : place + 2]]
            assert np.allclose(shown, 100 * np.array(expected), atol=0.051)


def test_calibration_and_hard_utterances_fit_the_probabilities_of_the_csv(page, lines):
    trained = {row: each for row, each in lines.items() if row != "linear probe"}
    p_true = {}
    for row, each in trained.items():
        p = np.array([[float(line[f"p({name})"]) for name in CLASSES] for line in each])
        label = np.array([CLASSES.index(line["label"]) for line in each])
        p_true[row] = p[np.arange(len(p)), label]
        sure, right = p.max(1), p.argmax(1) == label
        ece, bins = 0, []
        for i in range(10):
            inside = (sure > i / 10) & (sure <= (i + 1) / 10)
            bins.append(str(inside.sum()))
            if inside.any():
                ece += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
        brier = ((p - np.eye(3)[label]) ** 2).sum(1).mean()
        (shown,) = ([float(x) for x in r[1:]] for r in page.table("Calibration") if r[0] == row)
        nll = metrics.log_loss(label, p / p.sum(1, keepdims=True))
        assert np.allclose(shown, [100 * ece, brier, nll], atol=[0.06, 0.001, 0.001])
        assert [r[2] for r in page.table("Bins of confidence") if r[0] == row] == bins
    mean = np.mean([*p_true.values()], axis=0)
    expected = [lines["teacher"][k]["id"] for k in np.argsort(mean, kind="stable")]
    table = page.table("The hardest test utterances")
    assert [row[0] for row in table] == expected[: len(table)]
    ids = columns(lines["teacher"], "id")[0]
    for row in table:
        k = ids.index(row[0])
        said = lines["updated student"][k]
        assert row[3:5] == [said["label"], said["prediction"]]
        assert np.allclose([float(x) for x in row[5:]], [p[k] for p in p_true.values()], atol=6e-4)
    duel = {name: int(count) for name, count, _ in page.table("Test utterances; the mean p")}
    surer = (p_true["updated student"] > p_true["meta-teacher"]).sum()
    assert duel["S′ gives the true class a higher probability"] == surer
    right = [np.array([x["label"] == x["prediction"] for x in lines[name]])
             for name in ("meta-teacher", "updated student")]  # fmt: skip
    assert duel["only S′ right"] == (right[1] & ~right[0]).sum()
    assert duel["neither right"] == (~right[1] & ~right[0]).sum()


def test_the_log_the_tasks_the_costs_and_the_parts_are_shown_as_they_are(page, workdir):
    logs = [
        [
            json.loads(x)
            for x in (workdir / f"fold_{k}/student/metrics.jsonl").open().readlines()[:3]
        ]
        for k in (1, 2)
    ]
    for i, row in enumerate(page.table("Student with the contrastive branch (3.2.1) by epoch")):
        values = [log[i]["validation/ua"] for log in logs]
        told = f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"
        assert row[0] == str(i + 1)
        assert told in row
    tasks = page.table("Steps of each task")
    assert tasks == [
        ["1", "2 (25.0 %)", "6 (75.0 %)"],
        ["2", "4 (50.0 %)", "4 (50.0 %)"],
        ["3", "6 (75.0 %)", "2 (25.0 %)"],
    ]
    sizes = {row[0]: row[1] for row in page.table("Parameters")}
    assert sizes["deployed student and its encoder"] == "1,000,000"
    assert page.table("Seconds of computing")[-1] == ["both", "0.005", "200"]
    assert page.table("Utterances in the parts")[0] == ["1", "2", "3", "4", "5", "6", "angry"]


def test_every_picture_has_a_name_and_its_numbers_below_it(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) > 20
    for picture in pictures:
        assert picture["role"] == "img"
        assert picture["aria-labelledby"] in ids
    without = re.findall(r"<figcaption>([^<]*)</figcaption></figure>\n(?!<details>)", page.source)
    assert len(without) == 1
    assert without[0].endswith("by speaker: the same points.")
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert {"header", "nav", "main"} <= {tag for tag, _ in page.elements}


def is_self_contained(page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "link",
        "object",
        "embed",
        "base",
        "form",
        "input",
    }
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert attributes.get("href", "#").startswith("#")
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", page.source))
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_the_page_loads_nothing_and_is_the_same_each_time(page, workdir):
    is_self_contained(page)
    assert write_report(workdir).read_text(encoding="utf-8") == page.source


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    return write_report(write_run(folder, HOSTILE, ROWS[1:2], names='"><b>{}', corpus=HOSTILE[0]))


def test_names_of_classes_speakers_and_files_stay_text(hostile):
    page = Page(hostile)
    is_self_contained(page)
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    shown = [row[0] for row in page.table("Confusion of the student")]
    assert shown == [figures.printable(name) for name in HOSTILE]
    assert shown[:4] == [*HOSTILE[:4]]
    assert "\x00" not in page.source
    assert '"><b>10' in [row[0] for row in page.table("Scores by speaker")]


@pytest.mark.parametrize(
    ("how", "absent"),
    [
        ({"rows": ("student",), "speakers": 0}, {
            "The curriculum": "no curriculum stage",
            "Scores by speaker": "does not name its speakers",
            "Scores": "no test speaker is known",
        }),
        ({"rows": ("teacher",), "folds": 1, "speakers": 1, "logs": False}, {
            "Learning curves": "no metrics",
            "The student’s vectors": "no vectors of a student",
            "How it was run": "does not say how",
            "Scores": "only 1 test speaker is known",
        }),
    ],
)  # fmt: skip
def test_what_a_run_does_not_have_is_said(how, absent, tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", CLASSES[:2], **how)))
    sections = {name.split(". ")[1]: text for name, text in page.sections.items()}
    assert [*sections] == [*SECTIONS]
    for name, told in absent.items():
        assert told in sections[name]


def test_an_unfinished_or_damaged_run_is_reported_as_far_as_it_is_there(tmp_path):
    folder = write_run(tmp_path / "run", CLASSES[:2], ("teacher", "student"), speakers=4)
    (folder / "results.json").write_text('{"corpus": "syn')
    (folder / "costs.json").write_bytes(b"\xff\xfe")
    (folder / "fold_2" / "predictions.npz").unlink()
    (folder / "fold_2" / "student" / "metrics.jsonl").write_text("[1]\nnonsense")
    page = Page(write_report(folder))
    assert "Not finished, and so not in this report: fold 2." in page.source
    assert "is written at the end of a run" in page.source
    with pytest.raises(UserError, match="no fold_"):
        write_report(tmp_path)


def test_a_run_that_diverged_is_reported(tmp_path):
    folder = write_run(tmp_path / "run", CLASSES[:2], ("student",), folds=1)
    path = folder / "fold_1" / "predictions.npz"
    with np.load(path) as saved:
        arrays = {name: saved[name] for name in saved.files}
    arrays["student"][0], arrays["vectors"][0] = np.nan, np.inf
    write_arrays(path, **arrays)
    log = folder / "fold_1" / "student" / "metrics.jsonl"
    log.write_text('{"epoch": 1, "train/loss": NaN, "validation/ua": 0.5, "train/soft": Infinity}')
    page = Page(write_report(folder))
    assert "No row of the results has probabilities." in page.source
    assert "There are no vectors of a student to show." in page.source


def test_a_report_that_fails_leaves_the_results(monkeypatch, tmp_path, capsys):
    def fail(workdir):
        raise RuntimeError("no font")

    assert html.try_to_write_report(write_run(tmp_path / "run", CLASSES[:2], ("teacher",))) == [
        "report.html"
    ]
    monkeypatch.setattr(html, "write_report", fail)
    assert html.try_to_write_report(tmp_path) == []
    assert "report.html could not be written (RuntimeError('no font'))" in capsys.readouterr().err


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Runs of two weights, two seeds each."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [
        write_run(folder / f"{weight}-{seed}", CLASSES[:2], ("student",), seed=seed, logs=False,
                  **{"contrastive.weight": weight})
        for weight in (0.05, 0.9) for seed in (0, 1)
    ]  # fmt: skip
    comparison = compare(read_runs(runs)[0])
    (folder / "comparison.html").write_text(comparison_page(comparison), encoding="utf-8")
    return folder


def test_a_comparison_has_the_curves_of_the_setting_that_differs(comparison):
    page = Page(comparison / "comparison.html")
    is_self_contained(page)
    assert [name.split(". ")[1] for name in page.sections] == [
        "Runs", "Scores", "Differences between rows", "Differences between runs",
        "Scores by a setting", "Confusion matrices",
    ]  # fmt: skip
    student, name, *shown = page.table("Scores by setting")[0]
    assert (student, name) == ("student", "UA")
    for weight, cell in zip((0.05, 0.9), shown, strict=True):
        scores = [
            100 * json.loads((comparison / f"{weight}-{seed}" / "results.json").read_text())
            ["overall"]["student"]["ua"] for seed in (0, 1)
        ]  # fmt: skip
        low, high = min(scores), max(scores)
        assert cell == f"{np.mean(scores):.1f} ({low:.1f} to {high:.1f})"
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 6


def test_a_picture_follows_the_page_and_thins_out_what_is_too_much():
    points = np.random.default_rng(0).normal(size=(5000, 2))
    assert len(figures.thinned(5000, 400)) == 400
    assert figures.thinned(3, 400).tolist() == [0, 1, 2]
    drawn = figures.scatter("k", "t", points[:9], ["$x$"] * 9, ["$x$"], "x")
    assert "var(--blue, #0067a6)" in drawn
    assert "font-family" not in drawn
    assert ">$x$<" in drawn  # not a formula
    assert set(re.findall(r'\bid="([^"]*)', drawn)) >= {"k-title"}
    assert all(name.startswith("k-") for name in re.findall(r'\bid="([^"]*)', drawn))


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's package chromium")
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(workdir, hostile, comparison, page):
    from playwright.sync_api import sync_playwright

    del page  # written
    paths = [workdir / "report.html", hostile, comparison / "comparison.html"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown, told = chromium.new_page(), []
        shown.on("console", lambda message: told.append(message.text))
        shown.on("pageerror", lambda error: told.append(str(error)))
        shown.on("dialog", lambda dialog: told.append(dialog.message))
        for path in paths:
            shown.goto(path.as_uri())
            shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            for width, scheme in product((390, 1280), ("light", "dark")):
                shown.set_viewport_size({"width": width, "height": 900})
                shown.emulate_media(color_scheme=scheme)
                assert shown.evaluate("document.documentElement.scrollWidth") == width
                ink = shown.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
                assert (ink == "rgb(31, 35, 40)") == (scheme == "light")
        assert not told
        chromium.close()
