"""Pretrained speech encoders in Flax, one file each; `load_encoder` is in `checkpoint`.

Encoders are imported only when they are needed: checking a name needs neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serkd_jax.encoders.base import Encoder

# The values of `model_type` in a checkpoint's config.json, which are also the names of the modules.
ENCODERS = ("hubert", "wav2vec2", "wavlm", "whisper")


def find_encoder(model_type: str) -> "Encoder":
    """Returns the description of a kind of encoder, one of `ENCODERS`."""
    return importlib.import_module(f"{__name__}.{model_type}").ENCODER
