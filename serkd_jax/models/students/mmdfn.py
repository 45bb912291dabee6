"""MM-DFN (Hu et al., ICASSP 2022) with audio alone: a graph of the utterances of a dialogue."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.losses import l2_normalize
from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames, zero_invalid
from serkd_jax.models.recurrent import lstm_step, scan_frames
from serkd_jax.models.students.base import Student, StudentOutput, size, small_uniform
from serkd_jax.models.transformer import Dropout

MARKS = 2  # columns after the audio vector: the place of the speaker, and the mark


class MMDFN(Student):
    """A dialogue (B, U, N + 2) -> context of the speakers -> layers over its graph -> classes.

    An example is one utterance with its whole dialogue. Row u is utterance u of the dialogue: its
    audio vector, the number of its speaker (the row of his first utterance), and a mark, which is 1
    at the utterance to be classified and 0 at the others. A "frame" is a row. The utterance is
    classified by what comes after it, too.

    Attributes:
        width: width of the linear layer and of the speaker encoder, half of it in each direction.
        graph_width: width of the layers over the graph.
        num_layers: number of these layers.
        speaker_weight: weight of the speaker encoder's output; the original has 3 for IEMOCAP and
            0.5 for MELD.
        lamda: the greater it is, the more a layer's own weights count; less so in deeper layers.
        alpha: share of the first layer's output in what a layer carries over without weights.
        dropout: dropout rate.
    """

    classifier_dims: Sequence[int] = size((), 1, 8192)
    width: int = size(200, 2, 8192)
    graph_width: int = size(100, 1, 8192)
    num_layers: int = size(16, 1, 128)
    speaker_weight: float = size(3.0, 0, 100)
    lamda: float = size(0.5, 0, 100)
    alpha: float = size(0.2, 0, 1)
    dropout: float = size(0.4, 0, 0.99, deployed=False)

    description: ClassVar[str] = "an MM-DFN"
    reads_dialogues: ClassVar[bool] = True

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the layers' weights and outputs, and the graph, limit the size."""
        if self.width % 2:
            raise ValueError(f"student.width is {self.width}: use an even number")
        if 1 < variates <= MARKS:
            raise ValueError(
                f"the features have {variates} dimensions: with the speaker and the mark, an "
                f"utterance has at least {MARKS + 1}"
            )
        layers = self.num_layers * self.graph_width * max(frames, 2 * self.graph_width)
        if max(layers, max(frames, self.width) * max(frames, self.width, variates)) > 2**26:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames)
        vectors, speaker, mark = features[..., :-MARKS], features[..., -2], features[..., -1]
        init = small_uniform(vectors.shape[-1])
        dense = nn.Dense(
            self.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="audio"
        )
        own = find_speakers(speaker, valid)
        encoder = SpeakerEncoder(self.width // 2, self.dropout, self.dtype, name="speakers")
        x = dense(vectors)
        x += self.speaker_weight * encoder(x, own, dropout_keys)
        graph = normalize(adjacency(x, valid))
        x = Dropout(self.dropout, name="context_dropout")(x, dropout_keys)
        fusion = Fusion(
            self.graph_width,
            self.num_layers,
            self.lamda,
            self.alpha,
            self.dropout,
            self.dtype,
            self.remat,
            name="fusion",
        )
        h = fusion(x, graph, dropout_keys)
        h = Dropout(self.dropout, name="fusion_dropout")(h, dropout_keys)
        both = at_least_float32(jnp.concatenate([x, h], axis=-1))
        hidden = masked_mean(both, valid & (mark > 0.5))
        hidden = nn.relu(Dropout(self.dropout, name="output_dropout")(hidden, dropout_keys))
        return self.classify_and_project(hidden, kernel_init=small_uniform(hidden.shape[-1]))


def find_speakers(speaker: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns (B, U, U) bool, True at [b, u, s] if s is the speaker of utterance u.

    Args:
        speaker: (B, U) float, the speakers' numbers, less than U.
        valid: (B, U) bool, True where there is an utterance; padding has no speaker.
    """
    slots = jnp.arange(speaker.shape[1])
    number = jnp.clip(speaker.astype(jnp.int32), 0, slots[-1])
    return valid[..., None] & (number[..., None] == slots)


class SpeakerEncoder(nn.Module):
    """A bidirectional GRU of two layers over each speaker's utterances by themselves."""

    width: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, own: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        """Maps utterances (B, U, N) to (B, U, 2 width); `own` is that of `find_speakers`."""
        for i in range(2):
            if i:
                x = Dropout(self.dropout, name="dropout")(x, dropout_keys)
            both = [
                SpeakerGRU(self.width, reverse, self.dtype, name=f"{name}_{i}")(x, own)
                for name, reverse in (("forward", False), ("backward", True))
            ]
            x = jnp.concatenate(both, axis=-1)
        return x


class SpeakerGRU(nn.Module):
    """A GRU with torch's two biases, in which each speaker has a state of his own.

    Attributes:
        width: number of hidden units.
        reverse: whether it reads the utterances from the last to the first.
        dtype: dtype of the computation; None means that of inputs and parameters.
    """

    width: int
    reverse: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, own: jax.Array) -> jax.Array:
        """Maps utterances (B, U, N) to (B, U, width); `own` is that of `find_speakers`."""
        init, widths = small_uniform(self.width), (self.width, 3 * self.width)
        gates = nn.Dense(
            widths[1], dtype=self.dtype, kernel_init=init, bias_init=init, name="input"
        )(x)
        kernel = self.param("kernel", init, widths).astype(gates.dtype)
        bias = self.param("bias", init, widths[1:]).astype(gates.dtype)

        def step(states: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
            gate, here = inputs
            # Not a matrix product, in which a GPU would round the states.
            before = zero_invalid(states, here).sum(1)
            after = gru_step(gate, before @ kernel + bias, before)
            return jnp.where(here[..., None], after[:, None], states), after

        states = jnp.zeros((*own.shape[:2], self.width), gates.dtype)
        return scan_frames(step, states, (gates, own), self.reverse)


def gru_step(of_input: jax.Array, of_state: jax.Array, state: jax.Array) -> jax.Array:
    """Returns the next state (B, H), given the (B, 3 H) gates that input and state add up to."""
    (r, z, n), (state_r, state_z, state_n) = (
        jnp.split(x, 3, axis=-1) for x in (of_input, of_state)
    )
    keep = nn.sigmoid(z + state_z)
    return (1 - keep) * nn.tanh(n + nn.sigmoid(r + state_r) * state_n) + keep * state


def adjacency(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the weights of the edges, 1 - angle / pi, of all pairs of a dialogue.

    Args:
        x: (B, U, D) utterances.
        valid: (B, U) bool, True where there is an utterance; no edge leads elsewhere.

    Returns:
        (B, U, U), at least float32.
    """
    x = l2_normalize(at_least_float32(x))
    # A GPU would round the factors to ten bits, after which a cosine may be more than 1.
    cosine = jnp.einsum("bud,bvd->buv", x, x, precision="highest")
    # So that the slope at a self edge is exactly 0, and the edge that of others for a zero vector.
    row = jnp.arange(x.shape[1])
    cosine = jnp.where(row[:, None] == row, 1.0, cosine)
    # The slope of arccos is infinite at 1.
    weights = 1 - jnp.arccos(0.99999 * cosine) / jnp.pi
    return jnp.where(valid[:, :, None] & valid[:, None, :], weights, 0)


def normalize(weights: jax.Array) -> jax.Array:
    """Divides weights (B, U, U) by the roots of the sums of row and column; 0 stays 0."""
    scale = jax.lax.rsqrt(jnp.maximum(weights.sum(2), 1e-6))
    return weights * scale[:, :, None] * scale[:, None, :]


def layer_strengths(num_layers: int, lamda: float) -> jax.Array:
    """Returns theta_k = ln(lamda / k + 1) of the layers k = 1, 2, ..., by which weights count."""
    return jnp.log(lamda / jnp.arange(1, num_layers + 1) + 1)


def graph_convolution(
    x: jax.Array,
    first: jax.Array,
    graph: jax.Array,
    kernel: jax.Array,
    theta: jax.Array,
    alpha: float,
) -> jax.Array:
    """Computes the convolution of GCNII's variant, before its ReLU.

    Args:
        x: (B, U, W) nodes.
        first: (B, U, W) what the nodes were before the first layer.
        graph: (B, U, U) normalised weights of the edges.
        kernel: (2 W, W) weights.
        theta: share of the product with `kernel`; the rest is what is carried over without it.
        alpha: share of `first` in what is carried over.
    """
    near = graph @ x
    weighted = jnp.concatenate([near, first], axis=-1) @ kernel
    return theta * weighted + (1 - theta) * ((1 - alpha) * near + alpha * first)


class Fusion(nn.Module):
    """Graph-based dynamic fusion: graph convolutions, each after a step of one LSTM over layers.

    Attributes:
        width: width of the layers, W.
        num_layers: number of layers.
        lamda: see `layer_strengths`.
        alpha: see `graph_convolution`.
        dropout: dropout rate.
        dtype: dtype of the computation; None means that of inputs and parameters.
        remat: whether to compute a layer again for the gradient instead of keeping its activations.
    """

    width: int
    num_layers: int
    lamda: float
    alpha: float
    dropout: float
    dtype: DTypeLike | None
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, graph: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        """Maps nodes (B, U, N) to (B, U, W); `graph` (B, U, U) is that of `normalize`."""
        width, init = self.width, small_uniform(x.shape[-1])
        first = nn.Dense(width, dtype=self.dtype, kernel_init=init, bias_init=init, name="input")(x)
        first = nn.relu(first)
        init, dtype = small_uniform(width), first.dtype
        # The LSTM has torch's two biases.
        biases = [self.param(f"lstm_bias_{i}", init, (4 * width,)) for i in range(2)]
        lstm = self.param("lstm_kernel", init, (2 * width, 4 * width)).astype(dtype)
        kernels = self.param("kernels", init, (self.num_layers, 2 * width, width)).astype(dtype)
        bias, graph = sum(biases).astype(dtype), graph.astype(dtype)
        dropout = Dropout(self.dropout, name="dropout")

        def layer(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (h, hidden, cell), (kernel, theta, number) = carry, inputs
            gates = jnp.concatenate([h, hidden], axis=-1) @ lstm + bias
            hidden, cell = lstm_step(gates, cell)
            out = graph_convolution(hidden, first, graph, kernel, theta, self.alpha)
            out = dropout(nn.relu(out), layer_keys(dropout_keys, number))
            return (out + h, hidden, cell), None

        zero = jnp.zeros_like(first)
        start = (dropout(first, dropout_keys), zero, zero)
        theta = layer_strengths(self.num_layers, self.lamda).astype(dtype)
        inputs = (kernels, theta, jnp.arange(self.num_layers))
        step = jax.checkpoint(layer) if self.remat else layer
        return jax.lax.scan(step, start, inputs)[0][0]


def layer_keys(keys: jax.Array | None, number: jax.Array) -> jax.Array | None:
    """Returns a layer's own keys (B,), so that the layers drop other values; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
