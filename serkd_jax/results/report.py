"""Writes `results.json`, `results.md` and the table on the terminal."""

from pathlib import Path
from typing import Any

from serkd_jax.data.tables import markdown_cell
from serkd_jax.files import write_file, write_json
from serkd_jax.results.predictions import PROBE, Predictions, score, write_table


def write_results(
    workdir: Path,
    corpus: str,
    config: dict[str, Any],
    predictions: Predictions,
    params: dict[str, int],
    data: str,
) -> str:
    """Scores the test predictions; writes `results.json`, `results.md` and `predictions.csv`.

    Args:
        workdir: the folder to which to write.
        corpus: name of the corpus.
        config: the run's config.
        predictions: the test predictions of all folds.
        params: parameter counts of teacher and student.
        data: Markdown about the corpus: its counts, and what was left out or cut.

    Returns:
        The Markdown report, without `data`.
    """
    results = {
        "corpus": corpus,
        "config": config,
        "classes": next(iter(predictions.values()))["classes"].tolist(),
        **score(predictions),
        "params": params,
        "data": data,
    }
    report = _markdown(results)
    write_table(workdir / "predictions.csv", predictions)
    write_json(workdir / "results.json", results)
    write_file(workdir / "results.md", f"{report}\n## Data\n\n{data}\n")
    return report


def _markdown(results: dict[str, Any]) -> str:
    overall, folds = results["overall"], results["folds"]
    names = [*map(markdown_cell, results["classes"])]
    *_, last = (row for row in overall if row != PROBE)
    lines = [
        f"# {results['corpus']}",
        "",
        f"{overall[last]['n']} test utterances in {len(folds)} fold(s), {len(names)} classes; "
        f"chance UA {100 / len(names):.1f} %. Scores in %, over the pooled test predictions.",
        "",
        "| model | UA | WA | wF1 |" + "".join(f" UA fold {fold} |" for fold in folds),
        "|---|---|---|---|" + "---|" * len(folds),
    ]
    for row in overall:
        scores = [overall[row][m] for m in ("ua", "wa", "wf1")]
        scores += [fold[row]["ua"] for fold in folds.values()]
        cells = "".join(f" {100 * score:.1f} |" for score in scores)
        lines.append(f"| {row.replace('_', ' ')} |{cells}")
    if PROBE in overall:
        baseline = "a linear SVM on mean and deviation over time of the student's features"
        lines += ["", f"The linear probe is a baseline: {baseline}."]
    params = ", ".join(
        f"{name} {count:,} ({count / 2**20:.2f}M)" for name, count in results["params"].items()
    )
    lines += ["", f"Parameters: {params}; M is 2^20, as in the paper."]
    lines += ["", f"Confusion of the {last.replace('_', ' ')} (rows are true classes):", ""]
    lines += ["| |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * len(names)]
    for name, counts in zip(names, overall[last]["confusion"], strict=True):
        lines.append(f"| {name} |" + "".join(f" {count} |" for count in counts))
    return "\n".join(lines) + "\n"
