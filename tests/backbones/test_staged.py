"""What blocks compute is computed once, also where XLA would rather do it again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import sam, staged
from jaxear.backbones.sam import SamConfig, SamEncoder
from jaxear.backbones.staged import computed_once, run
from tests.training.tiny import optimized

DEPTH = 4
SMALL = SamConfig(32, DEPTH, 2, (1, 3), 64, window_size=3, out_channels=16)


def gradient() -> tuple[Callable[..., Any], nnx.State, jax.Array]:
    """That of a small SAM's encoder, and its arguments."""
    graph, params = nnx.split(SamEncoder(SMALL, (64, 64), rngs=nnx.Rngs(0)), nnx.Param)
    images = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))

    def loss(params: nnx.State, images: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graph, params)(images)))

    return jax.grad(loss, argnums=(0, 1)), params, images


@pytest.fixture
def without(monkeypatch, trace_anew) -> Callable[[], None]:
    """To be called to do without."""

    def replace() -> None:
        for module in (sam, staged):
            monkeypatch.setattr(module, "computed_once", lambda x, block: x)
        trace_anew()

    return replace


def most_operands() -> int:
    """Of all loops of the gradient, as compiled here."""
    function, *inputs = gradient()
    with optimized():
        program = jax.jit(function).lower(*inputs).compile().as_text()
    return max(len(names.split(",")) for names in re.findall(r" fusion\(([^)]*)\)", program))


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends need no help")
def test_no_sum_along_the_shortcuts_is_made_of_all_those_before_it(without):
    found = most_operands()
    without()
    assert found < 16
    assert most_operands() > 2 * found


def test_values_and_gradients_are_the_same(without):
    function, *inputs = gradient()
    found = jax.tree.leaves(jax.jit(function)(*inputs))
    without()
    function, *inputs = gradient()
    expected = jax.tree.leaves(jax.jit(function)(*inputs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max())


class Doubling(nnx.Module):
    """Counts how often it is traced."""

    traced = 0

    def __init__(self, factor: float, n_calls: nnx.Variable | None = None):
        self.factor = nnx.Param(jnp.array(factor))
        self.n_calls = n_calls

    def __call__(self, x: jax.Array) -> jax.Array:
        Doubling.traced += 1
        if self.n_calls is not None:
            self.n_calls[...] += 1
        return self.factor[...] * x


def test_blocks_that_are_alike_are_traced_once():
    Doubling.traced = 0
    x = jnp.ones(3)
    for factor in (2.0, 3.0, 4.0):
        x = run(Doubling(factor), x, remat=False)
    assert Doubling.traced == 1
    np.testing.assert_array_equal(x, jnp.full(3, 24.0))
    run(Doubling(2.0), jnp.ones(4), remat=False)
    assert Doubling.traced == 2


def test_what_a_block_counts_is_counted_in_itself():
    blocks = [Doubling(2.0, nnx.Variable(jnp.array(0))) for _ in range(2)]
    for block in (*blocks, blocks[0]):
        run(block, jnp.ones(3), remat=False)
    assert [int(block.n_calls[...]) for block in blocks] == [2, 1]


def test_what_is_not_a_number_stays_none():
    block = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4)).at[0, 0].set(jnp.nan)
    np.testing.assert_array_equal(computed_once(x, block), x)
    block.bias[...] = jnp.full(4, jnp.nan)
    assert np.isnan(computed_once(jnp.ones((2, 4)), block)).all()
