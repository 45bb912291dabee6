"""A student for devices: convolutions over log-mel frames, pretrained on any speech."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames, zero_invalid
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import Dropout, LayerNorm, exact_gelu, portable_gelu


class FrameEncoder(nn.Module):
    """Maps frames (B, T, N) to frames (B, T, outputs), by convolutions over time.

    The first layer is a convolution, layer norm and GELU; each further one adds the same to its
    input. `serkd_jax.pretrain` trains it to predict the hidden states of a large encoder.

    Attributes:
        width: number of channels.
        num_layers: number of convolutions.
        kernel: number of frames that a convolution sees, odd.
        outputs: width of the frames that it returns.
        dtype: dtype of the computation; None means that of inputs and parameters.
        portable: whether to use only operations that every export format knows.
    """

    width: int
    num_layers: int
    kernel: int
    outputs: int
    dtype: DTypeLike | None = None
    portable: bool = False

    @nn.compact
    def __call__(self, features: jax.Array, valid: jax.Array) -> jax.Array:
        """Encodes features (B, T, N), of which the frames in `valid` (B, T) count."""
        gelu = portable_gelu if self.portable else exact_gelu
        x = features
        for i in range(self.num_layers):
            near = neighbourhoods(zero_invalid(x, valid), self.kernel)
            added = nn.Dense(self.width, dtype=self.dtype, name=f"conv_{i}")(near)
            added = gelu(LayerNorm(dtype=self.dtype, name=f"norm_{i}")(added))
            x = x + added if i else added
        return nn.Dense(self.outputs, dtype=self.dtype, name="out")(x)


def neighbourhoods(frames: jax.Array, kernel: int) -> jax.Array:
    """Joins each of (B, T, N) frames with its neighbours, to (B, T, kernel N).

    A linear layer of it is a convolution. In a loop on a CPU, XLA's own is twenty times as slow.
    """
    side = kernel // 2
    padded = jnp.pad(frames, ((0, 0), (side, side), (0, 0)))
    length = frames.shape[1]
    return jnp.concatenate([padded[:, i : i + length] for i in range(kernel)], axis=-1)


class ConvolutionalStudent(Student):
    """Features (B, T, N) -> `FrameEncoder` -> mean and deviation over time, normed -> classes.

    Attributes:
        width: number of channels of the convolutions.
        num_layers: number of convolutions.
        kernel: number of frames that a convolution sees.
        outputs: width of the encoded frames; h(., S) is twice as wide.
        dropout: dropout rate of h(., S).
    """

    description = "a convolutional network"

    width: int = size(192, 1, 4096)
    num_layers: int = size(4, 1, 100)
    kernel: int = size(5, 1, 99)
    outputs: int = size(512, 1, 8192)
    dropout: float = size(0.2, 0, 0.99, deployed=False)

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; the largest kernel limits the size."""
        del frames, variates
        if self.kernel % 2 == 0:
            raise ValueError(f"student.kernel is {self.kernel}: use an odd number of frames")
        if self.width * self.kernel * self.width > 2**28:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames)
        sizes = self.width, self.num_layers, self.kernel, self.outputs
        encoder = FrameEncoder(*sizes, self.dtype, self.portable, name="encoder")
        frames = at_least_float32(encoder(features, valid))
        mean = masked_mean(frames, valid)
        variance = masked_mean(jnp.square(frames - mean[:, None]), valid)
        hidden = jnp.concatenate([mean, jnp.sqrt(variance + 1e-5)], axis=-1)
        # Speakers and contents move these numbers little, and some much less than others.
        training = dropout_keys is not None
        hidden = nn.BatchNorm(
            not training, momentum=0.9, axis_name=self.axis, use_scale=False, use_bias=False,
            name="norm",
        )(hidden)  # fmt: skip
        return self.classify_and_project(Dropout(self.dropout)(hidden, dropout_keys))
