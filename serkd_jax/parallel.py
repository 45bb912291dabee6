"""One device or many: jit or pmap, and the collectives that a step needs under pmap.

Also several processes, each with devices of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from serkd_jax.errors import UserError

AXIS = "devices"


def join_processes(coordinator: str, num_processes: int = 0, process_id: int = 0) -> None:
    """Makes this process one of several that run the same program. Call it before using JAX.

    Args:
        coordinator: HOST:PORT of process 0; or "auto", where JAX can tell all three by itself:
            on TPU pods, Slurm, Open MPI and Kubernetes.
        num_processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        UserError: there is no such process, or JAX cannot tell.
    """
    if coordinator == "auto":
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the coordinator cannot be found ({error}): give HOST:PORT") from error
    elif 0 <= process_id < num_processes:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        raise UserError(
            f"process_id is {process_id} and num_processes {num_processes}: of N processes, give "
            "each a process_id from 0 to N-1"
        )


def wait_for_processes(name: str) -> None:
    """Returns when all processes have come here; ``name`` is of this place, and used once."""
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        # A week: the time between the first and the last is that of the work they share.
        multihost.sync_global_processes(name, timeout=7 * 24 * 3600, processes=everyone)


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


def compile_map(function: Callable[[Any, Any], Any], devices: list[jax.Device]) -> Callable:
    """Compiles ``function(params, batch)`` for as many batches at once as there are devices.

    Returns:
        A function of (params, batches), which have a leading axis for the devices, as have the
        outputs. Put params on the devices once, by `replicate`.
    """
    if len(devices) > 1:
        return jax.pmap(function, AXIS, in_axes=(None, 0), out_axes=0, devices=devices)

    def only(params: Any, batches: Any) -> Any:
        output = function(params, jax.tree.map(lambda x: x[0], batches))
        return jax.tree.map(lambda x: x[None], output)

    return jax.jit(only)


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Puts a copy of every array on each device; those that are there are not sent again."""
    everywhere = NamedSharding(Mesh(np.array(devices), AXIS), PartitionSpec())
    return jax.device_put(tree, everywhere)


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
    mapped = compile_map(predict, devices)

    def predict_rows(params: Any, rows: np.ndarray, batch_of: Callable[[np.ndarray], Any]) -> Any:
        params = replicate(params, devices)
        outputs = []
        for start in range(0, len(rows), batch_size):
            batch_rows = np.full(batch_size, rows[start])
            taken = rows[start : start + batch_size]
            batch_rows[: len(taken)] = taken
            batch = mapped(params, _split(batch_of(batch_rows), len(devices)))
            outputs.append(jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), batch))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *outputs)

    return predict_rows


def _split(batch: Any, num_devices: int) -> Any:
    """(B, ...) -> (devices, B / devices, ...)."""
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
