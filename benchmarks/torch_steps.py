"""The training steps in torch, written for speed, as the counterpart in a benchmark.

Models, shapes, losses and updates are those of `serkd_jax`, with the fastest that torch offers: one
projection to queries, keys and values, fused attention, fused AdamW, updates of all parameters in
one call, and `torch.compile`. Random numbers come from torch's generator instead of a key for each
example. No operation waits for the device.

Each step keeps its own state, which starts as at the first step of its stage, and takes a batch of
tensors on the device: ``inputs`` (B, T, N) float16, ``length``, ``label`` and ``index`` (B,) and
``teacher_hidden`` (B, H) float32, or ``{"train": ..., "quiz": ...}`` of such batches. Only the
paper's options are here, not those of `configs` that depart from them.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Output(NamedTuple):
    """The student's outputs for a batch."""

    hidden: Tensor  # (B, N)
    logits: Tensor  # (B, C)
    projection: Tensor  # (B, P), L2-normalised


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with a layer norm before it."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.intermediate_dense = nn.Linear(width, mlp_dim)
        self.output_dense = nn.Linear(mlp_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, training: bool, twice: bool) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        qkv = self.qkv(self.layer_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = attention(q, k, v) if twice else F.scaled_dot_product_attention(q, k, v)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + F.dropout(attended, self.dropout, training)
        fed = self.output_dense(F.gelu(self.intermediate_dense(self.final_layer_norm(x))))
        return x + F.dropout(fed, self.dropout, training)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that torch can differentiate twice, unlike the fused kernels.

    For 16-bit inputs only the softmax is in float32; torch's own `SDPBackend.MATH` would compute
    the products in float32 too.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype) @ v


class Student(nn.Module):
    """The inverted transformer, its classifier and its contrastive projection.

    h(., S) is the mean over D of each of the N variates.
    """

    def __init__(
        self, config: ConfigDict, shape: tuple[int, int], classes: int, dtype: torch.dtype | None
    ):
        super().__init__()
        num_frames, variates = shape
        width, self.dropout, self.dtype = config.width, config.dropout, dtype
        self.embed = nn.Linear(num_frames, width)
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.num_heads, config.mlp_dim, config.dropout)
            for _ in range(config.num_layers)
        )
        self.classifier = mlp(variates, *config.classifier_dims, classes)
        self.projection = mlp(variates, *config.projection_dims)

    def forward(self, features: Tensor, training: bool = False, twice: bool = False) -> Output:
        """Encodes and classifies (B, T, N) features.

        Args:
            features: standardised, of any float type.
            training: whether dropout is on.
            twice: whether the result will be differentiated twice.
        """
        with torch.autocast(features.device.type, self.dtype, self.dtype is not None):
            tokens = self.embed(features.float().mT)
            tokens = F.dropout(tokens, self.dropout, training)
            for layer in self.layers:
                tokens = layer(tokens, training, twice)
            hidden = tokens.mean(2)
            logits, projection = self.classifier(hidden), self.projection(hidden)
        return Output(hidden.float(), logits.float(), F.normalize(projection.float(), dim=-1))


