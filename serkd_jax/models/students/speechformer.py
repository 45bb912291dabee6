"""SpeechFormer++ (Chen et al., TASLP 2023): local attention and word tokens, in four stages."""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import (
    at_least_float32,
    average_groups,
    masked_mean,
    sinusoidal_positions,
    valid_frames,
    zero_invalid,
)
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import (
    MASKED_LOGIT,
    Dropout,
    TorchLayerNorm,
    attention_weights,
    join_heads,
    project_heads,
)

xavier = nn.initializers.xavier_uniform()


class SpeechFormer(Student):
    """Features (B, T, N) and learned word tokens -> stages of fewer and fewer frames -> classes.

    A word token stands for a second of speech. In the stages of frames, phones and words, a word
    attends to its own frames, and a frame to its neighbours and to its word. Between two stages
    neighbouring frames are averaged. In the last stage, all tokens attend to all.

    Attributes:
        mlp_dim: width of each feed-forward network; half of the original's 1,024 features.
        num_heads: number of attention heads. Features beyond a multiple of it are not read, as in
            the original.
        num_layers: number of layers in each stage.
        windows: number of neighbours, itself included, to which a frame attends in each stage but
            the last; odd.
        merges: number of frames that are averaged after each stage but the last.
        word_frames: number of frames for which there is a word token.
        dropout: dropout rate in the layers, of the attention weights, too.
        classifier_dropout: dropout rate between the classifier's layers.
        see_padding: whether padding takes part, as in the public code, which has no mask.
    """

    classifier_dims: Sequence[int] = size((512, 256), 1, 8192)
    mlp_dim: int = size(512, 1, 65_536)
    num_heads: int = size(8, 1, 256)
    num_layers: Sequence[int] = size((2, 2, 4, 4), 1, 100)
    windows: Sequence[int] = size((3, 11, 9), 1, 1001)
    merges: Sequence[int] = size((2, 6, 4), 1, 1000)
    word_frames: int = size(50, 1, 10_000)
    dropout: float = size(0.1, 0, 0.99, deployed=False)
    classifier_dropout: float = size(0.5, 0, 0.99, deployed=False)
    see_padding: bool = size(False)

    description: ClassVar[str] = "a SpeechFormer++"

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the attention weights limit the size."""
        between = len(self.num_layers) - 1
        if not between == len(self.windows) == len(self.merges):
            raise ValueError(
                f"student.windows and student.merges must have {between} numbers, one less than "
                "student.num_layers"
            )
        if even := [width for width in self.windows if width % 2 == 0]:
            raise ValueError(f"student.windows has {even[0]}: use odd numbers")
        if variates > 1 and (variates < self.num_heads or self._width(variates) % 2):
            raise ValueError(
                f"the features have {variates} dimensions, which give student.num_heads "
                f"{self.num_heads} no even width: use fewer heads, an even number of them"
            )
        tokens = frames * max((1, *self.windows))
        last = -(-frames // self.word_frames)
        for count in self.merges:
            frames = -(-frames // count)
        if max(tokens, (last + frames) ** 2) * self.num_heads > 2**28:
            raise ValueError("the student is too large to be run")

    @nn.nowrap
    def _width(self, variates: int) -> int:
        return variates - variates % self.num_heads

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        batch, length, variates = features.shape
        width = self._width(variates)
        valid = valid_frames(features, num_frames) | self.see_padding
        num_words = -(-length // self.word_frames)
        frames_of_word = -(-length // num_words)
        words = self.param("words", nn.initializers.truncated_normal(0.02), (num_words, width))
        words = jnp.broadcast_to(words, (batch, num_words, width)).astype(features.dtype)
        x = jnp.concatenate([words, features[..., :width]], axis=1)
        spoken = valid[:, ::frames_of_word]
        valid = jnp.concatenate([spoken, valid], axis=1)
        layer = nn.remat(Layer) if self.remat else Layer
        for stage, count in enumerate(self.num_layers):
            positions = sinusoidal_positions(x.shape[1], width) if stage == 0 else None
            x = TorchLayerNorm(dtype=self.dtype, name=f"norm_{stage}")(x)
            for i in range(count):
                x = layer(
                    self.num_heads,
                    self.mlp_dim,
                    num_words,
                    (*self.windows, 0)[stage],
                    self.dropout,
                    self.dtype,
                    name=f"layers_{stage}_{i}",
                )(x, valid, positions, dropout_keys)
            if stage < len(self.merges):
                x, valid = merge(x, valid, num_words, self.merges[stage])
                x = nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name=f"merge_{stage}")(x)
                x = TorchLayerNorm(dtype=self.dtype, name=f"merge_norm_{stage}")(x)
        hidden = masked_mean(at_least_float32(x), valid)
        return self.classify_and_project(hidden, self.classifier_dropout, dropout_keys)


class Layer(nn.Module):
    """A post-norm transformer layer over word tokens and frames.

    Attributes:
        num_heads: number of attention heads.
        mlp_dim: width of the feed-forward network.
        num_words: number of word tokens, which come first.
        window: see `attend_to_words_and_neighbours`; 0 for attention of all tokens to all.
        dropout: dropout rate.
        dtype: dtype of the computation; None means that of inputs and parameters.
    """

    num_heads: int
    mlp_dim: int
    num_words: int
    window: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        positions: jax.Array | None,
        dropout_keys: jax.Array | None,
    ) -> jax.Array:
        """Maps tokens (B, L, D) to (B, L, D).

        Args:
            x: (B, L, D) tokens.
            valid: (B, L) bool, True at tokens that take part.
            positions: (L, D), added to what the attention reads; None adds nothing.
            dropout_keys: (B,) keys, one per example; None turns dropout off.
        """
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=xavier)
        norm = functools.partial(TorchLayerNorm, dtype=self.dtype)

        def drop(x: jax.Array, name: str) -> jax.Array:
            return Dropout(self.dropout, name=f"{name}_dropout")(x, dropout_keys)

        h = x if positions is None else x + positions.astype(x.dtype)
        query, key, value = project_heads(h, self.num_heads, dense)
        if self.window:
            attended = attend_to_words_and_neighbours(
                query, key, value, valid, self.num_words, self.window, drop
            )
        else:
            weights = attention_weights(query, key, valid[:, None])
            attended = drop(weights, "weights") @ value
        attended = dense(x.shape[-1], name="out_proj")(join_heads(attended))
        x = norm(name="layer_norm")(x + drop(attended, "attention"))
        h = drop(nn.relu(dense(self.mlp_dim, name="intermediate_dense")(x)), "activation")
        h = drop(dense(x.shape[-1], name="output_dense")(h), "output")
        return norm(name="final_layer_norm")(x + h)


def attend_to_words_and_neighbours(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    num_words: int,
    window: int,
    drop: Callable[[jax.Array, str], jax.Array] = lambda weights, name: weights,
) -> jax.Array:
    """Computes the attention of the stages of frames, phones and words.

    A word attends to itself and to the frames of its segment. A frame attends to its neighbours,
    and adds its share of its word: the softmax, over the frames of the segment, of their products
    with what the word has become. A frame that is missing in a window or a segment, because the
    speech has ended, has a key and a value of 0. It is not masked, so it takes its part of the
    softmax.

    Args:
        query: (B, heads, L, d) of the word tokens and, after them, the frames.
        key: (B, heads, L, d).
        value: (B, heads, L, d).
        valid: (B, L) bool, False at tokens that are missing.
        num_words: number of words; all but the last have a segment of the same length.
        window: number of frames in a window, whose middle is the frame itself; odd.
        drop: dropout of weights, with a name.

    Returns:
        (B, heads, L, d).
    """
    query = query * query.shape[-1] ** -0.5
    seen = valid[:, None, num_words:]
    word_query, word_key, word_value = (x[:, :, :num_words] for x in (query, key, value))
    query, key, value = (x[:, :, num_words:] for x in (query, key, value))
    key, value = (zero_invalid(x, seen) for x in (key, value))
    batch, heads, length, width = query.shape
    in_segment = -(-length // num_words)

    def segments(x: jax.Array) -> jax.Array:
        """Divides (B, ..., L, ...) into (B, ..., words, frames of each, ...)."""
        missing = num_words * in_segment - length
        x = jnp.pad(x, [(0, missing) if axis == 2 else (0, 0) for axis in range(x.ndim)])
        return x.reshape(*x.shape[:2], num_words, in_segment, *x.shape[3:])

    def softmax(logits: jax.Array, name: str) -> jax.Array:
        return drop(nn.softmax(at_least_float32(logits)).astype(value.dtype), name)

    with_word = [
        jnp.concatenate([word[:, :, :, None], segments(frames)], axis=3)
        for word, frames in ((word_key, key), (word_value, value))
    ]
    weights = softmax(jnp.einsum("bhwd,bhwgd->bhwg", word_query, with_word[0]), "word")
    words = jnp.einsum("bhwg,bhwgd->bhwd", weights, with_word[1])

    logits = jnp.einsum("bhwgd,bhwd->bhwg", segments(query), words)
    share = softmax(jnp.where(segments(seen), logits, MASKED_LOGIT), "share")
    of_word = jnp.einsum("bhwg,bhwd->bhwgd", share, words)
    of_word = of_word.reshape(batch, heads, num_words * in_segment, width)[:, :, :length]

    around = [(0, 0), (0, 0), (window // 2, window // 2), (0, 0)]
    key, value = jnp.pad(key, around), jnp.pad(value, around)
    near = [slice(place, place + length) for place in range(window)]
    logits = jnp.stack([(query * key[:, :, place]).sum(-1) for place in near], axis=-1)
    weights = softmax(logits, "local")
    local = sum(weights[..., i, None] * value[:, :, place] for i, place in enumerate(near))
    return jnp.concatenate([words, local + of_word], axis=2)


def merge(
    x: jax.Array, valid: jax.Array, num_words: int, count: int
) -> tuple[jax.Array, jax.Array]:
    """Averages each group of `count` neighbouring frames, where missing ones count as 0.

    Args:
        x: (B, L, D) word tokens and, after them, frames.
        valid: (B, L) bool, False at tokens that are missing.
        num_words: number of word tokens, which stay as they are.
        count: number of frames in a group.

    Returns:
        The fewer tokens, and which of them take part.
    """
    frames = zero_invalid(x, valid)[:, num_words:]
    share = average_groups(valid[:, num_words:, None].astype(x.dtype), count)[..., 0]
    tokens = jnp.concatenate([x[:, :num_words], average_groups(frames, count)], axis=1)
    return tokens, jnp.concatenate([valid[:, :num_words], share > 0], axis=1)
