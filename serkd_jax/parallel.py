"""One device or many: jit or pmap, and the collectives that a step needs under pmap."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from serkd_jax.errors import UserError

AXIS = "devices"


def device_mean(tree: Any, axis: str | None) -> Any:
    """Mean of every array over the mapped axis; the identity where ``axis`` is None."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def device_gather(tree: Any, axis: str | None) -> Any:
    """The global batch, in order, from each device's share of it."""
    if axis is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), tree)


def choose_devices(num_devices: int, batch_size: int) -> list[jax.Device]:
    """The first ``num_devices`` local devices, or all of them for 0.

    Raises:
        UserError: there are fewer devices, or they do not divide the batch.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise UserError(f"num_devices is {num_devices}, but JAX sees {len(devices)} devices")
    devices = devices[: num_devices or None]
    if batch_size % len(devices):
        raise UserError(
            f"batch_size {batch_size} is not divisible by the {len(devices)} devices: "
            "choose another --config.batch_size, or fewer with --config.num_devices"
        )
    return devices


def compile_step(
    make_step: Callable[[str | None], Callable], devices: list[jax.Device]
) -> Callable:
    """Compiles ``step(state, batch, rng) -> (state, metrics)`` for one device or several.

    Args:
        make_step: makes the pure step from the name of the device axis (None on one device). On
            several, the step sees its share of the batch and must return the same state and
            metrics on each.
        devices: where it runs.

    Returns:
        A function of (state, global batch, rng). The state's buffers are donated.
    """
    if len(devices) == 1:
        return jax.jit(make_step(None), donate_argnums=0)
    mapped = jax.pmap(
        make_step(AXIS),
        AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )
    return lambda state, batch, rng: mapped(state, _split(batch, len(devices)), rng)


def compile_predict(
    predict: Callable[[Any, Any], Any], batch_size: int, devices: list[jax.Device]
) -> Callable[[Any, np.ndarray, Callable[[np.ndarray], Any]], Any]:
    """Compiles ``predict(params, batch) -> outputs`` for a set of any size.

    Returns:
        A function of (params, rows, batch_of), where ``batch_of`` makes a batch of some row
        numbers. It returns a tree of (len(rows), ...) NumPy arrays. It runs in batches of
        ``batch_size``, the last one filled up with copies of its first row, so that it is
        compiled once.
    """
    if len(devices) == 1:
        compiled = jax.jit(predict)
    else:
        mapped = jax.pmap(predict, AXIS, in_axes=(None, 0), out_axes=0, devices=devices)

        def compiled(params: Any, batch: Any) -> Any:
            outputs = mapped(params, _split(batch, len(devices)))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

    def predict_rows(params: Any, rows: np.ndarray, batch_of: Callable[[np.ndarray], Any]) -> Any:
        outputs = []
        for start in range(0, len(rows), batch_size):
            batch_rows = np.full(batch_size, rows[start])
            taken = rows[start : start + batch_size]
            batch_rows[: len(taken)] = taken
            outputs.append(_to_host(compiled(params, batch_of(batch_rows))))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *outputs)

    return predict_rows


def _to_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _split(batch: Any, num_devices: int) -> Any:
    """(B, ...) -> (devices, B / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
