"""The sections of a report that are made from test predictions."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from serkd_jax.results import diagnostics, figures, intervals, paper
from serkd_jax.results.markup import (
    Panel,
    figure,
    number,
    paragraph,
    percent,
    points,
    row_name,
    several,
    table,
)
from serkd_jax.results.metrics import TITLES
from serkd_jax.results.predictions import Predictions, pooled
from serkd_jax.results.runs import Run

# What the paper claims, and what it hopes for: that the first is better than the second.
CLAIMS = (
    ("meta_teacher", "teacher"),
    ("distilled_student", "student"),
    ("updated_student", "distilled_student"),
    ("updated_student", "meta_teacher"),
)
MOST_FOLDS, MOST_SPEAKERS, MOST_POINTS = 6, 30, 400  # in pictures
MOST_NAMED, MOST_HARD = 300, 25  # speakers and utterances in tables


def scores(run: Run) -> str:
    """The rows of the results, with intervals, beside the paper's."""
    if not run.rows:
        return paragraph("No row of the results is finished in every fold.", note=True)
    cited = paper.ROWS.get(run.corpus, {})
    columns = [m for m in TITLES if any(m in each for each in cited.values())]
    by, overall = run.drawn_by, run.scores["overall"]
    drawn = {how: intervals.bootstrap(run.predictions, how) for how in {by, "utterance"}}
    rows = [
        [
            row_name(row),
            *(_with_interval(overall[row][m], drawn[by][row][m]) for m in TITLES),
            *(_cited(cited.get(row, {}).get(m)) for m in columns),
        ]
        for row in run.rows
    ]
    head = ["model", *TITLES.values(), *(f"paper’s {TITLES[m]}" for m in columns)]
    main = table(f"Scores in %, with 95 % intervals by {by}", head, rows, numbered=True)
    # The paper has no UA on MELD, and wF1 as its last column.
    metric = columns[-1] if columns and "ua" not in columns else "ua"
    figure_of = _score_figure(run, metric, drawn)
    return _how_to_read_scores(run) + main + figure_of + _claims(run, metric)


def _how_to_read_scores(run: Run) -> str:
    told = [
        "The rows are the models in the order of training. UA is the mean of the classes’ recalls "
        "(Eq. 14), WA the share of utterances that are right (Eq. 15), and wF1 the mean of the "
        "classes’ F1, weighted by their sizes."
    ]
    if run.drawn_by == "speaker":
        told.append(
            "The intervals are by speaker: all utterances of a speaker are drawn together (2,000 "
            "bootstrap draws), so that they show what other speakers could give."
        )
        told += [f"With {run.speakers} speakers they are rough."] * (run.speakers < 20)
    else:
        told.append(
            "The intervals take utterances as independent (2,000 bootstrap draws), since "
            f"{_few(run.speakers)} known. They are too narrow for what other speakers would give."
        )
    told.append(
        "They do not contain what another seed would change: train with several seeds before you "
        "call one row better than another."
    )
    if run.corpus in paper.ROWS:
        told.append(
            f"The paper’s scores are those of its Table {paper.TABLES[run.corpus]}, for which it "
            "gives neither seeds nor intervals."
        )
    return paragraph(" ".join(told))


def _score_figure(run: Run, metric: str, drawn: dict) -> str:
    overall, folds = run.scores["overall"], run.scores["folds"]
    cited, name = paper.ROWS.get(run.corpus, {}), TITLES[metric]
    picture = figures.score_plot(
        "scores",
        f"{name} of each model, with 95 % intervals",
        [row_name(row) for row in run.rows],
        [100 * overall[row][metric] for row in run.rows],
        [tuple(100 * x for x in drawn[run.drawn_by][row][metric]) for row in run.rows],
        [[100 * fold[row][metric] for fold in folds.values()] for row in run.rows],
        [cited.get(row, {}).get(metric) for row in run.rows],
        f"{name}, %",
    )
    hows = sorted(drawn)
    rows = [
        [
            row_name(row),
            TITLES[m],
            percent(overall[row][m]),
            *(_to(drawn[how][row][m]) for how in hows),
            *(percent(fold[row][m]) for fold in folds.values()),
        ]
        for row in run.rows
        for m in TITLES
    ]
    head = ["model", "score", "all", *(f"95 %, by {how}" for how in hows)]
    head += [f"fold {fold}" for fold in folds]
    numbers = table("Scores of all test utterances and of each fold, in %", head, rows, names=2)
    return figure([("", picture)], f"{name} of each model, and what each fold gives.", numbers)


