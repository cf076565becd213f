"""GELU, LayerNorm and GroupNorm whose gradients need little of what the forward pass computed.

Left to differentiate the plain formulas, JAX keeps two to three arrays of the input's size for
each; written out, the derivatives need one. For SAM fine-tuned in batches of 32 that is a tenth of
the memory of a step. Values are those of `jax.nn.gelu`, `nnx.LayerNorm` and `nnx.GroupNorm`.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x * P(N(0, 1) <= x), exactly, not by tanh; any shape (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    wide = _widened(x)
    # By erf, not by erfc as the value is: XLA would otherwise keep that for both.
    below = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return gelu(x), (below + wide * density).astype(x.dtype) * dx


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x)); any shape."""
    return jax.nn.silu(x)


@silu.defjvp
def _silu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    wide = _widened(x)
    share = jax.nn.sigmoid(wide)
    return silu(x), (share * (1 + wide * (1 - share))).astype(x.dtype) * dx


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def standardize(x: jax.Array, groups: int | None, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, or, [b, h, w, c], over height,
    width and the channels of each of the `groups`; the same shape."""
    return _standardize(x, groups, epsilon)[0]


@standardize.defjvp
def _standardize_jvp(
    groups: int | None, epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y, factor = _standardize(x, groups, epsilon)
    mean = partial(_mean, groups=groups)
    return y, factor * (dx - mean(dx) - y * mean(y * dx))


def _standardize(x: jax.Array, groups: int | None, epsilon: float) -> tuple[jax.Array, jax.Array]:
    centred = x - _mean(x, groups)
    # Not the "fast" variance, E[x^2] - E[x]^2, which cancels where the mean is large.
    variance = _mean(jnp.square(centred), groups)
    factor = jax.lax.rsqrt(variance + epsilon)
    return centred * factor, factor


def _mean(x: jax.Array, groups: int | None) -> jax.Array:
    if groups is None:
        return jnp.mean(x, -1, keepdims=True)
    channels = jnp.mean(x, (1, 2))
    means = jnp.mean(channels.reshape(len(x), groups, -1), -1)
    return jnp.repeat(means, x.shape[-1] // groups, axis=-1)[:, None, None]


class LayerNorm(nnx.LayerNorm):
    """Over the last axis; statistics in float32 at least, the output in `dtype`."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """[..., c] -> the same shape."""
        y = standardize(_widened(x), None, self.epsilon)
        return _scaled(self, y).astype(self.dtype)


class GroupNorm(nnx.GroupNorm):
    """Over height, width and the channels of each group; statistics in float32 at least."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """[b, h, w, c] -> the same shape, in `dtype`."""
        y = standardize(_widened(x), self.num_groups, self.epsilon)
        return _scaled(self, y).astype(self.dtype)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scaled(norm: nnx.LayerNorm | nnx.GroupNorm, y: jax.Array) -> jax.Array:
    assert norm.scale is not None
    assert norm.bias is not None
    return y * norm.scale[...] + norm.bias[...]
