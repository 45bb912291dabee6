"""The models and the compiled stages of a config, which all folds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from serkd_jax.config import choose_dtype, make_student
from serkd_jax.data.examples import Examples, predict_rows
from serkd_jax.distributed import parallel
from serkd_jax.encoders.checkpoint import Checkpoint, load_encoder
from serkd_jax.encoders.distilled import Distilled, load_distilled
from serkd_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Layers
from serkd_jax.errors import UserError
from serkd_jax.models.policy import Policy
from serkd_jax.models.students.base import Adapter, Student
from serkd_jax.models.teacher import Classifier, Teacher
from serkd_jax.stages import student
from serkd_jax.stages.base import Stage, make_optimizer, make_schedule
from serkd_jax.stages.finetune import TeacherStage


class Programs:
    """Everything that is made once from a config and compiled on first use.

    Attributes:
        config: the whole config.
        num_classes: C.
        feature_shape: (T, N), the shape of the student's features.
        teacher_width: the width of the teacher's features, if it reads any.
        steps_per_epoch: number of steps in an epoch of any stage.
        devices: the devices on which the steps run.
        resident: whether the examples stay on the devices; otherwise they come with every call.
    """

    def __init__(
        self,
        config: ConfigDict,
        num_classes: int,
        feature_shape: tuple[int, int],
        teacher_width: int,
        steps_per_epoch: int,
        devices: list[jax.Device],
        resident: bool = True,
    ):
        self.config, self.num_classes = config, num_classes
        self.feature_shape, self.teacher_width = feature_shape, teacher_width
        self.steps_per_epoch, self.devices, self.resident = steps_per_epoch, devices, resident
        self._stages: dict[type[Stage], Stage] = {}
        self._steps: dict[type[Stage], Callable] = {}

    # Stages ------------------------------------------------------------------------------------

    def stage(self, kind: type[Stage]) -> Any:
        """Returns the stage of this kind, with its models and optimisers."""
        if kind not in self._stages:
            self._stages[kind] = kind.make(self)
        return self._stages[kind]

    def steps(self, kind: type[Stage]) -> Callable:
        """Returns the compiled steps of the stage of this kind; see `parallel.compile_steps`."""
        if kind not in self._steps:
            stage = self.stage(kind)
            self._steps[kind] = parallel.compile_steps(
                lambda axis: partial(stage.step, axis=axis),
                self.devices,
                shared_data=self.resident,
                pick=stage.pick,
            )
        return self._steps[kind]

    def total_steps(self, stage: str) -> int:
        """Returns the number of steps in all epochs of the stage of this name."""
        return self.config[stage].epochs * self.steps_per_epoch

    def make_optimizer(
        self, stage: str, learning_rate: float | None = None
    ) -> optax.GradientTransformation:
        """Makes the optimiser of a stage, with the stage's learning rate or the given one."""
        rate = self.config[stage].learning_rate if learning_rate is None else learning_rate
        return make_optimizer(self.config.optimizer, rate, self.total_steps(stage))

    def learning_rate(self, stage: str) -> optax.Schedule:
        """Returns the schedule of a stage: number of steps taken -> rate of the next step."""
        rate, total = self.config[stage].learning_rate, self.total_steps(stage)
        return make_schedule(self.config.optimizer, rate, total)

    # Teacher (Section 3.1) ---------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The pretrained encoder from which the teacher starts; None if it starts from scratch."""
        config = self.config.teacher
        return load_encoder(config.model, config.revision or None) if config.model else None

    @property
    def weights_hash(self) -> str:
        """The hash of the checkpoint from which the teacher starts; empty if from scratch."""
        return self.checkpoint.sha256 if self.checkpoint else ""

    @cached_property
    def teacher(self) -> Teacher:
        """The trained part of the teacher."""
        config = self.config.teacher
        make_layers = self.checkpoint.kind.layers if self.checkpoint else Wav2Vec2Layers
        layers = make_layers(self._layers_config, self.dtype, self.config.remat)
        return Teacher(
            layers,
            self.num_classes,
            config.patch_frames,
            config.projector,
            config.classifier_dims,
            config.time_pooling,
        )

    @property
    def _layers_config(self) -> Any:
        """The configuration of the teacher's layers, with the recipe's dropout."""
        config = self.config.teacher
        if self.checkpoint:
            architecture = self.checkpoint.config
            dropouts = dict.fromkeys(self.checkpoint.kind.dropouts, config.dropout)
            return type(architecture).from_dict(architecture.to_dict() | dropouts)
        from transformers import Wav2Vec2Config

        return Wav2Vec2Config(
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            do_stable_layer_norm=True,
            **dict.fromkeys(Wav2Vec2.dropouts, config.dropout),
        )

    @cached_property
    def embed(self) -> nn.Module | None:
        """The frozen front of the encoder, for waveform input."""
        if not self._reads_waveforms:
            return None
        return self.checkpoint.kind.embed(self.checkpoint.config, self.dtype)

    @property
    def embed_params(self) -> Any:
        """The parameters of the encoder's frozen front."""
        return self.checkpoint.params["embed"]

    @property
    def normalizes_waveforms(self) -> bool:
        """Whether the checkpoint's preprocessor standardises each waveform."""
        return self._reads_waveforms and self.checkpoint.do_normalize

    @property
    def teacher_hidden(self) -> int:
        """H, the width of h(., T)."""
        return self.config.teacher.projector or self._encoder_width

    @property
    def _encoder_width(self) -> int:
        return self.teacher.encoder.config.hidden_size

    @property
    def _reads_waveforms(self) -> bool:
        return self.config.teacher.input == "waveform"

    @cached_property
    def _new_teacher_params(self) -> Callable[[jax.Array], Any]:
        shape = (1, self.feature_shape[0], self.teacher_width)
        if self._reads_waveforms:
            shape = (1, 8, self._encoder_width)

        def init(rng: jax.Array) -> Any:
            mask = jnp.ones(shape[:2], bool)
            return self.teacher.init(rng, jnp.zeros(shape), mask)["params"]

        return jax.jit(init)

    def new_teacher_params(self, rng: jax.Array) -> Any:
        """Makes parameters before fine-tuning, with the checkpoint's layers if there is one."""
        params = self._new_teacher_params(rng)
        if self.checkpoint:
            return {**params, "encoder": self.checkpoint.params["encoder"]}
        return params

    @cached_property
    def teacher_predict(self) -> Callable:
        """The compiled function (state, examples, rows) -> hidden vectors and logits."""
        return self._compile_predict(self.stage(TeacherStage).predict)

    # Student (Section 3.2.1) -------------------------------------------------------------------

    @cached_property
    def student(self) -> Student:
        """The model of S, and of S' in the curriculum."""
        options = {"dtype": self.dtype, "remat": self.config.remat}
        return make_student(self.config, self.num_classes, **options)

    @cached_property
    def student_hidden(self) -> int:
        """The width of h(., S)."""
        inputs = jnp.zeros((1, *self.feature_shape)), jnp.ones(1, jnp.int32)
        init = self.student.init_with_output
        return jax.eval_shape(init, jax.random.key(0), *inputs)[0].hidden.shape[1]

    @cached_property
    def pretrained(self) -> Distilled | None:
        """The pretrained frame encoder of S; None if S starts from scratch.

        Raises:
            UserError: the folder cannot be used, or is of other sizes than the student.
        """
        config = self.config.student
        if not config.pretrained:
            return None
        found = load_distilled(config.pretrained)
        for name, value in asdict(found.sizes).items():
            part = "frontend" if name == "num_mels" else "student"
            mine = self.config[part].get(name)
            if mine != value:
                raise UserError(
                    f"{config.pretrained} has {name} {value}, but {part}.{name} is {mine}: set "
                    f"--config.{part}.{name}={value} (and student.kind=convolutional)"
                )
        return found

    @cached_property
    def new_student(self) -> Callable[[jax.Array], Any]:
        """The compiled function key -> new variables of S."""
        shape, pretrained = (1, *self.feature_shape), self.pretrained

        def init(rng: jax.Array) -> Any:
            variables = self.student.init(rng, jnp.zeros(shape), jnp.ones(1, jnp.int32))
            if pretrained:
                params = {**variables["params"], "encoder": pretrained.params}
                variables = {**variables, "params": params}
            return variables

        return jax.jit(init)

    @cached_property
    def student_predict(self) -> Callable:
        """The compiled function ((variables, statistics), examples, rows) -> student's outputs."""
        return self._compile_predict(partial(student.predict, self.student))

    # What distillation and the curriculum add (Sections 3.2.2 to 3.4) --------------------------

    @cached_property
    def adapter(self) -> Adapter | None:
        """The module that maps h(., S) to the teacher's width; None where it already has it."""
        same = self.student_hidden == self.teacher_hidden
        return None if same else Adapter(self.teacher_hidden)

    @cached_property
    def classifier(self) -> Classifier:
        """T', the meta-teacher."""
        return Classifier(self.num_classes, self.config.teacher.classifier_dims)

    @cached_property
    def classify(self) -> Callable[[Any, Any], jax.Array]:
        """The compiled function (parameters of T', hidden vectors (n, H)) -> logits (n, C)."""
        return jax.jit(lambda params, hidden: self.classifier.apply({"params": params}, hidden))

    @cached_property
    def policy(self) -> Policy:
        """The curriculum's policy, which picks the next task."""
        config = self.config.curriculum
        num_tasks = self.num_classes if config.task_by == "class" else config.num_tasks
        return Policy(num_tasks, config.policy_width, config.easy_bias)

    # -------------------------------------------------------------------------------------------

    def count_parameters(self) -> dict[str, int]:
        """Counts the parameters of teacher and student, as in Table 7.

        The count of a teacher that reads waveforms includes its frozen front, with the encoder's
        published size (see `Checkpoint`). Front-ends of stored features are not counted.
        """
        teacher = jax.eval_shape(self._new_teacher_params, jax.random.key(0))
        student = jax.eval_shape(self.new_student, jax.random.key(0))["params"]
        published = 0
        if self._reads_waveforms:
            teacher = {name: part for name, part in teacher.items() if name != "encoder"}
            published = self.checkpoint.num_parameters
        sizes = {"teacher": teacher, "student": student}
        counts = {name: sum(x.size for x in jax.tree.leaves(p)) for name, p in sizes.items()}
        return counts | {"teacher": counts["teacher"] + published}

    @property
    def dtype(self) -> str | None:
        """The dtype of the models' computation, None for float32; the parameters are float32."""
        name = choose_dtype(self.config, self.devices[0])
        return None if name == "float32" else name

    def _compile_predict(self, predict: Callable) -> Callable:
        """Compiles a prediction into a function of (params, examples, rows)."""
        compiled = parallel.compile_predict(predict, self.devices, shared_data=self.resident)

        def run(params: Any, examples: Examples, rows: np.ndarray) -> Any:
            return predict_rows(compiled, params, examples, rows, self.config.batch_size)

        return run
