"""One device or many: jit or pmap, and the collectives that a step needs under pmap.

There may also be several processes, each with devices of its own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from serkd_jax.errors import UserError

AXIS = "devices"


def join_processes(coordinator: str, num_processes: int = 0, process_id: int = 0) -> None:
    """Makes this process one of several that run the same program; call it before using JAX.

    Args:
        coordinator: HOST:PORT of process 0; or "auto" where JAX can find out all three arguments by
            itself: on TPU pods, Slurm, Open MPI and Kubernetes.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        UserError: there is no such process, or JAX cannot find the coordinator.
    """
    # By default, the other processes notice the death of one only after 100 seconds.
    options = {"heartbeat_timeout_seconds": 30}
    if coordinator == "auto":
        try:
            jax.distributed.initialize(**options)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the coordinator cannot be found ({error}): give HOST:PORT") from error
    elif 0 <= process_id < num_processes:
        # Otherwise, inside a Slurm task, JAX would use only one of the process's GPUs.
        options["cluster_detection_method"] = "deactivate"
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    else:
        raise UserError(
            f"process_id is {process_id} and num_processes {num_processes}: give each of N "
            "processes a process_id from 0 to N-1"
        )


def is_first_process() -> bool:
    """Returns whether this is the first process, which writes what all processes have."""
    return jax.process_index() == 0


def of_first_process(tree: Any) -> Any:
    """Returns the first process's arrays in all processes, as NumPy arrays."""
    return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))


def wait_for_processes(name: str) -> None:
    """Returns when all processes have called it; each place in a run needs a `name` of its own."""
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        # A week, since the last process may arrive only when the work that they share is done.
        multihost.sync_global_processes(name, timeout=7 * 24 * 3600, processes=everyone)


def wait_for_file(path: Path, name: str, option: str) -> None:
    """Returns when all processes have called it, after checking that this one sees a file.

    Args:
        path: the file, which the first process wrote.
        name: see `wait_for_processes`.
        option: the option by which the user chooses where the file is, for the message.

    Raises:
        UserError: this process does not see the file.
    """
    wait_for_processes(name)
    if not path.exists():
        raise UserError(
            f"process {jax.process_index()} does not see {path}, which process 0 wrote: "
            f"{option} must be on a file system that all processes share"
        )


def device_mean(tree: Any, axis: str | None) -> Any:
    """Returns the mean of every array over the mapped axis; the identity if `axis` is None."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def device_gather(tree: Any, axis: str | None) -> Any:
    """Joins the shares of all devices, in order, to the global batch."""
    if axis is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, tiled=True), tree)


def choose_devices(num_devices: int, batch_sizes: dict[str, int]) -> list[jax.Device]:
    """Returns the first `num_devices` devices or, for 0, all devices of all processes.

    Args:
        num_devices: number of devices.
        batch_sizes: sizes of the batches to be divided among them, by their keys in the config.

    Raises:
        UserError: there are fewer devices, there are several processes and `num_devices` is not 0,
            or a batch size is not divisible by the number of devices.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise UserError(f"num_devices is {num_devices}, but JAX sees {len(devices)} devices")
    if num_devices and jax.process_count() > 1:
        raise UserError("several processes use all their devices: leave num_devices at 0")
    devices = devices[: num_devices or None]
    for key, size in batch_sizes.items():
        if size % len(devices):
            raise UserError(
                f"{key} {size} is not divisible by the {len(devices)} devices: "
                f"choose another --config.{key}, or fewer with --config.num_devices"
            )
    return devices


def local_devices(devices: list[jax.Device]) -> list[jax.Device]:
    """Returns those of the devices that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def memory_of_device(devices: list[jax.Device]) -> int:
    """Returns the bytes of memory of each device; CPU devices share the machine's memory."""
    local = local_devices(devices)
    if stats := local[0].memory_stats():
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(local)


