"""Writes `results.json`, `results.md` and the table on the terminal."""

from pathlib import Path
from typing import Any

import numpy as np

from serkd_jax.data.tables import markdown_cell
from serkd_jax.files import write_file, write_json
from serkd_jax.results.metrics import classification_metrics


def write_results(
    workdir: Path,
    corpus: str,
    config: dict[str, Any],
    class_names: list[str],
    fold_predictions: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
    params: dict[str, int],
    data: str,
) -> str:
    """Scores the test predictions; writes `results.json` and `results.md`.

    Args:
        workdir: the folder to which to write.
        corpus: name of the corpus.
        config: the run's config.
        class_names: the names of the C classes.
        fold_predictions: fold -> row -> (labels (n,), predictions (n,)). Rows that all folds have
            are pooled.
        params: parameter counts of teacher and student.
        data: Markdown about the corpus: its counts, and what was left out or cut.

    Returns:
        The Markdown report, without `data`.
    """

    def score(labels: np.ndarray, predictions: np.ndarray) -> dict[str, Any]:
        return classification_metrics(labels, predictions, len(class_names))

    folds = {
        fold: {row: score(*predictions) for row, predictions in rows.items()}
        for fold, rows in fold_predictions.items()
    }
    overall, (first, *_) = {}, folds.values()
    for row in (row for row in first if all(row in rows for rows in folds.values())):
        labels, predictions = zip(*(rows[row] for rows in fold_predictions.values()), strict=True)
        overall[row] = score(np.concatenate(labels), np.concatenate(predictions))
    results = {
        "corpus": corpus,
        "config": config,
        "classes": class_names,
        "folds": folds,
        "overall": overall,
        "params": params,
    }
    report = _markdown(results)
    write_json(workdir / "results.json", results)
    write_file(workdir / "results.md", f"{report}\n## Data\n\n{data}\n")
    return report


def _markdown(results: dict[str, Any]) -> str:
    overall, folds = results["overall"], results["folds"]
    names = [*map(markdown_cell, results["classes"])]
    *_, last = overall
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
    params = ", ".join(
        f"{name} {count:,} ({count / 2**20:.2f}M)" for name, count in results["params"].items()
    )
    lines += ["", f"Parameters: {params}; M is 2^20, as in the paper."]
    lines += ["", f"Confusion of the {last.replace('_', ' ')} (rows are true classes):", ""]
    lines += ["| |" + "".join(f" {name} |" for name in names), "|---|" + "---|" * len(names)]
    for name, counts in zip(names, overall[last]["confusion"], strict=True):
        lines.append(f"| {name} |" + "".join(f" {count} |" for count in counts))
    return "\n".join(lines) + "\n"
