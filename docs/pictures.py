"""The pictures of the README and of docs/evidence.md, drawn from the root of the repository.

    python docs/pictures.py --tradeoff=tradeoff.json --systems=systems.json

``pipeline.svg`` is a drawing; the others show what ``benchmarks.tradeoff`` measured.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from serkd_jax.results.systems_table import SYSTEMS

HERE = Path(__file__).parent
INK, PALE = "#24292f", "#f6f8fa"
BLUE, ORANGE, GREEN, PURPLE = "#0969da", "#bc4c00", "#1a7f37", "#8250df"

BOXES = {  # name: (x, y, title, what it is)
    "corpus": (0, 2, "corpus", "EMO-DB, IEMOCAP, MELD,\na manifest of your own"),
    "records": (1, 2, "records", "16 kHz audio\nin TFRecords"),
    "features": (2, 2, "features", "HuBERT, wav2vec 2.0,\nWavLM, Whisper, log-mel"),
    "teacher": (0, 1, "teacher", "fine-tuned\nEq. 1"),
    "student": (1, 1, "student", "contrastive branch\nEqs. 2, 3"),
    "distill": (2, 1, "distilled student", "and meta-teacher\nEqs. 4 to 9"),
    "curriculum": (3, 1, "updated student", "curriculum policy\nEqs. 10 to 13"),
    "results": (2, 0, "results", "per fold and pooled,\nevery prediction kept"),
    "export": (3, 0, "export", "safetensors, StableHLO,\nONNX, LiteRT"),
}
ARROWS = ("corpus records", "records features", "distill curriculum", "results export")
WIDTH, HEIGHT, ACROSS, UP = 0.78, 0.62, 1.06, 1.08


def draw_pipeline() -> None:
    """What one command does."""
    figure, axes = plt.subplots(figsize=(9.5, 4.4))

    def frame(left: float, bottom: float, width: float, height: float, **how: str) -> None:
        style = "round,pad=0.03"
        axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, **how))

    def arrow(start: tuple[float, float], end: tuple[float, float], **how: str) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK} | how)

    frame(
        -0.1, UP - 0.18, 3 * ACROSS + WIDTH + 0.2, HEIGHT + 0.4, facecolor="white",
        edgecolor=BLUE, linestyle="--",
    )  # fmt: skip
    axes.text(-0.06, UP + HEIGHT + 0.09, "for each test fold", color=BLUE, fontsize=10)
    for x, y, title, text in BOXES.values():
        left, bottom = x * ACROSS, y * UP
        frame(left, bottom, WIDTH, HEIGHT, facecolor=PALE, edgecolor=INK)
        axes.text(left + WIDTH / 2, bottom + 0.47, title, ha="center", weight="bold", fontsize=11)
        axes.text(left + WIDTH / 2, bottom + 0.2, text, ha="center", va="center", fontsize=9)
    for pair in ARROWS:
        (x, y), (to_x, _) = (BOXES[name][:2] for name in pair.split())
        middle = y * UP + HEIGHT / 2
        arrow((x * ACROSS + WIDTH + 0.04, middle), (to_x * ACROSS - 0.04, middle))
    middle = 2 * ACROSS + WIDTH / 2
    arrow((middle, 2 * UP - 0.04), (middle, UP + HEIGHT + 0.25))
    arrow((middle, UP - 0.2), (middle, HEIGHT + 0.04))
    teaches = {"color": ORANGE, "connectionstyle": "arc3,rad=0.1"}
    arrow((WIDTH * 0.7, UP - 0.04), (2 * ACROSS + 0.1, UP - 0.04), **teaches)
    axes.text(ACROSS + WIDTH / 2, UP - 0.115, "teaches", color=ORANGE, fontsize=9, ha="center")
    axes.set(xlim=(-0.2, 3 * ACROSS + WIDTH + 0.2), ylim=(-0.08, 2 * UP + HEIGHT + 0.08))
    axes.axis("off")
    save(figure, "pipeline.svg")


# Front-end -> its colour and name; row -> marker, fill and name.
FRONT_ENDS = {
    "whisper": (BLUE, "features of Whisper-base"),
    "logmel": (ORANGE, "log-mel frames"),
    "mfcc": (GREEN, "39 MFCC"),
    "whisper and spectra": (PURPLE, "Whisper-base, spectra and MFCC"),
}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # ms
MARKERS = {
    "linear_probe": ("s", "none", "linear probe"),
    "student": ("o", "none", "student, undistilled"),
    "updated_student": ("o", "full", "updated student"),
    "updated_student, int8": ("^", "full", "updated student, int8"),
    "system": ("D", "full", "compared system"),
}


def draw_tradeoff(table: Path, name: str, speakers: str, legend: str | tuple[float, float]) -> None:
    """UA over the real-time factor of every model, with intervals by speaker."""
    rows = json.loads(table.read_text())["rows"]
    rows = [
        row | {"row": "system"} if row["kind"] in SYSTEMS and row["row"] == "student" else row
        for row in rows
        if row["row"] in MARKERS
    ]
    probes = {row["frontend"]: row for row in rows if row["row"] == "linear_probe"}  # one of each
    rows = [*probes.values(), *(row for row in rows if row["row"] != "linear_probe")]
    figure, axes = plt.subplots(figsize=(8, 4.6))
    for row in rows:
        color, _ = FRONT_ENDS[row["frontend"]]
        marker, fill, _ = MARKERS[row["row"]]
        time, ua, (low, high) = 1e3 * row["seconds"], 100 * row["ua"], row["interval"]
        axes.errorbar(
            time, ua, [[ua - 100 * low], [100 * high - ua]], fmt=marker, fillstyle=fill,
            color=color, markersize=7, elinewidth=0.8, alpha=0.85,
        )  # fmt: skip
        text = {"textcoords": "offset points", "color": INK}
        if row["row"] == "system":
            axes.annotate(SYSTEMS[row["kind"]].name, (time, ua), (7, 0), va="center", **text)
        elif row["row"] == "updated_student" and row["frontend"] == "logmel":
            size = f"{row['parameters'] / 1e6:.2f}M"
            axes.annotate(size, (time, 100 * high), (0, 5), ha="center", **text)
    for front_end in dict.fromkeys(row["frontend"] for row in rows):
        color, label = FRONT_ENDS[front_end]
        axes.plot([], [], "-", color=color, label=label)
    for kind, (marker, fill, label) in MARKERS.items():
        if any(row["row"] == kind for row in rows):
            axes.plot([], [], marker, fillstyle=fill, color=INK, label=label)
    ticks = [tick for tick in TICKS if tick <= 2e3 * max(row["seconds"] for row in rows)]
    axes.set(
        xscale="log",
        xticks=ticks,
        xticklabels=ticks,
        xlabel="milliseconds on one core for a second of audio, front-end included",
        ylabel="unweighted accuracy, %",
    )
    axes.set_title(f"EMO-DB, 7 emotions, {speakers}; 95 % intervals by speaker", fontsize=11)
    axes.minorticks_off()
    axes.grid(color="#d0d7de")
    axes.legend(loc=legend, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, name)


def save(figure: plt.Figure, name: str) -> None:
    """On white, for dark pages, too; text stays text."""
    figure.tight_layout()
    figure.savefig(HERE / name, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tradeoff", type=Path, help="of ten folds, by benchmarks.tradeoff")
    parser.add_argument("--systems", type=Path, help="of the systems on two folds, by the same")
    given = parser.parse_args()
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "serkd", "font.family": "sans-serif"}
    )
    draw_pipeline()
    if given.tradeoff:
        draw_tradeoff(given.tradeoff, "tradeoff.svg", "each speaker unheard in turn", "lower right")
    if given.systems:
        draw_tradeoff(given.systems, "systems.svg", "five speakers unheard", (0.42, 0.02))
