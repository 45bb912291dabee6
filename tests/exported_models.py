"""Exported folders with random weights, as quick to make as they are small."""

import jax
import jax.numpy as jnp
import numpy as np

from serkd_jax.audio.logmel import fingerprint
from serkd_jax.deploy.backends import Variables, make_student, read_variables
from serkd_jax.deploy.folder import CONFIG, FILES, VERSION, parse_config, read_config
from serkd_jax.deploy.formats import write_format
from serkd_jax.stages.standardization import Statistics

STUDENT = {
    "kind": "inverted",
    "inverted": True,
    "width": 16,
    "mlp_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "norm": "pre",
    "readout": "variates",
    "classifier_dims": [8],
    "variate_embedding": True,
    "use_norm": False,
    "variates": 0,
    "time_pooling": 2,
    "deviations": False,
}


def settings(**changes):
    """The content of a config.json: three classes, 8 mel bands, windows of half a second."""
    return {
        "format": VERSION,
        "labels": ["anger", "joy", "sadness"],
        "sample_rate": 16_000,
        "max_frames": 25,
        "num_features": 8,
        "student": STUDENT,
        "frontend": {"name": "logmel", "num_mels": 8, "fingerprint": fingerprint(8)},
    } | changes


def write_model(folder, formats=("safetensors",), statistics=None, **changes):
    """Such a folder; the statistics are random if none are given."""
    config = parse_config(settings(**changes))
    folder.mkdir()
    (folder / CONFIG).write_text(config.to_json())
    features = jnp.zeros((1, config.max_frames, config.num_features))
    init = jax.jit(make_student(config).init)
    learned = jax.device_get(init(jax.random.key(0), features, jnp.ones(1, int)))
    # Larger than a start of training has them, so that recordings differ.
    params = jax.tree.map(lambda x: 3 * x, learned["params"])
    batch_stats = learned.get("batch_stats", {})
    variables = Variables(params, statistics or random_statistics(config), batch_stats)
    for form in FILES:
        if form in formats:
            write_format(form, folder, config, variables)
    return folder


def random_statistics(config):
    """Far enough from none that features and padding differ where they are not applied."""
    rng = np.random.default_rng(0)
    mean, spread = rng.uniform((0.5, 0.3), (1.5, 0.8), (config.num_features, 2)).T
    return Statistics(mean.astype(np.float32), spread.astype(np.float32))


def logits_by_hand(folder, features, num_frames):
    """Of the student in Flax, with its features standardised and cut in NumPy."""
    config = read_config(folder)
    params, statistics, _ = read_variables(folder / FILES["safetensors"], config)
    standard = (features - statistics.mean) / statistics.spread
    for row, length in zip(standard, num_frames, strict=True):
        row[length:] = 0
    return np.asarray(make_student(config).apply({"params": params}, standard, num_frames).logits)
