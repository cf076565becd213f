"""What a training step is given beside the state: a batch, and what stays on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from jaxear.training.state import Leaves

# On the way to the devices they are numpy arrays, in a step JAX's.
Array = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """One batch, or one device's share of it.

    Attributes:
        rows: which image of the training split each is, int32 [b].
        positions: place in the whole batch, int32 [b]; random numbers are drawn from it, so that
            they do not depend on how the batch is cut over devices.
        subjects: whose ear it is, as a number, int32 [b].
        images: uint8 [b, h, w, 3]; None where the images lie on the device.
        features: the backbone's features, computed before; None where the backbone runs.
    """

    rows: Array
    positions: Array
    subjects: Array
    images: Array | None = None
    features: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Resident:
    """What lies on every device from the first step to the last.

    Attributes:
        images: the whole training split, uint8 [n, h, w, 3], where it fits; else None.
        judge: arrays of the network that the perceptual term compares features of.
    """

    images: Array | None = None
    judge: Leaves = field(default_factory=dict)
