"""The pipeline: records, features, then per fold the four stages of Section 3, then results.

Every part that is done is reused. :meth:`Experiment.run_fold` is the paper's order of training.
"""

import io
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from transformers import HubertConfig

from serkd_jax import batches, losses, parallel, report
from serkd_jax.errors import UserError
from serkd_jax.frontends import make_frontend, num_samples
from serkd_jax.metrics import classification_metrics
from serkd_jax.models.hubert import HubertEmbed
from serkd_jax.models.hubert_weights import load_hubert
from serkd_jax.models.policy import Policy
from serkd_jax.models.student import Adapter, Student
from serkd_jax.models.teacher import Classifier, Teacher
from serkd_jax.splits import Fold, make_folds
from serkd_jax.stages import curriculum, distill, student, teacher
from serkd_jax.stages.common import make_optimizer
from serkd_jax.training import Stage, train

# Config keys that say where and how a run is done, not what it computes.
PLACE_KEYS = ("data_dir", "manifest", "label_map", "cache_dir", "num_devices")
STAGE_NUMBER = {"teacher": 1, "student": 2, "distill": 3, "curriculum": 4}


class Experiment:
    """One run: a config, its data, its folds, and the compiled steps that all folds share."""

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """Prepares records and features (or finds them) and makes the folds.

        Raises:
            UserError: bad data or configuration, or a workdir that holds another run.
        """
        from serkd_jax.data import corpora, features, records  # the only part that needs TensorFlow

        self.config, self.workdir = config, Path(workdir)
        self.devices = parallel.choose_devices(config.num_devices, config.batch_size)
        self.workdir.mkdir(parents=True, exist_ok=True)
        corpus = corpora.make_corpus(config.corpus, **_corpus_arguments(config))
        fingerprint = corpus.fingerprint
        self._claim_workdir(fingerprint)
        cache = Path(config.cache_dir or self.workdir / "data")
        records_dir = records.prepare_records(corpus, cache)
        self.table = records.load_table(records_dir)
        self.folds = make_folds(
            self.table.labels,
            {
                "speaker": self.table.speakers,
                "session": self.table.sessions,
                "fold": self.table.folds,
                "split": self.table.splits,
            },
            config.protocol,
            config.seed,
        )
        self.frontend = make_frontend(config.frontend)
        features_dir = features.prepare_features(
            records_dir, self.frontend, config.max_frames, cache, fingerprint
        )
        _, self.features, self.num_frames = features.load_features(features_dir, config.max_frames)
        if config.teacher.input == "waveform":
            _, self.waveforms, self.num_samples = records.load_waveforms(
                records_dir, num_samples(config.max_frames)
            )
        elif config.teacher.input != "features":
            raise UserError(f"teacher.input must be waveform or features: {config.teacher.input!r}")

    def run(self) -> str:
        """Does what is left to do and returns the Markdown report."""
        predictions = {fold.name: self.run_fold(fold) for fold in self.folds}
        params = {
            "teacher": _count_parameters(self.teacher_parameters),
            "student": _count_parameters(jax.eval_shape(self._init_student, jax.random.key(0))),
        }
        return report.write_results(
            self.workdir,
            self.config.corpus,
            self.config.to_dict(),
            list(self.table.class_names),
            predictions,
            params,
            self._notes(),
        )

    def run_fold(self, fold: Fold) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """All stages of one fold; returns the test labels and predictions of every row."""
        saved = self._directory(fold, "predictions.npz")
        if not saved.exists():
            teacher_state, teacher_out = self.train_teacher(fold)
            student_state = self.train_student(fold)
            distilled_state = self.train_distilled_student(fold, teacher_state, teacher_out.hidden)
            updated_state = self.train_updated_student(fold, distilled_state, teacher_out.hidden)
            hidden = teacher_out.hidden[fold.test]
            logits = {
                "teacher": teacher_out.logits[fold.test],
                "student": self._predict_student(student_state.params, fold.test),
                "meta_teacher": np.asarray(self._classify(distilled_state.meta_params, hidden)),
                "distilled_student": self._predict_student(
                    distilled_state.params["student"], fold.test
                ),
                "updated_student": self._predict_student(updated_state.params, fold.test),
            }
            _save_arrays(
                saved,
                ids=np.array(self.table.ids)[fold.test],
                label=self.table.labels[fold.test],
                **logits,
            )
        with np.load(saved) as arrays:
            return {row: (arrays["label"], arrays[row].argmax(-1)) for row in report.ROWS}

    # Stage 1 -----------------------------------------------------------------------------------

    def train_teacher(self, fold: Fold) -> tuple[teacher.TeacherState, Any]:
        """Fine-tunes the teacher; its (hidden, logits) of every utterance are computed once."""
        params, frozen = self.teacher_parameters, self.teacher_frozen
        stage = self._stage(
            fold,
            "teacher",
            init=lambda: teacher.init_state(params, self.teacher_optimizer, frozen),
            step=self.teacher_step,
            batch_at=lambda step, _: self._teacher_batch(
                self._stream(fold, "teacher", "train", step)
            ),
            predict=lambda state, rows: (
                self.teacher_predict(state, self._teacher_batch(rows)).logits
            ),
        )
        state = train(stage, self._directory(fold, "teacher"))
        saved = self._directory(fold, "teacher") / "outputs.npz"
        if not saved.exists():
            rows = np.arange(len(self.table.ids))
            out = self.teacher_predict(state, self._teacher_batch(rows))
            _save_arrays(saved, ids=np.array(self.table.ids), hidden=out.hidden, logits=out.logits)
        with np.load(saved) as arrays:
            return state, teacher.TeacherOutput(arrays["hidden"], arrays["logits"])

    @cached_property
    def checkpoint(self):
        """The pretrained HuBERT that the teacher starts from."""
        return load_hubert(self.config.teacher.model)

    @cached_property
    def teacher_model(self) -> Teacher:
        """The trained part of the teacher."""
        config = self.config.teacher
        sizes = (
            self.checkpoint.config
            if config.model
            else HubertConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                do_stable_layer_norm=True,
            )
        )
        dropouts = dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout"), config.dropout
        )
        sizes = HubertConfig(**(sizes.to_dict() | dropouts))
        return Teacher(sizes, len(self.table.class_names), config.patch_frames)

    @cached_property
    def teacher_parameters(self) -> Any:
        """Initial parameters: pretrained layers where a checkpoint is named, a new classifier."""
        rng = jax.random.fold_in(jax.random.key(self.config.seed), STAGE_NUMBER["teacher"])
        width = (
            self.frontend.width
            if self.config.teacher.input == "features"
            else self.teacher_model.config.hidden_size
        )
        init = jax.jit(self.teacher_model.init)
        params = init(rng, jnp.zeros((1, 8, width)), jnp.ones((1, 8), bool))["params"]
        if self.config.teacher.model:
            params = {**params, "encoder": self.checkpoint.params["encoder"]}
        return params

    @cached_property
    def teacher_frozen(self) -> Any:
        """Parameters of the frozen convolutional front, for waveform input."""
        return self.checkpoint.params["embed"] if self._embed else {}

    @cached_property
    def _embed(self) -> HubertEmbed | None:
        config = self.config.teacher
        if config.input == "features":
            return None
        if not config.model:
            raise UserError("teacher.input=waveform needs a HuBERT checkpoint in teacher.model")
        return HubertEmbed(self.checkpoint.config)

    @cached_property
    def _to_frames(self):
        return teacher.make_frames(
            self._embed, normalize=bool(self._embed) and self.checkpoint.do_normalize
        )

    @cached_property
    def teacher_optimizer(self):
        """AdamW of the teacher."""
        return self._optimizer(self.config.teacher)

    @cached_property
    def teacher_step(self):
        """Compiled Eq. 1."""
        make_step = partial(
            teacher.make_step,
            self.teacher_model,
            self._to_frames,
            self.teacher_optimizer,
            self.config.teacher,
        )
        return parallel.compile_step(make_step, self.devices)

    @cached_property
    def teacher_predict(self):
        """Compiled forward pass of the teacher."""
        predict = teacher.make_predict(self.teacher_model, self._to_frames)
        return parallel.compile_predict(predict, self.config.batch_size, self.devices)

    # Stage 2 -----------------------------------------------------------------------------------

    def train_student(self, fold: Fold) -> student.StudentState:
        """Trains the undistilled student."""
        config = self.config
        stage = self._stage(
            fold,
            "student",
            init=lambda: student.init_state(
                self._init_student(self._rng(fold, "student")),
                self.student_optimizer,
                config.contrastive,
                config.student.projection_dim,
            ),
            step=self.student_step,
            batch_at=lambda step, _: self._batch(self._stream(fold, "student", "train", step)),
            predict=lambda state, rows: self._predict_student(state.params, rows),
        )
        return train(stage, self._directory(fold, "student"))

    @cached_property
    def student_model(self) -> Student:
        """S, and S' of the later stages."""
        config = self.config.student
        sizes = {k: v for k, v in config.items() if k not in ("learning_rate", "epochs")}
        return Student(len(self.table.class_names), **sizes)

    def _init_student(self, rng: jax.Array) -> Any:
        features = jnp.zeros((1, *self.features.shape[1:]))
        return jax.jit(self.student_model.init)(rng, features, jnp.ones(1, jnp.int32))["params"]

    @cached_property
    def student_optimizer(self):
        """AdamW of the undistilled student."""
        return self._optimizer(self.config.student)

    @cached_property
    def student_step(self):
        """Compiled Eqs. 2-3."""
        make_step = partial(
            student.make_step, self.student_model, self.student_optimizer, self.config.contrastive
        )
        return parallel.compile_step(make_step, self.devices)

    @cached_property
    def student_predict(self):
        """Compiled forward pass of the student."""
        predict = student.make_predict(self.student_model)
        return parallel.compile_predict(predict, self.config.batch_size, self.devices)

    def _predict_student(self, params: Any, rows: np.ndarray) -> np.ndarray:
        """(n, C) logits of the utterances ``rows``."""
        return self.student_predict(params, self._batch(rows)).logits

    # Stage 3 -----------------------------------------------------------------------------------

    def train_distilled_student(
        self, fold: Fold, teacher_state: teacher.TeacherState, hidden: np.ndarray
    ) -> distill.DistillState:
        """Distils a new student while the meta-teacher learns from its quiz results."""

        def init() -> distill.DistillState:
            student_rng, adapter_rng = jax.random.split(self._rng(fold, "distill"))
            adapter_params = self.adapter.init(
                adapter_rng, jnp.zeros((1, self.config.student.width))
            )["params"]
            return distill.init_state(
                {"student": self._init_student(student_rng), "adapter": adapter_params},
                teacher_state.params["classifier"],
                self.distill_optimizer,
                self.meta_optimizer,
                self.config.contrastive,
                self.config.student.projection_dim,
            )

        stage = self._stage(
            fold,
            "distill",
            init=init,
            step=self.distill_step,
            batch_at=lambda step, _: {
                part: self._batch(self._stream(fold, "distill", part, step), hidden)
                for part in ("train", "quiz")
            },
            predict=lambda state, rows: self._predict_student(state.params["student"], rows),
        )
        return train(stage, self._directory(fold, "distill"))

    @cached_property
    def adapter(self) -> Adapter:
        """The student's hidden vector to the teacher's width."""
        return Adapter(self.teacher_model.config.hidden_size)

    @cached_property
    def classifier(self) -> Classifier:
        """T', the meta-teacher."""
        return Classifier(len(self.table.class_names))

    @cached_property
    def _classify(self):
        return jax.jit(lambda params, hidden: self.classifier.apply({"params": params}, hidden))

    @cached_property
    def distill_optimizer(self):
        """AdamW of the distilled student."""
        return self._optimizer(self.config.distill)

    @cached_property
    def meta_optimizer(self):
        """AdamW of the meta-teacher."""
        return self._optimizer(self.config.meta, epochs=self.config.distill.epochs)

    @cached_property
    def distill_step(self):
        """Compiled Eqs. 4-9."""
        make_step = partial(
            distill.make_step,
            self.student_model,
            self.adapter,
            self.classifier,
            self.distill_optimizer,
            self.meta_optimizer,
            self.config,
        )
        return parallel.compile_step(make_step, self.devices)

    # Stage 4 -----------------------------------------------------------------------------------

    def train_updated_student(
        self, fold: Fold, distilled: distill.DistillState, hidden: np.ndarray
    ) -> curriculum.CurriculumState:
        """Trains S' on the tasks that the policy picks."""
        logits = self._classify(distilled.meta_params, hidden[fold.train])
        labels = self.table.labels[fold.train]
        probability = np.exp(losses.true_class_log_probability(logits, labels))
        task_of_row = curriculum.assign_tasks(probability, labels, self.config.curriculum)
        rows_of_task = [fold.train[task_of_row == k] for k in range(self.policy.num_tasks)]
        empty = [k for k, rows in enumerate(rows_of_task) if len(rows) == 0]
        if empty:
            raise UserError(
                f"fold {fold.name}: curriculum task(s) {empty} have no training example: "
                "lower curriculum.num_tasks"
            )

        def batch_at(step: int, state: curriculum.CurriculumState) -> curriculum.CurriculumBatch:
            task = int(state.task)
            seed = self._seed(fold, "curriculum", "train")
            rows = batches.sample_rows(
                rows_of_task[task], self.config.batch_size, step, [*seed, task]
            )
            quiz_rows = self._stream(fold, "curriculum", "quiz", step)
            return {"train": self._batch(rows), "quiz": self._batch(quiz_rows, hidden)}

        stage = self._stage(
            fold,
            "curriculum",
            init=lambda: curriculum.init_state(
                distilled,
                self.curriculum_optimizer,
                self.policy,
                self.policy_optimizer,
                self.config.curriculum,
                self.config.student.width,
                self._rng(fold, "curriculum"),
            ),
            step=self.curriculum_step,
            batch_at=batch_at,
            predict=lambda state, rows: self._predict_student(state.params, rows),
        )
        return train(stage, self._directory(fold, "curriculum"))

    @cached_property
    def policy(self) -> Policy:
        """Picks the next task."""
        config = self.config.curriculum
        by_class = config.task_by == "class"
        num_tasks = len(self.table.class_names) if by_class else config.num_tasks
        return Policy(num_tasks, config.policy_width, config.easy_bias)

    @cached_property
    def curriculum_optimizer(self):
        """AdamW of the updated student."""
        return self._optimizer(self.config.curriculum)

    @cached_property
    def policy_optimizer(self):
        """AdamW of the policy, one step an episode."""
        config = self.config.curriculum
        return make_optimizer(
            ConfigDict({**self.config.optimizer, "schedule": "constant", "warmup": 0.0}),
            config.policy_learning_rate,
            config.epochs * self.steps_per_epoch // config.episode_steps,
        )

    @cached_property
    def curriculum_step(self):
        """Compiled Eqs. 10-13."""
        make_step = partial(
            curriculum.make_step,
            self.student_model,
            self.adapter,
            self.classifier,
            self.policy,
            self.curriculum_optimizer,
            self.policy_optimizer,
            self.config,
            self.config.curriculum.epochs * self.steps_per_epoch,
        )
        return parallel.compile_step(make_step, self.devices)

    # What the stages share ---------------------------------------------------------------------

    @cached_property
    def steps_per_epoch(self) -> int:
        """Enough batches for the largest fold's training part, so that all folds share programs."""
        largest = max(len(fold.train) for fold in self.folds)
        return -(-largest // self.config.batch_size)

    def _stage(self, fold: Fold, name: str, *, init, step, batch_at, predict) -> Stage:
        """A stage that is validated by ``predict(state, rows) -> (n, C) logits``."""
        labels = self.table.labels[fold.validation]

        def validate(state: Any) -> dict[str, float]:
            logits = predict(state, fold.validation)
            scores = classification_metrics(labels, logits.argmax(-1), len(self.table.class_names))
            loss = float(losses.cross_entropy(logits, labels))
            return {"loss": loss, **{metric: scores[metric] for metric in ("ua", "wa", "wf1")}}

        return Stage(
            title=f"fold {fold.name}/{self.folds[-1].name} {name}",
            epochs=self.config[name].epochs,
            steps_per_epoch=self.steps_per_epoch,
            init=init,
            step=step,
            batch_at=batch_at,
            validate=validate,
            selection_metric=self.config.selection_metric,
            rng=jax.random.fold_in(self._rng(fold, name), 1),
        )

    def _optimizer(self, config: ConfigDict, epochs: int | None = None):
        epochs = config.epochs if epochs is None else epochs
        return make_optimizer(
            self.config.optimizer, config.learning_rate, epochs * self.steps_per_epoch
        )

    def _batch(self, rows: np.ndarray, hidden: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Features of the utterances ``rows``, with the teacher's hidden vectors where given."""
        batch = {"inputs": self.features[rows], "length": self.num_frames[rows]}
        batch |= {"label": self.table.labels[rows], "index": rows.astype(np.int32)}
        return batch if hidden is None else batch | {"teacher_hidden": hidden[rows]}

    def _teacher_batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if self.config.teacher.input == "features":
            return self._batch(rows)
        waveforms = {"inputs": self.waveforms[rows], "length": self.num_samples[rows]}
        return waveforms | {"label": self.table.labels[rows], "index": rows.astype(np.int32)}

    def _stream(self, fold: Fold, stage: str, part: str, step: int) -> np.ndarray:
        """Row numbers of a stage's batch from the ``train`` or ``quiz`` part of the fold."""
        seed = self._seed(fold, stage, part)
        return batches.stream_rows(getattr(fold, part), self.config.batch_size, step, seed)

    def _seed(self, fold: Fold, stage: str, part: str) -> list[int]:
        return [self.config.seed, int(fold.name), STAGE_NUMBER[stage], int(part == "quiz")]

    def _rng(self, fold: Fold, stage: str) -> jax.Array:
        rng = jax.random.fold_in(jax.random.key(self.config.seed), int(fold.name))
        return jax.random.fold_in(rng, STAGE_NUMBER[stage])

    def _directory(self, fold: Fold, name: str) -> Path:
        return self.workdir / f"fold_{fold.name}" / name

    def _notes(self) -> list[str]:
        """What a reader of the results must know of the data."""
        notes = []
        limit = num_samples(self.config.max_frames)
        cut = int((self.table.num_samples > limit).sum())
        if cut:
            notes.append(
                f"{cut} utterances are longer than max_frames={self.config.max_frames} "
                f"({limit / 16000:.1f} s) and were cut there."
            )
        if self.table.skipped:
            reasons = [f"`{item['id']}` ({item['reason']})" for item in self.table.skipped]
            notes.append(f"{len(reasons)} files were skipped: {'; '.join(reasons)}.")
        return notes

    def _claim_workdir(self, fingerprint: str) -> None:
        """Writes what this run is, or refuses a workdir in which another run was begun."""
        path = self.workdir / "run.json"
        mine = {"corpus_fingerprint": fingerprint, **_flatten(self.config.to_dict())}
        mine = {k: v for k, v in mine.items() if k not in PLACE_KEYS}
        if not path.exists():
            report.write_atomically(path, json.dumps(mine, indent=1) + "\n")
            return
        theirs = json.loads(path.read_text())
        differ = [k for k in sorted(mine | theirs) if mine.get(k) != theirs.get(k)]
        if differ:
            changes = ", ".join(f"{k}: {theirs.get(k)} -> {mine.get(k)}" for k in differ[:5])
            raise UserError(
                f"{self.workdir} holds checkpoints of another run ({changes}"
                f"{', ...' if len(differ) > 5 else ''}). Use another --workdir, or delete this one"
            )


def _corpus_arguments(config: ConfigDict) -> dict[str, Any]:
    """The config keys that describe the corpus, less those that are not set."""
    arguments = {key: config.get(key) for key in ("data_dir", "manifest", "label_map")}
    return {key: value for key, value in arguments.items() if value} | dict(
        config.get("synthetic", {})
    )


def _count_parameters(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; values as JSON gives them back."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    report.write_atomically(path, buffer.getvalue())
