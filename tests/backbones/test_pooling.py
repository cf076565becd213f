"""Max pooling against `reduce_window` and torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.pooling import max_pool

# size, stride, margin: VGG's, ResNet's, and windows with gaps.
SHAPES = [(2, 2, 0), (3, 2, 1), (2, 3, 0)]


def images(*, ties: bool) -> jax.Array:
    values = np.random.default_rng(0).normal(size=(2, 9, 12, 3)).astype(np.float32)
    return jnp.asarray(np.round(values) if ties else values)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("size", "stride", "margin"), SHAPES)
def test_values_and_gradients_are_those_of_reduce_window(size, stride, margin, ties):
    x = images(ties=ties)
    margins = ((margin, margin), (margin, margin))
    reference, plain_vjp = jax.vjp(
        lambda x: nnx.max_pool(x, (size, size), (stride, stride), margins), x
    )
    value, vjp = jax.vjp(lambda x: max_pool(x, size, stride, margin), x)
    np.testing.assert_array_equal(value, reference)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=value.shape), jnp.float32)
    np.testing.assert_allclose(vjp(dy)[0], plain_vjp(dy)[0], atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("size", "stride", "margin"), SHAPES)
def test_ties_and_nan_are_treated_as_in_torch(size, stride, margin):
    torch = pytest.importorskip("torch")
    x = np.array(images(ties=True))
    original = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(original, size, stride, margin)
    pooled.backward(torch.ones_like(pooled))
    gradient = jax.grad(lambda x: max_pool(x, size, stride, margin).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, original.grad.permute(0, 2, 3, 1).numpy())
    x[0, 2:4, 3:7, 1] = np.nan
    pooled = torch.nn.functional.max_pool2d(
        torch.tensor(x).permute(0, 3, 1, 2), size, stride, margin
    )
    np.testing.assert_array_equal(
        max_pool(jnp.asarray(x), size, stride, margin), pooled.permute(0, 2, 3, 1).numpy()
    )


@pytest.mark.parametrize(("platform", "windows"), [("cpu", False), ("cuda", True)])
def test_only_a_cpu_takes_another_form(platform, windows):
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 2, 2).sum()))
    lowered = gradient.trace(images(ties=False)).lower(lowering_platforms=(platform,)).as_text()
    assert ("select_and_scatter" in lowered) == windows
