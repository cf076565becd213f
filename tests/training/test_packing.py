"""The optimiser's view of the parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxear.config import TrainConfig
from jaxear.training.optimizer import create_optimizer
from jaxear.training.packing import VECTOR, pack, pack_factors, unpack

LEAVES = {
    "b.kernel": jnp.arange(6.0).reshape(2, 3),
    "b.bias": jnp.asarray([7.0, 8.0]),
    "a.table": jnp.arange(4.0).reshape(2, 2) + 10,
    "c.scale": jnp.asarray([1.5], jnp.bfloat16),
}


def test_kernels_stay_and_all_else_lies_end_to_end():
    packed = pack(LEAVES)
    assert packed.keys() == {"b.kernel", VECTOR}
    np.testing.assert_array_equal(packed[VECTOR], [10, 11, 12, 13, 7, 8, 1.5])


def test_unpacking_gives_back_what_was_packed():
    found = unpack(pack(LEAVES), LEAVES)
    assert found.keys() == LEAVES.keys()
    for name, leaf in LEAVES.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)


def test_kernels_alone_and_nothing_at_all_can_be_packed():
    kernels = {"b.kernel": LEAVES["b.kernel"]}
    assert pack(kernels).keys() == unpack(kernels, kernels).keys() == kernels.keys()
    assert pack({}) == unpack({}, {}) == {}


def test_an_update_of_packed_leaves_is_that_of_each():
    """Two steps with clipping, decay and a rate of its own for every leaf."""
    leaves = {name: leaf.astype(jnp.float32) for name, leaf in LEAVES.items()}
    factors = {name: 0.5**i for i, name in enumerate(leaves)}
    config = TrainConfig(clip_norm=0.5, weight_decay=0.1)
    schedule = optax.constant_schedule(0.1)
    packing = create_optimizer(config, schedule, pack_factors(factors, leaves))
    plain = create_optimizer(config, schedule, factors)
    packed_state, state = packing.init(pack(leaves)), plain.init(leaves)
    for step in (1.0, -3.0):
        gradients = jax.tree.map(lambda leaf, step=step: jnp.sin(step * leaf), leaves)
        packed, packed_state = packing.update(pack(gradients), packed_state, pack(leaves))
        expected, state = plain.update(gradients, state, leaves)
        found = unpack(packed, leaves)
        for name in leaves:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_one_factor_for_all_stays_one_number():
    factors = dict.fromkeys(LEAVES, 0.25)
    assert pack_factors(factors, LEAVES) == {"b.kernel": 0.25, VECTOR: 0.25}
