"""Loads encoders in Hugging Face's format from a folder or the hub into Flax, and saves them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.encoders import ENCODERS, find_encoder, hub
from serkd_jax.encoders.base import (
    Encoder,
    EncoderModel,
    EncoderOutput,
    Tensors,
    normalize_waveform,
)
from serkd_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
MASKED = "masked_spec_embed"  # the vector that replaces masked frames in training
MOST_NAMED = 10  # the most tensors that a message names
# Keys of a config.json that say how it was written, not what the model computes.
HISTORY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, and so hashable
class Checkpoint:
    """A pretrained encoder.

    Attributes:
        kind: the kind of encoder.
        config: the architecture, as a configuration of the library `transformers`.
        params: the parameters of `model()`, float32 NumPy arrays: `{"embed": ..., "encoder": ...}`.
            Put them on the device once (`jax.device_put`), not with every call.
        do_normalize: whether the model expects each clip to have mean 0 and variance 1.
        sha256: hash of everything on which the hidden states depend, to show what features were
            made with. It is the same for a whole model and for its encoder only, in one file or in
            shards.
        assumption: what was assumed about the preprocessor if it had no file; else empty.
        masked_spec_embed: (H,) the vector that torch's model puts in place of masked frames. It is
            not used here; `save_encoder` writes it again.
        num_parameters: number of the encoder's parameters in its files, with `masked_spec_embed`.
    """

    kind: Encoder
    config: PreTrainedConfig
    params: dict[str, Any]
    do_normalize: bool
    sha256: str
    assumption: str = ""
    masked_spec_embed: np.ndarray | None = None
    num_parameters: int = 0

    def model(self, dtype: DTypeLike | None = None, **options: Any) -> EncoderModel:
        """Makes the Flax module; see `EncoderModel`."""
        return EncoderModel(self.kind, self.config, dtype, tuple(options.items()))

    def encode(
        self,
        params: Any,
        waveform: jax.Array,
        num_samples: jax.Array | None = None,
        dtype: DTypeLike | None = None,
        **options: Any,
    ) -> EncoderOutput:
        """Encodes waveforms as they were recorded; includes what the preprocessor does.

        Args:
            params: the checkpoint's parameters, or others of the same shapes.
            waveform: (B, samples) float32, 16 kHz.
            num_samples: (B,) int, the number of valid samples of each clip; None means all.
            dtype: dtype of the computation; None means that of the parameters.
            **options: options of the encoder, such as Whisper's `pad_to_30s`.
        """
        if num_samples is None:
            num_samples = jnp.full(waveform.shape[0], waveform.shape[1])
        if self.do_normalize:
            waveform = normalize_waveform(waveform, num_samples)
        model = self.model(dtype, **options)
        return model.apply({"params": params}, waveform, num_samples)


def load_encoder(
    name_or_path: str | Path, revision: str | None = None, safetensors_only: bool = False
) -> Checkpoint:
    """Loads an encoder of the kind that its `config.json` names, without heads and decoders.

    Args:
        name_or_path: a local folder, or a model's name on the Hugging Face hub.
        revision: branch, tag or commit on the hub; None means its main branch.
        safetensors_only: whether to ignore a `pytorch_model.bin`, which is a pickle.

    Raises:
        UserError: the folder, the model or one of its files is missing or damaged, the architecture
            is not supported, the tensors do not fit the architecture, or there is only a
            `pytorch_model.bin` and torch is not installed.
    """
    stored = (SAFETENSORS,) if safetensors_only else (SAFETENSORS, TORCH)
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(str(name_or_path), revision, stored)
    content = _read_json(folder / CONFIG)
    kind, config = _read_config(folder / CONFIG, content)
    do_normalize, assumption = _read_preprocessor(folder, kind, config)
    try:
        tensors = _read_tensors(_weight_files(folder, stored), kind)
        num_parameters = sum(value.size for value in tensors.values())
        masked = tensors.pop(MASKED, None)
        params = convert_params(kind, config, tensors)
    except ValueError as error:
        raise UserError(f"{folder} is not the model that its {CONFIG} describes: {error}") from None
    return Checkpoint(
        kind=kind,
        config=config,
        params=params,
        do_normalize=do_normalize,
        sha256=_sha256(config, do_normalize, params),
        assumption=assumption,
        num_parameters=num_parameters,
        masked_spec_embed=None if masked is None else masked.astype(np.float32),
    )


def save_encoder(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Writes a folder that `load_encoder` and the model's class in `transformers` can read.

    To save a fine-tuned encoder, replace the parameters it started from by its own:
    `save_encoder(dataclasses.replace(checkpoint, params=params), folder)`. Files of the same names
    in the folder are overwritten. Weights are stored in half precision if that loses nothing.
    Without `masked_spec_embed`, `transformers` initialises that vector randomly if the
    configuration asks for it; only its training reads it.

    Raises:
        UserError: the parameters do not fit the architecture or are not finite, or the folder has
            a `processor_config.json`, which `transformers` would read instead of our file.
    """
    from safetensors.numpy import save_file

    kind, config = checkpoint.kind, checkpoint.config
    tensors = _torch_tensors(kind, config, checkpoint.params)
    masks = getattr(config, "mask_time_prob", 0) > 0 or getattr(config, "mask_feature_prob", 0) > 0
    if masks and checkpoint.masked_spec_embed is not None:
        tensors[MASKED] = checkpoint.masked_spec_embed
    if broken := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise UserError(f"not saved: NaN or infinity in {_some(broken)}")
    folder = Path(folder).expanduser()
    if (folder / PREPROCESSORS[1]).exists():
        raise UserError(f"{folder} holds {PREPROCESSORS[1]} of another model: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SAFETENSORS}.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})
    content = config.to_dict() | {"architectures": [kind.model_name], "dtype": "float32"}
    type(config).from_dict(content).save_pretrained(folder)
    kind.write_preprocessor(config, checkpoint.do_normalize, folder)
    partial.replace(folder / SAFETENSORS)


def convert_params(
    kind: Encoder, config: PreTrainedConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Turns the tensors of torch's encoder into the parameters of `EncoderModel(kind, config)`.

    Args:
        kind: the kind of encoder.
        config: the architecture.
        tensors: the tensors by their names within the encoder, of any float type.

    Raises:
        ValueError: lists the tensors that are missing, unexpected or of another shape.
    """
    tensors = kind.from_torch({name: value for name, value in tensors.items() if name != MASKED})
    expected = _param_shapes(kind, config)
    _check_shapes(
        {name: value.shape for name, value in tensors.items()},
        {kind.torch_name(path): _reversed(path, shape) for path, shape in expected.items()},
    )
    params = {}
    for path in expected:
        value = tensors[kind.torch_name(path)]
        value = value.T if path[-1] == "kernel" else value
        params[path] = np.ascontiguousarray(value, dtype=np.float32)
    return traverse_util.unflatten_dict(params)


def _reversed(path: tuple[str, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape that a parameter has in torch."""
    return tuple(shape[::-1] if path[-1] == "kernel" else shape)


def _param_shapes(kind: Encoder, config: PreTrainedConfig) -> dict[tuple[str, ...], tuple]:
    """Returns the shape of each parameter by its path, without computing or allocating."""
    waveform = jax.ShapeDtypeStruct((1, SAMPLE_RATE), jnp.float32)
    init = EncoderModel(kind, config).init
    variables = jax.eval_shape(init, jax.random.key(0), waveform)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables["params"]).items()}


