"""UA against the time that a second of audio takes on one core, of finished runs.

    pip install -e '.[test]'
    taskset -c 0 python -m benchmarks.tradeoff RUN RUN ... --out=tradeoff.json

Each RUN is the workdir of a finished run that trained a student, or a folder of workdirs. The last
student of every fold is exported to int8 (ONNX) and predicts the fold's test utterances. The times
are of one recording of the greatest length, front-end included: log-mel in NumPy or the encoder in
JAX, then ONNX Runtime. The linear probe is given the time of its front-end. Runs that differ in
the seed alone are one model, with the mean of their UAs and its 95 % interval by speaker.
`python docs/pictures.py --tradeoff=tradeoff.json` draws the table.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.inference import in_process, student_cost
from serkd_jax.audio.logmel import num_samples
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.deploy.backends import load_classifier
from serkd_jax.deploy.formats import write_format
from serkd_jax.deploy.trained import STUDENT_ROWS, Trained, load_test_inputs, load_trained
from serkd_jax.errors import UserError
from serkd_jax.export import export
from serkd_jax.files import write_json
from serkd_jax.results.comparison import Group, group_runs, read_runs
from serkd_jax.results.intervals import interval, mean_of_seeds
from serkd_jax.results.predictions import PROBE
from serkd_jax.results.systems_table import what_it_reads

FLOAT, INT8 = "onnx", "onnx-int8"


def main() -> None:
    """Measures every model; prints the table, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="workdirs, or folders of workdirs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=3, help="for which a time is measured")
    options = parser.parse_args()
    runs, problems = read_runs(options.runs)
    lines = []
    try:
        for group in tqdm(group_runs(runs), "models", unit="model", disable=None):
            lines += measure(group, options.seconds)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    write_json(options.out, {"cores": len(os.sched_getaffinity(0)), "rows": lines})
    print(markdown(lines))
    for problem in problems:
        print(f"Left out: {problem}")


def measure(group: Group, seconds: float) -> list[dict[str, Any]]:
    """A line for the linear probe, for each student of a model, and for the last one in int8.

    Raises:
        UserError: a run has no student, or cannot be exported.
    """
    run = group.first
    students = [row for row in STUDENT_ROWS if row in run.scores]  # the last one comes first
    if not students:
        raise UserError(f"{run.workdir} has no student: name a run that trains one")
    int8 = f"{students[0]}, int8"
    decided = [
        {
            fold: {**arrays, int8: classify_test(each.workdir, fold, students[0])}
            for fold, arrays in each.predictions.items()
        }
        for each in group.runs.values()
    ]
    trained = load_trained(run.workdir, next(iter(run.predictions)), students[0])
    front_end, float_time, int8_time = time_student(trained, seconds)
    student = sum(x.size for x in jax.tree.leaves(trained.variables.params))
    checkpoint = getattr(trained.frontend, "checkpoint", None)
    encoder = checkpoint.num_parameters if checkpoint else 0
    of_row = {PROBE: (encoder, front_end)}
    of_row |= dict.fromkeys(reversed(students), (encoder + student, front_end + float_time))
    of_row |= {int8: (encoder + student, front_end + int8_time)}
    scores = mean_of_seeds(decided)
    return [
        {
            "frontend": what_it_reads(run.results["config"]),
            "kind": trained.config.student["kind"],
            "row": row,
            "parameters": parameters,
            "seconds": time,
            "seeds": len(decided),
            "ua": scores[row]["ua"][0],
            "interval": interval(scores[row]["ua"][1]),
        }
        for row, (parameters, time) in of_row.items()
        if row in scores
    ]


def classify_test(workdir: Path, fold: str, row: str) -> np.ndarray:
    """The logits (n, C) of a fold's test utterances by its student in int8."""
    trained = load_trained(workdir, fold, row)
    with tempfile.TemporaryDirectory() as folder:
        write_format(INT8, Path(folder), trained.config, trained.variables)
        return load_classifier(Path(folder), trained.config, INT8)(*load_test_inputs(trained, None))


def time_student(trained: Trained, seconds: float) -> tuple[float, float, float]:
    """Seconds for a second of audio: of the front-end, of the student, and of it in int8."""
    length = num_samples(trained.config.max_frames) / SAMPLE_RATE
    with tempfile.TemporaryDirectory() as folder:
        export(trained, Path(folder), [FLOAT, INT8], None)
        costs = {
            form: in_process(student_cost, Path(folder), form, 1, seconds) for form in (FLOAT, INT8)
        }
    front_end = min(cost.front_end for cost in costs.values())
    return tuple(t / length for t in (front_end, costs[FLOAT].model, costs[INT8].model))


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table, times in ms."""
    rows = ["| front-end | student | row | parameters | ms | seeds | UA |", "|---" * 7 + "|"]
    for line in lines:
        low, high = (100 * x for x in line["interval"])
        told = [line["frontend"], line["kind"], line["row"].replace("_", " ")]
        told += [f"{line['parameters']:,}", f"{1e3 * line['seconds']:.2f}", str(line["seeds"])]
        rows.append(f"| {' | '.join(told)} | {100 * line['ua']:.1f} ({low:.1f} to {high:.1f}) |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
