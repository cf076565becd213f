"""The changes of layout between torch and Flax, each with its exact inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Transform:
    """A named, bit-exact rearrangement: `inverse(forward(x))` is x, dtype included."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def _permute(name: str, *axes: int) -> Transform:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(
        name,
        lambda x: np.ascontiguousarray(np.transpose(x, axes)),
        lambda x: np.ascontiguousarray(np.transpose(x, back)),
    )


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = _permute("linear: [out, in] -> [in, out]", 1, 0)
CONV = _permute("conv: OIHW -> HWIO", 2, 3, 1, 0)
COUNTER = Transform(
    "counter: int64 -> int32", lambda x: x.astype(np.int32), lambda x: x.astype(np.int64)
)
