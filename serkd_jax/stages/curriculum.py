"""Stage 4: the student's curriculum (Section 3.4, Eqs. 10-13).

Tasks are parts of the training set. A policy observes the student's state and picks the task of
the next batch, on which the updated student S' trains. The policy learns by REINFORCE from how
often S' beats the frozen meta-teacher T' on a quiz batch of clips to which neither was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError
from serkd_jax.models.policy import Policy
from serkd_jax.models.students.base import Adapter, Student, adapt
from serkd_jax.models.teacher import Classifier
from serkd_jax.stages.augmentation import example_keys
from serkd_jax.stages.base import Batch, QuizBatch, Stage, make_adamw
from serkd_jax.stages.distill import DistillState
from serkd_jax.stages.standardization import Statistics, standardize
from serkd_jax.stages.student import (
    StudentState,
    descend,
    encode_keys,
    run_student,
    student_objective,
)

if TYPE_CHECKING:
    from serkd_jax.programs import Programs


class Episode(struct.PyTreeNode):
    """What the policy has observed, chosen and earned so far in an episode of E steps.

    Attributes:
        observations: (E, S) float32, what it observed.
        actions: (E,) int32, the tasks that it chose.
        rewards: (E,) float32, what they earned.
    """

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array


class Frozen(struct.PyTreeNode):
    """What the curriculum takes from distillation and does not change.

    Attributes:
        statistics: the statistics by which the student's features are standardised.
        adapter_params: the parameters of the distilled student's adapter; empty without one.
        meta_params: the parameters of T'.
    """

    statistics: Statistics
    adapter_params: Any
    meta_params: Any


class CurriculumState(StudentState):
    """Everything that the curriculum needs in order to resume: a `StudentState`, and the policy.

    Attributes:
        policy_params: the parameters of `Policy`.
        policy_opt_state: the state of the policy's optimiser.
        episode: the policy's current episode.
        baseline: (E,) running mean of the returns of earlier episodes, for each step of an episode.
        observation: (S,) what the policy observed when it chose `task`.
        task: () int32, the task of the next batch.
        task_accuracy: (K,) running accuracy of S' on each task's batches.
        task_reward: (K,) running reward after each task's batches.
        frozen: what no step changes.
    """

    policy_params: Any
    policy_opt_state: Any
    episode: Episode
    baseline: jax.Array
    observation: jax.Array
    task: jax.Array
    task_accuracy: jax.Array
    task_reward: jax.Array
    frozen: Frozen


def assign_tasks(margins: np.ndarray, labels: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Assigns each training example to a task, of which number 0 is the easiest.

    Args:
        margins: (n,) the meta-teacher's log-odds of the true class; not its probabilities, which
            round to 1.
        labels: (n,) int, the classes.
        config: the config's `curriculum` part. `task_by='difficulty'` ranks the examples of each
            class by their margins and cuts them into `num_tasks` tiers of equal size, so that no
            tier favours a class; `task_by='class'` makes every class a task, ranked by its mean
            margin.

    Returns:
        (n,) int32, the number of each example's task.
    """
    if config.task_by == "difficulty":
        task = np.empty(len(labels), np.int32)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            easiest_first = rows[np.argsort(-margins[rows], kind="stable")]
            task[easiest_first] = np.arange(len(rows)) * config.num_tasks // len(rows)
        return task
    if config.task_by == "class":
        classes = np.unique(labels)
        means = np.array([margins[labels == c].mean() for c in classes])
        easiest_first = classes[np.argsort(-means, kind="stable")]
        return np.argmax(labels[:, None] == easiest_first, axis=1).astype(np.int32)
    raise UserError(f"curriculum.task_by must be difficulty or class: {config.task_by!r}")


