"""The student, T' and Eqs. 2-9 and 12 in torch, written from the paper: an oracle for whole steps.

Models are torch's own layers; a model is applied to a dictionary of parameters, so that torch can
differentiate through the pilot step.
"""

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class MLP(nn.ModuleList):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths):
        super().__init__(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x):
        *inner, last = self
        for layer in inner:
            x = F.relu(layer(x))
        return last(x)


class InvertedTransformer(nn.Module):
    """iTransformer (Liu et al. 2023) without its projection, then Section 4.4's classifier.

    Its encoder has no last norm. `sizes` has the attributes of our student. Dropout follows the
    embedding and both parts of a layer; torch's layer has it in two more places.
    """

    def __init__(self, sizes, num_frames, num_variates, num_classes, dropout=0.0):
        super().__init__()
        width, self.readout = sizes.width, sizes.readout
        num_tokens, token_size = self.token_shape(num_frames, num_variates)
        self.embed = nn.Linear(token_size, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                sizes.num_heads,
                sizes.mlp_dim,
                0.0,
                "gelu",
                batch_first=True,
                norm_first=sizes.norm == "pre",
            )
            for _ in range(sizes.num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        for layer in self.layers:
            layer.dropout1.p = layer.dropout2.p = dropout
        read = {"variates": num_tokens, "tokens": width, "flatten": num_tokens * width}
        hidden = read[self.readout]
        self.classifier = MLP(hidden, *sizes.classifier_dims, num_classes)
        self.projection = MLP(hidden, *sizes.projection_dims)

    def token_shape(self, num_frames, num_variates):
        """A token is the course of a variate."""
        return num_variates, num_frames

    def tokens(self, features):
        """(B, T, N) -> (B, N, D): a token for each variate."""
        return self.embed(features.transpose(1, 2))

    def padding(self, features, lengths):
        """Where tokens are padding, (B, L): nowhere, as all variates are there."""
        return None

    def forward(self, features, lengths):
        """(B, T, N) -> hidden, logits, projection."""
        tokens, padding = self.dropout(self.tokens(features)), self.padding(features, lengths)
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=padding)
        if padding is not None:
            tokens = tokens.masked_fill(padding[..., None], 0)
        if self.readout == "variates":
            hidden = tokens.sum(2) / tokens.shape[2]
        elif self.readout == "flatten":
            hidden = torch.cat(tokens.unbind(1), 1)
        else:
            count = tokens.shape[1] if padding is None else (~padding).sum(1, keepdim=True)
            hidden = tokens.sum(1) / count
        return hidden, self.classifier(hidden), F.normalize(self.projection(hidden))


class FrameTransformer(InvertedTransformer):
    """The first row of Table 4: an ordinary encoder, positions of Vaswani et al. (2017)."""

    def token_shape(self, num_frames, num_variates):
        """A token is a frame."""
        return num_frames, num_variates

    def tokens(self, features):
        """(B, T, N) -> (B, T, D)."""
        length, width = features.shape[1], self.embed.out_features
        position = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        waves = torch.stack([position.sin(), position.cos()], -1).reshape(length, width)
        return self.embed(features) + waves

    def padding(self, features, lengths):
        """The frames after a clip's end."""
        return torch.arange(features.shape[1]) >= lengths[:, None]


class Adapter(nn.Module):
    """The student's hidden vector in the teacher's width."""

    def __init__(self, width, hidden_size):
        super().__init__()
        self.dense = nn.Linear(width, hidden_size)

    def forward(self, hidden):
        return self.dense(hidden)


class MetaTeacher(nn.Module):
    """The teacher's classifier."""

    def __init__(self, hidden_size, dims, num_classes):
        super().__init__()
        self.dense = MLP(hidden_size, *dims, num_classes)

    def forward(self, hidden):
        return self.dense(hidden)


class Nets(NamedTuple):
    """The architectures; parameters are given at each call."""

    student: InvertedTransformer
    adapter: nn.Module  # nn.Identity where h(., S) has the teacher's width
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
            inner = {_RENAMED.get(name, re.sub(r"_(\d+)$", r".\1", name)): torch_names(value)}
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


def equation_2(output, labels, keys, key_labels, config):
    """λ L^sup + (1-λ) CE, with Eq. 3 as a loop over the anchors."""
    _, logits, projection = output
    weight, temperature = config.contrastive.weight, config.contrastive.temperature
    contrastive = 0.0
    for z, label in zip(projection, labels, strict=True):
        log_likelihood = torch.log_softmax(keys @ z / temperature, 0)
        positive = key_labels == label
        if positive.any():
            contrastive = contrastive - log_likelihood[positive].mean() / len(labels)
    smoothing = config.student.label_smoothing
    cross_entropy = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return weight * contrastive + (1 - weight) * cross_entropy


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
    if not params:
        return {}
    values = torch.autograd.grad(loss, list(params.values()), allow_unused=True, **options)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), values, strict=True)
    }


def standardized(inputs, lengths, statistics):
    """Each clip's frames less the mean, over the spread; what is after them is 0."""
    mean, spread = map(torch.tensor, (statistics.mean, statistics.spread))
    out = torch.zeros(inputs.shape, dtype=torch.float64)
    for place, clip, length in zip(out, torch.tensor(np.array(inputs)), lengths, strict=True):
        place[:length] = (clip[:length].double() - mean) / spread
    return out


def student_objective(net, params, batch, dictionary, config):
    """The student's output and Eq. 2, of training or (Eq. 11) of S'."""
    output = functional_call(net, params, (batch["features"], batch["length"]))
    loss = equation_2(output, batch["label"], *dictionary, config)
    return output, loss


def distillation_objective(nets, params, meta, batch, dictionary, config):
    """Eq. 4 of the student and its adapter against T'."""
    output, loss = student_objective(nets.student, params["student"], batch, dictionary, config)
    adapted = functional_call(nets.adapter, params["adapter"], output[0])
    teacher_logits = functional_call(nets.meta, meta, batch["teacher_hidden"])
    return equation_4(
        output, adapted, batch["teacher_hidden"], teacher_logits, loss, config.distill
    )


def collaborative_objective(nets, params, meta, quiz):
    """Eq. 9 of T' on the quiz batch."""
    inputs = quiz["features"], quiz["length"]
    hidden, _, _ = functional_call(nets.student, params["student"], inputs)
    adapted = functional_call(nets.adapter, params["adapter"], hidden)
    logits = (functional_call(nets.meta, meta, h) for h in (quiz["teacher_hidden"], adapted))
    return equation_9(*logits, quiz["label"])
