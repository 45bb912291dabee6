"""Which examples a step sees, and how they get to the devices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from serkd_jax.distributed import parallel

SHARE_OF_MEMORY = 0.4  # of a device for the examples; the rest is for states and activations


def stream_rows(rows: np.ndarray, batch_size: int, steps: range, seed: Sequence[int]) -> np.ndarray:
    """Returns batches (len(steps), B) from an endless stream of shuffled passes over the rows.

    They are a function of (seed, step), so that a resumed run sees the same batches. Every pass has
    each row once. A batch may span the end of one pass and the beginning of the next, so that no
    row is left out and any number of rows is enough.
    """
    positions = np.arange(steps.start * batch_size, steps.stop * batch_size)
    passes = positions // len(rows)
    order = {p: np.random.default_rng([*seed, p]).permutation(rows) for p in np.unique(passes)}
    taken = [order[p][i % len(rows)] for p, i in zip(passes, positions, strict=True)]
    return np.array(taken).reshape(len(steps), batch_size)


def sample_rows(rows: np.ndarray, batch_size: int, step: int, seed: Sequence[int]) -> np.ndarray:
    """Draws a batch for `step`; rows occur in it equally often, up to a difference of one."""
    rng = np.random.default_rng([*seed, step])
    passes = -(-batch_size // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[:batch_size]


@dataclass(frozen=True)
class Examples:
    """What steps see of the utterances, row by row: on the devices, or read when needed.

    Attributes:
        columns: (n, ...) arrays of all n utterances, by their names in
            `serkd_jax.stages.base.Batch`; without `inputs` if these are read from records.
        devices: the devices of all processes.
        read: rows (m,) -> their inputs (m, ...) from records; None if `columns` has the inputs and
            each device a copy of the columns.
    """

    columns: dict[str, Any]
    devices: list[jax.Device]
    read: Callable[[np.ndarray], np.ndarray] | None = None

    def with_columns(self, **columns: np.ndarray) -> "Examples":
        """Returns the same examples with more columns."""
        if self.read is None:
            columns = parallel.replicate(columns, self.devices)
        return replace(self, columns=self.columns | columns)

    def chunks(self, size: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields row numbers, inputs and lengths of all utterances as NumPy arrays of `size`."""

        def read(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            rows = np.arange(start, min(start + size, len(self.columns["length"])))
            part = slice(rows[0], rows[-1] + 1)
            inputs = self.read(rows) if self.read else np.asarray(self.columns["inputs"][part])
            return rows, inputs, np.asarray(self.columns["length"][part])

        return read_ahead(read, range(0, len(self.columns["length"]), size))

    def take(self, rows: Any) -> tuple[Any, Any]:
        """Prepares a tree of rows (..., B) for a program of `serkd_jax.distributed.parallel`.

        Returns:
            Columns, and the places of the rows in them. The columns are those of the whole corpus,
            or have only what this process's share of the rows needs, with an axis for the devices.
        """
        shares = jax.tree.map(lambda x: parallel.share_of_batch(x, self.devices), rows)
        if self.read is None:
            return self.columns, shares
        leaves, structure = jax.tree.flatten(shares)
        wanted = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
        columns = {name: column[wanted] for name, column in self.columns.items()}
        different, which = np.unique(wanted, return_inverse=True)
        columns["inputs"] = self.read(different)[which.reshape(wanted.shape)]
        places, start = [], 0
        for leaf in leaves:
            one_device = start + np.arange(leaf[0].size).reshape(leaf.shape[1:])
            places.append(np.broadcast_to(one_device, leaf.shape))
            start += leaf[0].size
        return parallel.distribute(columns, self.devices), jax.tree.unflatten(structure, places)


def are_resident(choice: str, num_bytes: int, devices: list[jax.Device]) -> bool:
    """Returns whether the examples go on the devices: as chosen, or for `auto` if they fit."""
    fits = num_bytes <= SHARE_OF_MEMORY * parallel.memory_of_device(devices)
    return bool(parallel.of_first_process(choice == "device" or (choice == "auto" and fits)))


def read_ahead(read: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yields `read(item)` for each item, while a thread already reads the next one."""
    with ThreadPoolExecutor(1) as reader:
        reading = None
        for item in items:
            before, reading = reading, reader.submit(read, item)
            if before:
                yield before.result()
        if reading:
            yield reading.result()


def predict_rows(
    predict: Callable[[Any, Any, Any], Any],
    params: Any,
    examples: Examples,
    rows: np.ndarray,
    batch_size: int,
) -> Any:
    """Runs a program of `parallel.compile_predict` over any number of rows.

    The last batch is padded with copies of the last row, so that only one shape is compiled.

    Returns:
        A tree of (len(rows), ...) NumPy arrays.
    """
    filled = np.pad(rows, (0, -len(rows) % batch_size), mode="edge")
    batches = np.split(filled, len(filled) // batch_size)
    params = parallel.replicate(params, examples.devices)
    outputs: list[Any] = []
    for data, places in read_ahead(examples.take, batches):
        outputs.append(predict(params, data, places))
        outputs[-2:-1] = jax.device_get(outputs[-2:-1])  # at most two are in device memory
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *jax.device_get(outputs))
