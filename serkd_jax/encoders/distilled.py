"""Small encoders of log-mel frames that `serkd_jax.pretrain` made: saves and loads them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from serkd_jax.errors import UserError
from serkd_jax.files import read_json, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
REMEDY = "name a folder made by serkd_jax.pretrain, or make it again"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a `FrameEncoder`, and the number of log-mel bands that it reads."""

    num_mels: int
    width: int
    num_layers: int
    kernel: int
    outputs: int


def save_distilled(folder: Path, sizes: Sizes, params: Any, about: dict[str, Any]) -> None:
    """Writes the weights, and `config.json` with the sizes and what is said about the training."""
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(params, sep=".")
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
    partial = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, {"model_type": "serkd-jax-frames", **asdict(sizes), **about})


def load_distilled(folder: str | Path) -> tuple[Sizes, dict[str, Any], str]:
    """Returns sizes, parameters, and a hash of all on which the encoded frames depend.

    Raises:
        UserError: the folder is missing, or holds something else, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    described = read_json(folder / CONFIG, REMEDY)
    try:
        sizes = Sizes(**{name: int(described[name]) for name in Sizes.__dataclass_fields__})
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({error}): {REMEDY}") from error
    digest = hashlib.sha256(json.dumps(asdict(sizes)).encode())
    for name, value in sorted(tensors.items()):
        if not np.isfinite(value).all():
            raise UserError(f"{folder / WEIGHTS}: {name} is not finite: {REMEDY}")
        digest.update(name.encode() + value.tobytes())
    params = traverse_util.unflatten_dict(tensors, sep=".")
    return sizes, params, digest.hexdigest()[:16]
