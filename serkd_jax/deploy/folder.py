"""The exported folder and its `config.json`, which is read as untrusted input.

No path is ever taken from the configuration: every file has a fixed name.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.tables import is_class_name
from serkd_jax.encoders import ENCODERS
from serkd_jax.encoders.hub import download
from serkd_jax.errors import UserError
from serkd_jax.models.students import STUDENTS

CONFIG = "config.json"
CARD = "README.md"
FRONTEND = "frontend"  # a folder with the encoder, if it came from a local folder
REMEDY = "export or fetch the model again"
VERSION = 3  # of the layout

# The file of each format; the first always exists, with config.json and the model card.
FILES = {
    "safetensors": "model.safetensors",
    "stablehlo": "model.stablehlo",
    "stablehlo-bf16": "model.bf16.stablehlo",
    "onnx": "model.onnx",
    "onnx-int8": "model.int8.onnx",
    "tflite": "model.tflite",
    "tflite-int8": "model.int8.tflite",
}

# A predicate of the allowed values, and a description of them.
_Rule = tuple[Callable[[Any], bool], str]


def _number(kind: type, least: int, greatest: int) -> _Rule:
    def holds(value: Any) -> bool:
        return type(value) is kind and least <= value <= greatest

    return holds, f"{kind.__name__} {least} to {greatest}"


_MODEL = {"max_frames": _number(int, 1, 10_000), "num_features": _number(int, 1, 10_000)}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of an exported model.

    Attributes:
        labels: the names of the C classes, in the order of the logits.
        max_frames: T, the length of a window in frames, at 50 a second.
        num_features: N.
        student: the student's `kind` and sizes, which `make_student` checks where they are used.
        frontend: `name`, `fingerprint`, and the settings of `LogMel` or `Pretrained`.
        trained: what the model was trained on and how, for people.
    """

    labels: tuple[str, ...]
    max_frames: int
    num_features: int
    student: Mapping[str, Any]
    frontend: Mapping[str, Any]
    trained: Mapping[str, Any]

    def to_json(self) -> str:
        """Returns the text of `config.json`."""
        known = {"format": VERSION, "labels": list(self.labels), "sample_rate": SAMPLE_RATE}
        sizes = {"max_frames": self.max_frames, "num_features": self.num_features}
        parts = {"frontend": self.frontend, "student": self.student, "trained": self.trained}
        return json.dumps(sealed(known | sizes | parts), indent=1) + "\n"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a hash of the rest of the content, which reveals edits and damage."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def find_folder(model: str | Path, revision: str | None, form: str) -> Path:
    """Finds the folder of a model, or downloads from the hub the files that a format needs.

    Raises:
        UserError: there is no such folder, model or format.
    """
    if form not in FILES:
        raise UserError(f"there is no format {form!r}: use one of {', '.join(FILES)}")
    folder = Path(model)
    if folder.is_dir():
        return folder
    patterns = [CONFIG, CARD, FILES[form], f"{FRONTEND}/*.json", f"{FRONTEND}/*.safetensors"]
    return download(str(model), revision, patterns, f"a local folder has a {CONFIG}")


def read_config(folder: Path) -> ModelConfig:
    """Reads and checks `config.json`.

    Raises:
        UserError: the file is missing, or is not as an export has written it.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}: name a folder made by serkd_jax.export")
    try:
        if path.stat().st_size > 1_000_000:
            raise ValueError("it is larger than 1 MB")
        given = json.loads(path.read_text("utf-8"))
        config = parse_config(given)
        if sealed(given) != given:
            raise ValueError("its sha256 does not match")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, was edited, or was written by another version ({error}): {REMEDY}"
        ) from error


def parse_config(given: Any) -> ModelConfig:
    """Checks a configuration and returns it.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(given, dict) or given.get("format") != VERSION:
        raise ValueError(f"format is not {VERSION}")
    labels = given.get("labels")
    if not (isinstance(labels, list) and 2 <= len(labels) <= 1000):
        raise ValueError("labels is not a list of 2 to 1000 names")
    if not all(map(is_class_name, labels)):
        raise ValueError("a label is not a name")
    if len(set(labels)) < len(labels):
        raise ValueError("two labels are the same")
    if given.get("sample_rate") != SAMPLE_RATE:
        raise ValueError(f"sample_rate is not {SAMPLE_RATE}")
    _check({key: given.get(key) for key in _MODEL}, _MODEL, "config")
    student, frontend = given.get("student"), given.get("frontend")
    if given["max_frames"] * given["num_features"] > 2**26:
        raise ValueError("the model is too large to be run")
    if not isinstance(student, dict) or student.get("kind") not in list(STUDENTS):
        raise ValueError(f"student.kind is not one of {', '.join(STUDENTS)}")
    _check_frontend(frontend, given["num_features"])
    trained = given.get("trained", {})
    return ModelConfig(
        tuple(labels), given["max_frames"], given["num_features"], student, frontend, trained
    )


def _check(values: Any, rules: Mapping[str, _Rule], where: str) -> None:
    if not isinstance(values, dict) or values.keys() != rules.keys():
        raise ValueError(f"{where} must have the keys {', '.join(rules)}")
    for key, (holds, words) in rules.items():
        if not holds(values[key]):
            raise ValueError(f"{where}.{key} is {str(values[key])[:50]}, not {words}")


def _check_frontend(frontend: Any, num_features: int) -> None:
    name = frontend.get("name") if isinstance(frontend, dict) else None
    if name in SPECTRAL:
        spectral = SPECTRAL[name]
        allowed = spectral.least <= num_features <= spectral.most
        if frontend.get(spectral.size) != num_features or not allowed:
            size, span = f"frontend.{spectral.size}", f"{spectral.least} to {spectral.most}"
            raise ValueError(f"{size} is not num_features, or not {span}")
        if frontend.get("fingerprint") != spectral.fingerprint(num_features):
            raise ValueError(f"it was made with another version of the {name} front-end")
    elif name in ENCODERS:
        model, revision = frontend.get("model"), frontend.get("revision")
        if model is not None and not (isinstance(model, str) and _HUB_NAME.fullmatch(model)):
            raise ValueError("frontend.model is not a name on the hub")
        if revision is not None and not isinstance(revision, str):
            raise ValueError("frontend.revision is not text")
        layer = frontend.get("layer")
        if not all(type(k) is int for k in (layer if isinstance(layer, list) else [layer])):
            raise ValueError("frontend.layer is neither a number nor a list of them")
        if type(frontend.get("pad_to_30s")) is not bool:
            raise ValueError("frontend.pad_to_30s is neither true nor false")
        if frontend.get("dtype") not in ("float32", "bfloat16"):
            raise ValueError("frontend.dtype is neither float32 nor bfloat16")
        if not isinstance(frontend.get("fingerprint"), str):
            raise ValueError("frontend.fingerprint is not text")
        if frontend.get("beside", "") not in ("", *SPECTRAL):
            raise ValueError(f"frontend.beside is not one of {', '.join(SPECTRAL)}")
    else:
        known = ", ".join((*SPECTRAL, *ENCODERS))
        raise ValueError(f"frontend.name is not one of {known}")