def compile_steps(
    make_step: Callable[[str | None], Callable],
    devices: list[jax.Device],
    *,
    shared_data: bool = True,
    pick: Callable[[Any, Any], Any] = lambda _, rows: rows,
) -> Callable:
    """Compiles many training steps as one program, for one device or several.

    The program is a loop whose length is an argument, while the length of `lax.scan` is part of the
    program. So the same program takes whole epochs and the rest of an interrupted one, and the
    results do not depend, to the last bit, on where a run was interrupted.

    Args:
        make_step: makes the pure `step(state, batch, rng) -> (state, metrics)` from the name of
            the device axis (None on one device). On several devices, each step sees its share of
            the batch and must return the same state and metrics on all devices.
        devices: the devices of all processes.
        shared_data: whether all devices have the same data; otherwise each has its own.
        pick: (state, a step's rows) -> the rows of its batch.

    Returns:
        A function of (state, data, rows, count, rng), with data and rows from `Examples.take`, that
        takes the first `count` of the S steps in `rows`. It returns the state and the metrics, each
        (S,). The state's buffers are donated.
    """

    def make_run(axis: str | None) -> Callable:
        step = make_step(axis)

        def run(state: Any, data: Any, rows: Any, count: jax.Array, rng: jax.Array) -> tuple:
            @jax.jit  # so that it is traced only once
            def one(state: Any, i: jax.Array) -> tuple:
                picked = pick(state, jax.tree.map(lambda x: x[i], rows))
                return step(state, _gather(data, picked), rng)

            def body(i: jax.Array, carry: tuple) -> tuple:
                state, metrics = one(carry[0], i)
                return state, jax.tree.map(lambda all, x: all.at[i].set(x), carry[1], metrics)

            length = jax.tree.leaves(rows)[0].shape[0]
            shapes = jax.eval_shape(one, state, 0)[1]
            metrics = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)
            return jax.lax.fori_loop(0, count, body, (state, metrics))

        return run

    in_axes = (None, None if shared_data else 0, 0, None, None)
    return _compile(make_run, devices, in_axes, None, donate_argnums=0)


def compile_map(function: Callable[[Any, Any], Any], devices: list[jax.Device]) -> Callable:
    """Compiles `function(params, batch)` for as many batches at once as there are devices.

    Returns:
        A function of (params, batches); the batches and the outputs have a leading axis for the
        devices. Put the params on the devices once, with `replicate`.
    """
    return _compile(lambda _: function, devices, (None, 0), 0)


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Puts a copy of every array on each device of this process, unless it is already there."""
    return jax.device_put(tree, NamedSharding(_local_mesh(devices), PartitionSpec()))


def distribute(tree: Any, devices: list[jax.Device]) -> Any:
    """Puts arrays with a leading axis for this process's devices on them, each part on its own."""
    return jax.device_put(tree, NamedSharding(_local_mesh(devices), PartitionSpec(AXIS)))


def _local_mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(local_devices(devices)), AXIS)


def compile_predict(
    predict: Callable[[Any, Any], Any], devices: list[jax.Device], *, shared_data: bool = True
) -> Callable[[Any, Any, Any], Any]:
    """Compiles `predict(params, batch) -> outputs` for one device or several.

    Returns:
        A function of (params, data, rows), with data and rows from
        `serkd_jax.data.examples.Examples.take`; it returns the outputs of the whole batch.
    """

    def make_run(axis: str | None) -> Callable:
        return lambda params, data, rows: device_gather(predict(params, _gather(data, rows)), axis)

    return _compile(make_run, devices, (None, None if shared_data else 0, 0), None)


def share_of_batch(rows: np.ndarray, devices: list[jax.Device]) -> np.ndarray:
    """Takes this process's share of rows (..., B), as (local devices, ..., B / devices)."""
    split = np.stack(np.split(rows, len(devices), axis=-1))
    return split[[device.process_index == jax.process_index() for device in devices]]


def _gather(data: Any, rows: Any) -> Any:
    """Replaces each array of row numbers in the tree `rows` by its batch."""
    return jax.tree.map(lambda x: {name: column[x] for name, column in data.items()}, rows)


def _compile(
    make: Callable[[str | None], Callable],
    devices: list[jax.Device],
    in_axes: tuple[int | None, ...],
    out_axes: int | None,
    **options: Any,
) -> Callable:
    """Compiles by jit for one device and by pmap for several; axis 0 is that of the devices."""
    if len(devices) > 1:
        options |= {"in_axes": in_axes, "out_axes": out_axes, "devices": devices}
        return jax.pmap(make(AXIS), AXIS, **options)
    function = make(None)

    def only(*arguments: Any) -> Any:
        given = (
            arg if axis is None else jax.tree.map(lambda x: x[0], arg)
            for arg, axis in zip(arguments, in_axes, strict=True)
        )
        out = function(*given)
        return out if out_axes is None else jax.tree.map(lambda x: x[None], out)

    return jax.jit(only, **options)