@dataclass(frozen=True)
class CurriculumStage(Stage):
    """Trains S' on Eq. 10 with tasks chosen by a policy, which learns from the reward of Eq. 13.

    Attributes:
        student: S'.
        adapter: maps F(., S') to the teacher's width; None where F(., S') already has it.
        hidden_width: the width of F(., S').
        classifier: T'.
        policy: picks the tasks.
        optimizer: the optimiser of S'.
        policy_optimizer: the policy's optimiser.
        config: the whole config, of which `student`, `contrastive` and `curriculum` are read.
        total_steps: number of steps of the stage, for the progress that the policy observes.
    """

    name = "curriculum"
    starts_from = ("teacher", "distill")
    reads = ("student", "contrastive", "curriculum")
    rows = ("updated_student",)
    student_row = "updated_student"

    student: Student
    adapter: Adapter | None
    hidden_width: int
    classifier: Classifier
    policy: Policy
    optimizer: optax.GradientTransformation
    policy_optimizer: optax.GradientTransformation
    config: ConfigDict
    total_steps: int

    @classmethod
    def make(cls, programs: Programs) -> CurriculumStage:
        """Makes the stage with the models of a config.

        The policy's learning rate is constant, since it takes only one step per episode.
        """
        config = programs.config
        return cls(
            programs.student,
            programs.adapter,
            programs.student_hidden,
            programs.classifier,
            programs.policy,
            programs.make_optimizer("curriculum"),
            make_adamw(config.optimizer, config.curriculum.policy_learning_rate),
            config,
            programs.total_steps("curriculum"),
        )

    @staticmethod
    def pick(state: CurriculumState, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Selects the state's task from a step's rows, `train` (K, B) and `quiz` (B,)."""
        return {**rows, "train": rows["train"][state.task]}

    @staticmethod
    def frozen(distilled: DistillState) -> Frozen:
        """Returns what the curriculum takes from distillation and does not change."""
        return Frozen(distilled.frozen, distilled.params["adapter"], distilled.meta_params)

    def init(self, rng: jax.Array, distilled: DistillState) -> CurriculumState:
        """Makes the state before the first step: S' is a clone of the distilled student.

        Args:
            rng: the key of the policy's initial parameters and of the first task.
            distilled: the state at the end of distillation.
        """
        params, config = distilled.params["student"], self.config.curriculum
        num_tasks = self.policy.num_tasks
        observation = jnp.zeros(self.hidden_width + 2 * num_tasks + 1)
        init_rng, task_rng = jax.random.split(rng)
        policy_params = self.policy.init(init_rng, observation)["params"]
        return CurriculumState(
            step=jnp.int32(0),
            params=params,
            batch_stats=distilled.batch_stats,
            opt_state=self.optimizer.init(params),
            momentum_params=distilled.momentum_params,
            momentum_stats=distilled.momentum_stats,
            queue=distilled.queue,
            policy_params=policy_params,
            policy_opt_state=self.policy_optimizer.init(policy_params),
            episode=Episode(
                jnp.zeros((config.episode_steps, observation.size)),
                jnp.zeros(config.episode_steps, jnp.int32),
                jnp.zeros(config.episode_steps),
            ),
            baseline=jnp.zeros(config.episode_steps),
            observation=observation,
            task=self._sample_task(policy_params, observation, task_rng),
            task_accuracy=jnp.zeros(num_tasks),
            task_reward=jnp.zeros(num_tasks),
            frozen=self.frozen(distilled),
        )

    def step(
        self, state: CurriculumState, batch: QuizBatch, rng: jax.Array, axis: str | None = None
    ) -> tuple[CurriculumState, dict[str, jax.Array]]:
        """Trains S' on the current task, rewards the policy for it, and lets it choose the next."""
        config = self.config.curriculum
        train_rng, task_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        task, slot = state.task, state.step % config.episode_steps
        state, embedding, metrics = self._train_student(state, batch["train"], train_rng, axis)
        reward = self._reward(state, batch["quiz"], axis)
        rate, accuracy = config.running_rate, metrics["accuracy"]
        state = state.replace(
            task_accuracy=_follow(state.task_accuracy, task, accuracy, rate),
            task_reward=_follow(state.task_reward, task, reward, rate),
            episode=Episode(
                state.episode.observations.at[slot].set(state.observation),
                state.episode.actions.at[slot].set(task),
                state.episode.rewards.at[slot].set(reward),
            ),
        )
        if config.sampling == "policy":
            episode_ended = slot == config.episode_steps - 1
            state = jax.lax.cond(episode_ended, self._update_policy, lambda s: s, state)
        progress = state.step / self.total_steps
        observation = jnp.concatenate(
            [embedding, state.task_accuracy, state.task_reward, progress[None]]
        )
        next_task = self._sample_task(state.policy_params, observation, task_rng)
        state = state.replace(observation=observation, task=next_task)
        return state, {**metrics, "reward": reward, "task": task.astype(jnp.float32)}

    def _train_student(
        self, state: CurriculumState, batch: Batch, rng: jax.Array, axis: str | None
    ) -> tuple[CurriculumState, jax.Array, dict[str, jax.Array]]:
        """Takes a step of S' on Eq. 10; also returns the mean of F(., S') over the batch."""
        frozen, contrastive = state.frozen, self.config.contrastive
        dropout_rng, mask_rng = jax.random.split(rng)
        features = standardize(batch["inputs"], batch["length"], frozen.statistics)
        keys, key_labels = encode_keys(
            self.student, state, features, batch, mask_rng, contrastive, axis
        )
        dropout_keys = example_keys(dropout_rng, batch["index"])

        def objective(params: Any) -> tuple[jax.Array, tuple]:
            out, batch_stats = run_student(
                self.student, params, state.batch_stats, batch, features, dropout_keys, axis
            )
            loss, metrics = student_objective(
                out, batch["label"], keys, key_labels, state.queue, self.config
            )
            adapted = adapt(self.adapter, frozen.adapter_params, out.hidden)
            teacher_logits = self.classifier.apply({"params": frozen.meta_params}, adapted)
            if self.config.curriculum.hold_teacher:
                teacher_logits = jax.lax.stop_gradient(teacher_logits)
            consistency = losses.mean_consistency(teacher_logits, out.logits, batch["label"])
            loss = losses.updated_student_loss(loss, consistency)
            metrics = {"loss": loss, "consistency": consistency, **metrics}
            return loss, ((out.hidden.mean(0), metrics), batch_stats)

        grads, (aux, batch_stats) = jax.grad(objective, has_aux=True)(state.params)
        grads, (embedding, metrics) = parallel.device_mean((grads, aux), axis)
        metrics["gradient_norm"] = optax.global_norm(grads)
        state = descend(self, state, grads, batch_stats, keys, key_labels, contrastive.momentum)
        return state, embedding, metrics

    def _reward(self, state: CurriculumState, quiz: Batch, axis: str | None) -> jax.Array:
        """Returns Eq. 13 on the quiz batch, with both models frozen."""
        features = standardize(quiz["inputs"], quiz["length"], state.frozen.statistics)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = self.student.apply(variables, features, quiz["length"]).logits
        teacher_logits = self.classifier.apply(
            {"params": state.frozen.meta_params}, quiz["teacher_hidden"]
        )
        return parallel.device_mean(losses.reward(logits, teacher_logits, quiz["label"]), axis)

    def _update_policy(self, state: CurriculumState) -> CurriculumState:
        """Takes a step of the policy by REINFORCE on the finished episode."""
        config = self.config.curriculum
        returns = losses.discounted_returns(state.episode.rewards, config.discount)
        # There is nothing to compare the first episode with: it only sets the baseline.
        first = state.step <= config.episode_steps
        baseline = jnp.where(first, returns, state.baseline)
        advantages = returns - baseline

        def objective(policy_params: Any) -> jax.Array:
            logits = self.policy.apply({"params": policy_params}, state.episode.observations)
            return losses.reinforce(logits, state.episode.actions, advantages)

        grads = jax.grad(objective)(state.policy_params)
        updates, opt_state = self.policy_optimizer.update(
            grads, state.policy_opt_state, state.policy_params
        )
        return state.replace(
            policy_params=optax.apply_updates(state.policy_params, updates),
            policy_opt_state=opt_state,
            baseline=baseline + config.running_rate * advantages,
        )

    def _sample_task(self, policy_params: Any, observation: jax.Array, rng: jax.Array) -> jax.Array:
        """Draws the next task, () int32, from the policy, or uniformly for the ablation."""
        logits = self.policy.apply({"params": policy_params}, observation)
        if self.config.curriculum.sampling == "uniform":
            logits = jnp.zeros_like(logits)
        return jax.random.categorical(rng, logits).astype(jnp.int32)


def _follow(running: jax.Array, task: jax.Array, value: jax.Array, rate: float) -> jax.Array:
    """Moves `running[task]` towards `value` by the share `rate` of the difference."""
    return running.at[task].add(rate * (value - running[task]))
