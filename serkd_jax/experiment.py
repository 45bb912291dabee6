"""The pipeline: records, features, then per fold the four stages of Section 3, then results.

Every part that is done is reused. :meth:`Experiment.run_fold` is the paper's order of training.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from serkd_jax import batches, losses, parallel, report
from serkd_jax.errors import UserError
from serkd_jax.frontends import make_frontend, num_samples
from serkd_jax.metrics import classification_metrics
from serkd_jax.models.teacher import TeacherOutput
from serkd_jax.programs import STAGES, Programs, check_config, chosen_stages
from serkd_jax.splits import Fold, folds_as_json, make_folds, speaker_note
from serkd_jax.stages.common import Batch
from serkd_jax.stages.curriculum import CurriculumBatch, CurriculumState, assign_tasks
from serkd_jax.stages.distill import DistillState
from serkd_jax.stages.student import StudentState
from serkd_jax.stages.teacher import TeacherState
from serkd_jax.training import Stage, train

# Config keys that say where and how a run is done, not what it computes.
PLACE_KEYS = ("data_dir", "manifest", "label_map", "cache_dir", "num_devices", "strict")
PLACE_KEYS += ("protocol.file", "stages")
STAGE_NUMBER = {name: i for i, name in enumerate(STAGES, start=1)}


class Experiment:
    """One run: a config, its data, its folds, and the order of the stages."""

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """Prepares records and features (or finds them) and makes the folds.

        Raises:
            UserError: bad data or configuration, or a workdir that holds another run.
        """
        # Here and not above: only this needs TensorFlow.
        from serkd_jax.data import corpora, counts, features, records

        check_config(config)
        self.config, self.workdir = config, Path(workdir)
        devices = parallel.choose_devices(config.num_devices, config.batch_size)
        cache = Path(config.cache_dir or self.workdir / "data")
        max_frames = config.max_frames

        corpus = corpora.make_corpus(config.corpus, **_corpus_arguments(config))
        records_dir = records.prepare_records(corpus, cache)
        self.table = records.load_table(records_dir)
        counted = counts.check_counts(self.table, corpus, config.strict, most_named=20)
        self.folds = self._make_folds()
        self.data_report = "\n\n".join([counted, *self._notes()])
        splits = folds_as_json(self.folds, self.table.ids)
        # Enough batches for the largest fold's training part, so that all folds share programs.
        largest = max(len(fold.train) for fold in self.folds)
        self.steps_per_epoch = -(-largest // config.batch_size)

        frontend = make_frontend(config.frontend, devices)
        self.programs = Programs(
            config,
            len(self.table.class_names),
            (max_frames, frontend.width),
            self.steps_per_epoch,
            devices,
        )
        self._claim_workdir(
            {
                "the corpus": corpus.fingerprint,
                "the splits": hashlib.sha256(splits.encode()).hexdigest()[:16],
                "the front-end": frontend.fingerprint,
                "the teacher's weights": self.programs.weights_hash,
            }
        )
        report.write_atomically(self.workdir / "splits.json", splits)
        features_dir = features.prepare_features(records_dir, frontend, max_frames, cache)
        ids, self.features, self.num_frames = features.load_features(features_dir, max_frames)
        self._check_rows(ids, features_dir)
        if config.teacher.input == "waveform" and "teacher" in chosen_stages(config):
            ids, self.waveforms, self.num_samples = records.load_waveforms(
                records_dir, num_samples(max_frames)
            )
            self._check_rows(ids, records_dir)

    def _make_folds(self) -> list[Fold]:
        table, config = self.table, self.config
        columns = {
            "id": table.ids,
            "speaker": table.speakers,
            "session": table.sessions,
            "fold": table.folds,
            "split": table.splits,
        }
        return make_folds(table.labels, columns, config.protocol, config.seed)

    def _check_rows(self, ids: np.ndarray, place: Path) -> None:
        """Everything is indexed by row: the rows must be the table's."""
        if not np.array_equal(ids, self.table.ids):
            raise UserError(f"{place} does not hold the utterances of the records: delete it")

    def run(self) -> str:
        """Does what is left to do of the chosen stages; returns the scores as Markdown."""
        predictions = {fold.name: self.run_fold(fold) for fold in self.folds}
        teacher_params = jax.eval_shape(self.programs.init_teacher).params
        student_params = jax.eval_shape(self.programs.new_student_params, jax.random.key(0))
        return report.write_results(
            self.workdir,
            self.config.corpus,
            self.config.to_dict(),
            list(self.table.class_names),
            predictions,
            {
                "teacher": _count_parameters(teacher_params),
                "student": _count_parameters(student_params),
            },
            self.data_report,
        )

    def run_fold(self, fold: Fold) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The chosen stages of a fold; returns test labels and predictions of all rows so far."""
        saved = self._directory(fold, "predictions.npz")
        stages = chosen_stages(self.config)
        logits, test = _load_arrays(saved), fold.test
        if any(stage in stages and row not in logits for row, stage in report.STAGE_OF_ROW.items()):
            if "teacher" in stages:
                teacher, teacher_out = self.train_teacher(fold)
                hidden = teacher_out.hidden
                logits["teacher"] = teacher_out.logits[test]
            if "student" in stages:
                student = self.train_student(fold)
                logits["student"] = self._student_logits(student.params, test)
            if "distill" in stages:
                distilled = self.distill(fold, teacher, hidden)
                logits["meta_teacher"] = self.programs.classify(distilled.meta_params, hidden[test])
                params = distilled.params["student"]
                logits["distilled_student"] = self._student_logits(params, test)
            if "curriculum" in stages:
                updated = self.train_updated_student(fold, distilled, hidden)
                logits["updated_student"] = self._student_logits(updated.params, test)
            logits |= {"ids": self.table.ids[test], "label": self.table.labels[test]}
            _save_arrays(saved, **logits)
        return {
            row: (logits["label"], logits[row].argmax(-1)) for row in report.ROWS if row in logits
        }

    def train_teacher(self, fold: Fold) -> tuple[TeacherState, TeacherOutput]:
        """Stage 1; the hidden vectors and logits of every utterance are computed once."""
        programs = self.programs

        def predict(state: TeacherState, rows: np.ndarray) -> TeacherOutput:
            return programs.teacher_predict(state, rows, self._teacher_batch)

        stage = self._stage(
            fold,
            "teacher",
            init=programs.init_teacher,
            step=programs.teacher_step,
            batch_at=lambda step, _: self._teacher_batch(self._stream(fold, "teacher", step)),
            logits=lambda state, rows: predict(state, rows).logits,
        )
        state = train(stage, self._directory(fold, "teacher"))
        saved = self._directory(fold, "teacher/outputs.npz")
        if not saved.exists():
            out = predict(state, np.arange(len(self.table)))
            _save_arrays(saved, ids=self.table.ids, hidden=out.hidden, logits=out.logits)
        arrays = _load_arrays(saved)
        return state, TeacherOutput(arrays["hidden"], arrays["logits"])

    def train_student(self, fold: Fold) -> StudentState:
        """Stage 2."""
        stage = self._stage(
            fold,
            "student",
            init=lambda: self.programs.init_student(self._rng(fold, "student")),
            step=self.programs.student_step,
            batch_at=lambda step, _: self._batch(self._stream(fold, "student", step)),
            logits=lambda state, rows: self._student_logits(state.params, rows),
        )
        return train(stage, self._directory(fold, "student"))

    def distill(self, fold: Fold, teacher: TeacherState, hidden: np.ndarray) -> DistillState:
        """Stage 3: a new student, while the meta-teacher learns from its quiz results."""

        def batch_at(step: int, _: DistillState) -> dict[str, Batch]:
            return {
                part: self._batch(self._stream(fold, "distill", step, part), hidden)
                for part in ("train", "quiz")
            }

        rng, classifier = self._rng(fold, "distill"), teacher.params["classifier"]
        stage = self._stage(
            fold,
            "distill",
            init=lambda: self.programs.init_distill(rng, classifier),
            step=self.programs.distill_step,
            batch_at=batch_at,
            logits=lambda state, rows: self._student_logits(state.params["student"], rows),
        )
        return train(stage, self._directory(fold, "distill"))

    def train_updated_student(
        self, fold: Fold, distilled: DistillState, hidden: np.ndarray
    ) -> CurriculumState:
        """Stage 4: S' on the tasks that the policy picks."""
        rows_of_task = self._tasks(fold, distilled, hidden)

        def batch_at(step: int, state: CurriculumState) -> CurriculumBatch:
            task = int(state.task)
            seed = [*self._seed(fold, "curriculum", "train"), task]
            size = self.config.batch_size
            quiz_rows = self._stream(fold, "curriculum", step, "quiz")
            return {
                "train": self._batch(batches.sample_rows(rows_of_task[task], size, step, seed)),
                "quiz": self._batch(quiz_rows, hidden),
            }

        rng = self._rng(fold, "curriculum")
        stage = self._stage(
            fold,
            "curriculum",
            init=lambda: self.programs.init_curriculum(rng, distilled),
            step=self.programs.curriculum_step,
            batch_at=batch_at,
            logits=lambda state, rows: self._student_logits(state.params, rows),
        )
        return train(stage, self._directory(fold, "curriculum"))

    def _tasks(self, fold: Fold, distilled: DistillState, hidden: np.ndarray) -> list[np.ndarray]:
        """The training rows of every curriculum task, ranked by the meta-teacher."""
        logits = self.programs.classify(distilled.meta_params, hidden[fold.train])
        labels = self.table.labels[fold.train]
        probability = np.exp(losses.true_class_log_probability(logits, labels))
        task = assign_tasks(probability, labels, self.config.curriculum)
        rows_of_task = [fold.train[task == k] for k in range(self.programs.policy.num_tasks)]
        empty = [k for k, rows in enumerate(rows_of_task) if len(rows) == 0]
        if empty:
            raise UserError(
                f"fold {fold.name}: curriculum task(s) {empty} have no training example: "
                "lower curriculum.num_tasks"
            )
        return rows_of_task

    def _stage(
        self,
        fold: Fold,
        name: str,
        *,
        init: Callable[[], Any],
        step: Callable,
        batch_at: Callable[[int, Any], Any],
        logits: Callable[[Any, np.ndarray], np.ndarray],
    ) -> Stage:
        """A stage that is validated by the (n, C) ``logits`` of (state, rows)."""
        labels = self.table.labels[fold.validation]

        def validate(state: Any) -> dict[str, float]:
            predicted = logits(state, fold.validation)
            num_classes = len(self.table.class_names)
            scores = classification_metrics(labels, predicted.argmax(-1), num_classes)
            loss = float(losses.cross_entropy(predicted, labels))
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
            rng=jax.random.fold_in(self._rng(fold, name), 2),
        )

    def _student_logits(self, params: Any, rows: np.ndarray) -> np.ndarray:
        """(n, C) logits of the utterances ``rows``."""
        return self.programs.student_predict(params, rows, self._batch).logits

    def _batch(self, rows: np.ndarray, hidden: np.ndarray | None = None) -> Batch:
        """Features of the utterances ``rows``, with the teacher's hidden vectors where given."""
        batch = {"inputs": self.features[rows], "length": self.num_frames[rows]}
        batch |= {"label": self.table.labels[rows], "index": rows.astype(np.int32)}
        return batch if hidden is None else batch | {"teacher_hidden": hidden[rows]}

    def _teacher_batch(self, rows: np.ndarray) -> Batch:
        """What the teacher reads of the utterances ``rows``."""
        batch = self._batch(rows)
        if self.config.teacher.input == "waveform":
            batch |= {"inputs": self.waveforms[rows], "length": self.num_samples[rows]}
        return batch

    def _stream(self, fold: Fold, stage: str, step: int, part: str = "train") -> np.ndarray:
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
        notes = [speaker_note(self.folds, self.table.speakers)]
        for fold in self.folds:
            if unused := len(self.table) - sum(map(len, fold.parts.values())):
                notes.append(f"{unused} utterances are in no part of fold {fold.name}.")
        sizes = np.bincount(self.table.labels, minlength=len(self.table.class_names))
        empty = [n for n, size in zip(self.table.class_names, sizes, strict=True) if size == 0]
        if empty:
            notes.append(f"No utterance could be used of: {', '.join(empty)}.")
        limit = num_samples(self.config.max_frames)
        cut = int((self.table.num_samples > limit).sum())
        if cut:
            notes.append(
                f"{cut} utterances are longer than max_frames={self.config.max_frames} "
                f"({limit / 16000:.1f} s) and were cut there."
            )
        return notes

    def _claim_workdir(self, sources: dict[str, str]) -> None:
        """Writes what this run is, or refuses a workdir in which another one has trained."""
        path = self.workdir / "run.json"
        config = {k: v for k, v in _flatten(self.config.to_dict()).items() if k not in PLACE_KEYS}
        mine = sources | config
        if any(self.workdir.glob("fold_*")) and path.exists():
            theirs = json.loads(path.read_text())
            differ = [k for k in sorted(mine | theirs) if mine.get(k) != theirs.get(k)]
            if differ:
                changes = ", ".join(f"{k}: {theirs.get(k)} -> {mine.get(k)}" for k in differ[:5])
                more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
                raise UserError(
                    f"{self.workdir} holds checkpoints of another run ({changes}{more}). Use "
                    "another --workdir, or delete this one"
                )
        report.write_atomically(path, json.dumps(mine, indent=1) + "\n")


def _corpus_arguments(config: ConfigDict) -> dict[str, Any]:
    """The config keys that describe the corpus, less those that are not set."""
    keys = ("data_dir", "manifest", "label_map", "speaker_pattern")
    given = {key: config[key] for key in keys if config.get(key)}
    return given | dict(config.get("synthetic", {}))


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


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What ``_save_arrays`` has left there, if anything."""
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    report.write_atomically(path, buffer.getvalue())
