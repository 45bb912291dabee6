"""HuBERT checkpoints in Hugging Face format: from a folder or the hub to Flax, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from serkd_jax import hub
from serkd_jax.errors import UserError
from serkd_jax.models.hubert import HubertModel, check_config

if TYPE_CHECKING:
    from transformers import HubertConfig

CONFIG = "config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"

# Parts of fine-tuned checkpoints that HuBERT itself does not need.
MASKED = "masked_spec_embed"  # what takes the place of masked frames in training
HEADS = re.compile(rf"(lm_head|projector|classifier)\.|({MASKED}|layer_weights)$")
POSITIONS = "encoder.pos_conv_embed."
# The two spellings of torch's weight normalisation: magnitude and direction of a weight.
WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)

RUNNING = ("running_mean", "running_var")  # of a batch norm
BATCH_NORM_EPSILON = 1e-5  # torch's default


@dataclasses.dataclass(frozen=True)
class HubertCheckpoint:
    """A pre-trained HuBERT.

    Attributes:
        config: the architecture.
        params: of `HubertModel(config)`, float32 NumPy arrays: `{"embed": ..., "encoder": ...}`.
            Put them on the device once (`jax.device_put`), not with every call.
        do_normalize: whether the model wants each clip with zero mean and unit variance.
        sha256: of the files that were read, to tell what features were made with.
        masked_spec_embed: (H,) what torch's model puts in place of masked frames. `HubertModel`
            has no use for it; `save_hubert` passes it on.
    """

    config: HubertConfig
    params: dict[str, Any]
    do_normalize: bool
    sha256: str
    masked_spec_embed: np.ndarray | None = None


def load_hubert(
    name_or_path: str | Path, revision: str | None = None, safetensors_only: bool = False
) -> HubertCheckpoint:
    """Loads a HuBERT checkpoint; heads of fine-tuned models are left out.

    Args:
        name_or_path: a local folder, or a model's name on the Hugging Face hub.
        revision: branch, tag or commit on the hub; None means its main branch.
        safetensors_only: whether to leave alone a `pytorch_model.bin`, which is a pickle.

    Raises:
        UserError: the folder, the model or one of its files is not there or damaged, the
            architecture is not supported, the tensors are not those of the architecture, or there
            is only a `pytorch_model.bin` and torch is not installed.
    """
    stored = (SAFETENSORS,) if safetensors_only else (SAFETENSORS, TORCH)
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = _download(str(name_or_path), revision, stored)
    config = _read_config(folder / CONFIG)
    weights = _weight_files(folder, stored)
    preprocessors = [file for name in PREPROCESSORS if (file := folder / name).exists()]
    tensors: dict[str, np.ndarray] = {}
    for file in weights:
        tensors |= _read_torch(file) if file.suffix == ".bin" else _read_safetensors(file)
    masked = tensors.get(MASKED, tensors.get(f"hubert.{MASKED}"))
    try:
        params = convert_params(config, tensors)
    except ValueError as error:
        raise UserError(f"{folder} is not the model that its {CONFIG} describes: {error}") from None
    return HubertCheckpoint(
        config=config,
        params=params,
        do_normalize=_read_do_normalize(preprocessors),
        sha256=_sha256([folder / CONFIG, *preprocessors, *weights]),
        masked_spec_embed=None if masked is None else masked.astype(np.float32),
    )


def save_hubert(checkpoint: HubertCheckpoint, folder: str | Path) -> None:
    """Writes a folder that `transformers.HubertModel.from_pretrained` and `load_hubert` read.

    To save a fine-tuned encoder, put its parameters in place of those it started from:
    `save_hubert(dataclasses.replace(checkpoint, params=params), folder)`. Files of the same names
    in the folder are replaced. Without `masked_spec_embed`, transformers initialises that vector
    anew if the configuration asks for one; only its training reads it.

    Raises:
        UserError: the parameters are not those of the architecture, or not finite; or the folder
            has a `processor_config.json`, which transformers would read instead of ours.
    """
    from safetensors.numpy import save_file
    from transformers import HubertConfig, Wav2Vec2FeatureExtractor

    tensors = _torch_tensors(checkpoint.config, checkpoint.params)
    masks = checkpoint.config.mask_time_prob > 0 or checkpoint.config.mask_feature_prob > 0
    if masks and checkpoint.masked_spec_embed is not None:
        tensors[MASKED] = checkpoint.masked_spec_embed
    if broken := [name for name, value in tensors.items() if not np.isfinite(value).all()]:
        raise UserError(f"not saved: NaN or infinity in {', '.join(broken)}")
    folder = Path(folder).expanduser()
    if (folder / PREPROCESSORS[1]).exists():
        raise UserError(f"{folder} holds {PREPROCESSORS[1]} of another model: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SAFETENSORS}.tmp"
    save_file(tensors, partial, metadata={"format": "pt"})
    config = checkpoint.config.to_dict() | {"architectures": ["HubertModel"], "dtype": "float32"}
    HubertConfig.from_dict(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=checkpoint.do_normalize,
        # With group norm, transformers wants padding with zeros and no mask.
        return_attention_mask=checkpoint.config.feat_extract_norm == "layer",
    ).save_pretrained(folder)
    partial.replace(folder / SAFETENSORS)


def torch_name(path: tuple[str, ...]) -> str:
    """Name in `transformers.HubertModel` of a parameter of our `HubertModel`.

    For example `("encoder", "layers_3", "output_dense", "kernel")` is
    `encoder.layers.3.feed_forward.output_dense.weight`. The values differ by the order of axes
    alone: torch's is the reverse of Flax's for dense and convolution kernels alike.
    """
    name = ".".join(path)
    name = re.sub(r"^embed\.", "", name)
    name = re.sub(r"^pos_conv_embed\.", "encoder.pos_conv_embed.", name)
    name = re.sub(r"\b(conv_layers|layers)_(\d+)\.", r"\1.\2.", name)
    name = re.sub(r"\b(intermediate|output)_dense\.", r"feed_forward.\g<0>", name)
    return re.sub(r"\b(kernel|scale)$", "weight", name)


def convert_params(config: HubertConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns the tensors of a torch HuBERT into the parameters of `HubertModel(config)`.

    Args:
        config: the architecture.
        tensors: by torch name, with or without the `hubert.` of fine-tuned models, any float type.

    Raises:
        ValueError: lists all tensors that are missing, unexpected or of another shape.
    """
    tensors = {name.removeprefix("hubert."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not HEADS.match(name)}
    tensors = _fold_batch_norm(_fold_weight_norm(tensors))
    expected = {torch_name(path): (path, shape) for path, shape in _param_shapes(config).items()}
    _check_shapes(
        {name: value.shape for name, value in tensors.items()},
        {name: shape[::-1] for name, (_, shape) in expected.items()},
    )
    return traverse_util.unflatten_dict(
        {
            path: np.ascontiguousarray(tensors[name].T, dtype=np.float32)
            for name, (path, _) in expected.items()
        }
    )


def _param_shapes(config: HubertConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each parameter, by its path; computes and allocates nothing."""
    waveform = jax.ShapeDtypeStruct((1, 16_000), jnp.float32)
    variables = jax.eval_shape(HubertModel(config).init, jax.random.key(0), waveform)
    return {k: v.shape for k, v in traverse_util.flatten_dict(variables["params"]).items()}


def _check_shapes(have: dict[str, tuple], want: dict[str, tuple]) -> None:
    """Raises a UserError that lists all that is missing, unexpected or of another shape."""
    problems = [f"missing {name}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    problems += [
        f"{name} has shape {have[name]} instead of {want[name]}"
        for name in sorted(want.keys() & have.keys())
        if have[name] != want[name]
    ]
    if problems:
        raise UserError("; ".join(problems))


def _torch_tensors(config: HubertConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `convert_params`, with the names that torch writes today."""
    paths = traverse_util.flatten_dict(params)
    _check_shapes(
        {torch_name(path): np.shape(value)[::-1] for path, value in paths.items()},
        {torch_name(path): shape[::-1] for path, shape in _param_shapes(config).items()},
    )
    tensors = {
        torch_name(path): np.ascontiguousarray(np.asarray(value, np.float32).T)
        for path, value in paths.items()
    }
    if config.conv_pos_batch_norm:
        norm = f"{POSITIONS}batch_norm."
        scale = tensors.pop(f"{POSITIONS}batch_norm_scale")
        tensors[f"{norm}weight"] = scale
        tensors[f"{norm}bias"] = tensors.pop(f"{POSITIONS}batch_norm_bias")
        tensors[f"{norm}running_mean"] = np.zeros_like(scale)
        tensors[f"{norm}running_var"] = np.full_like(scale, 1 - BATCH_NORM_EPSILON)
        tensors[f"{norm}num_batches_tracked"] = np.array(0)
    else:
        magnitude, direction = WEIGHT_NORM[-1]
        weight = tensors.pop(f"{POSITIONS}conv.weight")
        norm = np.sqrt(np.square(weight).sum((0, 1), keepdims=True))
        tensors[f"{POSITIONS}conv.{magnitude}"] = norm
        # Any direction will do where the magnitude is 0, but 0 / 0 will not.
        tensors[f"{POSITIONS}conv.{direction}"] = np.where(norm > 0, weight, np.float32(1))
    return tensors


def _fold_batch_norm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces the batch norm before the positional convolution by a scale and a bias."""
    prefix = f"{POSITIONS}batch_norm."
    if not all(prefix + name in tensors for name in ("weight", "bias", *RUNNING)):
        return tensors  # there is none, or what is missing will be reported
    tensors = dict(tensors)
    weight, bias, mean, variance = (
        tensors.pop(prefix + name).astype(np.float32) for name in ("weight", "bias", *RUNNING)
    )
    tensors.pop(f"{prefix}num_batches_tracked", None)
    scale = weight / np.sqrt(variance + BATCH_NORM_EPSILON)
    return tensors | {
        f"{POSITIONS}batch_norm_scale": scale,
        f"{POSITIONS}batch_norm_bias": bias - mean * scale,
    }


def _fold_weight_norm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces each weight-normalised pair by its weight, g * v / |v|."""
    tensors = dict(tensors)
    for magnitude, direction in WEIGHT_NORM:
        for name in [name for name in tensors if name.endswith(f".{direction}")]:
            prefix = name.removesuffix(direction)
            if prefix + magnitude not in tensors:
                continue  # both halves will be reported: one missing, one unexpected
            g = tensors.pop(prefix + magnitude).astype(np.float32)
            v = tensors.pop(name).astype(np.float32)
            axes = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
            norm = np.sqrt(np.square(v).sum(axes, keepdims=True))
            tensors[f"{prefix}weight"] = v * (g / norm)
    return tensors


def _download(name: str, revision: str | None, stored: Sequence[str]) -> Path:
    """Downloads (once; the hub's cache is used) the files that `load_hubert` reads."""
    remedy = f"without network access, pass the path of a folder with {CONFIG} and {SAFETENSORS}"
    for weights in stored:  # torch's, as large as the first, only if needed
        stem, suffix = weights.split(".")
        patterns = [CONFIG, *PREPROCESSORS]
        patterns += [weights, f"{weights}.index.json", f"{stem}-*-of-*.{suffix}"]
        folder = hub.download(name, revision, patterns, remedy)
        if any(folder.glob(f"{stem}*.{suffix}")):
            break
    return folder


def _weight_files(folder: Path, stored: Sequence[str]) -> list[Path]:
    """The files with the weights: one, or the shards that an index names; safetensors first."""
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


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    import safetensors

    # bfloat16, which NumPy lacks, is read as the type that jax has registered with it.
    with (
        _damage_explained(file, safetensors.SafetensorError),
        safetensors.safe_open(file, framework="numpy") as tensors,
    ):
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file} is in torch's own format and there is no {SAFETENSORS} beside it. Reading "
            'it needs torch: pip install "serkd-jax[torch]"'
        ) from error
    # torch raises whatever its zip or pickle reader stumbles over.
    with _damage_explained(file, Exception):
        # weights_only: a full pickle could run any code.
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _damage_explained(file: Path, errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise UserError(
            f"{file} ({file.stat().st_size:,} bytes) cannot be read; it is truncated, damaged or "
            f"a git-lfs pointer: delete it and download it again. The reader's words: {error}"
        ) from error


def _read_config(file: Path) -> HubertConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import HubertConfig

    content = _read_json(file)
    if (model_type := content.get("model_type")) != "hubert":
        raise UserError(f"{file} describes a model of type {model_type!r}, not 'hubert'")
    try:
        config = HubertConfig.from_dict(content)
        check_config(config)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not an architecture that is supported: {error}") from error
    return config


def _read_do_normalize(files: list[Path]) -> bool:
    """As transformers: a feature extractor in a processor's file goes first; default is True."""
    contents = [_read_json(file) for file in files]
    nested = [
        content["feature_extractor"] for content in contents if "feature_extractor" in content
    ]
    return bool((nested or contents or [{}])[0].get("do_normalize", True))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: a model's folder holds {CONFIG} and {SAFETENSORS}"
        ) from None
    except ValueError as error:  # not UTF-8 or not JSON
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    return content


def _sha256(files: list[Path]) -> str:
    """Digest over the names and contents of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
