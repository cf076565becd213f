"""Which device holds what. One pure step serves all strategies; `--parallel` chooses among them.

`jit`: parameters on every device, each batch cut into one piece per device; XLA adds the averaging.
`fsdp`: the same step, but each large array of the state is cut over the devices, too.
`pmap`: the step is mapped over the devices of one process and averages by itself; for code that
expects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxear.errors import UserError
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.state import TrainState
from jaxear.training.step import EvalStep, TrainStep

AXIS = "data"
# Cutting what is smaller costs more in messages than it saves in memory (elements).
FSDP_MIN_SIZE = 2**14


class Parallel(Protocol):
    """A sharding strategy: how state and batches lie on the devices of all processes."""

    @property
    def axis_name(self) -> str | None:
        """The mapped axis over which the step itself has to average, if there is one."""
        ...

    def put_state(self, state: TrainState) -> TrainState:
        """The state onto the devices; each process gives the whole of it."""
        ...

    def put_resident(self, resident: Resident) -> Resident:
        """What stays, onto every device."""
        ...

    def put_batch(self, batch: Any) -> Any:
        """This process's share of a batch, a pytree of arrays [b_local, ...], cut over devices."""
        ...

    def lower_train(
        self, step: TrainStep, state: TrainState, resident: Resident, batch: TrainBatch
    ) -> jax.stages.Lowered:
        """The training step, traced and ready to be compiled; it writes over its state.

        Of its arguments only shapes and dtypes matter here: those that they have before the methods
        above put them onto the devices.
        """
        ...

    def compile_eval(self, step: EvalStep) -> Any:
        """The evaluation step, to be compiled when it is first called."""
        ...

    def collect(self, tree: Any) -> Any:
        """What an evaluation step returned for the whole batch, on the host: numpy [b, ...]."""
        ...

    def scalars(self, metrics: Any) -> dict[str, float]:
        """What a training step returned beside the state, on the host."""
        ...

    def savable(self, state: TrainState) -> TrainState:
        """The state as checkpoints hold it, the same for all strategies."""
        ...


@dataclass(frozen=True)
class JitParallel:
    """`jit` and `fsdp`: jax.jit over a mesh with one axis, "data"."""

    mesh: Mesh
    shard_state: bool = False
    axis_name: str | None = None

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def state_sharding(self, leaf: Any) -> NamedSharding:
        """Where an array of the state lies: its longest axis that divides is cut under `fsdp`."""
        shape, n = np.shape(leaf), self.mesh.size
        axes = [i for i, length in enumerate(shape) if length % n == 0]
        if not self.shard_state or not axes or np.prod(shape) < FSDP_MIN_SIZE:
            return self._sharding()
        longest = max(axes, key=lambda i: shape[i])
        return self._sharding(*(AXIS if i == longest else None for i in range(len(shape))))

    def put_state(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: _put(x, self.state_sharding(x)), state)

    def put_resident(self, resident: Resident) -> Resident:
        return jax.tree.map(lambda x: _put(x, self._sharding()), resident)

    def put_batch(self, batch: Any) -> Any:
        sharding = self._sharding(AXIS)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
        )

    def lower_train(
        self, step: TrainStep, state: TrainState, resident: Resident, batch: TrainBatch
    ) -> jax.stages.Lowered:
        shardings, same = jax.tree.map(self.state_sharding, state), self._sharding()
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, same, self._sharding(AXIS)),
            out_shardings=(shardings, same),
        )
        n = jax.process_count()
        whole = _shapes(batch, lambda shape: (n * shape[0], *shape[1:]))
        return jitted.lower(_shapes(state), _shapes(resident), whole)

    def compile_eval(self, step: EvalStep) -> Any:
        return jax.jit(step, out_shardings=self._sharding(AXIS))

    def collect(self, tree: Any) -> Any:
        if jax.process_count() == 1:
            return jax.device_get(tree)
        return multihost_utils.process_allgather(tree, tiled=True)

    def scalars(self, metrics: Any) -> dict[str, float]:
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def savable(self, state: TrainState) -> TrainState:
        return state


@dataclass(frozen=True)
class PmapParallel:
    """`pmap`: jax.pmap over the devices; every array of the state has a leading axis for them."""

    axis_name: str | None = AXIS

    def _replicate(self, tree: Any) -> Any:
        if not jax.tree.leaves(tree):
            return tree
        n = jax.local_device_count()
        return jax.pmap(lambda x: x, axis_name=self.axis_name)(
            jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (n, *np.shape(x))), tree)
        )

    def put_state(self, state: TrainState) -> TrainState:
        return self._replicate(state)

    def put_resident(self, resident: Resident) -> Resident:
        return self._replicate(resident)

    def put_batch(self, batch: Any) -> Any:
        n = jax.local_device_count()
        return jax.tree.map(lambda x: np.asarray(x).reshape(n, -1, *np.shape(x)[1:]), batch)

    def lower_train(
        self, step: TrainStep, state: TrainState, resident: Resident, batch: TrainBatch
    ) -> jax.stages.Lowered:
        mapped: Any = jax.pmap(step, axis_name=self.axis_name, donate_argnums=0)
        n = jax.local_device_count()
        copies = _shapes((state, resident), lambda shape: (n, *shape))
        cut = _shapes(batch, lambda shape: (n, shape[0] // n, *shape[1:]))
        return mapped.lower(*copies, cut)

    def compile_eval(self, step: EvalStep) -> Any:
        return jax.pmap(step, axis_name=self.axis_name)

    def collect(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)

    def scalars(self, metrics: Any) -> dict[str, float]:
        return {name: float(value[0]) for name, value in metrics.items()}

    def savable(self, state: TrainState) -> TrainState:
        return jax.tree.map(lambda x: np.asarray(x[0]), state)


def _shapes(tree: Any, change: Callable[[tuple], tuple] = tuple) -> Any:
    """A pytree's shapes, each changed, and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(change(np.shape(x)), x.dtype), tree)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, onto the devices of all of them."""
    if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def create_parallel(name: str, batch_size: int, accumulate: int = 1) -> Parallel:
    """The strategy called `name` over all devices of all processes.

    Raises:
        UserError: a batch of this size cannot be cut evenly over them.
    """
    n = jax.device_count() * accumulate
    if batch_size % n:
        parts = f"{jax.device_count()} devices"
        parts += f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"A batch of {batch_size} cannot be cut evenly over {parts}; use a multiple of {n}, "
            f"such as {-(-batch_size // n) * n}."
        )
    if name == "pmap":
        if jax.process_count() > 1:
            raise UserError("--parallel pmap is for one process; over several, use jit or fsdp.")
        return PmapParallel()
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    return JitParallel(mesh, shard_state=name == "fsdp")