def _claims(run: Run, metric: str) -> str:
    """Compares rows in pairs."""
    pairs = [(a, b) for a, b in CLAIMS if a in run.rows and b in run.rows]
    if not pairs:
        return ""
    by, given = run.drawn_by, run.predictions
    tested = [intervals.paired(given, a, given, b, by) for a, b in pairs]
    adjusted = intervals.holm([each[metric].p for each in tested])
    rows = [
        [
            f"{row_name(a)} − {row_name(b)}",
            *(_with_interval(*each[m][:2], points) for m in TITLES),
            number(each[metric].p),
            number(p),
        ]
        for (a, b), each, p in zip(pairs, tested, adjusted, strict=True)
    ]
    head = ["difference", *TITLES.values(), f"p of {TITLES[metric]}", "p, Holm"]
    return paragraph(
        "Both models of a difference are scored on the same draws. Where an interval contains 0, "
        "these test utterances leave open which of the two is better. The last column adjusts p "
        f"for {several(len(pairs), 'test')}."
    ) + table(f"Differences in points, with 95 % intervals by {by}", head, rows, numbered=True)


def confusions(run: Run) -> str:
    """Confusion matrices of every row."""
    counts = {row: np.array(run.scores["overall"][row]["confusion"]) for row in run.rows}
    panels, numbers = [], []
    for i, (row, matrix) in enumerate(counts.items()):
        panel, told = confusion(f"confusion-{i}", row_name(row), matrix, run.classes)
        panels.append(panel)
        numbers.append(told)
    return paragraph(
        "Each row of a matrix is a true class, each column a predicted one. The upper number in a "
        "cell is the percentage of the true class, the lower one the count. The diagonal has the "
        "recalls, whose mean is UA. The paper’s Fig. 3 shows such matrices of the student, with "
        "and without the contrastive loss; two runs with `--config.stages=student` make them."
    ) + figure(panels, "Confusion matrices of all test utterances.", *numbers)


def confusion(key: str, name: str, counts: np.ndarray, classes: Sequence[str]) -> tuple[Panel, str]:
    """Makes the picture of a confusion matrix, and the table of its numbers."""
    cells = [
        [label, *(f"{n:,} ({100 * n / size:.1f} %)" if size else f"{n:,}" for n in row)]
        for label, row, size in zip(classes, counts.tolist(), counts.sum(1).tolist(), strict=True)
    ]
    caption = f"Confusion of the {name}: counts, and % of the true class"
    picture = figures.confusion_matrix(key, f"Confusion matrix of the {name}", counts, classes)
    return (name, picture), table(caption, ["true class", *classes], cells)


def classes(run: Run) -> str:
    """Recall, precision and F1 of each class."""
    label, names = pooled(run.predictions, "label"), run.classes
    found = {
        row: diagnostics.class_scores(label, run.predicted(row), len(names)) for row in run.rows
    }
    recalls = {row_name(row): 100 * each["recall"] for row, each in found.items()}
    picture = figures.dot_plot("classes", "Recall of each class", names, recalls, "recall, %")
    sizes = np.bincount(label, minlength=len(names)).tolist()
    rows = [
        [name, row_name(row), f"{size:,}"]
        + [percent(found[row][m][c]) for m in ("recall", "precision", "f1")]
        for c, (name, size) in enumerate(zip(names, sizes, strict=True))
        for row in run.rows
    ]
    head = ["class", "model", "n", "recall", "precision", "F1"]
    numbers = table("Scores by class, in %", head, rows, names=2)
    return paragraph(
        "Recall is the share of a class that is found. It does not show how often the class is "
        "predicted wrongly; precision does, and is in the table. A class with few test utterances "
        "has a recall that scatters by chance."
    ) + figure([("", picture)], "Recall of each class.", numbers)


