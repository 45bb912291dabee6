"""The systems of Tables 8 and 9, each trained as by its authors, under our protocol.

    python -m serkd_jax.main --config=configs/systems.py:dwformer,emodb,whisper \
        --config.data_dir=EMODB --workdir=runs/dwformer

After the system comes the recipe of a corpus with its presets; without one, it is IEMOCAP's.
Without a preset the front-end is that of the system's authors; with one, it is the preset's. The
records, their lengths and the folds are the recipe's. The sizes, loss, optimiser, schedule, batch
size and epochs are the system's, but its epoch is picked on the validation part, not on the test
part as in most of the public codes. docs/systems.md says more.
"""

import copy
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from configs import common, emodb, iemocap, manifest, meld
from serkd_jax.data.corpora import corpus_of
from serkd_jax.models.students import find_student

RECIPES = {"iemocap": iemocap, "meld": meld, "emodb": emodb, "manifest": manifest}


def timnet(config: ConfigDict) -> None:
    """Adam at a constant rate, with label smoothing."""
    config.batch_size = 64
    config.student.update({"learning_rate": 1e-3, "epochs": 500, "label_smoothing": 0.1})
    config.optimizer.update({"beta1": 0.93, "beta2": 0.98, "schedule": "constant"})
    if config.corpus != "iemocap":
        config.student.num_levels = 8


def dwformer(config: ConfigDict) -> None:
    """SGD whose rate starts again after 3, 9, 21, 45 and 93 of 120 epochs."""
    epochs, blocks = (100, 2) if config.corpus == "meld" else (120, 3)
    config.student.update({"learning_rate": 5e-4, "epochs": epochs, "num_blocks": blocks})
    config.optimizer.update({"name": "sgd", "schedule": "cosine"})
    config.optimizer.update({"first_cycle": 3 / epochs, "final": 0.02})


def shiftcnn(config: ConfigDict) -> None:
    """AdamW with a warm-up of 5 of 100 epochs; for its whole family, on frozen features."""
    config.student.update({"learning_rate": 5e-4, "epochs": 100})
    config.optimizer.update({"weight_decay": 0.05, "clip_norm": 5.0})
    config.optimizer.update({"schedule": "cosine", "warmup": 0.05, "final": 0.01})


def speechformer(config: ConfigDict) -> None:
    """SGD."""
    config.student.update({"learning_rate": 5e-4, "epochs": 120})
    config.optimizer.update({"name": "sgd", "schedule": "cosine", "final": 0.01})


def camser(config: ConfigDict) -> None:
    """AdamW at a constant rate, until eight epochs bring nothing."""
    config.batch_size, config.patience = 64, 8
    config.student.update({"learning_rate": 1e-5, "epochs": 100})
    config.optimizer.update({"weight_decay": 0.01, "decayed": "all", "schedule": "constant"})


def mmdfn(config: ConfigDict) -> None:
    """Adam with decay in the gradient and a focal loss; of the authors' grids, the first values."""
    rate, weight = (5e-4, 0.5) if config.corpus == "meld" else (1e-4, 3.0)
    config.student.update({"learning_rate": rate, "speaker_weight": weight, "focus": 0.5})
    config.student.update({"epochs": 30, "dropout": 0.2})
    config.patience = 5
    config.optimizer.update({"name": "adam", "weight_decay": 1e-4, "decayed": "all"})
    config.optimizer.schedule = "constant"


# How each kind of student is trained, if not as ours.
TRAININGS: dict[str, Callable[[ConfigDict], None]] = {
    "timnet": timnet,
    "dwformer": dwformer,
    "shiftcnn": shiftcnn,
    "shiftformer": shiftcnn,
    "shiftlstm": shiftcnn,
    "speechformer": speechformer,
    "camser": camser,
    "mmdfn": mmdfn,
}


# The front-ends of the authors, where they are not HuBERT-large, as in the recipes.
MFCC = {"timnet": ConfigDict({"name": "mfcc", "num_coefficients": 39})}
HUBERT_BASE = common.encoder("hubert", "facebook/hubert-base-ls960")
ENCODERS = {
    "dwformer": common.encoder("wavlm", "microsoft/wavlm-large", 12),
    "camser": common.encoder("wav2vec2", "facebook/wav2vec2-base-960h"),
} | dict.fromkeys(("shiftcnn", "shiftformer", "shiftlstm"), HUBERT_BASE)


def with_system(
    config: ConfigDict, name: str, front_ends: Mapping[str, ConfigDict] = MFCC
) -> ConfigDict:
    """Changes a recipe to a system: its student and its training, on the recipe's own folds.

    Args:
        config: the recipe.
        name: a kind of student.
        front_ends: system -> what it reads instead of the recipe's features.
    """
    if name in front_ends:
        config.frontend = copy.deepcopy(front_ends[name])
    config = common.with_student(config, name)
    config.stages = "student"
    config.contrastive.weight = 0.0
    config.student.update({"standardize": False, "label_smoothing": 0.0, "focus": 0.0})
    config.selection_metric = "wf1" if config.corpus == "meld" else "ua"
    config.batch_size, config.patience = 32, 0
    config.optimizer = common.paper().optimizer
    config.optimizer.update({"weight_decay": 0.0, "clip_norm": 0.0})
    TRAININGS[name](config)
    config.contrastive.queue_size = config.batch_size  # without weight it does nothing
    return config


def lacking(config: ConfigDict) -> dict[str, str]:
    """Returns the systems that a recipe cannot train, with the reasons."""
    corpus = corpus_of(config)
    found = {}
    for name in TRAININGS:
        student = find_student(name)
        if student.beside and "model" not in config.frontend:
            found[name] = "the features are not an encoder's"
        elif student.reads_dialogues and not any(corpus.turn_of(x)[0] for x in corpus.utterances):
            found[name] = "the corpus has no dialogues"
    return found


def get_config(preset: str = "") -> ConfigDict:
    """The recipe of SYSTEM,RECIPE,PRESET."""
    name, _, rest = preset.partition(",")
    recipe, _, rest = (rest or "iemocap").partition(",")
    for given, known in ((name, TRAININGS), (recipe, RECIPES)):
        if given not in known:
            raise ValueError(f"there is no {given!r}: use one of {', '.join(known)}")
    return with_system(RECIPES[recipe].get_config(rest), name, {} if rest else MFCC | ENCODERS)
