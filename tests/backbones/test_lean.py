"""Lean layers: values and derivatives of the plain formulas, with less kept for the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.lean import GroupNorm, LayerNorm, gelu, silu

SHAPE = (2, 3, 5, 8)


def norms(dtype):
    """Pairs of ours and Flax's with the same random parameters."""
    kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0), "epsilon": 1e-3}
    pairs = {
        "layer norm": (LayerNorm(8, **kinds), nnx.LayerNorm(8, use_fast_variance=False, **kinds)),
        "group norm": (
            GroupNorm(8, num_groups=2, **kinds),
            nnx.GroupNorm(8, num_groups=2, use_fast_variance=False, **kinds),
        ),
    }
    for pair in pairs.values():
        for norm in pair:
            rng = np.random.default_rng(0)
            norm.scale[...] = jnp.asarray(rng.normal(size=8), dtype)
            norm.bias[...] = jnp.asarray(rng.normal(size=8), dtype)
    return pairs


def functions(dtype):
    """Pairs (ours, the plain one) of parameters and an array."""
    pairs = {
        "gelu": (lambda _, x: gelu(x), lambda _, x: jax.nn.gelu(x, approximate=False)),
        "silu": (lambda _, x: silu(x), lambda _, x: jax.nn.silu(x)),
    }
    arguments = dict.fromkeys(pairs, (jnp.zeros(()),) * 2)
    for name, (ours, plain) in norms(dtype).items():
        (graph, params), (plain_graph, plain_params) = nnx.split(ours), nnx.split(plain)
        pairs[name] = (
            lambda p, x, graph=graph: nnx.merge(graph, p)(x),
            lambda p, x, graph=plain_graph: nnx.merge(graph, p)(x),
        )
        arguments[name] = params, plain_params
    return {name: (*pairs[name], *arguments[name]) for name in pairs}


NAMES = ("gelu", "silu", "layer norm", "group norm")


@pytest.mark.parametrize("name", NAMES)
def test_values_and_derivatives_are_those_of_the_plain_formula(name):
    with jax.enable_x64(True):
        ours, plain, params, plain_params = functions(jnp.float64)[name]
        rng = np.random.default_rng(1)
        x, dx, cotangent = (jnp.asarray(rng.normal(1, 3, SHAPE)) for _ in range(3))
        found, expected = [], []
        for results, f, p in ((found, ours, params), (expected, plain, plain_params)):
            y, pull_back = jax.vjp(f, p, x)
            results += [y, *jax.tree.leaves(pull_back(cotangent))]
            results.append(jax.jvp(lambda x, f=f, p=p: f(p, x), (x,), (dx,))[1])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_once_by_norms_and_seldom_by_activations(name):
    ours, _, params, _ = functions(jnp.bfloat16)[name]
    _, exact, _, plain_params = functions(jnp.float32)[name]
    x = jnp.asarray(np.random.default_rng(1).normal(1, 3, SHAPE), jnp.bfloat16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), plain_params)
    y, pull_back = jax.vjp(lambda x: ours(params, x), x)
    want, exactly = jax.vjp(lambda x: exact(rounded, x), x.astype(jnp.float32))
    (gradient,), (wanted,) = pull_back(jnp.ones_like(y)), exactly(jnp.ones_like(want))
    assert y.dtype == gradient.dtype == jnp.bfloat16
    if "norm" in name:
        np.testing.assert_allclose(np.float32(y), want, rtol=2**-8, atol=1e-5)
        np.testing.assert_allclose(np.float32(gradient), wanted, rtol=2**-8, atol=1e-5)
    else:  # computed in bfloat16, as they are elsewhere
        np.testing.assert_allclose(np.float32(y), want, atol=2**-7 * float(jnp.abs(want).max()))
        np.testing.assert_allclose(np.float32(gradient), wanted, atol=2**-7)


@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept_for_the_gradient(name):
    ours, plain, params, plain_params = functions(jnp.float32)[name]
    x = jax.ShapeDtypeStruct((4, 16, 16, 8), jnp.float32)

    def kept(f, params):
        backward = jax.eval_shape(lambda p, x: jax.vjp(f, p, x)[1], params, x)
        return sum(leaf.size for leaf in jax.tree.leaves(backward)) / x.size

    assert kept(ours, params) < 1.3
    assert kept(plain, plain_params) > 1.9
