"""Named experiments for `python -m serkd_jax.sweep --experiments=configs/sweeps.py:NAME`.

Each is a dictionary of labels and of what they change in the recipe.
"""

_NOT_INVERTED = {"student.inverted": False, "student.readout": "tokens"}
# The inverted student of `:whisper` has one time point and narrow tokens, one for each variate. A
# student whose tokens are frames needs several time points, and the teacher's width.
_NOT_INVERTED_WHISPER = _NOT_INVERTED | {
    "student.variates": 0,
    "student.time_pooling": 25,
    "student.deviations": False,
    "student.width": 128,
    "student.mlp_dim": 256,
    "student.num_heads": 4,
    "student.num_layers": 2,
}

# Table 4, and Fig. 3: the student alone.
TABLE4 = {
    "not inverted, CE": {"stages": "student", **_NOT_INVERTED, "contrastive.weight": 0.0},
    "inverted, CE": {"stages": "student", "contrastive.weight": 0.0},
    "inverted, CE + Sup": {"stages": "student"},
}
TABLE4_WHISPER = TABLE4 | {
    "not inverted, CE": TABLE4["not inverted, CE"] | _NOT_INVERTED_WHISPER,
}

# Fig. 2: λ and τ1, each with the other as in Table 3.
FIG2 = {
    f"{name}={value}": {"stages": "student", f"contrastive.{key}": value}
    for name, key, values in (
        ("lambda", "weight", (0.05, 0.1, 0.2, 0.9)),
        ("tau1", "temperature", (0.07, 0.1, 0.5, 1.0)),
    )
    for value in values
}

# What each part of the method is worth; docs/paper.md says what each switch does.
ABLATIONS = {
    "whole": {},
    "without inversion": _NOT_INVERTED,
    "without Sup": {"contrastive.weight": 0.0},
    "without meta-teacher": {"meta.order": "none"},
    "first order": {"meta.order": "first_order"},
    "without soft labels": {"distill.soft": False},
    "without PKD": {"distill.beta": 0.0},
    "without curriculum": {"curriculum.sampling": "uniform"},
}
ABLATIONS_WHISPER = ABLATIONS | {"without inversion": _NOT_INVERTED_WHISPER}

# How the scores grow with the training data; each part is in the next.
LEARNING_CURVE = {
    f"share={share}": {"protocol.training_share": share} for share in (0.1, 0.2, 0.4, 0.7, 1.0)
}

# The same experiment on random halves of the speakers, which `benchmarks.divisions` makes: on ten,
# and on ten others.
DIVISIONS, MORE_DIVISIONS = (
    {
        f"division={k}": {
            "protocol.split_by": "file",
            "protocol.file": f"divisions/{k}.json",
            "seed": k,
        }
        for k in range(first, first + 10)
    }
    for first in (1, 11)
)

# What each part of the method is worth on these halves, for students of an encoder's features.
DIVISIONS_WHISPER = {
    f"{division},{part}": halves | changes
    for part, changes in ABLATIONS_WHISPER.items()
    for division, halves in DIVISIONS.items()
}
