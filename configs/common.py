"""The paper's values (Section 4 and Table 3), on which every recipe is based."""

import copy
from functools import partial

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from serkd_jax.config import STUDENT_SETTINGS
from serkd_jax.models.students import STUDENTS, find_student
from serkd_jax.models.students.base import sizes

WHISPER = ("whisper", "openai/whisper-base", 3)
# On Whisper's features, frames are averaged, not joined: ten times fewer weights to fit to a few
# hundred clips.
WHISPER_TEACHER = {
    "time_pooling": 25,
    "patch_frames": 1,
    "width": 128,
    "mlp_dim": 256,
    "num_layers": 2,
}


def encoder(name: str, model: str = "", layer: int | list[int] = -1) -> ConfigDict:
    """A pretrained encoder as front-end: hubert, wav2vec2, wavlm or whisper.

    Args:
        name: the kind of encoder; for a teacher, an empty name means the student's front-end.
        model: a local folder, or a name on the Hugging Face hub.
        layer: -1 for the last hidden state, k for the output of layer k, or a list of these
            whose outputs are averaged (on the command line, 8,9,10).
    """
    settings = {"name": name, "model": model, "revision": "", "dtype": "float32"}
    settings |= {"pad_to_30s": False} if name == "whisper" else {}  # transformers pads, we do not
    config = ConfigDict(settings | {"layer": placeholder(object)})
    config.layer = layer
    return config


