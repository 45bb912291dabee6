"""Runs an exported model: a function for each file format, and the front-end before it.

Packages are imported only when they are needed: ONNX with log-mel features needs only numpy and
onnxruntime. No file is read by pickle. StableHLO, ONNX and LiteRT files are graphs of operations,
which cannot access anything but their inputs: those that could are refused.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.deploy.folder import CONFIG, FILES, FRONTEND, REMEDY, ModelConfig
from serkd_jax.errors import UserError

# (features float32 (B, T, N), num_frames int32 (B,)) -> logits float32 (B, C)
Classify = Callable[[np.ndarray, np.ndarray], np.ndarray]
# waveforms at 16 kHz -> (features, num_frames) as above
Featurize = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]


class Variables(NamedTuple):
    """All that a model has learned, which is what its weights file has: NumPy or JAX arrays."""

    params: Any  # the student's parameters, without what only training needs
    statistics: Any  # the `Statistics` by which its features are standardised
    batch_stats: Any  # the student's batch statistics; empty if it has none


def load_classifier(folder: Path, config: ModelConfig, form: str, threads: int = 0) -> Classify:
    """Loads one format of an exported folder.

    Args:
        folder: the model's folder.
        config: the contents of its `config.json`.
        form: one of `FILES`; `safetensors` runs in Flax.
        threads: number of threads for ONNX and LiteRT; 0 lets them choose. JAX uses all cores that
            the process may use.

    Returns:
        The classifier, which raises a `UserError` if it fails or its logits are not finite.

    Raises:
        UserError: the format's file is missing, damaged or another model's, or its runtime is not
            installed.
    """
    path = folder / FILES[form]
    if not path.is_file():
        there = ", ".join(name for name, file in FILES.items() if (folder / file).is_file())
        raise UserError(f"{folder} has no {FILES[form]}; it has {there or 'no model'}")
    try:
        run = _LOADERS[form](path, config, threads)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{form} needs {error.name}: pip install {_PACKAGES[form]}") from error
    except Exception as error:  # each reader has its own exceptions for damaged files
        raise UserError(
            f"{path} cannot be read; it is truncated, damaged or another model's: export or fetch "
            f"it again. The reader's error: {str(error)[:500]}"
        ) from error

    def classify(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        try:
            logits = np.asarray(run(features, num_frames), np.float32)
        except Exception as error:  # the graph is not what its inputs suggest
            raise UserError(f"{path} cannot be run: {str(error)[:500]}") from error
        if logits.shape != (len(features), len(config.labels)) or not np.isfinite(logits).all():
            raise UserError(f"{path} gives logits that are not finite or of a wrong shape")
        return logits

    return classify


_PACKAGES = dict.fromkeys(FILES, "serkd-jax")
_PACKAGES |= {"onnx": "onnxruntime", "onnx-int8": "onnxruntime"}
_PACKAGES |= {"tflite": "ai-edge-litert", "tflite-int8": "ai-edge-litert"}


def make_student(config: ModelConfig, **options: Any) -> Any:
    """Makes the Flax student, without what only training needs.

    Raises:
        UserError: there is no student with these sizes.
    """
    from serkd_jax.models.students import find_student
    from serkd_jax.models.students.base import check_sizes

    kind = find_student(config.student["kind"])
    sizes = {key: value for key, value in config.student.items() if key != "kind"}
    try:
        sizes = check_sizes(kind, sizes, deployed=True)
        student = kind(len(config.labels), **sizes, projection_dims=(), **options)
        student.check(config.max_frames, config.num_features)
    except ValueError as error:
        raise UserError(f"{CONFIG} has no such student ({error}): {REMEDY}") from error
    return student


def make_apply(config: ModelConfig, **options: Any) -> Callable:
    """Makes the whole model in JAX: (`Variables`, features, num_frames) -> float32 logits."""
    import jax

    from serkd_jax.stages.standardization import standardize

    student = make_student(config, **options)

    def apply(variables: Variables, features: jax.Array, num_frames: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            features = standardize(features, num_frames, variables.statistics)
            learned = {"params": variables.params, "batch_stats": variables.batch_stats}
            return student.apply(learned, features, num_frames).logits

    return apply


def read_variables(path: Path, config: ModelConfig) -> Variables:
    """Reads float32 NumPy arrays from `model.safetensors`.

    Raises:
        UserError: the tensors do not fit the configuration or are not finite, or a spread is not
            positive.
    """
    import jax
    from flax import traverse_util
    from safetensors.numpy import load_file

    from serkd_jax.stages.standardization import Statistics, no_statistics

    inputs = (
        jax.ShapeDtypeStruct((1, config.max_frames, config.num_features), np.float32),
        jax.ShapeDtypeStruct((1,), np.int32),
    )
    student = jax.eval_shape(make_student(config).init, jax.random.key(0), *inputs)
    student = student["params"], student.get("batch_stats", {})
    statistics = no_statistics(config.num_features)
    expected = flat_variables(Variables(student[0], statistics, student[1]))
    tensors = load_file(path)
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = (
            f"{values[name].dtype}{values[name].shape}" if name in values else "absent"
            for values in (tensors, expected)
        )
        if have != want:
            raise UserError(
                f"{path} is not the model of its config.json: {name} is {have}, not {want}"
            )
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; export the model again")
    if not (tensors["statistics.spread"] > 0).all():
        raise UserError(f"{path}: statistics.spread is not positive; export the model again")
    params = traverse_util.unflatten_dict(tensors, sep=".")
    statistics, batch_stats = params.pop("statistics"), params.pop("batch_stats", {})
    return Variables(params, Statistics(**statistics), batch_stats)


def flat_variables(variables: Variables) -> dict[str, Any]:
    """Returns the arrays by the names that they have in `model.safetensors`."""
    from flax import traverse_util

    rest = {"statistics": vars(variables.statistics), "batch_stats": variables.batch_stats}
    return traverse_util.flatten_dict(variables.params | rest, sep=".")


def _load_flax(path: Path, config: ModelConfig, threads: int) -> Classify:
    del threads
    import jax

    apply = jax.jit(make_apply(config))
    variables = jax.device_put(read_variables(path, config))
    return _few_shapes(lambda *inputs: apply(variables, *inputs), config)


def _load_stablehlo(path: Path, config: ModelConfig, threads: int) -> Classify:
    del threads
    import jax
    import jax.export

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    calls = set(re.findall(r"custom_call[ @\"]+([\w.$-]+)", exported.mlir_module()))
    if unknown := calls - {"shape_assertion"}:  # custom calls name functions of the process
        raise ValueError(f"it calls {', '.join(sorted(unknown))}")
    features, num_frames = exported.in_avals
    want = (config.max_frames, config.num_features)
    if (features.shape[1:], num_frames.shape[1:]) != (want, ()):
        raise ValueError(f"it takes {features} and {num_frames}")
    return _few_shapes(jax.jit(exported.call), config)


def _few_shapes(apply: Callable, config: ModelConfig) -> Classify:
    """Pads batches with silence to powers of two, since JAX compiles for each batch size."""
    import jax

    def run(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        missing = (1 << (len(features) - 1).bit_length()) - len(features)
        padded = np.pad(features, ((0, missing), (0, 0), (0, 0))), np.pad(num_frames, (0, missing))
        return np.asarray(apply(*padded))[: len(features)]

    return at_most(_rows_in_cache(config), run) if jax.default_backend() == "cpu" else run


def at_most(count: int, run: Classify) -> Classify:
    """Wraps a classifier so that it gets at most `count` rows at once."""

    def classify(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        parts = (slice(i, i + count) for i in range(0, len(features), count))
        return np.concatenate([run(features[part], num_frames[part]) for part in parts])

    return classify


def _rows_in_cache(config: ModelConfig) -> int:
    """Returns how many rows, a power of two, to run at once: few if large, for a CPU's cache."""
    rows = 2**19 // (config.max_frames * config.num_features)
    return 1 << max(0, rows.bit_length() - 1)