def speakers(run: Run) -> str:
    """UA and WA of each test speaker."""
    if not run.speakers:
        return paragraph("The corpus does not name its speakers.", note=True)
    if not run.rows:
        return paragraph("No row of the results is finished in every fold.", note=True)
    found = {row: diagnostics.speaker_scores(run.predictions, row) for row in run.rows}
    last = (run.trained or run.rows)[-1]
    best, sizes = found[last], {name: each["n"] for name, each in found[last].items()}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))

    def best_first(names: Sequence[str]) -> list[str]:
        return sorted(names, key=lambda name: (-best[name]["ua"], name))

    drawn, named = (best_first(largest[:most]) for most in (MOST_SPEAKERS, MOST_NAMED))
    shown = dict.fromkeys((run.rows[0], last))
    values = {row_name(row): [100 * found[row][name]["ua"] for name in drawn] for row in shown}
    picture = figures.dot_plot("speakers", "UA of each speaker", drawn, values, "UA, %")
    rows = [
        [name, f"{sizes[name]:,}"]
        + [percent(found[row][name][m]) for row in run.rows for m in ("ua", "wa")]
        for name in named
    ]
    head = ["speaker", "n", *(f"{m}, {row_name(row)}" for row in run.rows for m in ("UA", "WA"))]
    low, high = (percent(end(each["ua"] for each in best.values())) for end in (min, max))
    told = [
        f"The {row_name(last)} has a UA of {low} to {high} %, depending on the speaker. The UA of "
        "a speaker is the mean over the classes that this speaker has. With few speakers, it is "
        "they who decide the score of a fold, more than the model does; and a speaker with few "
        "utterances scatters by chance."
    ]
    if len(drawn) < len(sizes):
        told.append(
            f"The figure has the {len(drawn)} of {len(sizes):,} speakers with the most utterances."
        )
    if len(named) < len(sizes):
        told.append(f"The table has the {len(named)} with the most.")
    numbers = table("Scores by speaker, in %", head, rows, tall=len(rows) > 15)
    return paragraph(" ".join(told)) + figure([("", picture)], "UA of each speaker.", numbers)


def vectors(run: Run) -> str:
    """The last student's vectors in two dimensions."""
    folds = {
        fold: arrays
        for fold, arrays in run.predictions.items()
        if "vectors" in arrays and diagnostics.embeddable(arrays["vectors"])
    }
    if not folds:
        return paragraph("There are no vectors of a student to show.", note=True)
    shown = dict(list(folds.items())[:MOST_FOLDS])
    by_class, by_speaker, places = [], [], []
    sizes = Counter(pooled(run.predictions, "label").tolist())
    common = sorted(c for c, _ in sizes.most_common(len(figures.COLOURS)))
    for fold, arrays in shown.items():
        embedded, method = diagnostics.embed(arrays["vectors"])
        kept = figures.thinned(len(embedded), MOST_POINTS)
        axis, xy = f"two dimensions by {method}", embedded[kept]
        names, who = arrays["classes"][arrays["label"]][kept], arrays["speaker"][kept]
        drawn = [run.classes[c] for c in common]
        title = f"The student’s vectors of fold {fold}"
        svg = figures.scatter(f"class-{fold}", f"{title}, by class", xy, names, drawn, axis)
        by_class.append((f"Fold {fold}, by class", svg))
        drawn = [
            name for name, _ in Counter(who.tolist()).most_common(len(figures.COLOURS)) if name
        ]
        if len(drawn) > 1:
            drawn.sort()
            svg = figures.scatter(f"speaker-{fold}", f"{title}, by speaker", xy, who, drawn, axis)
            by_speaker.append((f"Fold {fold}, by speaker", svg))
        about = zip(arrays["ids"][kept], names, who, xy, strict=True)
        places += [[i, fold, c, s, f"{x:.2f}", f"{y:.2f}"] for i, c, s, (x, y) in about]
    told = [
        "Each point is a test utterance: its vector in the last student (h(., S) in the paper), "
        "brought from its leading principal components (at most 16) to two dimensions. A fold has "
        "a student, and so a space, of its own. Vectors that serve their purpose lie together by "
        "class, and not by speaker. Sizes and distances of groups mean little in such pictures; "
        "the table measures neighbours among all of the components."
    ]
    if len(shown) < len(folds):
        told.append(f"Drawn are the first {len(shown)} of {len(folds)} folds.")
    if any(len(arrays["ids"]) > MOST_POINTS for arrays in shown.values()):
        told.append(f"Of each fold, {MOST_POINTS} points are drawn, evenly spread over its list.")
    head = ["utterance", "fold", "class", "speaker", "x", "y"]
    where = table("The points", head, places, tall=True, names=4)
    caption = "The last student’s vectors of test utterances, by"
    pictures = figure(by_class, f"{caption} class.", where)
    if by_speaker:
        pictures += figure(by_speaker, f"{caption} speaker: the same points.")
    return paragraph(" ".join(told)) + _neighbours(folds) + pictures


