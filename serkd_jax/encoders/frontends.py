"""Front-ends: 16 kHz waveforms to feature sequences at 50 frames a second.

A front-end is called with waveforms; `Frontend` says what else it has. All share one grid of
frames: n samples give (n - 400) // 320 + 1 of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from serkd_jax.audio import logmel
from serkd_jax.audio.logmel import FRAME_RATE, HOP, num_frames, num_samples
from serkd_jax.distributed import parallel
from serkd_jax.encoders import ENCODERS
from serkd_jax.encoders.checkpoint import Checkpoint, load_encoder
from serkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel frames, computed on the CPU; see `serkd_jax.audio.logmel.log_mel`."""

    num_mels: int = 80
    name: ClassVar[str] = "logmel"
    num_devices: ClassVar[int] = 1
    assumption: ClassVar[str] = ""

    @property
    def width(self) -> int:
        """Number of mel bands."""
        return self.num_mels

    @property
    def settings(self) -> dict[str, Any]:
        """Name and number of mel bands."""
        return {"name": self.name, "num_mels": self.num_mels}

    @property
    def fingerprint(self) -> str:
        """All settings that the features depend on."""
        return logmel.fingerprint(self.num_mels)

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `serkd_jax.data.sources.Frontend`; each waveform is computed by itself."""
        for i, waveform in enumerate(waveforms):
            yield i, logmel.log_mel(waveform[: num_samples(max_frames)], self.num_mels)


class Batching(NamedTuple):
    """How clips are put together."""

    frames: int  # of a full batch, padding included; a longer clip is a batch of its own
    growth: float  # from one padded length to the next


# On a CPU, a clip by itself is as fast as any batch, and a program more costs two seconds.
CPU_BATCHING = Batching(50, 1.05)
ACCELERATOR_BATCHING = Batching(8192, 1.25)


def default_batching() -> Batching:
    """What suits the kind of device that JAX uses."""
    return CPU_BATCHING if jax.default_backend() == "cpu" else ACCELERATOR_BATCHING


class Batch(NamedTuple):
    """Clips that go through an encoder together."""

    clips: np.ndarray  # (n,) int, which ones
    frames: int  # that each is padded to
    size: int  # rows of the program, at least n


def bucket_lengths(max_frames: int, growth: float) -> list[int]:
    """The lengths that clips are padded to, ascending.

    The last is `max_frames`, each is at most `growth` times the one before, and none is shorter
    than a second.
    """
    lengths = [max_frames]
    while (shorter := math.ceil(lengths[0] / growth)) >= 50 and shorter < lengths[0]:
        lengths.insert(0, shorter)
    return lengths


def plan_batches(num_frames: Sequence[int], max_frames: int, batching: Batching) -> list[Batch]:
    """Batches of clips of similar length, as a function of the arguments alone.

    A batch is padded to the longest clip's bucket and takes clips of that bucket and the next
    shorter one, so none grows by more than `batching.growth` squared. What does not fill a batch
    goes into one of half the rows, or a quarter, and so on: a few programs for each length.

    Args:
        num_frames: of each clip, at most `max_frames`.
        max_frames: the longest length.
        batching: how many go together, and how they are padded.
    """
    buckets = np.array(bucket_lengths(max_frames, batching.growth))
    bucket_of = np.searchsorted(buckets, num_frames)
    longest_first = np.argsort(-np.asarray(num_frames), kind="stable")
    batches, start = [], 0
    while start < len(longest_first):
        bucket = bucket_of[longest_first[start]]
        size = max(1, batching.frames // int(buckets[bucket]))
        clips = longest_first[start : start + size]
        clips = clips[bucket_of[clips] >= bucket - 1]
        while size // 2 >= len(clips):
            size //= 2
        batches.append(Batch(clips, int(buckets[bucket]), size))
        start += len(clips)
    return batches


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Hidden states of a pretrained encoder (Section 4.3: HuBERT's last), on all given devices.

    Attributes:
        model: a local folder in the Hugging Face format, or a name on the hub.
        revision: of the name on the hub.
        layer: -1 for the last hidden state, with the final norm that some encoders have; else an
            index into `EncoderOutput.hidden_states`, k for the output of layer k without it; or
            several of these, whose mean is taken.
        dtype: of the computation, float32 or bfloat16.
        pad_to_30s: of Whisper alone: whether every clip is padded as transformers does it.
        kind: the `model_type` that the model must have; empty takes any.
        batching: None means `default_batching()`.
        devices: none means all local ones.
        safetensors_only: whether to refuse weights in torch's own format, which is a pickle.
    """

    model: str
    revision: str | None = None
    layer: int | Sequence[int] = -1
    dtype: str = "float32"
    pad_to_30s: bool = False
    kind: str = ""
    batching: Batching | None = None
    devices: tuple[jax.Device, ...] = ()
    safetensors_only: bool = False

    VERSION: ClassVar[int] = 3

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Architecture and weights, once the settings have been checked against them."""
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"the front-end's dtype is {self.dtype!r}: use float32 or bfloat16")
        checkpoint = load_encoder(self.model, self.revision or None, self.safetensors_only)
        found = checkpoint.kind
        if self.kind and self.kind != found.model_type:
            raise UserError(
                f"{self.model} is a {found.model_type}, not a {self.kind}: set the front-end's "
                f"name to {found.model_type}, or name another model"
            )
        if self.pad_to_30s and "pad_to_30s" not in found.options:
            raise UserError(f"{self.model} is a {found.model_type}: pad_to_30s is Whisper's alone")
        if found.num_frames(checkpoint.config, num_samples(326)) != 326:
            raise UserError(f"{self.model} does not give one frame every {HOP} samples")
        layers = checkpoint.config.num_hidden_layers
        if not self.layers or any(not -layers - 1 <= layer <= layers for layer in self.layers):
            raise UserError(
                f"{self.model} has {layers} layers: layer {self.layer} is not in "
                f"{-layers - 1} to {layers}, nor a list of such"
            )
        return checkpoint

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """One or several, each once."""
        given = (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
        if not all(type(layer) is int for layer in given) or len(set(given)) < len(given):
            raise UserError(f"layer is {self.layer!r}: use a number, or a list of different ones")
        return given

    @property
    def name(self) -> str:
        """The kind of encoder."""
        return self.checkpoint.kind.model_type

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.checkpoint.config.hidden_size

    @property
    def assumption(self) -> str:
        """See `Checkpoint`."""
        return self.checkpoint.assumption

    @property
    def settings(self) -> dict[str, Any]:
        """Which model, weights, layer and type; and what may change the rounding."""
        keys = ("name", "model", "revision", "layer", "dtype", *self.checkpoint.kind.options)
        return {key: getattr(self, key) for key in keys} | {
            "do_normalize": self.checkpoint.do_normalize,
            "assumption": self.assumption,
            "weights_sha256": self.checkpoint.sha256,
            "batch_frames": self._batching.frames,
            "device": self._devices[0].device_kind,
        }

    @property
    def fingerprint(self) -> str:
        """The weights' hash: a folder and a hub name with the same weights give the same features.

        Neither device nor size of batches: they change the rounding alone.
        """
        layers = ",".join(map(str, self.layers))
        padded = "-30s" if self.pad_to_30s else ""
        return f"{self.name}-v{self.VERSION}-{self.checkpoint.sha256}-{layers}-{self.dtype}{padded}"

    @property
    def num_devices(self) -> int:
        """How many devices compute."""
        return len(self._devices)

    @property
    def _batching(self) -> Batching:
        return self.batching or default_batching()

    @cached_property
    def _devices(self) -> list[jax.Device]:
        return list(self.devices or jax.local_devices())

    @cached_property
    def _encode(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        options = {"pad_to_30s": True} if self.pad_to_30s else {}

        def encode(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            output = self.checkpoint.encode(params, *batch, self.dtype, **options)
            states = [
                output.last_hidden_state if layer == -1 else output.hidden_states[layer]
                for layer in self.layers
            ]
            if len(states) == 1:
                return states[0].astype(jnp.float16)
            return jnp.stack(states).astype(jnp.float32).mean(0).astype(jnp.float16)

        params = jax.tree.map(lambda x: x.astype(jnp.dtype(self.dtype)), self.checkpoint.params)
        params = parallel.replicate(params, self._devices)
        compiled = parallel.compile_map(encode, self._devices)
        return lambda waveforms, lengths: compiled(params, (waveforms, lengths))

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `serkd_jax.data.sources.Frontend`; the devices share out the batches of a group."""
        most = self.checkpoint.kind.max_frames(self.checkpoint.config)
        if most is not None and max_frames > most:
            raise UserError(
                f"{self.model} takes at most {most} frames, {most / FRAME_RATE:g} s, not "
                f"{max_frames}: lower max_frames or max_seconds"
            )
        waveforms = [waveform[: num_samples(max_frames)] for waveform in waveforms]
        frames = np.array([num_frames(len(waveform)) for waveform in waveforms])
        running = None  # the devices work on these batches while the host takes the last results
        for batches in self._rounds(frames, max_frames, groups):
            started = batches, self._encode(*_stack(batches, waveforms, self.num_devices))
            if running:
                yield from _unstack(*running, frames)
            running = started
        if running:
            yield from _unstack(*running, frames)

    def _rounds(
        self, frames: np.ndarray, max_frames: int, groups: Sequence[int] | None
    ) -> Iterator[list[Batch]]:
        """Batches of one shape, as many at once as there are devices."""
        groups = np.zeros(len(frames), int) if groups is None else np.asarray(groups)
        by_shape: dict[tuple[int, int], list[Batch]] = {}
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            for batch in plan_batches(frames[members], max_frames, self._batching):
                batch = batch._replace(clips=members[batch.clips])
                by_shape.setdefault((batch.frames, batch.size), []).append(batch)
        for batches in by_shape.values():
            for start in range(0, len(batches), self.num_devices):
                yield batches[start : start + self.num_devices]


