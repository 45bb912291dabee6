"""Pictures of results, as SVG for a page: numbers in, text out, by matplotlib.

The same numbers give the same text. Colours are CSS variables with a fallback, so that a page can
change them in the dark; shapes and dashes tell apart what colours do, for print. Texts stay texts,
in the font of the page, and every id begins with the picture's `key`, which is unique on a page.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

INK, FAINT, PAPER = "#1f2328", "#d8dce1", "#fefefe"
CELL = "#3b95d6"  # of areas behind text
# Okabe and Ito's colours, darkened until lines of them can be seen on white.
BLUE, ORANGE, GREEN, PINK, OCHRE, SKY, GREY, BROWN = COLOURS = (
    "#0067a6", "#c85000", "#00795a", "#b0508a", "#a06a00", "#2f8fc4", "#6a6f76", "#7b4a2e",
)  # fmt: skip
_NAMES = ("blue", "orange", "green", "pink", "ochre", "sky", "grey", "brown")
VARIABLES = dict(
    zip(
        (INK, FAINT, PAPER, CELL, *COLOURS),
        ("ink", "faint", "paper", "cell", *_NAMES),
        strict=True,
    )
)
MARKERS, DASHES = "osD^vXP*", ("-", "--", "-.", ":")
WIDTH, HEIGHT = 3.4, 2.3  # inches: what a phone shows in full size
PIXELS = 96  # of CSS, for each inch
MOST_CLIPS = 1000  # points of a duel
MOST_LINES = 10  # folds, beyond which a band stands for them
MOST_NUMBERED = 12  # classes, beyond which the cells of a matrix have no room for numbers

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "serkd",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.parse_math": False,  # names may contain dollar signs
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": "medium",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_styled = style.context(["default", _STYLE])
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}href"


def printable(name: str) -> str:
    """Replaces what XML cannot hold: control characters, and bytes that were not UTF-8."""
    return "".join(
        "\ufffd" if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000
        or ord(c) in (0xFFFE, 0xFFFF) else c
        for c in str(name)
    )  # fmt: skip


def shortened(name: str, most: int = 16) -> str:
    """Returns a name that has room in a picture; one that begins with _ is shown, too."""
    name = printable(name)
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return f"\u200b{name}" if name.startswith("_") else name


@_styled
def score_plot(
    key: str,
    title: str,
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    points: Sequence[Sequence[float]],
    paper: Sequence[float | None],
    label: str,
    parts: str = "folds",
) -> str:
    """Draws scores in % with intervals, those of each part (fold or seed), and the paper's."""
    figure, axes = _figure(width=4.2, height=0.6 + 0.36 * len(names))
    places = np.arange(len(names))
    spread = np.clip(np.abs(np.array(intervals).T - np.array(values)), 0, None)
    axes.errorbar(
        values, places, xerr=spread, fmt="D", color=BLUE, markersize=6, linewidth=1.4, capsize=3,
        label=f"all {parts}, 95 % interval", zorder=3,
    )  # fmt: skip
    if max(map(len, points)) > 1:
        for place, each in zip(places, points, strict=True):
            axes.plot(
                each, [place + 0.2] * len(each), "o", color=BLUE, markersize=3.5, alpha=0.55,
                label=f"each {parts[:-1]}" if place == 0 else None,
            )  # fmt: skip
    known = [(x, place) for x, place in zip(paper, places, strict=True) if x is not None]
    if known:
        axes.plot(
            *zip(*known, strict=True), "s", markerfacecolor="none", color=ORANGE, markersize=7,
            markeredgewidth=1.4, label="the paper", linestyle="none",
        )  # fmt: skip
    axes.set_yticks(places, [shortened(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    _legend(axes)
    return _svg(figure, key, title)


@_styled
def confusion_matrix(key: str, title: str, counts: np.ndarray, names: Sequence[str]) -> str:
    """Draws (C, C) counts, whose rows are true classes: percent of the row, and count below."""
    counts = np.asarray(counts)
    size = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(size, 1)
    number = len(names)
    side = max(WIDTH, 1.1 + 0.42 * min(number, MOST_NUMBERED))
    figure, axes = _figure(side, side * 0.94)
    for i, j in np.ndindex(counts.shape):
        axes.add_patch(
            Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=CELL, alpha=shares[i, j], linewidth=0)
        )
        if number <= MOST_NUMBERED:
            percent = f"{100 * shares[i, j]:.0f}" if size[i, 0] else "–"
            axes.text(j, i - 0.13, percent, ha="center", va="center", weight="bold")
            axes.text(
                j, i + 0.25, f"{counts[i, j]:,}", ha="center", va="center",
                fontsize=7 if number < 8 else 6,
            )  # fmt: skip
    labels = [shortened(name, 12) for name in names]
    slanted = max(map(len, labels)) * number > 36
    turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(number), labels, **turn)
    axes.set_yticks(range(number), labels)
    axes.set(xlim=(-0.5, number - 0.5), ylim=(number - 0.5, -0.5), aspect="equal")
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    return _svg(figure, key, title)


@_styled
def curves(
    key: str,
    title: str,
    lines: Mapping[str, np.ndarray],
    label: str,
    limits: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """Draws values (folds, epochs) by name: their mean, and each fold, or a band of many folds."""
    figure, axes = _figure()
    handles = []
    for i, (colour, marker, values) in enumerate(
        zip(COLOURS, MARKERS, lines.values(), strict=False)
    ):
        epochs = np.arange(1, values.shape[1] + 1)
        if len(values) > MOST_LINES:
            ends = (end.reduce(values) for end in (np.fmin, np.fmax))
            axes.fill_between(epochs, *ends, color=colour, alpha=0.15, linewidth=0)
        for fold in values if 1 < len(values) <= MOST_LINES else ():
            axes.plot(epochs, fold, color=colour, linewidth=0.6, alpha=0.5)
        every = max(1, len(epochs) // 6)
        handles += axes.plot(
            epochs, mean_of_known(values), DASHES[i % 4], color=colour, linewidth=1.6,
            marker=marker, markersize=3.5, markevery=(i * every // max(1, len(lines)), every),
        )  # fmt: skip
    _integers(axes)
    axes.set(xlabel="epoch", ylabel=label)
    if log and any((values > 0).any() for values in lines.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if limits:
        axes.set_ylim(limits)
    if len(lines) > 1:
        _legend(axes, handles, [*lines])
    return _svg(figure, key, title)


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Averages (folds, epochs) over the folds that have a finite value; NaN where none has."""
    known = np.isfinite(values)
    sums = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan)


@_styled
def task_shares(key: str, title: str, shares: np.ndarray, names: Sequence[str]) -> str:
    """Draws (epochs, K) shares of the steps as stacked bars, from the first task upwards."""
    figure, axes = _figure()
    epochs, bottom = np.arange(1, len(shares) + 1), np.zeros(len(shares))
    depth = np.linspace(0.15, 1, shares.shape[1])
    handles = []
    for share, alpha in zip(100 * shares.T, depth, strict=True):
        handles.append(
            axes.bar(
                epochs, share, 0.86, bottom, facecolor=(CELL, alpha), edgecolor=INK,
                linewidth=0.4,
            )
        )  # fmt: skip
        bottom = bottom + share
    _integers(axes)
    axes.set(xlabel="epoch", ylabel="steps, %", ylim=(0, 100))
    axes.grid(visible=False)
    shown = [*range(len(names))] if len(names) <= 6 else [0, len(names) - 1]
    _legend(axes, [handles[i] for i in shown], [shortened(names[i]) for i in shown])
    return _svg(figure, key, title)


@_styled
def duel(key: str, title: str, teacher: np.ndarray, student: np.ndarray) -> str:
    """Draws the probabilities (n,) that T' and S' give the true class, a point for each clip."""
    figure, axes = _figure(height=WIDTH * 0.92)
    kept = thinned(len(teacher), MOST_CLIPS)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
    axes.plot(
        teacher[kept], student[kept], "o", color=BLUE, markersize=3.2, alpha=0.45,
        markeredgewidth=0,
    )  # fmt: skip
    beside = {"rotation": 45, "ha": "center", "va": "center"}
    axes.text(0.46, 0.54, "S′ is surer", **beside)
    axes.text(0.54, 0.46, "T′ is surer", **beside)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(xlabel="p(true class), meta-teacher T′", ylabel="p(true class), student S′")
    return _svg(figure, key, title)


def thinned(number: int, most: int) -> np.ndarray:
    """Returns at most `most` of the first `number` integers, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))


@_styled
def dot_plot(
    key: str, title: str, names: Sequence[str], values: Mapping[str, Sequence[float]], label: str
) -> str:
    """Draws values in % for each name (downwards), with a marker for each kind of value."""
    kinds = len(values)
    figure, axes = _figure(4.0, 0.55 + (0.1 + 0.07 * kinds) * len(names))
    places, step = np.arange(len(names)), 0.8 / max(kinds, 1)
    handles = []
    for i, (colour, marker, column) in enumerate(
        zip(COLOURS, MARKERS, values.values(), strict=False)
    ):
        beside = places + (i - (kinds - 1) / 2) * step
        handles += axes.plot(
            column, beside, marker, color=colour, markersize=4.5, markeredgewidth=0
        )
    for place in places[1:]:
        axes.axhline(place - 0.5, color=FAINT, linewidth=0.6)
    axes.set_yticks(places, [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    known = [x for column in values.values() for x in column if np.isfinite(x)] or [0, 100]
    axes.set(xlabel=label, xlim=(10 * (min(known) // 10) - 2, 10 * -(-max(known) // 10) + 2))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    _legend(axes, handles, [*values])
    return _svg(figure, key, title)


@_styled
def scatter(
    key: str,
    title: str,
    points: np.ndarray,
    groups: Sequence[str],
    names: Sequence[str],
    xlabel: str,
) -> str:
    """Draws points (n, 2) by group; at most eight `names` have a colour, others are grey."""
    figure, axes = _figure(WIDTH, WIDTH * 0.8)
    groups = np.asarray(groups)
    looks = dict(zip(names, zip(COLOURS, MARKERS, strict=True), strict=False))
    others = ~np.isin(groups, [*looks])
    handles, labels = [], []
    for name, (colour, marker) in looks.items():
        handles += axes.plot(
            *points[groups == name].T, marker, color=colour, markersize=4, alpha=0.75,
            markeredgewidth=0,
        )  # fmt: skip
        labels.append(shortened(name, 12))
    if others.any():
        handles += axes.plot(*points[others].T, ".", color=GREY, markersize=3, alpha=0.5, zorder=1)
        labels.append("others")
    axes.set(xticks=[], yticks=[], xlabel=xlabel)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    _legend(axes, handles, labels)
    return _svg(figure, key, title)


@_styled
def reliability(
    key: str, title: str, confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray
) -> str:
    """Draws accuracy against mean confidence, in bins whose counts are the points' areas."""
    figure, axes = _figure(2, 1.95)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
    full = counts > 0
    area = 6 + 220 * counts[full] / max(1, counts.sum())
    axes.scatter(
        confidence[full],
        accuracy[full],
        area,
        color=BLUE,
        edgecolor=PAPER,
        linewidth=0.6,
        zorder=3,
        clip_on=False,
    )
    axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.06), aspect="equal", xlabel="confidence")
    axes.set(ylabel="accuracy", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    return _svg(figure, key, title)


@_styled
def stacked_bars(
    key: str, title: str, names: Sequence[str], parts: Mapping[str, Sequence[float]], label: str
) -> str:
    """Draws a bar for each name (downwards), made of parts."""
    figure, axes = _figure(4.0, 0.6 + 0.32 * len(names))
    left, places, handles = np.zeros(len(names)), np.arange(len(names)), []
    for colour, hatch, widths in zip(COLOURS, ("", "////", "...."), parts.values(), strict=False):
        handles.append(
            axes.barh(
                places, widths, 0.6, left, facecolor=colour, edgecolor=PAPER, linewidth=0.6,
                hatch=hatch,
            )
        )  # fmt: skip
        left = left + np.array(widths)
    axes.set_yticks(places, [shortened(name, 24) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    _legend(axes, handles, [*parts])
    return _svg(figure, key, title)


@_styled
def sweep(
    key: str,
    title: str,
    settings: Sequence[float],
    values: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    label: str,
) -> str:
    """Draws scores in % against a setting: by name and setting the score of each run (seed)."""
    figure, axes = _figure(WIDTH, HEIGHT)
    handles = []
    places = np.arange(len(settings))  # evenly, as in the paper's Fig. 2
    for i, (colour, marker, runs) in enumerate(
        zip(COLOURS, MARKERS, values.values(), strict=False)
    ):
        means = [np.mean(each) if len(each) else np.nan for each in runs]
        low = [np.min(each) if len(each) else np.nan for each in runs]
        high = [np.max(each) if len(each) else np.nan for each in runs]
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        for place, each in zip(places, runs, strict=True):
            axes.plot([place] * len(each), each, marker, color=colour, markersize=3, alpha=0.5)
        handles += axes.plot(
            places, means, DASHES[i % 4], marker=marker, color=colour, linewidth=1.4, markersize=5.5
        )
    axes.set_xticks(places, [f"{value:g}" for value in settings])
    axes.set(xlabel=shortened(xlabel, 40), ylabel=label)
    _legend(axes, handles, [shortened(name, 24) for name in values])
    return _svg(figure, key, title)


def _figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def _legend(
    axes: Axes, handles: Sequence | None = None, labels: Sequence[str] | None = None
) -> None:
    """Adds a legend above the axes, in as many columns as there is room for."""
    if handles is None:
        handles, labels = (named[::-1] for named in axes.get_legend_handles_labels())
    if not handles:
        return
    width, height = axes.figure.get_size_inches()
    widest = 38 + 4.9 * max(map(len, labels))  # points: a handle, and letters
    columns = max(1, min(len(handles), int(72 * width / widest)))
    axes.figure.set_size_inches(width, height + 0.17 * -(-len(handles) // columns))
    axes.figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, handletextpad=0.5,
        borderaxespad=0.1,
    )  # fmt: skip


def _integers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _svg(figure: Figure, key: str, title: str) -> str:
    """Writes a figure as an element of HTML, with a title that is read aloud."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The page's fonts show more scripts than the one that measures the texts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    _tidy(root, key)
    width, height = (round(PIXELS * inches) for inches in figure.get_size_inches())
    named = {"role": "img", "aria-labelledby": f"{key}-title"}
    attributes = {"viewBox": root.get("viewBox"), "width": str(width), "height": str(height)}
    root.attrib = attributes | named
    heading = ElementTree.Element("title", {"id": f"{key}-title"})
    heading.text = printable(title)
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(root: ElementTree.Element, key: str) -> None:
    """Makes ids unique, colours variable and numbers short; removes what only files need."""
    elements = [*root.iter()]
    used = set()
    for element in elements:
        used |= set(re.findall(r"url\(#([^)]+)\)", " ".join(element.attrib.values())))
        used.add(element.get(_XLINK, "").removeprefix("#"))
    for element in elements:
        element.tag = element.tag.removeprefix(_SVG)
        element.tail = None
        if element.tag != "text":
            element.text = None
        for child in [*element]:
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                element.remove(child)
        for name, value in [*element.attrib.items()]:
            del element.attrib[name]
            if name == "id":
                if value in used:
                    element.set("id", f"{key}-{value}")
            elif name == _XLINK:
                element.set("href", f"#{key}-{value[1:]}")
            else:
                element.set(name, _tidy_value(name, value, key))


def _tidy_value(name: str, value: str, key: str) -> str:
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", value)
    if name == "style":
        value = re.sub(r"font: [^;]*;? ?", _font, value)
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for colour, variable in VARIABLES.items():
            value = value.replace(colour, f"var(--{variable}, {colour})")
        return re.sub(r"([:;]) ", r"\1", value)
    return re.sub(r"-?\d+\.\d{3,}", lambda x: f"{float(x[0]):.2f}".rstrip("0").rstrip("."), value)


def _font(declaration: re.Match[str]) -> str:
    """Keeps a text's size and weight, and leaves its family to the page."""
    size = re.search(r"[\d.]+px", declaration[0])
    weight = "font-weight:700;" if " 700 " in declaration[0] else ""
    return f"{weight}font-size:{size[0]};" if size else ""
