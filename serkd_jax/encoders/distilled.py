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


@dataclass(frozen=True)
class Distilled:
    """A small encoder.

    Attributes:
        sizes: its sizes.
        params: the parameters of its `FrameEncoder`.
        mean: (num_mels,) mean of each band in pretraining, by which its input is standardised.
        spread: (num_mels,) their standard deviation, likewise.
        sha256: hash of all on which the encoded frames depend.
    """

    sizes: Sizes
    params: dict[str, Any]
    mean: np.ndarray
    spread: np.ndarray
    sha256: str = ""


def save_distilled(folder: Path, distilled: Distilled, about: dict[str, Any]) -> None:
    """Writes the weights, and `config.json` with the sizes and what is said about the training."""
    from safetensors.numpy import save_file

    flat = traverse_util.flatten_dict(distilled.params, sep=".")
    flat |= {"mean": distilled.mean, "spread": distilled.spread}
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
    partial = folder / f"{WEIGHTS}.tmp"
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS)
    described = {"model_type": "serkd-jax-frames", **asdict(distilled.sizes), **about}
    write_json(folder / CONFIG, described)


def load_distilled(folder: str | Path) -> Distilled:
    """Loads what `save_distilled` wrote.

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
        mean, spread = (tensors[name] for name in ("mean", "spread"))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} cannot be read ({error}): {REMEDY}") from error
    digest = hashlib.sha256(json.dumps(asdict(sizes)).encode())
    for name, value in sorted(tensors.items()):
        if not np.isfinite(value).all():
            raise UserError(f"{folder / WEIGHTS}: {name} is not finite: {REMEDY}")
        digest.update(name.encode() + value.tobytes())
    del tensors["mean"], tensors["spread"]
    params = traverse_util.unflatten_dict(tensors, sep=".")
    return Distilled(sizes, params, mean, spread, digest.hexdigest()[:16])