def paper(table3: str = "iemocap") -> ConfigDict:
    """The paper's settings, with the column of Table 3 for ``iemocap`` or ``meld``.

    Values that are neither in Table 3 nor in the section named in a comment are ours; where both
    kinds are mixed, ours are marked. `docs/paper.md` has the reasons.
    """
    iemocap = {"iemocap": True, "meld": False}[table3]
    config = ConfigDict()
    config.seed = 0  # of weights, batches, dropout and masks; `protocol.seed` draws the parts
    config.num_devices = 0  # 0: all devices that JAX sees
    config.dtype = "auto"  # of the models' computation; auto: bfloat16 on GPU/TPU, float32 on CPU
    config.remat = False  # recompute activations for the gradient: less memory, more time
    config.examples = "auto"  # on the device if they fit, else read from records when needed
    config.steps_per_dispatch = 32  # per dispatch; SIGTERM and progress are handled after each
    config.cache_dir = ""  # records and features; empty: the workdir. Runs can share one.
    config.stages_dir = ""  # finished stages, which runs can share; empty: each has its own
    config.data_dir = ""
    config.strict = False  # whether counts that differ from the published ones are an error

    # What is trained. Table 4 needs only "student"; distill needs teacher, and curriculum both.
    config.stages = "teacher,student,distill,curriculum"

    # Section 4.3: hubert-large-ll60k, cut or padded to T frames of 20 ms.
    config.frontend = encoder("hubert", "facebook/hubert-large-ll60k")
    config.max_frames = 326 if iemocap else 224

    # Which utterances are for testing, for selecting epochs (validation), and for training the
    # meta-teacher and rewarding the policy (half of the quiz part each): ours.
    config.protocol = ConfigDict(
        {
            "split_by": "speaker",  # speaker, session, fold, split, random or file
            "groups_per_fold": 1,  # speakers, sessions or folds held out together
            "num_folds": 5,  # for split_by=random
            "file": "",  # for split_by=file: the splits.json of a workdir
            "training_share": 1.0,  # of what is not tested; less shows how much data is needed
            "validation": 0.1,  # shares of the training data, stratified
            "quiz": 0.1,
            "speakers_apart": False,  # whether validation and quiz have speakers of their own
            "seed": 0,  # of what is drawn here
        }
    )
    # Which epoch is kept: the best ua, wa or wf1 on the validation part, or the last one; ours.
    config.selection_metric = "ua" if iemocap else "wf1"
    config.patience = 0  # end a stage after so many epochs without a better one; 0: never

    config.batch_size = 32
    config.optimizer = ConfigDict(  # everything except the name is ours
        {
            "name": "adamw",  # or adam, sgd: their decay is added to the gradient
            "beta1": 0.9,  # with sgd, the momentum
            "beta2": 0.999,
            "weight_decay": 0.01,
            "decayed": "kernels",  # not biases, norms and embeddings; or all
            "clip_norm": 1.0,
            "schedule": "constant",  # or cosine
            "warmup": 0.0,  # share of the steps over which the rate rises from 0
            # Of cosine: the share of the steps after which the rate starts again, then twice as
            # many each time (0: never), and the last rate of each cycle as a share of the first.
            "first_cycle": 0.0,
            "final": 0.0,
        }
    )

    # Section 3.1: hubert-large-ls960-ft, its 24 layers fine-tuned.
    config.teacher = ConfigDict(
        {
            "input": "waveform",  # or features: the layers read the stored features
            "frontend": encoder(""),  # of these features, if not the student's
            "model": "facebook/hubert-large-ls960-ft",
            "revision": "",
            "patch_frames": 0,  # 0: the layers read the input frames
            "time_pooling": 1,  # frames averaged before they are joined to patches
            "standardize": False,  # by mean and spread of the training part; only with patches
            # Ours: these give Table 7's 302.45M and 301.83M.
            "projector": 1024,
            "classifier_dims": (512, 256) if iemocap else (),
            "dropout": 0.1,  # ours
            "max_frequency_mask": 0,  # SpecAugment of the teacher's input: none
            "max_time_mask": 0,
            "learning_rate": 1e-4,
            "epochs": 20,
        }
    )

    # Section 3.2.1. The widths are ours: they give Table 7's 11.92M and 11.87M.
    config.student = ConfigDict(
        {
            "kind": "inverted",
            "pretrained": "",  # a folder made by serkd_jax.pretrain, for kind=convolutional
            "inverted": True,
            "readout": "variates",  # h(., S): the mean over D of every token; or tokens, flatten
            "norm": "pre",  # ours; or post
            "standardize": True,  # features, by mean and spread of the training part: ours
            "label_smoothing": 0.0,  # share of the target that all classes get alike
            "focus": 0.0,  # of the focal loss: its exponent; 0 is cross-entropy
            "width": 512,
            "mlp_dim": 1792,
            "num_heads": 8,
            "num_layers": 4,
            "classifier_dims": (384, 128),
            "projection_dims": (256, 256),
            "dropout": 0.1,  # ours
            "variate_embedding": False,
            "use_norm": False,
            "variates": 0,  # 0: the features themselves
            "time_pooling": 1,
            "deviations": False,
            "learning_rate": 1e-4,
            "epochs": 30 if iemocap else 100,
        }
    )
    config.contrastive = ConfigDict(
        {
            "weight": 0.05 if iemocap else 0.2,  # λ; 0 is cross-entropy only
            "temperature": 0.07 if iemocap else 1.0,  # τ1
            "momentum": 0.999,  # ours
            "queue_size": 1024,  # ours
            "max_frequency_mask": 50,
            "max_time_mask": 8,
        }
    )

    # Section 3.2.2; its rate and epochs are the student's.
    config.distill = ConfigDict(
        {
            "alpha": 0.1 if iemocap else 0.5,
            "beta": 100.0,  # 0 turns PKD off
            "soft": True,  # False drops L^soft and keeps the weights of the other terms
            "temperature": 5.0 if iemocap else 6.0,  # τ2
            "direction": "teacher_student",  # KL(p_t || p_s); student_teacher is Eq. 5 as printed
            "learning_rate": 1e-4,
            "epochs": 30 if iemocap else 100,
        }
    )
    # Section 3.3; its epochs are those of distill.
    config.meta = ConfigDict(
        {
            # second_order: through the pilot step; second_order_forward: the same by forward
            # mode; first_order: no gradient through the pilot step; none: the teacher is fixed
            "order": "second_order",
            "learning_rate": 1e-3,
            "pilot_learning_rate": 1e-4,  # ours: the student's rate
            "quiz_batch_size": 0,  # 0: batch_size; a smaller one makes a step cheaper
        }
    )

    # Section 3.4; everything except learning rate and epochs is ours.
    config.curriculum = ConfigDict(
        {
            "learning_rate": 1e-3,
            "epochs": 100,
            "task_by": "difficulty",  # tiers by log-odds of the true class under T'; or class
            "num_tasks": 4,
            "sampling": "policy",  # or uniform: every task equally likely, no curriculum
            "hold_teacher": True,  # Eq. 12 moves S' through its own term only
            "episode_steps": 16,
            "discount": 0.9,
            # of the running accuracy and reward that the policy sees, and of the policy's baseline
            "running_rate": 0.1,
            "policy_width": 64,
            "policy_learning_rate": 1e-3,
            "easy_bias": 2.0,
        }
    )
    return config


def logmel(config: ConfigDict) -> ConfigDict:
    """Changes a recipe to log-mel frames and models trained from scratch, without downloads."""
    config.frontend = ConfigDict({"name": "logmel", "num_mels": 40})
    config.contrastive.max_frequency_mask = 5
    return small(config)


def mfcc(config: ConfigDict) -> ConfigDict:
    """Changes a recipe to 39 MFCC and models trained from scratch, without downloads."""
    config.frontend = ConfigDict({"name": "mfcc", "num_coefficients": 39})
    config.contrastive.max_frequency_mask = 5
    return small(config)


