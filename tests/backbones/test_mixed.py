"""Convolutions of bfloat16 activations with weights that are not rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.layers import conv


@pytest.mark.parametrize(("size", "depthwise"), [(1, False), (3, True)])
def test_only_the_input_is_rounded(size, depthwise):
    kinds = {"param_dtype": jnp.float32, "depthwise": depthwise}
    exact = conv(24, 24, size, dtype=jnp.float32, rngs=nnx.Rngs(0), **kinds)
    layer = conv(24, 24, size, dtype=jnp.bfloat16, round_weights=False, rngs=nnx.Rngs(0), **kinds)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 24)), jnp.float32)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32)

    def run(layer, x):
        graph, params = nnx.split(layer)
        found, pull = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        d_params, d_x = pull(found)
        return found, d_params["kernel"][...], d_x

    expected, *gradients = jax.jit(lambda x: run(exact, x))(rounded)
    found, *others = jax.jit(lambda x: run(layer, x))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
    for gradient, other in zip(gradients, others, strict=True):
        assert other.dtype == jnp.float32
        np.testing.assert_allclose(other, gradient, rtol=0, atol=1e-2 * np.abs(gradient).max())