def standardize(batch: Batch, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """The batch's inputs minus the mean, divided by the spread, in float32; padding stays 0."""
    mean, spread = statistics
    frames = torch.arange(batch["inputs"].shape[1], device=mean.device)
    valid = frames < batch["length"][:, None]
    return torch.where(valid[..., None], (batch["inputs"].float() - mean) / spread, 0.0)


def spec_augment(features: Tensor, length: Tensor, max_frequency: int, max_time: int) -> Tensor:
    """Zeroes a block of features and a block of valid frames in every example of (B, T, N)."""

    def outside_block(size: int, limit: Tensor, max_width: int) -> Tensor:
        width = torch.randint(max_width + 1, limit.shape, device=limit.device)
        width = torch.minimum(width, limit // 2)
        start = (torch.rand(limit.shape, device=limit.device) * (limit - width + 1)).long()
        position = torch.arange(size, device=limit.device)
        return (position < start[:, None]) | (position >= (start + width)[:, None])

    frames, variates = features.shape[1:]
    keep_time = outside_block(frames, length, max_time)
    keep_frequency = outside_block(variates, torch.full_like(length, variates), max_frequency)
    return features * (keep_time[:, :, None] & keep_frequency[:, None, :])


def supervised_contrastive(
    anchors: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, temperature: float
) -> Tensor:
    """Eq. 3 for (B, P) anchors and (M, P) keys; a negative label marks an empty slot."""
    similarity = anchors @ keys.T / temperature
    log_probability = similarity.masked_fill(key_labels < 0, -torch.inf).log_softmax(-1)
    positive = labels[:, None] == key_labels
    total = torch.where(positive, log_probability, 0.0).sum(-1)
    return -(total / positive.sum(-1).clamp(min=1)).mean()


def soft_label_divergence(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """τ2² KL(p_t || p_s), Eqs. 5-7."""
    log_s, log_t = ((logits / tau).log_softmax(-1) for logits in (student_logits, teacher_logits))
    return tau**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def true_class_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) -> (B,)."""
    return logits.softmax(-1).gather(1, labels[:, None])[:, 0]


class Parts(NamedTuple):
    """What the steps are made of."""

    config: ConfigDict
    student: Student
    adapter: nn.Module  # maps h(., S) to the teacher's width; nn.Identity if they agree
    classifier: nn.Sequential  # T'
    statistics: tuple[Tensor, Tensor]  # (N,) mean and spread of the features
    device: torch.device
    compile: Callable[[Callable], Callable]  # torch.compile, or nothing

    def optimizer(self, params: Iterable[nn.Parameter], rate: float) -> torch.optim.AdamW:
        """AdamW at a constant rate; only matrices decay."""
        params = list(params)
        decay = self.config.optimizer.weight_decay
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, rate, fused=True)


class StudentStep:
    """The undistilled student's step, Eqs. 2-3."""

    def __init__(self, parts: Parts):
        self.config, self.student = parts.config, copy.deepcopy(parts.student)
        self.momentum_student = copy.deepcopy(parts.student).requires_grad_(False)
        self.statistics = parts.statistics
        size, width = self.config.contrastive.queue_size, self.config.student.projection_dims[-1]
        self.queue_keys = torch.zeros(size, width, device=parts.device)
        self.queue_labels = torch.full((size,), -1, device=parts.device)
        self.slots = torch.arange(size, device=parts.device)  # the oldest first
        self.trained = list(self.student.parameters())
        self.optimizer = parts.optimizer(self.trained, self.config.student.learning_rate)
        self.standardize = parts.compile(standardize)
        self.encode_keys = parts.compile(self._encode_keys)
        self.objective = parts.compile(self._objective)

    def __call__(self, batch: Batch) -> None:
        """Takes a step."""
        batch = self._standard(batch)
        keys = self.encode_keys(batch)
        self.objective(batch, keys).backward()
        self._update(batch, keys)

    def _standard(self, batch: Batch) -> Batch:
        """The batch with standardised features added."""
        return batch | {"features": self.standardize(batch, self.statistics)}

    def _encode_keys(self, batch: Batch) -> Tensor:
        config = self.config.contrastive
        masks = config.max_frequency_mask, config.max_time_mask
        with torch.no_grad():
            masked = spec_augment(batch["features"], batch["length"], *masks)
            return self.momentum_student(masked).projection

    def _student_loss(self, out: Output, labels: Tensor, keys: Tensor) -> Tensor:
        """Eq. 2."""
        config, labels = self.config.contrastive, labels.long()
        keys = torch.cat([keys, self.queue_keys])
        key_labels = torch.cat([labels, self.queue_labels])
        contrastive = supervised_contrastive(
            out.projection, labels, keys, key_labels, config.temperature
        )
        cross_entropy = F.cross_entropy(out.logits, labels)
        return config.weight * contrastive + (1 - config.weight) * cross_entropy

    def _objective(self, batch: Batch, keys: Tensor) -> Tensor:
        out = self.student(batch["features"], training=True)
        return self._student_loss(out, batch["label"], keys)

    @torch.no_grad()
    def _update(self, batch: Batch, keys: Tensor) -> None:
        """Updates the parameters by their gradients, the momentum encoder and the queue."""
        descend(self.optimizer, self.trained, self.config.optimizer.clip_norm)
        ours, theirs = (list(m.parameters()) for m in (self.momentum_student, self.student))
        torch._foreach_lerp_(ours, theirs, 1 - self.config.contrastive.momentum)
        oldest = self.slots[: len(keys)]
        self.queue_keys[oldest], self.queue_labels[oldest] = keys, batch["label"].long()
        self.slots = self.slots.roll(-len(keys))


def descend(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], clip_norm: float) -> None:
    """Takes a step of the optimiser by the clipped gradients, and then releases them."""
    if clip_norm:
        nn.utils.clip_grad_norm_(params, clip_norm)
    optimizer.step()
    optimizer.zero_grad()


class KDStep(StudentStep):
    """Distillation with a fixed teacher (``meta.order='none'``), Eqs. 4-8."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.adapter = copy.deepcopy(parts.adapter)
        self.classifier = copy.deepcopy(parts.classifier)
        self.trained += self.adapter.parameters()
        self.optimizer = parts.optimizer(self.trained, self.config.distill.learning_rate)

    def __call__(self, batch: dict[str, Batch]) -> None:
        """Takes a step; the quiz batch is not used."""
        super().__call__(batch["train"])

    def _objective(self, batch: Batch, keys: Tensor) -> Tensor:
        out = self.student(batch["features"], training=True)
        with torch.no_grad():
            teacher_logits = self.classifier(batch["teacher_hidden"])
        return self._hard_part(out, batch, keys) + self._soft_part(out, teacher_logits)

    def _hard_part(self, out: Output, batch: Batch, keys: Tensor) -> Tensor:
        """The terms of Eq. 4 that do not depend on T'."""
        hidden = batch["teacher_hidden"], self.adapter(out.hidden)
        patient = F.mse_loss(*(F.normalize(h, dim=-1) for h in hidden))
        student = self._student_loss(out, batch["label"], keys)
        return self.config.distill.alpha * student + self.config.distill.beta * patient

    def _soft_part(self, out: Output, teacher_logits: Tensor) -> Tensor:
        config = self.config.distill
        soft = soft_label_divergence(out.logits, teacher_logits, config.temperature)
        return (1 - config.alpha) * soft


class MetaStep(KDStep):
    """Distillation with the meta-teacher, Eqs. 4-9 (``meta.order='second_order'``).

    The pilot step and the student's real step differ only in T', so both go back through one
    forward pass. AOTAutograd, and therefore `torch.compile`, cannot differentiate twice, so that
    pass is never compiled.
    """

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.pilot_student, self.pilot_adapter = map(copy.deepcopy, (self.student, self.adapter))
        self.pilot = [*self.pilot_student.parameters(), *self.pilot_adapter.parameters()]
        self.meta = list(self.classifier.parameters())
        self.meta_optimizer = parts.optimizer(self.meta, self.config.meta.learning_rate)
        self.quiz_loss = parts.compile(self._quiz_loss)

    def __call__(self, batch: dict[str, Batch]) -> None:
        """Takes a step of T' and then one of the student."""
        train, quiz = (self._standard(batch[part]) for part in ("train", "quiz"))
        rate = self.config.meta.pilot_learning_rate
        keys = self.encode_keys(train)
        out = self.student(train["features"], training=True, twice=True)
        hard = self._hard_part(out, train, keys)

        loss = hard + self._soft_part(out, self.classifier(train["teacher_hidden"]))
        slopes = torch.autograd.grad(loss, self.trained, create_graph=True)
        with torch.no_grad():
            torch._foreach_copy_(self.pilot, self.trained)
            torch._foreach_add_(self.pilot, slopes, alpha=-rate)
        # Back through the pilot step by hand, so that the quiz batch's pass can be compiled.
        gradients = torch.autograd.grad(
            self.quiz_loss(quiz), self.meta + self.pilot, allow_unused=True
        )
        direct, along = gradients[: len(self.meta)], gradients[len(self.meta) :]
        reached = [pair for pair in zip(slopes, along, strict=True) if pair[1] is not None]
        slopes, along = zip(*reached, strict=True)
        through = torch.autograd.grad(slopes, self.meta, along, retain_graph=True)
        for parameter, d, t in zip(self.meta, direct, through, strict=True):
            parameter.grad = d - rate * t
        descend(self.meta_optimizer, self.meta, self.config.optimizer.clip_norm)

        with torch.no_grad():
            teacher_logits = self.classifier(train["teacher_hidden"])
        (hard + self._soft_part(out, teacher_logits)).backward(inputs=self.trained)
        self._update(train, keys)

    def _quiz_loss(self, quiz: Batch) -> Tensor:
        """Eq. 9 for the pilot student."""
        hidden = self.pilot_adapter(self.pilot_student(quiz["features"]).hidden)
        logits = (self.classifier(h) for h in (quiz["teacher_hidden"], hidden))
        return 0.5 * sum(F.cross_entropy(scores, quiz["label"].long()) for scores in logits)


class CurriculumStep(StudentStep):
    """The steps of the updated student and of the policy that picks its tasks, Eqs. 10-13."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        config, device = self.config.curriculum, parts.device
        self.optimizer = parts.optimizer(self.trained, config.learning_rate)
        self.adapter = copy.deepcopy(parts.adapter).requires_grad_(False)
        self.classifier = copy.deepcopy(parts.classifier).requires_grad_(False)
        tasks, steps = config.num_tasks, config.episode_steps
        seen = len(parts.statistics[0]) + 2 * tasks + 1
        self.policy = mlp(seen, config.policy_width, tasks).to(device)
        nn.init.zeros_(self.policy[-1].weight)
        bias = config.easy_bias / 2
        self.policy[-1].bias.data = torch.linspace(bias, -bias, tasks, device=device)
        self.policy_optimizer = parts.optimizer(
            self.policy.parameters(), config.policy_learning_rate
        )
        self.observations = torch.zeros(steps, seen, device=device)
        self.actions = torch.zeros(steps, dtype=torch.long, device=device)
        self.rewards = torch.zeros(steps, device=device)
        self.baseline = torch.zeros(steps, device=device)
        self.task_accuracy, self.task_reward = torch.zeros(2, tasks, device=device)
        self.observation = torch.zeros(seen, device=device)
        self.tasks = torch.arange(tasks, device=device)
        self.task = self._sample_task()
        later = torch.arange(steps) - torch.arange(steps)[:, None]
        # (E, E) matrix that turns an episode's rewards into its discounted returns.
        self.discounts = (config.discount ** later.clamp(min=0) * (later >= 0)).to(device)
        self.steps_taken = 0
        self.reward = parts.compile(self._reward)

    def __call__(self, batch: dict[str, Batch]) -> None:
        """Takes a step, and at the end of an episode also a step of the policy."""
        train, config = self._standard(batch["train"]), self.config.curriculum
        keys = self.encode_keys(train)
        loss, embedding, accuracy = self.objective(train, keys)
        loss.backward()
        self._update(train, keys)
        reward = self.reward(self._standard(batch["quiz"]))

        slot = self.steps_taken % config.episode_steps
        self.steps_taken += 1
        for running, value in ((self.task_accuracy, accuracy), (self.task_reward, reward)):
            # Indexing with `running[self.task]` would wait for the device.
            running.lerp_(value, config.running_rate * (self.tasks == self.task))
        self.observations[slot], self.actions[slot] = self.observation, self.task
        self.rewards[slot] = reward
        if slot == config.episode_steps - 1:
            self._update_policy()
        progress = embedding.new_full((1,), self.steps_taken / config.epochs)
        self.observation = torch.cat([embedding, self.task_accuracy, self.task_reward, progress])
        self.task = self._sample_task()

    def _objective(self, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 10, the mean hidden vector and the accuracy."""
        out, labels = self.student(batch["features"], training=True), batch["label"].long()
        with torch.no_grad():  # Eq. 12 moves the student through its own term only
            teacher_logits = self.classifier(self.adapter(out.hidden))
        teacher, student = (true_class_probability(x, labels) for x in (teacher_logits, out.logits))
        loss = self._student_loss(out, labels, keys) + (teacher - student).mean()
        accuracy = (out.logits.argmax(-1) == labels).float().mean()
        return loss, out.hidden.detach().mean(0), accuracy

    def _reward(self, quiz: Batch) -> Tensor:
        """Eq. 13 as a share of the examples."""
        with torch.no_grad():
            logits = self.student(quiz["features"]).logits, self.classifier(quiz["teacher_hidden"])
        student, teacher = (true_class_probability(x, quiz["label"].long()) for x in logits)
        return (student > teacher).float().mean()

    @torch.no_grad()
    def _sample_task(self) -> Tensor:
        """Samples by Gumbel's trick, as `torch.multinomial` waits for the device."""
        logits = self.policy(self.observation)
        return (logits - torch.empty_like(logits).exponential_().log()).argmax()

    def _update_policy(self) -> None:
        """REINFORCE on the finished episode; the first episode only sets the baseline."""
        returns = self.discounts @ self.rewards
        if self.steps_taken <= self.config.curriculum.episode_steps:
            self.baseline = returns
        advantages = returns - self.baseline
        log_probability = self.policy(self.observations).log_softmax(-1)
        chosen = log_probability.gather(1, self.actions[:, None])[:, 0]
        (-(chosen * advantages).mean()).backward()
        descend(self.policy_optimizer, [], 0.0)
        self.baseline = self.baseline + self.config.curriculum.running_rate * advantages


class Evaluation:
    """The forward pass of a batch."""

    def __init__(self, parts: Parts):
        self.student, self.statistics = copy.deepcopy(parts.student), parts.statistics
        self.predict = parts.compile(self._predict)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """(B, C) logits."""
        return self.predict(batch)

    def _predict(self, batch: Batch) -> Tensor:
        return self.student(standardize(batch, self.statistics)).logits


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


def make_steps(
    config: ConfigDict,
    classes: int,
    variates: int,
    hidden: int,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> dict[str, Callable[[Any], Any]]:
    """Makes the steps ``student``, ``kd``, ``meta``, ``curriculum`` and ``evaluation``.

    Args:
        config: the whole config, of the paper's kind.
        classes: C.
        variates: N.
        hidden: H, the teacher's width.
        device: where the steps run.
        dtype: the type for autocast, such as `torch.bfloat16`; None computes in float32, on CUDA
            with the caller's `torch.set_float32_matmul_precision` ("high" is TF32, like XLA's
            default).
        compile: whether to compile losses, gradients and forward passes. A process that makes
            steps again must first call `torch.compiler.reset()`: dynamo compiles a function for
            only a limited number of objects.
    """
    device = torch.device(device)
    adapter = nn.Identity() if variates == hidden else nn.Linear(variates, hidden)
    parts = Parts(
        config,
        Student(config.student, (config.max_frames, variates), classes, dtype).to(device),
        adapter.to(device),
        mlp(hidden, *config.teacher.classifier_dims, classes).to(device),
        (torch.zeros(variates, device=device), torch.ones(variates, device=device)),
        device,
        partial(torch.compile, fullgraph=True) if compile else lambda function: function,
    )
    steps = {
        "student": StudentStep,
        "kd": KDStep,
        "meta": MetaStep,
        "curriculum": CurriculumStep,
        "evaluation": Evaluation,
    }
    return {name: make(parts) for name, make in steps.items()}
