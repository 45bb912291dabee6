"""Exported folders with random weights, as quick to make as they are small."""

import jax
import jax.numpy as jnp

from serkd_jax.deploy.backends import make_student
from serkd_jax.deploy.folder import CONFIG, FILES, parse_config
from serkd_jax.deploy.formats import write_format
from serkd_jax.logmel import fingerprint

STUDENT = {
    "inverted": True,
    "width": 16,
    "mlp_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "classifier_dim": 8,
    "variate_embedding": True,
    "use_norm": False,
    "time_pooling": 2,
}


def settings(**changes):
    """The content of a config.json: three classes, 8 mel bands, windows of half a second."""
    return {
        "format": 1,
        "labels": ["anger", "joy", "sadness"],
        "sample_rate": 16_000,
        "max_frames": 25,
        "num_features": 8,
        "student": STUDENT,
        "frontend": {"name": "logmel", "num_mels": 8, "fingerprint": fingerprint(8)},
    } | changes


def write_model(folder, formats=("safetensors",), **changes):
    """Such a folder."""
    config = parse_config(settings(**changes))
    folder.mkdir()
    (folder / CONFIG).write_text(config.to_json())
    features = jnp.zeros((1, config.max_frames, config.num_features))
    init = jax.jit(make_student(config).init)
    params = jax.device_get(init(jax.random.key(0), features, jnp.ones(1, int))["params"])
    # Larger than a start of training has them, so that recordings differ.
    params = jax.tree.map(lambda x: 3 * x, params)
    for form in FILES:
        if form in formats:
            write_format(form, folder, config, params)
    return folder