def whisper(config: ConfigDict) -> ConfigDict:
    """Changes a recipe to features of a middle layer of Whisper-base (a download of some 0.3 GB).

    Teacher and student are trained from scratch on these features; the encoder is not trained.
    """
    config.frontend = encoder(*WHISPER)
    config = small(config)
    config.teacher.update(WHISPER_TEACHER)
    # Means and deviations over the recording of 64 learned variates: on validation speakers as good
    # as the course in time of all 512, and seven times cheaper. See docs/student.md.
    config.student.update({"variates": 64, "time_pooling": 0, "deviations": True})
    config.student.update({"width": 16, "mlp_dim": 64, "num_heads": 1, "num_layers": 1})
    # Some 300 steps on 1,500 utterances; 750 do not improve the teacher.
    config.teacher.epochs = config.student.epochs = config.distill.epochs = 10
    config.curriculum.update({"learning_rate": 3e-5, "epochs": 4})
    return config


def logmel_from_whisper(config: ConfigDict) -> ConfigDict:
    """A log-mel student, deployed without an encoder, with a teacher on Whisper's features."""
    config = logmel(config)
    config.teacher.update(WHISPER_TEACHER)
    config.teacher.frontend = encoder(*WHISPER)
    return config


def device(config: ConfigDict) -> ConfigDict:
    """A convolutional log-mel student for a device, taught by a teacher on Whisper's features.

    It is meant to start from `serkd_jax.pretrain`: add ``--config.student.pretrained=FOLDER``.
    """
    config = with_student(logmel_from_whisper(config), "convolutional")
    config.frontend.num_mels = 64
    config.student.update({"classifier_dims": (128,), "epochs": 10})
    config.distill.epochs = 10
    config.curriculum.update({"learning_rate": 3e-5, "epochs": 4})
    return config


def small(config: ConfigDict) -> ConfigDict:
    """Models from scratch on features, for a CPU and a few hundred to a few thousand utterances."""
    config.teacher = ConfigDict(
        {
            "input": "features",
            "frontend": encoder(""),  # empty: the student's
            "model": "",  # empty: from scratch, with the sizes below
            "revision": "",
            "patch_frames": 4,  # 80 ms
            "time_pooling": 1,
            "standardize": True,
            "projector": 0,
            "classifier_dims": (128, 64),
            "width": 192,
            "mlp_dim": 384,
            "num_layers": 4,
            "num_heads": 4,
            "dropout": 0.2,
            "max_frequency_mask": 0,
            "max_time_mask": 0,
            "learning_rate": 1e-3,
            "epochs": 25,
        }
    )
    config.student.update(
        {
            # With a few hundred clips this readout generalises best to the validation
            # speakers of EMO-DB; see docs/student.md.
            "readout": "flatten",
            "time_pooling": 10,  # 200 ms
            "width": 64,
            "mlp_dim": 128,
            "num_heads": 4,
            "num_layers": 2,
            "classifier_dims": (128,),
            "projection_dims": (64,),
            "dropout": 0.2,
            "learning_rate": 1e-3,
            "epochs": 50,
        }
    )
    config.contrastive.queue_size = 256
    config.distill.update({"alpha": 0.5, "learning_rate": 1e-3, "epochs": 50})
    config.meta.update({"learning_rate": 1e-4, "pilot_learning_rate": 1e-3})
    config.curriculum.update(
        {"learning_rate": 1e-4, "epochs": 20, "policy_learning_rate": 1e-2, "episode_steps": 8}
    )
    # A validation part of some forty clips picks epochs by chance.
    config.selection_metric = "last"
    config.optimizer.update({"weight_decay": 0.1, "schedule": "cosine", "warmup": 0.1})
    return config


def with_student(config: ConfigDict, kind: str) -> ConfigDict:
    """Changes a recipe to a student of another kind, with that kind's default sizes."""
    if config.student.kind == kind:
        return config
    student = find_student(kind)
    kept = {key: config.student[key] for key in STUDENT_SETTINGS}
    defaults = {name: field.default for name, field in sizes(student).items()}
    config.student = ConfigDict(defaults | kept | {"kind": kind})
    if student.reads_dialogues:  # speakers and marks beside the features
        config.student.standardize, config.contrastive.weight = False, 0.0
    if student.beside and "model" in config.frontend:
        encoder = config.frontend
        config.frontend = copy.deepcopy(encoder)  # so that `layer` may still be a list
        with config.frontend.unlocked():
            config.frontend.beside = student.beside
        if config.teacher.input == "features" and not config.teacher.frontend.name:
            config.teacher.frontend = encoder  # without what is beside it
    return config


def with_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """Applies the text after the colon in ``--config=configs/X.py:preset``.

    This is one of the presets, a kind of student, or both, as in ``:whisper,inverted``.
    """
    presets = {"logmel": logmel, "whisper": whisper, "logmel-from-whisper": logmel_from_whisper}
    presets |= {"device": device, "mfcc": mfcc}
    presets |= {kind: partial(with_student, kind=kind) for kind in STUDENTS}
    for name in filter(None, preset.split(",")):
        if name not in presets:
            known = ", ".join(f":{name}" for name in presets)
            raise ValueError(f"the recipe has no preset {name!r}: use {known} or none")
        config = presets[name](config)
    return config
