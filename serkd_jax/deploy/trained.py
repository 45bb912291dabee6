"""Loads a trained student from a finished workdir, and its test utterances."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from serkd_jax import __version__
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.config import PATH_KEYS
from serkd_jax.data.reader import read_examples
from serkd_jax.data.sources import Frontend, RecordsSource
from serkd_jax.deploy.backends import Variables, pad_features
from serkd_jax.deploy.folder import VERSION, ModelConfig, parse_config
from serkd_jax.encoders.frontends import Pretrained, make_frontend
from serkd_jax.errors import UserError
from serkd_jax.experiment import STAGES
from serkd_jax.files import read_arrays, read_json
from serkd_jax.models.students import find_student
from serkd_jax.models.students.base import deployed_params, sizes
from serkd_jax.stages.standardization import Statistics
from serkd_jax.training import load_selected

UNFINISHED = "name the workdir of a finished run; if this is one, start the run again to repair it"
STAGE_OF_ROW = {kind.student_row: kind for kind in reversed(STAGES) if kind.student_row}
STUDENT_ROWS = tuple(STAGE_OF_ROW)


@dataclass(frozen=True)
class Trained:
    """A trained student of one fold.

    Attributes:
        workdir: the run's workdir.
        fold: the name of the fold.
        row: the student's row in the results, one of `STUDENT_ROWS`.
        results: the contents of the run's `results.json`.
        predictions: for every fold, `ids`, `label`, and the logits of each row of the results.
        config: the configuration of the exported model.
        variables: what the student has learned, as NumPy arrays.
        frontend: the front-end of the features on which it was trained.
    """

    workdir: Path
    fold: str
    row: str
    results: Mapping[str, Any]
    predictions: Mapping[str, Mapping[str, np.ndarray]]
    config: ModelConfig
    variables: Variables
    frontend: Frontend


def load_trained(workdir: Path, fold: str, row: str) -> Trained:
    """Reads a student and its predictions from the workdir of a finished run.

    Raises:
        UserError: the run is not finished, was made by another version or has no such fold or row,
            or its front-end has changed since.
    """
    results = read_json(workdir / "results.json", UNFINISHED, ("folds", "config", "classes"))
    run = read_json(workdir / "run.json", UNFINISHED, ("the front-end",))
    if fold not in results["folds"]:
        raise UserError(f"{workdir} has no fold {fold}: use one of {', '.join(results['folds'])}")
    if row not in results["folds"][fold]:
        raise UserError(
            f"{workdir} has no {row}; it has {', '.join(results['folds'][fold])}: use --row"
        )
    kind = results["config"]["student"]["kind"]
    if find_student(kind).reads_dialogues:
        raise UserError(
            f"a student of kind {kind!r} classifies an utterance by its whole dialogue: exported "
            "models hear single recordings, so export another student"
        )
    stage = STAGE_OF_ROW[row]
    selected = load_selected(workdir / f"fold_{fold}" / stage.name)
    params = deployed_params(stage.student_params(selected["params"]))
    statistics = read_arrays(
        workdir / f"fold_{fold}" / "statistics.npz", UNFINISHED, ("mean", "spread")
    )
    frontend = make_frontend(ConfigDict(results["config"]["frontend"]))
    if frontend.fingerprint != run["the front-end"]:
        raise UserError(f"the front-end is not what {workdir} was trained on: its weights changed")
    predictions = {
        name: read_arrays(
            workdir / f"fold_{name}" / "predictions.npz", UNFINISHED, ("ids", "label")
        )
        for name in results["folds"]
    }
    return Trained(
        workdir,
        fold,
        row,
        results,
        predictions,
        model_config(results, fold, row, frontend),
        Variables(params, Statistics(**statistics), selected["batch_stats"] or {}),
        frontend,
    )


def model_config(results: Mapping, fold: str, row: str, frontend: Frontend) -> ModelConfig:
    """Makes the configuration of the exported model; it does not name an encoder's local folder."""
    config = results["config"]
    settings = {"name": frontend.name, "fingerprint": frontend.fingerprint}
    if isinstance(frontend, Pretrained):
        settings["model"] = None if _is_folder(frontend.model) else frontend.model
        keys = ("revision", "layer", "dtype", "pad_to_30s")
        settings |= {key: getattr(frontend, key) for key in keys}
        settings["beside"] = frontend.beside.name if frontend.beside else ""
    else:
        settings |= frontend.settings
    return parse_config(
        {
            "format": VERSION,
            "labels": results["classes"],
            "sample_rate": SAMPLE_RATE,
            "max_frames": config["max_frames"],
            "num_features": frontend.width,
            "frontend": settings,
            "student": deployed_student(config["student"]),
            "trained": {
                "by": f"serkd-jax {__version__}",
                "corpus": results["corpus"],
                "fold": fold,
                "row": row,
                "config": _without_places(config),
            },
        }
    )


def deployed_student(student: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the kind of a recipe's student, and the sizes that its exported model has.

    Raises:
        UserError: the recipe was made by another version.
    """
    try:
        names = sizes(find_student(student["kind"]), deployed=True)
        return {key: student[key] for key in ("kind", *names)}
    except KeyError as error:
        raise UserError(
            f"the run was made by another version, since its student has no {error}: export it "
            "with that version, or train again"
        ) from error


def _without_places(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Removes what names files on the machine of the run."""
    kept = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            kept[key] = _without_places(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" not in PATH_KEYS and not (key == "model" and _is_folder(value)):
            kept[key] = value
    return kept


def _is_folder(model: str) -> bool:
    """Returns whether an encoder is given as a folder on this machine, not by a hub name."""
    return Path(model).expanduser().is_dir()


def load_test_inputs(trained: Trained, cache_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Loads the features of the fold's test utterances, in the order of its predictions.

    Args:
        trained: the student.
        cache_dir: the cache that has the features; None means the run's own.

    Returns:
        Features, float32 (n, T, N), and their numbers of valid frames, int32 (n,).

    Raises:
        UserError: the features are not in the cache.
    """
    config, ids = trained.config, trained.predictions[trained.fold]["ids"].tolist()
    held_out = set(ids)
    cache = Path(cache_dir or trained.results["config"]["cache_dir"] or trained.workdir / "data")
    wanted = {"frontend": trained.frontend.fingerprint, "max_frames": config.max_frames}
    # Other corpora in the cache may have the same ids.
    corpus = read_json(trained.workdir / "run.json", UNFINISHED, ("the corpus",))["the corpus"]
    records = sorted(cache.glob(f"records/*-{corpus}/*/*/dataset_info.json"))
    wanted["source"] = RecordsSource(records[0].parent).fingerprint if records else ""
    for path in sorted(cache.glob("features/*/metadata.json")):
        made = read_json(path, UNFINISHED)
        if any(made.get(key) != value for key, value in wanted.items()):
            continue
        found = {
            example["id"]: example["features"]
            for example in read_examples(path.parent, ("id", "features"))
            if example["id"] in held_out
        }
        if len(found) == len(ids):
            return pad_features([found[key] for key in ids], config)
    raise UserError(
        f"{cache} does not hold the features of the test utterances: name the run's --cache_dir, "
        "or export with --nocheck"
    )
