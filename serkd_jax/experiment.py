"""The pipeline: records, features, then for each fold the stages of Section 3, then results.

Parts that are already done are reused. `Experiment.run_fold` has the paper's order of training.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.audio.logmel import num_samples
from serkd_jax.config import (
    check_config,
    check_student,
    chosen_stages,
    quiz_batch_size,
    settings_of,
)
from serkd_jax.data import corpora, counts, prepare, reader
from serkd_jax.data.dialogues import dialogue_examples, find_dialogues
from serkd_jax.data.examples import Examples, are_resident, sample_rows, stream_rows
from serkd_jax.data.sources import Frontend
from serkd_jax.data.splits import Fold, folds_as_json, make_folds
from serkd_jax.distributed import parallel
from serkd_jax.encoders.frontends import make_frontend
from serkd_jax.errors import UserError, differences
from serkd_jax.files import locked, read_arrays, read_json, write_arrays, write_file, write_json
from serkd_jax.models.students import find_student
from serkd_jax.models.students.base import StudentOutput, deployed_params
from serkd_jax.models.teacher import TeacherOutput
from serkd_jax.programs import Programs
from serkd_jax.results import costs, predictions, probe, report
from serkd_jax.results.metrics import classification_metrics
from serkd_jax.stages.base import Stage
from serkd_jax.stages.curriculum import CurriculumStage, CurriculumState, assign_tasks
from serkd_jax.stages.distill import DistillStage, DistillState
from serkd_jax.stages.finetune import TeacherStage, TeacherState
from serkd_jax.stages.standardization import Statistics, measure_statistics, no_statistics
from serkd_jax.stages.student import StudentStage, StudentState
from serkd_jax.training import Training, train

RETRAIN = "delete it, and what is missing is computed again"
# In the order of training, which is also the order of the rows in the results.
STAGES: tuple[type[Stage], ...] = (TeacherStage, StudentStage, DistillStage, CurriculumStage)
ROWS = tuple(row for kind in STAGES for row in kind.rows)


class Experiment:
    """One run: a config, its data, its folds, and the order of the stages.

    Attributes:
        config: the recipe.
        workdir: the folder to which everything is written.
        programs: the models and the compiled steps.
        table: what the records say about each utterance; all row numbers are rows of this table.
        folds: the folds, with the row numbers of their parts.
        features: the student's inputs.
        frames: the frames of the student's front-end, which the linear probe reads.
        teacher_inputs: the teacher's inputs, waveforms or features.
        data_report: what a reader of the results must know about the data, as Markdown.
        frontend: the front-end of the student's features.
        profile: whether the stages of the first fold trace some of their steps.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        programs: Programs,
        table: reader.Table,
        folds: list[Fold],
        features: Examples,
        frames: Examples,
        teacher_inputs: Examples,
        frontend: Frontend,
        data_report: str = "",
        profile: bool = False,
    ):
        self.config, self.workdir, self.programs = config, workdir, programs
        self.table, self.folds = table, folds
        self.features, self.frames, self.teacher_inputs = features, frames, teacher_inputs
        self.frontend, self.data_report, self.profile = frontend, data_report, profile
        self.steps_per_epoch = programs.steps_per_epoch

    def run_fold(self, fold: Fold) -> dict[str, np.ndarray]:
        """Runs the chosen stages of a fold.

        Returns:
            What is written to `predictions.npz`: what the test utterances are, and their logits in
            each row of the results that there is so far; see `results.predictions.Predictions`.
        """
        saved = self._directory(fold, predictions.NAME)
        logits, test = {}, fold.test
        if saved.exists():
            logits = read_arrays(saved, RETRAIN, ("ids", "label"))
        stages = chosen_stages(self.config)
        if any(row not in logits for kind in STAGES if kind.name in stages for row in kind.rows):
            if self._trains_students:
                statistics = vars(self.statistics[fold.name])
                write_arrays(self._directory(fold, "statistics.npz"), **statistics)
            states, teacher = self.train_fold(fold)
            if teacher:
                teacher = TeacherOutput(teacher.hidden[test], teacher.logits[test])
            logits |= self.predict_test(fold, states, self.features, teacher)
            # All processes have looked for the file before it is written.
            parallel.wait_for_processes(f"fold {fold.name} predicted")
            write_arrays(saved, **logits)
        order = (*predictions.NO_ROWS, *ROWS)
        return {name: logits[name] for name in order if name in logits}

    def train_fold(self, fold: Fold) -> tuple[dict[type[Stage], Any], TeacherOutput | None]:
        """Trains the chosen stages of a fold, or loads those that are finished.

        Returns:
            The state of each stage, in the order of training; and the teacher's hidden vectors and
            logits of every utterance, if there is a teacher.
        """
        stages, states, teacher = chosen_stages(self.config), {}, None
        if "teacher" in stages:
            states[TeacherStage], teacher = self.train_teacher(fold)
        if "student" in stages:
            states[StudentStage] = self.train_student(fold)
        if "distill" in stages:
            states[DistillStage] = self.distill(fold, states[TeacherStage], teacher.hidden)
        if "curriculum" in stages:
            distilled = states[DistillStage]
            states[CurriculumStage] = self.train_updated_student(fold, distilled, teacher.hidden)
        return states, teacher

    def predict_test(
        self,
        fold: Fold,
        states: Mapping[type[Stage], Any],
        features: Examples,
        teacher: TeacherOutput | None,
    ) -> dict[str, np.ndarray]:
        """Predicts the test utterances of a fold.

        Args:
            fold: the fold.
            states: from `train_fold`.
            features: the students' inputs.
            teacher: the teacher's hidden vectors and logits of the test utterances.

        Returns:
            As `run_fold`.
        """
        logits = {}
        for kind, state in states.items():
            if kind is TeacherStage:
                logits["teacher"] = teacher.logits
            if kind is DistillStage:
                logits["meta_teacher"] = self.programs.classify(state.meta_params, teacher.hidden)
            if kind.student_row:
                out = self._student_outputs(fold, kind, state, features, fold.test)
                logits[kind.student_row] = out.logits
                logits["vectors"] = predictions.principal_components(out.hidden)
        return logits | self._about_test(fold)

    def probe_fold(self, fold: Fold) -> dict[str, np.ndarray]:
        """Trains the linear probe on what the fold does not test on, in the first process alone.

        Returns:
            What is written to `probe.npz`: as `run_fold`, with the decision values as the only row.
            In the other processes, nothing.
        """
        saved = self._directory(fold, predictions.PROBE_NAME)
        arrays = read_arrays(saved, RETRAIN) if saved.exists() else {}
        # All processes have looked for the file before it is written.
        parallel.wait_for_processes(f"fold {fold.name} probe")
        if not arrays and parallel.is_first_process():
            classes = len(self.table.class_names)
            decided = probe.probe_fold(self._probe_vectors, self.table.labels, fold, classes)
            arrays = self._about_test(fold) | {predictions.PROBE: decided}
            write_arrays(saved, **arrays)
        parallel.wait_for_processes(f"fold {fold.name} probed")
        return arrays

    def train_teacher(self, fold: Fold) -> tuple[TeacherState, TeacherOutput]:
        """Runs stage 1, and computes the hidden vectors and logits of every utterance once."""
        programs, examples = self.programs, self.teacher_inputs
        reads_waveforms = self.config.teacher.input == "waveform"
        frozen = programs.embed_params if reads_waveforms else self._teacher_statistics[fold.name]
        state = self._train(
            fold,
            TeacherStage,
            frozen,
            (frozen,),
            examples=examples,
            rows_of=lambda steps: self._stream(fold, TeacherStage, steps),
            logits=lambda state, rows: programs.teacher_predict(state, examples, rows).logits,
        )
        saved = self._directory(fold, "teacher/outputs.npz")
        arrays = read_arrays(saved, RETRAIN, ("hidden", "logits")) if saved.exists() else {}
        # All processes have looked for the file before it is written.
        parallel.wait_for_processes(f"fold {fold.name} teacher")
        if not arrays:
            out = programs.teacher_predict(state, examples, np.arange(len(self.table)))
            arrays = {"ids": self.table.ids, "hidden": out.hidden, "logits": out.logits}
            write_arrays(saved, **arrays)
        return state, TeacherOutput(arrays["hidden"], arrays["logits"])

    def train_student(self, fold: Fold) -> StudentState:
        """Runs stage 2: the student, without the teacher."""
        statistics = self.statistics[fold.name]
        return self._train(
            fold,
            StudentStage,
            statistics,
            (statistics,),
            examples=self.features,
            rows_of=lambda steps: self._stream(fold, StudentStage, steps),
        )

    def distill(self, fold: Fold, teacher: TeacherState, hidden: np.ndarray) -> DistillState:
        """Runs stage 3: a new student, and the meta-teacher, which learns from its quiz results."""

        def rows_of(steps: range) -> dict[str, np.ndarray]:
            quiz = self._stream(fold, DistillStage, steps, "quiz", quiz_batch_size(self.config))
            return {"train": self._stream(fold, DistillStage, steps), "quiz": quiz}

        statistics = self.statistics[fold.name]
        return self._train(
            fold,
            DistillStage,
            statistics,
            (statistics, teacher.params["classifier"]),
            examples=self.features.with_columns(teacher_hidden=hidden),
            rows_of=rows_of,
        )

    def train_updated_student(
        self, fold: Fold, distilled: DistillState, hidden: np.ndarray
    ) -> CurriculumState:
        """Runs stage 4: S' trains on the tasks that the policy picks."""
        rows_of_task = self._tasks(fold, distilled, hidden)
        size, seed = self.config.batch_size, self._seed(fold, CurriculumStage, "train")

        def rows_of(steps: range) -> dict[str, np.ndarray]:
            """Returns batches of all tasks, since the policy picks a step's task on the device."""
            train = [
                [
                    sample_rows(rows, size, step, [*seed, task])
                    for task, rows in enumerate(rows_of_task)
                ]
                for step in steps
            ]
            quiz = self._stream(fold, CurriculumStage, steps, "reward")
            return {"train": np.array(train), "quiz": quiz}

        return self._train(
            fold,
            CurriculumStage,
            CurriculumStage.frozen(distilled),
            (distilled,),
            examples=self.features.with_columns(teacher_hidden=hidden),
            rows_of=rows_of,
        )

    def run(self) -> str:
        """Runs what remains of the chosen stages, and returns the scores as Markdown."""
        folds = {fold.name: self.run_fold(fold) | self.probe_fold(fold) for fold in self.folds}
        if self._trains_students:
            costs.write_costs(self.workdir, self._measure_costs)
        # The last file: a run that has its results is finished.
        return report.write_results(
            self.workdir,
            self.config.corpus,
            self.config.to_dict(),
            folds,
            self.programs.count_parameters(),
            self.data_report,
        )

    @property
    def _trains_students(self) -> bool:
        chosen = chosen_stages(self.config)
        return any(kind.student_row for kind in STAGES if kind.name in chosen)

    def _measure_costs(self) -> dict[str, Any]:
        """Measures what the student costs, with new weights: time does not depend on them."""
        variables = self.programs.new_student(jax.random.key(0))
        deployed = deployed_params(variables["params"])
        variables = {**variables, "params": deployed}
        student = jax.jit(partial(self.programs.student.clone(projection_dims=()).apply, variables))
        params = self.programs.count_parameters()
        params |= {"deployed": sum(x.size for x in jax.tree.leaves(deployed))}
        frames, shape = self.config.max_frames, self.programs.feature_shape
        return costs.measure_costs(self.frontend, frames, student, shape, params)

    @cached_property
    def _probe_vectors(self) -> np.ndarray:
        """The student's features of every utterance, (n, 2 N), as the linear probe reads them."""
        return probe.pool_all(self.frames.chunks())

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        """What each fold standardises the student's features by: measured on its training part."""
        width, pretrained = self.programs.feature_shape[1], self.programs.pretrained
        if pretrained:  # on other speech, so it must see frames of the same kind
            statistics = Statistics(pretrained.mean, pretrained.spread)
            return {fold.name: statistics for fold in self.folds}
        return self._measure(self.features, width, self.config.student.standardize)

    @cached_property
    def _teacher_statistics(self) -> dict[str, Statistics]:
        """Statistics of the teacher's features over each fold's training part, by fold name."""
        config = self.config.teacher
        same = self.teacher_inputs is self.features and not self.programs.pretrained
        if same and config.standardize == self.config.student.standardize:
            return self.statistics
        return self._measure(self.teacher_inputs, self.programs.teacher_width, config.standardize)

    def _measure(self, examples: Examples, width: int, wanted: bool) -> dict[str, Statistics]:
        names = [fold.name for fold in self.folds]
        if not wanted:
            return dict.fromkeys(names, no_statistics(width))
        members = np.zeros((len(names), len(self.table)), bool)
        for fold, member in zip(self.folds, members, strict=True):
            member[fold.train] = True
        measured = parallel.of_first_process(measure_statistics(examples.chunks(), members))
        return dict(zip(names, measured, strict=True))

    def _tasks(self, fold: Fold, distilled: DistillState, hidden: np.ndarray) -> list[np.ndarray]:
        """Returns the training rows of each curriculum task, as the meta-teacher ranks them."""
        logits = self.programs.classify(distilled.meta_params, hidden[fold.train])
        labels = self.table.labels[fold.train]
        margins = np.asarray(losses.true_class_margin(logits, labels))
        task = assign_tasks(margins, labels, self.config.curriculum)
        rows_of_task = [fold.train[task == k] for k in range(self.programs.policy.num_tasks)]
        empty = [k for k, rows in enumerate(rows_of_task) if len(rows) == 0]
        if empty:
            raise UserError(
                f"fold {fold.name}: curriculum task(s) {empty} have no training example: "
                "lower curriculum.num_tasks"
            )
        return rows_of_task

    def _train(
        self,
        fold: Fold,
        kind: type[Stage],
        frozen: Any,
        start: tuple,
        *,
        examples: Examples,
        rows_of: Callable[[range], Any],
        logits: Callable[[Any, np.ndarray], np.ndarray] | None = None,
    ) -> Any:
        """Trains a stage on a fold, and returns the state of its selected epoch.

        Args:
            fold: the fold whose parts the stage uses.
            kind: the stage's class.
            frozen: the part of the state that no step changes.
            start: the arguments of the stage's `init` after the key.
            examples: the examples that the stage trains on.
            rows_of: steps -> the rows that they train on.
            logits: (state, rows) -> logits for validation; by default those of the stage's student.
        """
        stage, rng = self.programs.stage(kind), self._rng(fold, kind)
        labels = self.table.labels[fold.validation]

        def validate(state: Any) -> dict[str, Any]:
            if logits:
                predicted = logits(state, fold.validation)
            else:
                out = self._student_outputs(fold, kind, state, self.features, fold.validation)
                predicted = out.logits
            num_classes = len(self.table.class_names)
            scores = classification_metrics(labels, predicted.argmax(-1), num_classes)
            loss = float(losses.cross_entropy(predicted, labels))
            wanted = ("ua", "wa", "wf1", "confusion")
            return {"loss": loss, **{metric: scores[metric] for metric in wanted}}

        count = min(self.config.steps_per_dispatch, self.steps_per_epoch)

        def take(steps: range) -> tuple[Any, Any]:
            rows, missing = rows_of(steps), count - len(steps)
            return examples.take(
                jax.tree.map(lambda x: np.concatenate([x, *[x[-1:]] * missing]), rows)
            )

        training = Training(
            title=f"fold {fold.name}/{self.folds[-1].name} {kind.name}",
            epochs=self.config[kind.name].epochs,
            steps_per_epoch=self.steps_per_epoch,
            steps_per_dispatch=count,
            devices=self.programs.devices,
            init=lambda: stage.init(jax.random.fold_in(rng, 1), *start),
            frozen=frozen,
            steps=self.programs.steps(kind),
            take=take,
            validate=validate,
            selection_metric=self.config.selection_metric,
            rng=jax.random.fold_in(rng, 2),
            learning_rate=self.programs.learning_rate(kind.name),
            patience=self.config.patience,
            profile=self.profile and fold is self.folds[0],
        )
        folder = self._stage_folder(fold, kind)
        with locked(folder, wait=True) if folder.is_symlink() else nullcontext():
            return train(training, folder)

    def _student_outputs(
        self, fold: Fold, kind: type[Stage], state: Any, features: Examples, rows: np.ndarray
    ) -> StudentOutput:
        """Returns the outputs for the utterances `rows` of the student in a stage's state."""
        variables = {"params": kind.student_params(state.params), "batch_stats": state.batch_stats}
        trained = variables, self.statistics[fold.name]
        return self.programs.student_predict(trained, features, rows)

    def _stream(
        self, fold: Fold, kind: type[Stage], steps: range, part: str = "train", size: int = 0
    ) -> np.ndarray:
        """Returns row numbers (steps, B) of a stage's batches from a part of the fold."""
        seed = self._seed(fold, kind, part)
        return stream_rows(getattr(fold, part), size or self.config.batch_size, steps, seed)

    def _seed(self, fold: Fold, kind: type[Stage], part: str) -> list[int]:
        return [self.config.seed, int(fold.name), _number(kind.name), _number(part)]

    def _rng(self, fold: Fold, kind: type[Stage]) -> jax.Array:
        rng = jax.random.fold_in(jax.random.key(self.config.seed), int(fold.name))
        return jax.random.fold_in(rng, _number(kind.name))

    def _stage_folder(self, fold: Fold, kind: type[Stage]) -> Path:
        """Returns a stage's folder: a link to one in `stages_dir`, if runs share their stages."""
        folder = self._directory(fold, kind.name)
        if not self.config.stages_dir:
            return folder
        if parallel.is_first_process() and not folder.exists():
            described = read_json(self.workdir / "run.json", RETRAIN)
            name = f"{kind.name}-{stage_identity(kind, described)}"
            shared = Path(self.config.stages_dir) / name / f"fold_{fold.name}"
            shared.mkdir(parents=True, exist_ok=True)
            folder.parent.mkdir(exist_ok=True)
            folder.symlink_to(os.path.relpath(shared.resolve(), folder.parent.resolve()))
        parallel.wait_for_processes(f"fold {fold.name} {kind.name} folder")
        return folder

    def _about_test(self, fold: Fold) -> dict[str, np.ndarray]:
        """Returns what the fold's test utterances are; see `predictions.ABOUT`."""
        return {
            "ids": self.table.ids[fold.test],
            "speaker": np.asarray(self.table.speakers)[fold.test],
            "label": self.table.labels[fold.test],
            "classes": np.asarray(self.table.class_names),
        }

    def _directory(self, fold: Fold, name: str) -> Path:
        return self.workdir / f"fold_{fold.name}" / name


