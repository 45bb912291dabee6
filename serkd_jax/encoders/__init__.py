"""Pretrained encoders of speech in Flax, a file each; `load_encoder` is in `checkpoint`.

Nothing is imported before it is needed: who only checks a name needs neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serkd_jax.encoders.base import Encoder

# The `model_type` of a checkpoint's config.json, which is also the name of the module here.
ENCODERS = ("hubert", "wav2vec2", "wavlm", "whisper")


def find_encoder(model_type: str) -> "Encoder":
    """What there is to know of a kind of encoder, one of `ENCODERS`."""
    return importlib.import_module(f"{__name__}.{model_type}").ENCODER
