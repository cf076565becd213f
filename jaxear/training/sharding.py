"""Which device holds what: parameters on every device, each batch cut into one piece per device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxear.errors import UserError


@dataclass(frozen=True)
class DataParallel:
    """Data parallelism over all local devices by jax.jit: state replicated, batches cut."""

    mesh: Mesh

    @classmethod
    def over_local_devices(cls) -> DataParallel:
        """One mesh axis, "data", over the devices of this process."""
        devices = jax.local_devices()
        return cls(
            jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        )

    @property
    def n_devices(self) -> int:
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError where a batch cannot be cut evenly."""
        if batch_size % self.n_devices:
            raise UserError(
                f"A batch of {batch_size} cannot be cut evenly over {self.n_devices} devices; "
                f"use a multiple, such as {-(-batch_size // self.n_devices) * self.n_devices}."
            )

    def put_state(self, state: Any) -> Any:
        """A pytree of arrays onto every device."""
        return jax.device_put(state, self.replicated)

    def put_batch(self, batch: np.ndarray) -> jax.Array:
        """A batch [b, ...], cut along its first axis."""
        return jax.device_put(batch, self.batch)
