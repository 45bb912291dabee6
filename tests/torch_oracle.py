"""The student, T' and Eqs. 2-9 and 12 in torch, written from the paper: an oracle for whole steps.

Models are torch's own layers; a model is applied to a dictionary of parameters, so that torch can
differentiate through the pilot step.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class InvertedTransformer(nn.Module):
    """iTransformer (Liu et al. 2023) without its projection, with a classifier (Section 4.4)."""

    def __init__(self, sizes, num_frames, num_classes):
        super().__init__()
        width = sizes.width
        self.embed = nn.Linear(num_frames, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, sizes.num_heads, sizes.mlp_dim, 0.0, "gelu", batch_first=True
            )
            for _ in range(sizes.num_layers)
        )
        self.classifier_0 = nn.Linear(width, sizes.classifier_dim)
        self.classifier_1 = nn.Linear(sizes.classifier_dim, num_classes)
        self.projection = nn.Linear(width, sizes.projection_dim)

    def tokens(self, features):
        """A token for each variate."""
        return self.embed(features.transpose(1, 2))

    def forward(self, features):
        """(B, T, N) -> hidden, logits, projection."""
        tokens = self.tokens(features)
        for layer in self.layers:
            tokens = layer(tokens)
        hidden = tokens.mean(1)
        logits = self.classifier_1(F.relu(self.classifier_0(hidden)))
        return hidden, logits, F.normalize(self.projection(hidden))


class Adapter(nn.Module):
    """The student's hidden vector in the teacher's width."""

    def __init__(self, width, hidden_size):
        super().__init__()
        self.dense = nn.Linear(width, hidden_size)

    def forward(self, hidden):
        return self.dense(hidden)


class MetaTeacher(nn.Module):
    """H-128-64-C."""

    def __init__(self, hidden_size, num_classes):
        super().__init__()
        self.dense_0 = nn.Linear(hidden_size, 128)
        self.dense_1 = nn.Linear(128, 64)
        self.dense_2 = nn.Linear(64, num_classes)

    def forward(self, hidden):
        return self.dense_2(F.relu(self.dense_1(F.relu(self.dense_0(hidden)))))


class Nets(NamedTuple):
    """The architectures; parameters are given at each call."""

    student: InvertedTransformer
    adapter: Adapter
    meta: MetaTeacher


def torch_names(params):
    """A Flax tree of parameters (or gradients) as {torch's name: array in torch's layout}."""
    named = {}
    for name, value in params.items():
        if name == "attention":
            parts = [torch_names(value[f"{part}_proj"]) for part in "qkv"]
            for kind in ("weight", "bias"):
                named[f"self_attn.in_proj_{kind}"] = np.concatenate([p[kind] for p in parts])
            inner = {"self_attn.out_proj": torch_names(value["out_proj"])}
        elif isinstance(value, dict):
            inner = {_RENAMED.get(name, name.replace("layers_", "layers.")): torch_names(value)}
        else:
            array = np.asarray(value)
            named["bias" if name == "bias" else "weight"] = array.T if name == "kernel" else array
            continue
        for prefix, tree in inner.items():
            named |= {f"{prefix}.{key}": array for key, array in tree.items()}
    return named


_RENAMED = {
    "intermediate_dense": "linear1",
    "output_dense": "linear2",
    "layer_norm": "norm1",
    "final_layer_norm": "norm2",
}


def tensors(params):
    """A Flax tree as torch parameters to differentiate by."""
    return {
        name: torch.tensor(np.array(array), dtype=torch.float64, requires_grad=True)
        for name, array in torch_names(params).items()
    }


def equation_2(output, labels, keys, key_labels, weight, temperature):
    """λ L^sup + (1-λ) CE, with Eq. 3 as a loop over the anchors."""
    _, logits, projection = output
    contrastive = 0.0
    for z, label in zip(projection, labels, strict=True):
        log_likelihood = torch.log_softmax(keys @ z / temperature, 0)
        positive = key_labels == label
        if positive.any():
            contrastive = contrastive - log_likelihood[positive].mean() / len(labels)
    return weight * contrastive + (1 - weight) * F.cross_entropy(logits, labels)


def equation_4(output, adapted, teacher_hidden, teacher_logits, student_loss, config):
    """α L^student + (1-α) L^soft + β L^PKD, with L^soft of Eqs. 5-7 and L^PKD of Eq. 8."""
    tau = config.temperature
    log_s = torch.log_softmax(output[1] / tau, 1)  # Eq. 6
    log_t = torch.log_softmax(teacher_logits / tau, 1)  # Eq. 7
    if config.direction == "teacher_student":
        soft = tau**2 * F.kl_div(log_s, log_t.exp(), reduction="batchmean")
    else:
        soft = tau**2 * (log_s.exp() * (log_s - log_t)).sum(1).mean()
    patient = F.mse_loss(F.normalize(teacher_hidden), F.normalize(adapted))
    if not config.soft:
        soft = torch.tensor(0.0)
    return config.alpha * student_loss + (1 - config.alpha) * soft + config.beta * patient


def equation_9(logits_of_teacher_hidden, logits_of_student_hidden, labels):
    """The two mean cross-entropies, halved."""
    log_t = torch.log_softmax(logits_of_teacher_hidden, 1)
    log_s = torch.log_softmax(logits_of_student_hidden, 1)
    rows = torch.arange(len(labels))
    return -(log_t[rows, labels] + log_s[rows, labels]).sum() / (2 * len(labels))


def equation_12(teacher_logits, student_logits, labels):
    """Mean of p_T'(y) - p_S'(y)."""
    rows = torch.arange(len(labels))
    return (teacher_logits.softmax(1) - student_logits.softmax(1))[rows, labels].mean()


def gradient(loss, params, **options):
    """The gradient of a loss as ``params`` are named; zero where it does not reach."""
    values = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), values, strict=True)
    }


def student_objective(net, params, batch, dictionary, config):
    """The student's output and Eq. 2, of training or (Eq. 11) of S'."""
    output = functional_call(net, params, batch["inputs"])
    loss = equation_2(output, batch["label"], *dictionary, config.weight, config.temperature)
    return output, loss


def distillation_objective(nets, params, meta, batch, dictionary, config):
    """Eq. 4 of the student and its adapter against T'."""
    output, loss = student_objective(
        nets.student, params["student"], batch, dictionary, config.contrastive
    )
    adapted = functional_call(nets.adapter, params["adapter"], output[0])
    teacher_logits = functional_call(nets.meta, meta, batch["teacher_hidden"])
    return equation_4(
        output, adapted, batch["teacher_hidden"], teacher_logits, loss, config.distill
    )


def collaborative_objective(nets, params, meta, quiz):
    """Eq. 9 of T' on the quiz batch."""
    hidden, _, _ = functional_call(nets.student, params["student"], quiz["inputs"])
    adapted = functional_call(nets.adapter, params["adapter"], hidden)
    logits = (functional_call(nets.meta, meta, h) for h in (quiz["teacher_hidden"], adapted))
    return equation_9(*logits, quiz["label"])