def _load_onnx(path: Path, config: ModelConfig, threads: int) -> Classify:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # A model may name other files for its weights; they would have to be in this missing folder.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path / "none")
    )
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    shapes = {given.name: given.shape[1:] for given in session.get_inputs()}
    if shapes != {"features": [config.max_frames, config.num_features], "num_frames": []}:
        raise ValueError(f"it takes {shapes}")

    def run(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"features": features, "num_frames": num_frames})[0]

    # The quantised model has one scale for the activations of a whole batch.
    quantised = path.name == FILES["onnx-int8"]
    return at_most(1 if quantised else _rows_in_cache(config), run)


def _load_tflite(path: Path, config: ModelConfig, threads: int) -> Classify:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads or None)
    run = interpreter.get_signature_runner()
    shapes = {name: list(given["shape"]) for name, given in run.get_input_details().items()}
    if shapes != {"features": [1, config.max_frames, config.num_features], "num_frames": [1]}:
        raise ValueError(f"it takes {shapes}")

    return at_most(
        1, lambda features, num_frames: run(features=features, num_frames=num_frames)["logits"]
    )


_LOADERS = {
    "safetensors": _load_flax,
    "stablehlo": _load_stablehlo,
    "stablehlo-bf16": _load_stablehlo,
    "onnx": _load_onnx,
    "onnx-int8": _load_onnx,
    "tflite": _load_tflite,
    "tflite-int8": _load_tflite,
}


def load_frontend(folder: Path, config: ModelConfig) -> Featurize:
    """Loads the front-end of an exported folder: a spectrum in NumPy, or an encoder in JAX.

    Raises:
        UserError: the encoder is missing, or is not the one with which the model was trained.
    """
    name = config.frontend["name"]
    if name in SPECTRAL:
        compute, width = SPECTRAL[name].compute, config.num_features
        return lambda waveforms: pad_features([compute(each, width) for each in waveforms], config)
    try:
        from serkd_jax.encoders.frontends import WITHOUT_MODEL, Pretrained
    except ImportError as error:
        raise UserError(f"a {name} front-end needs {error.name}: pip install serkd-jax") from error

    settings = {key: config.frontend[key] for key in ("revision", "layer", "dtype", "pad_to_30s")}
    if beside := config.frontend.get("beside"):
        settings["beside"] = WITHOUT_MODEL[beside]()
    model = config.frontend["model"] or str(folder / FRONTEND)
    encoder = Pretrained(model=model, kind=name, **settings, safetensors_only=True)
    try:
        made = encoder.width, encoder.fingerprint
    except UserError:
        raise
    except Exception as error:  # a config.json of an encoder can be wrong in many ways
        raise UserError(f"{model} is not a {name} ({error}): export or fetch it again") from error
    if made != (config.num_features, config.frontend["fingerprint"]):
        raise UserError(f"{model} is not the {name} that {folder} was trained on")

    def featurize(waveforms: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        features = dict(encoder(waveforms, config.max_frames))
        return pad_features([features[i] for i in range(len(waveforms))], config)

    return featurize


def pad_features(features: list[np.ndarray], config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Zero-pads features to T frames, as in training; also returns their numbers of frames."""
    padded = np.zeros((len(features), config.max_frames, config.num_features), np.float32)
    for row, values in zip(padded, features, strict=True):
        row[: len(values)] = values
    return padded, np.array([len(values) for values in features], np.int32)
