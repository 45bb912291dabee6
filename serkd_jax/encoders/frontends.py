"""Front-ends, which turn 16 kHz waveforms into feature sequences at 50 frames a second.

A front-end is called with waveforms; `serkd_jax.data.sources.Frontend` says what else it has. All
front-ends share one grid of frames: n samples give (n - 400) // 320 + 1 frames.
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

from serkd_jax.audio.logmel import FRAME_RATE, HOP, num_frames, num_samples
from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.distributed import parallel
from serkd_jax.encoders import ENCODERS
from serkd_jax.encoders.checkpoint import Checkpoint, load_encoder
from serkd_jax.errors import UserError


class WithoutModel:
    """A front-end of `serkd_jax.audio.spectral`, computed on the CPU."""

    name: ClassVar[str]
    num_devices: ClassVar[int] = 1
    assumption: ClassVar[str] = ""

    @property
    def width(self) -> int:
        """Number of values in a frame."""
        return getattr(self, SPECTRAL[self.name].size)

    @property
    def settings(self) -> dict[str, Any]:
        """Name and width, as in a recipe."""
        return {"name": self.name, SPECTRAL[self.name].size: self.width}

    @property
    def fingerprint(self) -> str:
        """A string of all settings on which the features depend."""
        return SPECTRAL[self.name].fingerprint(self.width)

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `serkd_jax.data.sources.Frontend`; each waveform is processed on its own."""
        for i, waveform in enumerate(waveforms):
            yield i, SPECTRAL[self.name].compute(waveform[: num_samples(max_frames)], self.width)


@dataclasses.dataclass(frozen=True)
class LogMel(WithoutModel):
    """Log-mel frames; see `serkd_jax.audio.logmel.log_mel`."""

    num_mels: int = 80
    name: ClassVar[str] = "logmel"


@dataclasses.dataclass(frozen=True)
class Mfcc(WithoutModel):
    """Mel-frequency cepstral coefficients; see `serkd_jax.audio.mfcc.mfcc`."""

    num_coefficients: int = 39
    name: ClassVar[str] = "mfcc"


@dataclasses.dataclass(frozen=True)
class Spectra(WithoutModel):
    """Spectra and cepstra of CA-MSER; see `serkd_jax.audio.spectra.spectra`."""

    num_values: int = SPECTRAL["spectra"].most
    name: ClassVar[str] = "spectra"


WITHOUT_MODEL = {kind.name: kind for kind in (LogMel, Mfcc, Spectra)}


class Batching(NamedTuple):
    """How clips are put into batches."""

    frames: int  # number in a full batch, including padding; a longer clip is a batch of its own
    growth: float  # factor from one padded length to the next


# On a CPU, a single clip is as fast as any batch, and each further program costs two seconds.
CPU_BATCHING = Batching(50, 1.05)
ACCELERATOR_BATCHING = Batching(8192, 1.25)


def default_batching() -> Batching:
    """Returns the batching that suits the kind of device that JAX uses."""
    return CPU_BATCHING if jax.default_backend() == "cpu" else ACCELERATOR_BATCHING


class Batch(NamedTuple):
    """Clips that go through an encoder together."""

    clips: np.ndarray  # (n,) int, the numbers of the clips
    frames: int  # number of frames to which each clip is padded
    size: int  # number of rows of the program, at least n


def bucket_lengths(max_frames: int, growth: float) -> list[int]:
    """Returns the lengths to which clips are padded, in ascending order.

    The last is `max_frames`, each is at most `growth` times the previous one, and none is shorter
    than a second.
    """
    lengths = [max_frames]
    while (shorter := math.ceil(lengths[0] / growth)) >= 50 and shorter < lengths[0]:
        lengths.insert(0, shorter)
    return lengths


