"""HuBERT (Hsu et al. 2021): wav2vec 2.0's architecture, and what HuBERT's variants add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from serkd_jax.encoders.base import Tensors
from serkd_jax.encoders.wav2vec2 import POSITIONS, Wav2Vec2

if TYPE_CHECKING:
    from transformers import HubertConfig

RUNNING = ("running_mean", "running_var")  # statistics of a batch norm
BATCH_NORM_EPSILON = 1e-5  # torch's default


class Hubert(Wav2Vec2):
    """HuBERT: base, large, xlarge and DistilHuBERT, with the positions' batch norm folded."""

    model_type = "hubert"
    config_name, model_name = "HubertConfig", "HubertModel"
    prefixes = ("hubert.",)

    def from_torch(self, tensors: Tensors) -> Tensors:
        """See `Encoder`; also replaces the positions' batch norm by a scale and a bias."""
        tensors = super().from_torch(tensors)
        prefix = f"{POSITIONS}batch_norm."
        if not all(prefix + name in tensors for name in ("weight", "bias", *RUNNING)):
            return tensors  # there is no batch norm, or its missing tensors will be reported
        weight, bias, mean, variance = (
            tensors.pop(prefix + name).astype(np.float32) for name in ("weight", "bias", *RUNNING)
        )
        tensors.pop(f"{prefix}num_batches_tracked", None)
        scale = weight / np.sqrt(variance + BATCH_NORM_EPSILON)
        return tensors | {
            f"{POSITIONS}batch_norm_scale": scale,
            f"{POSITIONS}batch_norm_bias": bias - mean * scale,
        }

    def to_torch(self, config: HubertConfig, tensors: Tensors) -> Tensors:
        """See `Encoder`; makes either a batch norm or a weight-normalised convolution."""
        if not config.conv_pos_batch_norm:
            return super().to_torch(config, tensors)
        tensors, norm = dict(tensors), f"{POSITIONS}batch_norm."
        scale = tensors.pop(f"{POSITIONS}batch_norm_scale")
        tensors[f"{norm}weight"] = scale
        tensors[f"{norm}bias"] = tensors.pop(f"{POSITIONS}batch_norm_bias")
        tensors[f"{norm}running_mean"] = np.zeros_like(scale)
        tensors[f"{norm}running_var"] = np.full_like(scale, 1 - BATCH_NORM_EPSILON)
        tensors[f"{norm}num_batches_tracked"] = np.array(0)
        return tensors


ENCODER = Hubert()
