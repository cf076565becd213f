"""How inverted residuals compute in bfloat16: where they round, and where they do not.

Errors of many thin layers add up. On random MobileNetV3-Large the largest error of a feature map
against float32, of its largest value, is (mean of four networks, and the worst of them):

    rounding operands and results of all layers, as autocast does     0.038   0.050
    operands of the convolutions alone, everything else exact         0.029   0.033
    operands but the weights; the shortcuts' sums (this module)       0.021   0.023

So activations are rounded once, as a convolution takes them in, and where a block ends; weights
not at all, and neither are a convolution's results before normalisation, activation and
squeeze-excite are through. What is stored and multiplied stays bfloat16: a float32 weight is the
sum of two of them up to 2^-16, so a 1x1 convolution is two products summed in float32 (Henry et
al. 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations"). The forward pass of 64 images of 128x128 takes 17.7 GFLOP instead of 9.8; its
gradient is computed as ever, from rounded operands, and JAX keeps 1.28 instead of 0.95 GB for it
(float32: 1.46). What that costs in time on an accelerator has not been measured. Where `dtype` is
`param_dtype` nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax


def round_input(args: tuple[Any, ...], *, dtype: Dtype) -> tuple[Any, ...]:
    """The layer's (input, kernel, bias) with the input alone in `dtype`, for `nnx.Conv`."""
    x, *weights = args
    return (x.astype(dtype), *weights)


def pointwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int] = (1, 1),
    *args: Any,
    **kwargs: Any,
) -> jax.Array:
    """A 1x1 convolution as the matrix product that it is, for `nnx.Conv`.

    On a CPU the gradient of a product takes half the time of a convolution's: XLA makes that
    another convolution, over the batch, of two transposed copies.

    Args:
        x: [b, h, w, c], of the kernel's precision, or of a lower one: then the kernel is not
            rounded (see above).
        kernel: [1, 1, c, d].
        window_strides: of height and width.

    Returns:
        [b, h', w', d] of the kernel's dtype.
    """
    del args, kwargs  # padding and the like, which leave nothing to choose
    rows, columns = window_strides
    x = x[:, ::rows, ::columns]
    return _product(x, kernel[0, 0])


@jax.custom_vjp
def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    if x.dtype == weights.dtype:
        return x @ weights
    # Not by conversions to and fro, which XLA may drop: the low part would be zero.
    bits = jnp.finfo(x.dtype)
    high = lax.reduce_precision(weights, bits.nexp, bits.nmant)
    parts = (high, weights - high)
    high, low = (_dot(x, part.astype(x.dtype), (3, 0), weights.dtype) for part in parts)
    return high + low


def _forward(x, weights):
    return _product(x, weights), (x, weights)


def _backward(residuals, dy):
    x, weights = residuals
    dy = dy.astype(x.dtype)
    dx = _dot(dy, weights.astype(x.dtype), (3, 1), x.dtype)
    # XLA on CPU makes a transposed copy of the first, for which it should be the narrower.
    narrow, wide = (x, dy) if x.shape[-1] <= dy.shape[-1] else (dy, x)
    found = _dot(narrow, wide, ((0, 1, 2), (0, 1, 2)), weights.dtype)
    return dx, found if narrow is x else found.T


_product.defvjp(_forward, _backward)


def _dot(x, y, axes, dtype):
    return jnp.tensordot(x, y, axes, preferred_element_type=dtype)