def _check_shapes(have: dict[str, tuple], want: dict[str, tuple]) -> None:
    """Compares the shapes of tensors with the expected ones.

    Raises:
        UserError: lists the tensors that are missing, unexpected or of another shape.
    """
    missing = want.keys() - have.keys()
    example = min(missing, default="")
    for name in have if missing else ():
        prefix = name.removesuffix(example)
        if prefix != name and all(prefix + each in have for each in missing):
            raise UserError(
                f"its tensors' names begin with {prefix!r}, as in a model that holds it: save the "
                f"model in it, or take {prefix!r} off the names"
            )
    shared = sorted(want.keys() & have.keys())
    misshapen = [
        f"{name} has shape {have[name]} instead of {want[name]}"
        for name in shared
        if have[name] != want[name]
    ]
    lists = {
        "missing": sorted(missing),
        "unexpected": sorted(have.keys() - want.keys()),
        "of another shape": misshapen,
    }
    problems = [f"{title} {_some(names)}" for title, names in lists.items() if names]
    if problems:
        raise UserError("; ".join(problems))


def _some(names: Sequence[str]) -> str:
    """Lists the first names, with the total number if there are more."""
    named = ", ".join(names[:MOST_NAMED])
    return named if len(names) <= MOST_NAMED else f"{named}, ... ({len(names)} in all)"


