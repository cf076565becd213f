"""Where the rows come from (arrays, memory maps, iterators) and how they reach the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BLOCK_ELEMENTS = 2**24
"""Numbers in a block of rows where no batch_size is given: 64 MiB in float32."""


class Source(NamedTuple):
    """Batches of rows: `blocks()` starts a pass; a repeatable source allows several."""

    blocks: Callable[[], Iterator[Any]]
    repeatable: bool


def is_rows(X: Any) -> bool:
    """Whether X is one table of rows (array, data frame, list of lists), not several batches."""
    if hasattr(X, "shape") or hasattr(X, "__array__"):
        return True
    return isinstance(X, (list, tuple)) and not (len(X) > 0 and np.ndim(X[0]) == 2)


def open_source(X: Any, batch_size: int | None) -> Source:
    """Make a Source of whatever holds the rows.

    X: anything with a shape that can be sliced by rows (array, memmap, HDF5 or Zarr data set, data
    frame), a list of lists, a function returning a new iterator of batches, a list of batches, any
    other iterable of batches (repeatable unless it is its own iterator, as generators are). Batches
    are [n, d].
    """
    if is_rows(X):
        rows = X if hasattr(X, "shape") else np.asarray(X)
        return Source(lambda: row_blocks(rows, batch_size), True)
    if callable(X):
        function: Any = X
        return Source(lambda: iter(function()), True)
    if isinstance(X, Iterable):
        return Source(lambda: iter(X), iter(X) is not X)
    raise TypeError(
        "Expected an array, an iterable of batches or a function that returns one, "
        f"got {type(X).__name__}."
    )


def row_blocks(X: Any, batch_size: int | None) -> Iterator[Any]:
    """Slices of consecutive rows of X [n, d], batch_size each (BLOCK_ELEMENTS numbers if None)."""
    rows = batch_size or max(1, BLOCK_ELEMENTS // max(1, int(np.prod(X.shape[1:]))))
    # A table without rows still yields one (empty) block, so that it meets the usual validation.
    for start in range(0, max(1, X.shape[0]), rows):
        yield X[start : start + rows]


class Spreader:
    """Spreads the rows of host batches evenly over this process's devices, on a leading axis g."""

    def __init__(self) -> None:
        self.devices = jax.local_devices()
        mesh = Mesh(np.array(self.devices), ("g",))
        self._sharding = NamedSharding(mesh, PartitionSpec("g"))
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def __call__(self, batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Turn a batch [n, d] into rows [g, r, d], padded, and their number on each device [g]."""
        groups, n = len(self.devices), len(batch)
        per_device = -(-n // groups)
        if per_device * groups != n:
            batch = np.concatenate([batch, np.repeat(batch[-1:], per_device * groups - n, axis=0)])
        counts = np.clip(n - per_device * np.arange(groups), 0, per_device)
        rows = batch.reshape(groups, per_device, batch.shape[1])
        return self.put(rows), self.put(counts.astype(np.int32))

    def put(self, x: np.ndarray) -> jax.Array:
        """Place x [g, ...] with its leading axis over the devices."""
        return jax.device_put(x, self._sharding)

    def replicate(self, x: np.ndarray | jax.Array) -> jax.Array:
        """Place a copy of x on every device."""
        return jax.device_put(x, self._replicated)

    def zeros(self, *shape: int, dtype: Any) -> jax.Array:
        """An accumulator of zeros [g, *shape], made on the devices."""
        return jax.numpy.zeros((len(self.devices), *shape), dtype, device=self._sharding)


def all_processes(tree: Any) -> Any:
    """Stack a tree of arrays over the p processes of a distributed run: leaves [p, ...]."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree))
