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
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from safetensors.numpy import save

from serkd_jax.deploy.backends import Variables, flat_variables, make_apply
from serkd_jax.deploy.folder import FILES, ModelConfig
from serkd_jax.errors import UserError

# Versions of 2024, which TensorFlow 2.21 reads; JAX writes what is newest.
TF_STABLEHLO, TF_CALL = "1.8.0", 9
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
    """Writes the model for batches of one; otherwise LiteRT's fast kernels are not used."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    shapes = {"features": (1, config.max_frames, config.num_features), "num_frames": (1,)}
    dtypes = {"features": jnp.float32, "num_frames": jnp.int32}
    inputs = [jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in shapes.items()]
    model = jax.jit(_classify(config, variables))
    exported = jax.export.export(model, platforms=["cpu"])(*inputs)
    signature = [
        tf.TensorSpec(x.shape, x.dtype, name) for name, x in zip(shapes, inputs, strict=True)
    ]

    @tf.function(input_signature=signature, autograph=False)
    def classify(*given: Any) -> Any:
        (logits,) = xla.call_module(
            [given[i] for i in exported.module_kept_var_idx],
            version=TF_CALL,
            module=_as_tensorflow_reads(exported.mlir_module_serialized),
            Tout=[tf.float32],
            Sout=[[1, len(config.labels)]],
            platforms=["CPU"],
        )
        return {"logits": logits}

    with _quiet("tensorflow"):
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [classify.get_concrete_function()], tf.Module()
        )
        if quantise:  # dynamic range: weights in 8 bits, activations quantised as they come
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        path.write_bytes(converter.convert())


def _as_tensorflow_reads(module: bytes) -> bytes:
    """Rewrites StableHLO in the version that TensorFlow reads; JAX writes newer ones."""
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        return stablehlo.serialize_portable_artifact(
            stablehlo.deserialize_portable_artifact(context, module), TF_STABLEHLO
        )


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
