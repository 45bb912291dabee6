"""One fold of a run in torch, written from docs/training.md and docs/paper.md: an oracle of wiring.

It has the models and equations of `torch_oracle`, the recordings and their labels. Of the run that
it is compared with it is told only what that run drew: the initial weights of what is new, the rows
of each batch, and the tasks.
"""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import HubertModel

import torch_oracle as oracle


class Drawn(NamedTuple):
    """What a stage of the run drew."""

    start: dict  # its initial parameters, in Flax's names
    train: np.ndarray  # rows (steps, B); of the curriculum (steps, tasks, B)
    quiz: np.ndarray  # rows (steps, B) of the quiz or of the reward part, where there is one
    tasks: np.ndarray  # (steps,) the curriculum's


class Corpus(NamedTuple):
    """Everything about the recordings, row by row."""

    waveforms: list[np.ndarray]
    features: list[np.ndarray]
    labels: np.ndarray
    parts: dict[str, np.ndarray]  # rows by part


class Epoch(NamedTuple):
    """A stage after an epoch."""

    logits: np.ndarray  # (n, C) of every recording
    scores: dict[str, float]  # `loss`, `ua` of validation; of the steps `reward` and Eq. 12
    state: dict  # what a later stage may start from


class AdamW:
    """Torch's, with the recipe's decay of matrices alone, clipping, warm-up and cosine."""

    def __init__(self, config, peak, total, params):
        self.config, self.peak, self.total, self.taken = config, peak, total, 0
        self.params = [*params]
        groups = [
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]])

    def step(self, grads):
        warm = round(self.config.warmup * self.total)
        rate = self.peak * self.taken / max(warm, 1)
        if self.taken >= warm:
            done = (self.taken - warm) / (self.total - warm)
            rate = self.peak * (1 + math.cos(math.pi * done)) / 2
        for group in self.adamw.param_groups:
            group["lr"] = rate
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.detach()
        torch.nn.utils.clip_grad_norm_(self.params, self.config.clip_norm)
        self.adamw.step()
        self.taken += 1


def scores(corpus, logits):
    """The validation part's cross-entropy and mean recall."""
    rows = corpus.parts["validation"]
    logits, labels = logits[rows], corpus.labels[rows]
    loss = F.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    return {"loss": loss, "ua": recall_score(labels, logits.argmax(1), average="macro")}


def copied(params):
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


# Teacher ---------------------------------------------------------------------------------------