def prepare_experiment(
    config: ConfigDict, workdir: str | Path, profile: bool = False
) -> Experiment:
    """Finds or makes records and features, makes the folds, and claims the workdir.

    Args:
        config: the recipe.
        workdir: the folder to which everything is written.
        profile: whether the stages of the first fold trace some of their steps.

    Raises:
        UserError: the data or the configuration are bad, or the workdir holds another run.
    """
    check_config(config)
    check_stages(config)
    workdir, max_frames = Path(workdir), config.max_frames
    sizes = {"batch_size": config.batch_size, "meta.quiz_batch_size": quiz_batch_size(config)}
    devices = parallel.choose_devices(config.num_devices, sizes)
    cache = Path(config.cache_dir or workdir / "data")

    corpus = corpora.corpus_of(config)
    records_dir = prepare.prepare_records(corpus, cache)
    table = reader.load_table(records_dir)
    counted = counts.check_counts(table, corpus, config.strict, most_named=20)
    columns = table.columns()
    folds = make_folds(table.labels, columns, config.protocol, table.class_names)
    splits = folds_as_json(folds, table.ids)

    local = parallel.local_devices(devices)
    frontend = teacher_frontend = make_frontend(config.frontend, local)
    dialogues, shape = None, (max_frames, frontend.width)
    if find_student(config.student.kind).reads_dialogues:
        dialogues = find_dialogues(corpus, table)
        shape = dialogues.shape(frontend.width)
    check_student(config, *shape)
    if config.teacher.frontend.name:
        teacher_frontend = make_frontend(config.teacher.frontend, local)
    has_teacher = "teacher" in chosen_stages(config)
    reads_waveforms = has_teacher and config.teacher.input == "waveform"
    reads_its_own = has_teacher and teacher_frontend is not frontend
    samples = num_samples(max_frames)
    width = frontend.width + reads_its_own * teacher_frontend.width
    bytes_of_all = 2 * len(table) * (max_frames * width + samples * reads_waveforms)
    bytes_of_all += dialogues.num_bytes(frontend.width) if dialogues else 0
    # Enough steps for the largest training part of any fold, so that all folds share programs.
    largest = max(len(fold.train) for fold in folds)
    programs = Programs(
        config,
        len(table.class_names),
        shape,
        teacher_frontend.width,
        -(-largest // config.batch_size),
        devices,
        are_resident(config.examples, bytes_of_all, devices),
    )
    sources = {
        "the corpus": corpus.fingerprint,
        "the splits": hashlib.sha256(splits.encode()).hexdigest()[:16],
        "the front-end": frontend.fingerprint,
        "the teacher's front-end": teacher_frontend.fingerprint,
        "the teacher's weights": programs.weights_hash,
        "the student's weights": programs.pretrained.sha256 if programs.pretrained else "",
    }
    if dialogues:
        sources["the dialogues"] = dialogues.fingerprint
    _claim_workdir(workdir, config, sources | {"dtype": programs.dtype or "float32"}, splits)

    def open_examples(folder: Path, name: str, length: int) -> Examples:
        return prepare.open_examples(folder, name, length, table, devices, programs.resident)

    def open_features(frontend: Frontend) -> Examples:
        folder = prepare.prepare_features(records_dir, frontend, max_frames, cache)
        return open_examples(folder, "features", max_frames)

    features = frames = teacher_inputs = open_features(frontend)
    if dialogues:
        features = dialogue_examples(dialogues, frames, table.labels, devices, programs.resident)
    if reads_waveforms:
        teacher_inputs = open_examples(records_dir, "audio", samples)
    elif reads_its_own:
        teacher_inputs = open_features(teacher_frontend)
    notes = [counted, *counts.data_notes(table, folds, max_frames, config.strict)]
    notes += _model_notes(config, programs, (frontend, teacher_frontend))
    data = table, folds, features, frames, teacher_inputs, frontend
    return Experiment(config, workdir, programs, *data, "\n\n".join(notes), profile)


def check_stages(config: ConfigDict) -> None:
    """Refuses unknown names in `config.stages`, and stages without those that they start from.

    Raises:
        UserError: names the key and its allowed values.
    """
    chosen, kinds = chosen_stages(config), {kind.name: kind for kind in STAGES}
    for name in chosen:
        if name not in kinds:
            raise UserError(f"stages has {name!r}: use {', '.join(kinds)}")
        for start in kinds[name].starts_from:
            if start not in chosen:
                raise UserError(f"stages has {name} but not {start}, which it starts from")
        if config[name].epochs < 1:
            raise UserError(f"{name}.epochs must be at least 1")


def stage_identity(kind: type[Stage], run: Mapping[str, Any]) -> str:
    """Returns a hash of all on which the result of a stage depends, so that runs can share it.

    Args:
        kind: the stage's class.
        run: the contents of `run.json`.
    """
    kinds = {each.name: each for each in STAGES}
    read_by_few = {part for each in STAGES for part in each.reads}

    def matters(key: str) -> bool:
        part, _, name = key.partition(".")
        if part not in read_by_few:
            whose = "teacher's" if kind is not TeacherStage else "student's"
            return whose not in key
        others = part in kinds and part != kind.name and name in ("epochs", "learning_rate")
        return part in kind.reads and not others

    values = {key: value for key, value in run.items() if matters(key)}
    values |= {name: stage_identity(kinds[name], run) for name in kind.starts_from}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _number(name: str) -> int:
    """Returns the number of the random stream of this name."""
    return zlib.crc32(name.encode())


def _model_notes(
    config: ConfigDict, programs: Programs, frontends: Sequence[Frontend]
) -> list[str]:
    """Returns what a reader of the results must know about the models and the encoders."""
    distills = {"distill", "curriculum"} & {*chosen_stages(config)}
    assumptions = [frontend.assumption for frontend in frontends]
    if checkpoint := programs.checkpoint:
        assumptions.append(checkpoint.assumption)
    assumed = dict.fromkeys(f"Assumed: {text}." for text in assumptions if text)
    return [_hidden_note(programs), *assumed] if distills else [*assumed]


def _hidden_note(programs: Programs) -> str:
    """Says how Eqs. 8, 9 and 12 compare the student's hidden vectors with the teacher's."""
    student, teacher = programs.student_hidden, programs.teacher_hidden
    told = f"h(., S) has {student} numbers and h(., T) {teacher}: Eqs. 8, 9 and 12 read h(., S)"
    if programs.adapter:
        return f"{told} through a linear adapter, which is trained and not deployed."
    return f"{told} as it is, with no adapter."


def _claim_workdir(workdir: Path, config: ConfigDict, sources: dict[str, str], splits: str) -> None:
    """Writes the description of this run, or refuses a workdir in which another has trained."""
    path = workdir / "run.json"
    mine = sources | settings_of(config)
    if any(workdir.glob("fold_*")) and path.exists():
        theirs = read_json(path, "delete the workdir, or use another --workdir")
        if differ := differences(theirs, mine, sorted(mine | theirs)):
            changes = ", ".join(differ[:5])
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"{workdir} holds checkpoints of another run ({changes}{more}). Use "
                "another --workdir, or delete this one"
            )
    parallel.wait_for_processes("workdir claimed")
    write_json(path, mine)
    write_file(workdir / "splits.json", splits)
    parallel.wait_for_file(path, "workdir described", "--workdir")