def _neighbours(folds: Predictions) -> str:
    rows = []
    for fold, arrays in folds.items():
        shares = []
        for groups in (arrays["label"], arrays["speaker"]):
            told = len(set(groups.tolist())) > 1
            shares += diagnostics.same_neighbour(arrays["vectors"], groups) if told else (None,) * 2
        rows.append([fold, f"{len(arrays['ids']):,}", *map(percent, shares)])
    head = ["fold", "n", "same class", "by chance", "same speaker", "by chance"]
    caption = "How often an utterance’s nearest neighbour is of its class, and its speaker, in %"
    return table(caption, head, rows, numbered=True)


def calibration(run: Run) -> str:
    """How far probabilities can be believed."""
    label = pooled(run.predictions, "label")
    found = {
        row: diagnostics.calibration(pooled(run.predictions, row), label) for row in run.probable
    }
    if not found:
        return paragraph("No row of the results has probabilities.", note=True)
    panels, bins = [], []
    for i, (row, each) in enumerate(found.items()):
        title = f"Accuracy by confidence, {row_name(row)}"
        svg = figures.reliability(
            f"calibration-{i}", title, each.confidence, each.accuracy, each.counts
        )
        panels.append((row_name(row), svg))
        for k, n in enumerate(each.counts.tolist()):
            ends = f"{k / len(each.counts):.1f} to {(k + 1) / len(each.counts):.1f}"
            means = [number(x[k]) if n else "–" for x in (each.confidence, each.accuracy)]
            bins.append([row_name(row), ends, f"{n:,}", *means])
    summary = [
        [row_name(row), percent(each.ece), number(each.brier), number(each.nll)]
        for row, each in found.items()
    ]
    head = ["model", "confidence", "n", "mean confidence", "accuracy"]
    return (
        paragraph(
            "Confidence is the probability of the predicted class. Below the diagonal, a model is "
            "surer than it is right. The area of a point is its share of the utterances, so small "
            "points say little. ECE is the mean distance from the diagonal over utterances. "
            "Nothing was done to calibrate the models; on recordings of another kind they will be "
            "further off."
        )
        + table(
            "Calibration: less is better",
            ["model", "ECE, %", "Brier score", "log loss, nats"],
            summary,
            numbered=True,
        )
        + figure(
            panels,
            "Accuracy by confidence, in ten bins of equal width.",
            table("Bins of confidence", head, bins, names=2, tall=True),
        )
    )


def hardest(run: Run) -> str:
    """The utterances whose labels the models believe least."""
    if not run.probable:
        return paragraph("No row of the results has probabilities.", note=True)
    given, last = run.predictions, run.probable[-1]
    places = diagnostics.hardest(given, run.probable, MOST_HARD).tolist()
    label, ids, who = (pooled(given, name) for name in ("label", "ids", "speaker"))
    fold = np.concatenate([[name] * len(each["ids"]) for name, each in given.items()])
    p = [diagnostics.true_class_probability(given, row) for row in run.probable]
    wrong = np.all([run.predicted(row) != label for row in run.probable], axis=0)
    said = run.predicted(last)
    rows = [
        [ids[k], fold[k], who[k], run.classes[label[k]], run.classes[said[k]]]
        + [number(each[k]) if each[k] >= 0.0005 else "< 0.001" for each in p]
        for k in places
    ]
    head = ["utterance", "fold", "speaker", "label", f"{row_name(last)} says"]
    head += [f"p, {row_name(row)}" for row in run.probable]
    return paragraph(
        f"No trained model is right on {wrong.sum():,} of {len(label):,} test utterances. Here are "
        f"the {len(rows)} whose label has the least probability, on average over models. Listen "
        "to them: some are hard, some are labelled wrongly, and some are damaged. Do not take "
        "utterances out of a test part because they are on this list."
    ) + table(
        "The hardest test utterances, with the probability of their label",
        head,
        rows,
        numbered=True,
        names=5,
    )


def _few(speakers: int) -> str:
    if not speakers:
        return "no test speaker is"
    return f"only {several(speakers, 'test speaker')} {'is' if speakers == 1 else 'are'}"


def _cited(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"


def _to(interval: tuple[float, float]) -> str:
    return " to ".join(map(percent, interval))


def _with_interval(value: float, interval: tuple[float, float], shown: Callable = percent) -> str:
    return f"{shown(value)} ({' to '.join(map(shown, interval))})"