def plan_batches(num_frames: Sequence[int], max_frames: int, batching: Batching) -> list[Batch]:
    """Makes batches of clips of similar length, which depend only on the arguments.

    A batch is padded to the bucket of its longest clip and takes clips of that bucket and the next
    shorter one, so no clip grows by more than `batching.growth` squared. Clips that do not fill a
    batch go into one with half of the rows, or a quarter, and so on, which needs only a few
    programs for each length.

    Args:
        num_frames: the number of frames of each clip, at most `max_frames`.
        max_frames: the greatest length.
        batching: how many frames go into a batch, and how clips are padded.
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
        model: a local folder in Hugging Face's format, or a name on the hub.
        revision: branch, tag or commit on the hub; None means the main branch.
        layer: -1 for the last hidden state, with the final norm that some encoders have; otherwise
            an index into `EncoderOutput.hidden_states`, where k is the output of layer k without
            that norm; or a list of these, of which the mean is taken.
        dtype: dtype of the computation, float32 or bfloat16.
        pad_to_30s: only for Whisper: whether to pad every clip to 30 s, as `transformers` does.
        kind: the `model_type` that the model must have; empty allows any.
        beside: a front-end without a model, whose frames are put before the hidden states.
        batching: how clips are put into batches; None means `default_batching()`.
        devices: the devices to use; empty means all local devices.
        safetensors_only: whether to refuse weights in torch's own format, which is a pickle.
    """

    model: str
    revision: str | None = None
    layer: int | Sequence[int] = -1
    dtype: str = "float32"
    pad_to_30s: bool = False
    kind: str = ""
    beside: WithoutModel | None = None
    batching: Batching | None = None
    devices: tuple[jax.Device, ...] = ()
    safetensors_only: bool = False

    VERSION: ClassVar[int] = 3

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The architecture and weights, against which the settings have been checked."""
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
            raise UserError(f"{self.model} is a {found.model_type}: only Whisper has pad_to_30s")
        if found.num_frames(checkpoint.config, num_samples(326)) != 326:
            raise UserError(f"{self.model} does not give one frame every {HOP} samples")
        layers = checkpoint.config.num_hidden_layers
        if not self.layers or any(not -layers - 1 <= layer <= layers for layer in self.layers):
            raise UserError(
                f"{self.model} has {layers} layers: layer {self.layer} is not in "
                f"{-layers - 1} to {layers}, nor a list of such numbers"
            )
        return checkpoint

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers in `layer`, one or several, all different."""
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
        """Width of the hidden states, and of what is beside them."""
        return self.checkpoint.config.hidden_size + (self.beside.width if self.beside else 0)

    @property
    def assumption(self) -> str:
        """See `Checkpoint`."""
        return self.checkpoint.assumption

    @property
    def settings(self) -> dict[str, Any]:
        """The model, weights, layer and dtype, and what may affect the rounding."""
        keys = ("name", "model", "revision", "layer", "dtype", *self.checkpoint.kind.options)
        return {key: getattr(self, key) for key in keys} | {
            "beside": self.beside and self.beside.settings,
            "do_normalize": self.checkpoint.do_normalize,
            "assumption": self.assumption,
            "weights_sha256": self.checkpoint.sha256,
            "batch_frames": self._batching.frames,
            "device": self._devices[0].device_kind,
        }

    @property
    def fingerprint(self) -> str:
        """A string of the weights' hash and the settings on which the features depend.

        The hash is the same for a folder and a name on the hub that have the same weights. Device
        and batch size are not in it, since they affect only the rounding.
        """
        layers = ",".join(map(str, self.layers))
        padded = "-30s" if self.pad_to_30s else ""
        version = f"{self.name}-v{self.VERSION}"
        states = f"{version}-{self.checkpoint.sha256}-{layers}-{self.dtype}{padded}"
        return f"{self.beside.fingerprint} beside {states}" if self.beside else states

    @property
    def num_devices(self) -> int:
        """The number of devices that compute."""
        return len(self._devices)

    @property
    def _batching(self) -> Batching:
        return self.batching or default_batching()

    @cached_property
    def _devices(self) -> list[jax.Device]:
        return list(self.devices or jax.local_devices())

    @cached_property
    def _encode(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(self.dtype)), self.checkpoint.params)
        params = parallel.replicate(params, self._devices)
        compiled = parallel.compile_map(self.encode, self._devices)
        return lambda waveforms, lengths: compiled(params, (waveforms, lengths))

    def encode(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The features, float16 (B, T, N), of waveforms (B, samples) with their lengths (B,)."""
        options = {"pad_to_30s": True} if self.pad_to_30s else {}
        output = self.checkpoint.encode(params, *batch, self.dtype, **options)
        states = [
            output.last_hidden_state if layer == -1 else output.hidden_states[layer]
            for layer in self.layers
        ]
        if len(states) == 1:
            return states[0].astype(jnp.float16)
        return jnp.stack(states).astype(jnp.float32).mean(0).astype(jnp.float16)

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        max_frames: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """See `serkd_jax.data.sources.Frontend`; the devices share the batches of a group."""
        most = self.checkpoint.kind.max_frames(self.checkpoint.config)
        if most is not None and max_frames > most:
            raise UserError(
                f"{self.model} takes at most {most} frames, {most / FRAME_RATE:g} s, not "
                f"{max_frames}: lower max_frames or max_seconds"
            )
        waveforms = [waveform[: num_samples(max_frames)] for waveform in waveforms]
        frames = np.array([num_frames(len(waveform)) for waveform in waveforms])
        for i, states in self._hidden_states(waveforms, frames, max_frames, groups):
            if self.beside:
                ((_, beside),) = self.beside([waveforms[i]], max_frames)
                states = np.concatenate([beside, states], axis=1)
            yield i, states

    def _hidden_states(
        self,
        waveforms: Sequence[np.ndarray],
        frames: np.ndarray,
        max_frames: int,
        groups: Sequence[int] | None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        running = None  # batches on the devices while the host takes the previous results
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
        """Yields batches of the same shape, as many at a time as there are devices."""
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
    """Returns (devices, size, samples) float32, and (devices, size) int32 numbers of samples."""
    _, frames, size = batches[0]
    # All samples that a clip of `frames` frames can have, since the normalisation includes those
    # after the last frame.
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
    """Yields the valid frames of each clip."""
    hidden = np.asarray(hidden)
    for k, batch in enumerate(batches):
        for row, clip in enumerate(batch.clips):
            yield int(clip), hidden[k, row, : num_frames[clip]].copy()  # frees the padding


def make_frontend(
    config: ConfigDict, devices: Sequence[jax.Device] = ()
) -> WithoutModel | Pretrained:
    """Makes a front-end from the `frontend` part of a config.

    Args:
        config: `name` is that of a class of `WITHOUT_MODEL` or a kind of encoder; the other keys
            are attributes of this class or of `Pretrained`, where `beside` is a name.
        devices: the devices on which an encoder computes; empty means all local devices.
    """
    settings = config.to_dict()
    name = settings.pop("name")
    if name not in (known := (*WITHOUT_MODEL, *ENCODERS)):
        raise UserError(f"frontend.name is {name!r}: use one of {', '.join(known)}")
    try:
        if name in WITHOUT_MODEL:
            return WITHOUT_MODEL[name](**settings)
        beside = settings.pop("beside", "")
        beside = WITHOUT_MODEL[beside]() if beside else None
        return Pretrained(**settings, kind=name, beside=beside, devices=tuple(devices))
    except TypeError as error:
        raise UserError(f"frontend {name}: {error}; use the {name} part of a recipe") from error