def fine_tune(config, corpus, folder, drawn):
    """The epochs of stage 1: HuBERT's layers move, what is before them does not."""
    encoder = HubertModel.from_pretrained(folder).double().eval()  # without dropout
    names = ("encoder.layers.", "encoder.layer_norm.")
    layers = [p for name, p in encoder.named_parameters() if name.startswith(names)]
    encoder.requires_grad_(False)
    for p in layers:
        p.requires_grad_()
    head = {name: oracle.tensors(drawn.start[name]) for name in ("projector", "classifier")}
    trained = [*layers, *head["projector"].values(), *head["classifier"].values()]
    projector = torch.nn.Linear(encoder.config.hidden_size, config.teacher.projector)
    classifier = classifier_of(config, corpus)
    total, epochs = len(drawn.train), []
    optimizer = AdamW(config.optimizer, config.teacher.learning_rate, total, trained)

    def forward(rows):
        clips = [corpus.waveforms[row] for row in rows]
        inputs = torch.zeros(len(rows), max(map(len, clips)), dtype=torch.float64)
        heard = torch.zeros(inputs.shape, dtype=torch.long)
        for place, mask, clip in zip(inputs, heard, clips, strict=True):
            normal = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
            place[: len(clip)], mask[: len(clip)] = torch.tensor(normal), 1
        frames = encoder(inputs, attention_mask=heard).last_hidden_state
        lengths = encoder._get_feat_extract_output_lengths(heard.sum(1))
        means = [clip[:n].mean(0) for clip, n in zip(frames, lengths, strict=True)]
        hidden = functional_call(projector, head["projector"], torch.stack(means))
        return hidden, functional_call(classifier, head["classifier"], hidden)

    for step, rows in enumerate(drawn.train, 1):
        loss = F.cross_entropy(forward(rows)[1], torch.tensor(corpus.labels[rows]))
        optimizer.step(torch.autograd.grad(loss, trained))
        if step % (total // config.teacher.epochs) == 0:
            with torch.no_grad():
                hidden, logits = (x.numpy() for x in forward(np.arange(len(corpus.labels))))
            state = {"hidden": hidden, "classifier": copied(head["classifier"])}
            epochs.append(Epoch(logits, scores(corpus, logits), state))
    return epochs


def classifier_of(config, corpus):
    """T', the teacher's classifier."""
    classes = len(np.unique(corpus.labels))
    return oracle.MetaTeacher(config.teacher.projector, config.teacher.classifier_dims, classes)


# Students --------------------------------------------------------------------------------------


class Students:
    """What stages 2 to 4 do alike."""

    def __init__(self, config, corpus, hidden=None):
        self.config, self.corpus, size = config, corpus, config.student.width
        self.features, self.length = standardized(config, corpus)
        self.label = torch.tensor(corpus.labels)
        self.hidden = torch.tensor(hidden) if hidden is not None else None
        net = oracle.InvertedTransformer(
            config.student, *self.features.shape[1:], len(np.unique(corpus.labels))
        )
        adapter = oracle.Adapter(size, config.teacher.projector)  # S is averaged over its tokens
        self.nets = oracle.Nets(net, adapter, classifier_of(config, corpus))

    def batch(self, rows):
        of_rows = {"features": self.features, "length": self.length, "label": self.label}
        of_rows |= {} if self.hidden is None else {"teacher_hidden": self.hidden}
        return {name: column[torch.tensor(rows)] for name, column in of_rows.items()}

    def student(self, params, batch):
        return functional_call(self.nets.student, params, (batch["features"], batch["length"]))

    def train(self, name, drawn, state, take_step):
        """The epochs of a stage; ``take_step(state, step, rows, dictionary)`` says its rows too."""
        settings, momentum = self.config[name], self.config.contrastive.momentum
        total, epochs, rewards = len(drawn.train), [], []
        for step in range(total):
            rows = drawn.train[step]
            rows = rows[drawn.tasks[step]] if name == "curriculum" else rows
            batch = self.batch(rows)
            keys = self.student(state["momentum"], batch)[2].detach()
            dictionary = [*state["queue"], *zip(keys, batch["label"], strict=True)]
            keys_and_labels = tuple(map(torch.stack, zip(*dictionary, strict=True)))
            rewards.append(take_step(state, step, batch, keys_and_labels))
            state["queue"].extend(zip(keys, batch["label"], strict=True))
            for key, value in state["momentum"].items():
                value.data = momentum * value.data + (1 - momentum) * state["student"][key].data
            if (step + 1) % (total // settings.epochs) == 0:
                everyone = self.batch(np.arange(len(self.label)))
                logits = self.student(state["student"], everyone)[1].detach().numpy()
                found = scores(self.corpus, logits)
                if name == "curriculum":
                    found["reward"], found["consistency"] = np.mean(rewards, 0)
                epochs.append(Epoch(logits, found, self.copied(state)))
                rewards = []
        return epochs

    @staticmethod
    def copied(state):
        kept = {k: copied(v) for k, v in state.items() if k != "queue"}
        return kept | {"queue": deque(state["queue"], state["queue"].maxlen)}

    def new(self, params):
        """A student before its first step."""
        queue = deque(maxlen=self.config.contrastive.queue_size)
        return {"student": oracle.tensors(params), "momentum": oracle.tensors(params)} | {
            "queue": queue
        }

    def train_student(self, drawn):
        """Stage 2, Eq. 2."""
        state, config = self.new(drawn.start), self.config
        params = state["student"]
        rate, total = config.student.learning_rate, len(drawn.train)
        optimizer = AdamW(config.optimizer, rate, total, params.values())

        def take_step(state, step, batch, dictionary):
            loss = oracle.student_objective(self.nets.student, params, batch, dictionary, config)[1]
            optimizer.step(oracle.gradient(loss, params).values())

        return self.train("student", drawn, state, take_step)

    @sdpa_kernel(SDPBackend.MATH)  # torch's fused attention has no second derivative
    def distill(self, drawn, classifier):
        """Stage 3: T' by Eq. 9 through the pilot step, then S by Eq. 4 against the new T'."""
        config, total = self.config, len(drawn.train)
        state = self.new(drawn.start["student"])
        state |= {"adapter": oracle.tensors(drawn.start["adapter"]), "meta": copied(classifier)}
        params = {part: state[part] for part in ("student", "adapter")}
        both, meta = [*params["student"].values(), *params["adapter"].values()], state["meta"]
        optimizer = AdamW(config.optimizer, config.distill.learning_rate, total, both)
        teaching = AdamW(config.optimizer, config.meta.learning_rate, total, meta.values())

        def slope(batch, dictionary, create_graph):
            loss = oracle.distillation_objective(self.nets, params, meta, batch, dictionary, config)
            return torch.autograd.grad(loss, both, create_graph=create_graph)

        def take_step(state, step, batch, dictionary):
            moved = iter(slope(batch, dictionary, True))
            pilot = {
                part: {k: p - config.meta.pilot_learning_rate * next(moved) for k, p in of.items()}
                for part, of in params.items()
            }
            quiz = self.batch(drawn.quiz[step])
            loss = oracle.collaborative_objective(self.nets, pilot, meta, quiz)
            teaching.step(oracle.gradient(loss, meta).values())
            optimizer.step(slope(batch, dictionary, False))

        return self.train("distill", drawn, state, take_step)

    def follow_curriculum(self, drawn, distilled):
        """Stage 4: the distilled student goes on by Eq. 10, on the tasks that were drawn."""
        config, total = self.config, len(drawn.train)
        state = self.copied(distilled)
        params, meta = state["student"], state["meta"]
        rate = config.curriculum.learning_rate
        optimizer = AdamW(config.optimizer, rate, total, params.values())

        def take_step(state, step, batch, dictionary):
            output, loss = oracle.student_objective(
                self.nets.student, params, batch, dictionary, config
            )
            adapted = functional_call(self.nets.adapter, state["adapter"], output[0])
            teacher = functional_call(self.nets.meta, meta, adapted).detach()
            consistency = oracle.equation_12(teacher, output[1], batch["label"])
            loss = loss + consistency
            optimizer.step(oracle.gradient(loss, params).values())
            quiz = self.batch(drawn.quiz[step])
            rows, label = torch.arange(len(quiz["label"])), quiz["label"]
            ours = self.student(params, quiz)[1].softmax(1)[rows, label]
            theirs = functional_call(self.nets.meta, meta, quiz["teacher_hidden"])
            reward = (ours > theirs.softmax(1)[rows, label]).double().mean()
            return reward.item(), consistency.item()

        return self.train("curriculum", drawn, state, take_step)

    def judge(self, meta):
        """(n, C): the meta-teacher's row, T'(h(., T))."""
        return functional_call(self.nets.meta, meta, self.hidden).detach().numpy()

    def tiers(self, meta):
        """The rows of each task: each class's training rows, those that T' is surest of first."""
        count, train = self.config.curriculum.num_tasks, self.corpus.parts["train"]
        margin = [
            row[label] - np.logaddexp.reduce(np.delete(row, label))
            for row, label in zip(self.judge(meta), self.corpus.labels, strict=True)
        ]
        tiers = [[] for _ in range(count)]
        for label in np.unique(self.corpus.labels):
            ranked = sorted(train[self.corpus.labels[train] == label], key=lambda row: -margin[row])
            for place, row in enumerate(ranked):
                tiers[place * count // len(ranked)].append(row)
        return tiers


def standardized(config, corpus):
    """(n, T, N): mean 0 and spread 1 over the frames of the training part; zeros at the end."""
    clips = [x[: config.max_frames].astype(np.float64) for x in corpus.features]
    frames = np.concatenate([clips[row] for row in corpus.parts["train"]])
    out = np.zeros((len(clips), config.max_frames, frames.shape[1]))
    for place, clip in zip(out, clips, strict=True):
        place[: len(clip)] = (clip - frames.mean(0)) / frames.std(0)
    return torch.tensor(out), torch.tensor([len(clip) for clip in clips])