def _torch_tensors(kind: Encoder, config: PreTrainedConfig, params: Mapping[str, Any]) -> Tensors:
    """Does the inverse of `convert_params`, with the names that current torch writes."""
    paths = traverse_util.flatten_dict(params)
    _check_shapes(
        {kind.torch_name(path): _reversed(path, np.shape(x)) for path, x in paths.items()},
        {
            kind.torch_name(path): _reversed(path, shape)
            for path, shape in _param_shapes(kind, config).items()
        },
    )
    tensors = {}
    for path, value in paths.items():
        value = np.asarray(value, np.float32)
        value = value.T if path[-1] == "kernel" else value
        tensors[kind.torch_name(path)] = np.ascontiguousarray(value)
    tensors = kind.to_torch(config, tensors)
    return {f"{kind.saved_prefix}{name}": _halved(value) for name, value in tensors.items()}


def _halved(value: np.ndarray) -> np.ndarray:
    """Converts to half precision if that loses nothing."""
    half = value.astype(np.float16)
    return half if np.array_equal(half.astype(value.dtype), value) else value


def _download(name: str, revision: str | None, stored: Sequence[str]) -> Path:
    """Downloads the files that `load_encoder` reads, unless they are in the hub's cache."""
    remedy = f"without network access, pass the path of a folder with {CONFIG} and {SAFETENSORS}"
    for weights in stored:  # torch's file, which is as large, only if it is needed
        stem, suffix = weights.split(".")
        patterns = [CONFIG, *PREPROCESSORS]
        patterns += [weights, f"{weights}.index.json", f"{stem}-*-of-*.{suffix}"]
        folder = hub.download(name, revision, patterns, remedy)
        if any(folder.glob(f"{stem}*.{suffix}")):
            break
    return folder


def _weight_files(folder: Path, stored: Sequence[str]) -> list[Path]:
    """Finds the files with the weights: one file or an index's shards, preferably safetensors."""
    for name in stored:
        if (file := folder / name).exists():
            return [file]
        if (index := folder / f"{name}.index.json").exists():
            weight_map = _read_json(index).get("weight_map", {})
            shards = [folder / shard for shard in sorted(set(weight_map.values()))]
            if any((s.parent, s.suffix) != (folder, Path(name).suffix) for s in shards):
                raise UserError(f"{index} names files of another place or kind: fetch it again")
            missing = [shard.name for shard in shards if not shard.exists()]
            if missing or not shards:
                raise UserError(
                    f"{index} names {', '.join(missing) or 'no files'}"
                    f"{', missing in that folder' if missing else ''}: download the model again"
                )
            return shards
    raise UserError(f"{folder} has none of {', '.join(stored)}: no weights to load")


def _read_tensors(files: Sequence[Path], kind: Encoder) -> Tensors:
    """Reads the encoder's tensors, by their names within it, but not those of heads and decoders.

    Raises:
        ValueError: the tensors are those of another kind of model.
    """
    readers = [_open_torch if file.suffix == ".bin" else _open_safetensors for file in files]
    with contextlib.ExitStack() as opened:
        found: dict[str, Callable[[], np.ndarray]] = {}
        for file, reader in zip(files, readers, strict=True):
            found |= opened.enter_context(reader(file))
        prefix = _find_prefix(found, kind)
        return {
            name.removeprefix(prefix): read()
            for name, read in found.items()
            if name.startswith(prefix)
        }


