"""Writes a student in each format; int8 formats use the format's own quantiser.

All formats take (features (B, T, N), num_frames (B,)) as the front-end makes them, standardise the
features, and return logits (B, C), in float32 whatever the dtype of the student's computation.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from serkd_jax.deploy.backends import Variables, flat_variables, make_apply
from serkd_jax.deploy.folder import FILES, ModelConfig
from serkd_jax.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")  # platforms for which the StableHLO is lowered


def write_format(form: str, folder: Path, config: ModelConfig, variables: Variables) -> None:
    """Writes one of `FILES` into the folder.

    Raises:
        UserError: the converter is not installed, or cannot convert this student.
    """
    path = folder / FILES[form]
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:  # the file is complete or absent
            unfinished = Path(work, path.name)
            _WRITERS[form](unfinished, config, variables)
            unfinished.replace(path)
    except ImportError as error:
        raise UserError(
            f'{form} needs {error.name}: pip install "serkd-jax[export]", or leave it out of '
            "--format"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # each converter has its own exceptions for what it cannot convert
        raise UserError(
            f"{form} cannot hold a student of kind {config.student['kind']!r}: leave it out of "
            f"--format. The converter's error: {str(error).splitlines()[0][:300]}"
        ) from error


def _classify(config: ModelConfig, variables: Variables, dtype: Any = None) -> Callable:
    """Returns the function that is exported, with the variables as its constants."""
    return partial(make_apply(config, portable=True, dtype=dtype), variables)


def _inputs(config: ModelConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes of the inputs, for batches of any size."""
    (batch,) = jax.export.symbolic_shape("batch")
    return (
        jax.ShapeDtypeStruct((batch, config.max_frames, config.num_features), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def _write_safetensors(path: Path, config: ModelConfig, variables: Variables) -> None:
    del config
    tensors = flat_variables(variables)
    path.write_bytes(save({name: np.asarray(x, np.float32) for name, x in tensors.items()}))


def _write_stablehlo(
    path: Path, config: ModelConfig, variables: Variables, dtype: Any = None
) -> None:
    if dtype:  # not for the statistics, since features are standardised in float32
        params = jax.tree.map(lambda x: x.astype(dtype), variables.params)
        variables = variables._replace(params=params)
    classify = jax.jit(_classify(config, variables, dtype))
    exported = jax.export.export(classify, platforms=PLATFORMS)(*_inputs(config))
    path.write_bytes(exported.serialize())


def _write_stablehlo_bf16(path: Path, config: ModelConfig, variables: Variables) -> None:
    _write_stablehlo(path, config, variables, jnp.bfloat16)


def _write_onnx(path: Path, config: ModelConfig, variables: Variables) -> None:
    from jax2onnx import to_onnx

    with _quiet("onnx_ir"):
        to_onnx(
            _classify(config, variables),
            _inputs(config),
            model_name="serkd_student",
            input_names=["features", "num_frames"],
            output_names=["logits"],
            return_mode="file",
            output_path=path,
            export_mode="web",  # one file, whatever its size
        )


def _write_onnx_int8(path: Path, config: ModelConfig, variables: Variables) -> None:
    """Stores weights in 8 bits per channel; activations are quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    exact = path.with_suffix(".float.onnx")
    _write_onnx(exact, config, variables)
    with _quiet("root"):  # it recommends shape inference, which changes nothing here
        quantize_dynamic(exact, path, weight_type=QuantType.QInt8, per_channel=True)


def _write_tflite(
    path: Path, config: ModelConfig, variables: Variables, quantise: bool = False
) -> None:
    """Writes a model for batches of one; for others, LiteRT does not use its fast kernels."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from jax.experimental import jax2tf

    convert = jax2tf.convert(_classify(config, variables), with_gradient=False)
    shapes = {"features": (1, config.max_frames, config.num_features), "num_frames": (1,)}
    dtypes = {"features": tf.float32, "num_frames": tf.int32}
    signature = [tf.TensorSpec(shape, dtypes[name], name) for name, shape in shapes.items()]

    @tf.function(input_signature=signature, autograph=False)
    def classify(features: Any, num_frames: Any) -> Any:
        return {"logits": convert(features, num_frames)}

    with _quiet("tensorflow"):
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [classify.get_concrete_function()], tf.Module()
        )
        if quantise:  # dynamic range: weights in 8 bits, activations quantised at run time
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        path.write_bytes(converter.convert())


def _write_tflite_int8(path: Path, config: ModelConfig, variables: Variables) -> None:
    _write_tflite(path, config, variables, quantise=True)


_WRITERS = {
    "safetensors": _write_safetensors,
    "stablehlo": _write_stablehlo,
    "stablehlo-bf16": _write_stablehlo_bf16,
    "onnx": _write_onnx,
    "onnx-int8": _write_onnx_int8,
    "tflite": _write_tflite,
    "tflite-int8": _write_tflite_int8,
}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silences a converter's warnings about its own code."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
