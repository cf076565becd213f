"""What training carries from step to step: plain dictionaries of arrays, by dotted path."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.traversals import unflatten_mapping

from jaxear.training.packing import pack
from jaxear.vae import EarVAE

Leaves = dict[str, jax.Array]
Path = tuple[str | int, ...]


class Partition(NamedTuple):
    """A model's arrays: trainable and frozen parameters, and buffers, which are neither."""

    trainable: Leaves
    frozen: Leaves
    buffers: Leaves


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        step: steps done, an int32 scalar.
        trainable: parameters that the optimiser moves.
        frozen: parameters that stay as they are.
        buffers: what is neither, e.g. the running statistics of BatchNorm.
        opt_state: the optimiser's state for `trainable`, packed (`packing.pack`).
        average: exponential moving average of `trainable`; empty where none is kept.
        bad_steps: how many steps in a row had to be skipped, an int32 scalar.
    """

    step: jax.Array
    trainable: Leaves
    frozen: Leaves
    buffers: Leaves
    opt_state: Any
    average: Leaves
    bad_steps: jax.Array

    @property
    def leaves(self) -> tuple[Leaves, Leaves, Leaves]:
        """The arrays of the model that is evaluated: the averaged one, where there is one."""
        return self.average or self.trainable, self.frozen, self.buffers


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays, so that pure functions can put arrays into it and call it."""

    graphdef: Any
    paths: Mapping[str, Path]

    def model(self, *leaves: Mapping[str, jax.Array]) -> EarVAE:
        """The model with these arrays; together they must be all it has."""
        values = {name: value for group in leaves for name, value in group.items()}
        if values.keys() != self.paths.keys():
            raise ValueError(f"leaves differ: {sorted(values.keys() ^ self.paths.keys())[:5]}")
        flat = {self.paths[name]: value for name, value in values.items()}
        return nnx.merge(self.graphdef, nnx.State(unflatten_mapping(flat)))

    def buffers_of(self, model: EarVAE, buffers: Leaves) -> Leaves:
        """The buffers of a model after a call, under the names that `buffers` has."""
        if not buffers:
            return {}
        state = dict(nnx.to_flat_state(nnx.state(model)))
        return {name: state[self.paths[name]].get_value() for name in buffers}


def split_model(
    model: EarVAE, trainable: Collection[str] | None = None
) -> tuple[Skeleton, Partition]:
    """Take a model apart: its skeleton, and its arrays in three groups.

    `trainable` names the parameters to train by their dotted paths; all of them by default.
    """
    graphdef, state = nnx.split(model)
    leaves = Partition({}, {}, {})
    paths: dict[str, Path] = {}
    for parts, variable in nnx.to_flat_state(state):
        path = cast(Path, tuple(parts))
        name = ".".join(map(str, path))
        paths[name] = path
        if not isinstance(variable, nnx.Param):
            group = leaves.buffers
        else:
            free = trainable is None or name in trainable
            group = leaves.trainable if free else leaves.frozen
        group[name] = variable.get_value()
    return Skeleton(graphdef, paths), leaves


def create_state(
    leaves: Partition, optimizer: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """The state before the first step; with a moving average of the parameters if asked for."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **leaves._asdict(),
        # As one program: one by one, each shape's zeros are compiled.
        opt_state=jax.jit(lambda trainable: optimizer.init(pack(trainable)))(leaves.trainable),
        # Copies: a step is given its state to write over, and must not get an array twice.
        average=jax.tree.map(jnp.copy, leaves.trainable) if average else {},
        bad_steps=jnp.zeros((), jnp.int32),
    )
