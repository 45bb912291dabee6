"""Tiny models, batches and steps of every stage, for the tests of the method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from transformers import HubertConfig

from serkd_jax.encoders.wav2vec2 import Wav2Vec2Embed, Wav2Vec2Layers, conv_frames
from serkd_jax.models.policy import Policy
from serkd_jax.models.students.base import Adapter
from serkd_jax.models.students.inverted import InvertedStudent
from serkd_jax.models.teacher import Classifier, Teacher
from serkd_jax.stages.curriculum import CurriculumStage
from serkd_jax.stages.distill import DistillStage
from serkd_jax.stages.finetune import TeacherStage
from serkd_jax.stages.standardization import Statistics
from serkd_jax.stages.student import StudentStage

# As in the paper, the mean over D of each of N variates has the teacher's width H.
B, T, N, D, H, C, P, K = 16, 12, 16, 8, 16, 3, 8, 3
CONFIG = ConfigDict(
    {
        "student": {"label_smoothing": 0.1, "focus": 0.0},
        "contrastive": {
            "weight": 0.3,
            "temperature": 0.1,
            "momentum": 0.9,
            "queue_size": 40,
            "max_frequency_mask": 3,
            "max_time_mask": 3,
        },
        "distill": {
            "alpha": 0.3,
            "beta": 10.0,
            "temperature": 2.0,
            "soft": True,
            "direction": "teacher_student",
        },
        "meta": {"order": "second_order", "pilot_learning_rate": 0.5},
        "curriculum": {
            "sampling": "policy",
            "hold_teacher": True,
            "episode_steps": 4,
            "discount": 0.9,
            "running_rate": 0.1,
        },
        "teacher": {"max_frequency_mask": 3, "max_time_mask": 3},
    }
)
HUBERT = HubertConfig(
    hidden_size=H,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8),
    conv_kernel=(10, 5),
    conv_stride=(50, 5),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
)
STUDENT = InvertedStudent(
    C,
    width=D,
    mlp_dim=16,
    num_heads=2,
    num_layers=1,
    classifier_dims=(10, 8),
    projection_dims=(12, P),
    dropout=0.1,
)
TEACHER = Teacher(Wav2Vec2Layers(HUBERT), C, patch_frames=2)
CLASSIFIER, POLICY = Classifier(C, (12, 8)), Policy(K, width=8)
# Adam's usual epsilon would blow the rounding noise in a zero gradient up to a full step.
OPTIMIZER, META_OPTIMIZER, POLICY_OPTIMIZER = (
    optax.adamw(rate, eps=1e-3) for rate in (3e-3, 1e-2, 1e-2)
)
RNG = jax.random.key(7)
STATISTICS = Statistics(
    np.linspace(-0.5, 1.5, N, dtype=np.float32), np.linspace(0.5, 1.5, N, dtype=np.float32)
)


def make_batch(seed, inputs=None):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, C, B).astype(np.int32)
    length = rng.integers(T // 2, T + 1, B).astype(np.int32)
    if inputs is None:  # classes differ in their mean, so that a step can learn
        inputs = rng.normal(size=(B, T, N)) + label[:, None, None]
        inputs = (inputs * (np.arange(T) < length[:, None])[..., None]).astype(np.float16)
    hidden = rng.normal(size=(B, H)).astype(np.float32) + label[:, None]
    index = rng.permutation(1000)[:B].astype(np.int32)
    return {
        "inputs": inputs,
        "length": length,
        "label": label,
        "index": index,
        "teacher_hidden": hidden,
    }


def make_pair(seed):
    return {"train": make_batch(seed), "quiz": make_batch(seed + 100)}


def stepper(stage):
    """The device axis -> the step of a stage."""
    return lambda axis=None: partial(stage.step, axis=axis)


def teacher_stage(config=CONFIG, model=TEACHER, optimizer=OPTIMIZER):
    params = model.init(RNG, jnp.zeros((1, T, N)), jnp.ones((1, T), bool))["params"]
    stage = TeacherStage(model, lambda _: params, None, False, optimizer, config.teacher)
    return stepper(stage), lambda: stage.init(RNG, STATISTICS), make_batch


def waveform_teacher_stage():
    model, embed = Teacher(Wav2Vec2Layers(HUBERT), C, projector=10), Wav2Vec2Embed(HUBERT)
    samples = 3000
    frozen = embed.init(RNG, jnp.zeros((1, samples)))["params"]
    frames = conv_frames(HUBERT, samples)
    params = model.init(RNG, jnp.zeros((1, frames, H)), jnp.ones((1, frames), bool))["params"]
    stage = TeacherStage(model, lambda _: params, embed, True, OPTIMIZER, CONFIG.teacher)

    def batch(seed):
        rng = np.random.default_rng(seed)
        waveform = rng.integers(-9999, 9999, (B, samples)).astype(np.int16)
        return make_batch(seed, waveform) | {
            "length": rng.integers(1000, samples, B).astype(np.int32)
        }

    return stepper(stage), lambda: stage.init(RNG, frozen), batch


def student_variables(model):
    return model.init(RNG, jnp.zeros((1, T, N)), jnp.ones(1, jnp.int32))


def make_adapter(model):
    """What the pipeline has for such a student: none where h(., S) has the teacher's width."""
    inputs = jnp.zeros((1, T, N)), jnp.ones(1, jnp.int32)
    width = jax.eval_shape(model.init_with_output, RNG, *inputs)[0].hidden.shape[1]
    return (None if width == H else Adapter(H)), width


def student_stage(config=CONFIG, model=STUDENT, optimizer=OPTIMIZER):
    stage = StudentStage(model, lambda _: student_variables(model), optimizer, config)
    return stepper(stage), lambda: stage.init(RNG, STATISTICS), make_batch


def distill_stage(config=CONFIG, model=STUDENT, optimizer=OPTIMIZER, meta_optimizer=META_OPTIMIZER):
    adapter, width = make_adapter(model)
    stage = DistillStage(
        model, lambda _: student_variables(model), adapter, width, CLASSIFIER, optimizer,
        meta_optimizer, config,
    )  # fmt: skip

    def init():
        meta = CLASSIFIER.init(RNG, jnp.zeros((1, H)))["params"]
        return stage.init(RNG, STATISTICS, meta)

    return stepper(stage), init, make_pair


def curriculum_stage(config=CONFIG, model=STUDENT, optimizer=OPTIMIZER):
    adapter, width = make_adapter(model)
    stage = CurriculumStage(
        model, adapter, width, CLASSIFIER, POLICY, optimizer, POLICY_OPTIMIZER, config, 50
    )
    _, init_distill, _ = distill_stage(config, model)
    return stepper(stage), lambda: stage.init(RNG, init_distill()), make_pair


def to_float64(tree):
    """Every float of a tree in float64."""

    def convert(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(convert, tree)


def changed(**settings):
    """CONFIG with some values changed, such as ``meta={"order": "none"}``."""
    config = ConfigDict(CONFIG.to_dict())
    config.update(settings)
    return config
