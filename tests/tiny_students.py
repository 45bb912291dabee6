"""Small students of every kind, and random variables for them."""

import jax
import jax.numpy as jnp
import numpy as np

from serkd_jax.models.students import find_student
from serkd_jax.models.students.base import sizes

# What differs from the defaults, for 8 features or more.
TINY = {
    "timnet": {"width": 6, "num_levels": 2},
    "dwformer": {"mlp_dim": 12, "num_heads": 2, "num_blocks": 1, "classifier_dims": (7,)},
    "shiftcnn": {"shift": 4},
    "shiftformer": {},
    "shiftlstm": {},
    "speechformer": {
        "mlp_dim": 12,
        "num_heads": 2,
        "num_layers": (1, 1),
        "windows": (3,),
        "merges": (2,),
        "word_frames": 10,
        "classifier_dims": (7,),
    },
    "camser": {
        "bins": 2,
        "coefficients": 1,
        "segment_frames": 4,
        "image": (64, 64),
        "lstm_width": 3,
        "width": 16,
        "classifier_dims": (7,),
    },
}

TINY["mmdfn"] = {"width": 6, "graph_width": 4, "num_layers": 3}
SYSTEMS = tuple(TINY)  # those of others, each with a recipe
TINY["convolutional"] = {"width": 6, "num_layers": 2, "kernel": 3, "outputs": 5, "dropout": 0.1}


def tiny(kind, **changes):
    """A tiny student of three classes, without projection."""
    return find_student(kind)(3, **{"projection_dims": ()} | TINY[kind] | changes)


def deployed_sizes(kind):
    """A tiny student as a `config.json` has it."""
    names = sizes(find_student(kind), deployed=True)
    values = {name: getattr(tiny(kind), name) for name in names}
    return {"kind": kind} | {k: list(v) if type(v) is tuple else v for k, v in values.items()}


def random_variables(model, *inputs, seed=0):
    """Variables without zeros or ones, so that a bias or a norm that is left out shows."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scale = 0.4 if x.ndim == 1 else np.prod(x.shape[:-1]) ** -0.5
        values = rng.normal(0, scale, x.shape).astype(np.float32)
        return np.abs(values) + 0.5 if path[-1].key in ("var", "scale") else values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_inputs(batch, frames, variates, seed=0):
    """Features, 0 after each example's frames, and their numbers; only the first one has all."""
    rng = np.random.default_rng(seed)
    num_frames = rng.integers(1, frames, batch).astype(np.int32)
    num_frames[0] = frames
    features = rng.normal(size=(batch, frames, variates)).astype(np.float32)
    features[np.arange(frames) >= num_frames[:, None]] = 0
    return features, num_frames


def count(kind, classes, frames, variates, **changes):
    """The numbers of parameters and of batch statistics of a deployed student."""
    model = find_student(kind)(classes, projection_dims=(), **changes)
    inputs = jnp.zeros((1, frames, variates)), jnp.ones(1, int)
    made = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return tuple(
        sum(x.size for x in jax.tree.leaves(made.get(name, {})))
        for name in ("params", "batch_stats")
    )