def _find_prefix(names: Mapping[str, Any], kind: Encoder) -> str:
    """Finds the prefix of the names of the encoder's tensors; empty if it is stored by itself."""

    def find(prefixes: Sequence[str]) -> str:
        return next((p for p in prefixes if any(name.startswith(p) for name in names)), "")

    if prefix := find(kind.prefixes):
        return prefix
    if prefix := find([f"{other}." for other in ENCODERS]):
        raise ValueError(f"it says {kind.model_type}, but there are tensors {prefix}...")
    if prefix := find(("model.decoder.", "decoder.")):
        raise ValueError(f"there is no encoder in it, only a decoder (tensors {prefix}...)")
    return ""


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    import safetensors

    # bfloat16, which NumPy lacks, is read as the dtype that JAX registers with NumPy.
    with (
        _damage_explained(file, safetensors.SafetensorError),
        safetensors.safe_open(file, framework="numpy") as tensors,
    ):
        names = tensors.keys()
        yield {name: functools.partial(tensors.get_tensor, name) for name in names}


@contextlib.contextmanager
def _open_torch(file: Path) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is in torch's own format and there is no {SAFETENSORS} beside it. Reading "
            'it needs torch: pip install "serkd-jax[torch]"'
        ) from error
    # torch raises any exception of its zip or pickle reader.
    with _damage_explained(file, Exception):
        # weights_only, since a full pickle could run any code.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("it holds more than tensors by name")
        arrays = {name: functools.partial(_to_numpy, value) for name, value in tensors.items()}
    yield arrays


def _to_numpy(tensor: Any) -> np.ndarray:
    """Converts a torch tensor by way of float32, since NumPy has no bfloat16."""
    return tensor.float().numpy()


@contextlib.contextmanager
def _damage_explained(file: Path, errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise UserError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read; it is truncated, damaged or "
            f"a git-lfs pointer: delete it and download it again. The reader's error: {error}"
        ) from error


def _read_config(file: Path, content: Mapping[str, Any]) -> tuple[Encoder, PreTrainedConfig]:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type, architectures = content.get("model_type"), content.get("architectures") or []
    if model_type not in ENCODERS:
        raise UserError(
            f"{file} describes a model of type {model_type!r}: the supported encoders are "
            f"{', '.join(ENCODERS)}"
        )
    kind = find_encoder(model_type)
    for other in (find_encoder(name) for name in ENCODERS if name != model_type):
        family = other.model_name.removesuffix("Model")
        if wrong := [name for name in architectures if str(name).startswith(family)]:
            raise UserError(
                f"{file} says model_type {model_type!r} but architecture {wrong[0]!r}: one of "
                "them is wrong; download it again"
            )
    try:
        config = getattr(transformers, kind.config_name).from_dict(content)
        kind.check_config(config)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{file} describes an unsupported architecture: {error}") from error
    return kind, config


def _read_preprocessor(folder: Path, kind: Encoder, config: PreTrainedConfig) -> tuple[bool, str]:
    """Returns whether waveforms are normalised, and what was assumed if no file says so.

    As in `transformers`, a feature extractor in a processor's file takes precedence.
    """
    files = [file for name in PREPROCESSORS if (file := folder / name).exists()]
    contents = [_read_json(file) for file in files]
    nested = [
        content["feature_extractor"] for content in contents if "feature_extractor" in content
    ]
    settings = (nested or contents or [{}])[0]
    try:
        do_normalize = kind.check_preprocessor(config, settings)
    except ValueError as error:
        raise UserError(f"{files[0]} is not a preprocessor of this model: {error}") from error
    if files:
        return do_normalize, ""
    return do_normalize, f"{folder} has no {PREPROCESSORS[0]}: {kind.assumption}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: a model's folder holds {CONFIG} and {SAFETENSORS}"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    return content


def _sha256(config: PreTrainedConfig, do_normalize: bool, params: Mapping[str, Any]) -> str:
    """Returns a hash of the architecture, the normalisation and the parameters."""
    fields = {key: x for key, x in config.to_diff_dict().items() if key not in HISTORY}
    described = json.dumps([fields, do_normalize], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    for path, value in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{value.shape}".encode())
        digest.update(value)
    return digest.hexdigest()