def _stack(
    batches: list[Batch], waveforms: Sequence[np.ndarray], num_devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """(devices, size, samples) float32 and (devices, size) int32, the samples of each clip."""
    _, frames, size = batches[0]
    # All samples that a clip of so many frames can have: those behind the last frame count in
    # the normalisation.
    padded = np.zeros((num_devices, size, num_samples(frames + 1) - 1), np.float32)
    lengths = np.zeros((num_devices, size), np.int32)
    for k, batch in enumerate(batches):
        for row, clip in enumerate(batch.clips):
            lengths[k, row] = len(waveforms[clip])
            padded[k, row, : lengths[k, row]] = waveforms[clip]
    return padded, lengths


def _unstack(
    batches: list[Batch], hidden: jax.Array, num_frames: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The valid frames of each clip."""
    hidden = np.asarray(hidden)
    for k, batch in enumerate(batches):
        for row, clip in enumerate(batch.clips):
            yield int(clip), hidden[k, row, : num_frames[clip]].copy()  # lets the padding go


def make_frontend(config: ConfigDict, devices: Sequence[jax.Device] = ()) -> LogMel | Pretrained:
    """Makes the front-end of a config's `frontend` part: its `name` and that one's settings.

    Args:
        config: `name` is `logmel` or a kind of encoder; the others are the attributes of
            `LogMel` or `Pretrained`.
        devices: that an encoder computes on; none means all local ones.
    """
    settings = config.to_dict()
    name = settings.pop("name")
    if name not in ("logmel", *ENCODERS):
        raise UserError(f"frontend.name is {name!r}: use one of logmel, {', '.join(ENCODERS)}")
    try:
        if name == "logmel":
            return LogMel(**settings)
        return Pretrained(**settings, kind=name, devices=tuple(devices))
    except TypeError as error:
        raise UserError(f"frontend {name}: {error}; use the {name} part of a recipe") from error
