"""Depthwise convolution that is fast on a CPU too, forward and gradient, exact to rounding.

XLA's CPU backend runs a convolution with one channel per group as a naive loop, and its gradient
is worse still. Here a CPU computes a sum of shifted products, which XLA fuses into one loop,
vectorised over the channels; GPUs and TPUs keep XLA's own convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

# Positions that one step of the kernel gradient's loop unrolls: more only lengthens compilation.
_TILE = 8


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int | None = None,
    precision: lax.PrecisionLike = None,
    out_sharding: None = None,
) -> jax.Array:
    """Convolve every channel with its own kernel; takes the place of `lax.conv_general_dilated`.

    Give it to a layer as `nnx.Conv(c, c, ..., feature_group_count=c,
    conv_general_dilated=depthwise_conv)`; the last six arguments are there for that and cannot be
    chosen, but for `precision`. Sums run in float32 at least, also where x is bfloat16. A kernel of
    higher precision than x is not rounded. Derivatives are those of reverse mode only.

    Milliseconds of the forward pass and of both gradients together, 7x7 kernels, float32, the
    stages of ConvNeXt at 128 pixels, the best of several runs on 2 busy CPU cores (jax 0.10; torch
    2.13 on one thread, which suffers less from company, its gradients with a forward pass):

        [b, h, w, c]       lax           here         torch
        8, 32, 32, 96    50   139     1.5   6.6     0.9    40
        8, 16, 16, 192   25   114     1.2   3.4     0.4    11
        8, 8, 8, 384     14   136     0.6   2.2     0.2     6
        8, 4, 4, 768     30   247     0.7   6.0     0.1    40

    EfficientNet's 3x3 and 5x5 gain as much: [8, 32, 32, 192], 5x5, stride 2, 17 and 456 ms by lax,
    0.9 and 3.6 here. ConvNeXt V2's whole gradient takes 2.3 s instead of 10.1 (batch 8), while 18
    such layers more than double the time of compilation.

    Args:
        x: [b, h, w, c].
        kernel: [kh, kw, 1, c].
        window_strides: of height and width.
        padding: "SAME", "VALID" or ((top, bottom), (left, right)), as for `lax`.

    Returns:
        [b, h', w', c] of x's dtype, or the kernel's if that is wider.

    Raises:
        ValueError: a dilation, another layout, or a kernel that is not one per channel.
    """
    del dimension_numbers, out_sharding  # nnx.Conv's: always NHWC, HWIO and None
    channels = x.shape[-1]
    if kernel.ndim != 4 or kernel.shape[2:] != (1, channels):
        raise ValueError(f"Expected a kernel [kh, kw, 1, {channels}], got {list(kernel.shape)}.")
    if feature_group_count not in (None, channels):
        raise ValueError(f"Expected {channels} groups, one per channel, not {feature_group_count}.")
    if any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ()))):
        raise ValueError("A dilated depthwise convolution is not implemented.")
    strides = (int(window_strides[0]), int(window_strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    return _conv(x, kernel, strides, ((top, bottom), (left, right)), precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads,
    precision: lax.PrecisionLike,
) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _shifted_products(
            _pad(x, pads), kernel, strides, jnp.promote_types(x.dtype, kernel.dtype)
        ),
        default=partial(_plain, strides=strides, pads=pads, precision=precision),
    )


def _forward(x, kernel, strides, pads, precision):
    return _conv(x, kernel, strides, pads, precision), (x, kernel)


def _backward(strides, pads, precision, residuals, dy):
    x, kernel = residuals
    plain = partial(_plain, strides=strides, pads=pads, precision=precision)

    def plain_gradients(x, kernel, dy):
        return jax.vjp(plain, x, kernel)[1](dy)

    def cpu_gradients(x, kernel, dy):
        return (
            _input_gradient(dy, kernel, x.shape, strides, pads).astype(x.dtype),
            _kernel_gradient(_pad(x, pads), dy, kernel.shape, strides).astype(kernel.dtype),
        )

    return lax.platform_dependent(x, kernel, dy, cpu=cpu_gradients, default=plain_gradients)


_conv.defvjp(_forward, _backward)


def _plain(x, kernel, *, strides, pads, precision):
    if x.dtype != kernel.dtype:
        # Or TPUs would round the kernel. There are too few products for them to take any time.
        x, precision = x.astype(jnp.promote_types(x.dtype, kernel.dtype)), lax.Precision.HIGH
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision,
    )


def _pad(x: jax.Array, pads: Pads, interior: tuple[int, int] = (0, 0)) -> jax.Array:
    """Zeros around (and between) the pixels, in the precision of the sums."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    config = [(0, 0, 0), *((*pad, gap) for pad, gap in zip(pads, interior, strict=True)), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _shifted_products(padded, kernel, strides, dtype):
    kh, kw = kernel.shape[:2]
    (sh, sw), (_, height, width, _) = strides, padded.shape
    kernel = kernel.astype(padded.dtype)
    total = jnp.zeros((), padded.dtype)
    for i in range(kh):
        for j in range(kw):
            shifted = padded[:, i : height - kh + i + 1 : sh, j : width - kw + j + 1 : sw]
            total += shifted * kernel[i, j, 0]
    return total.astype(dtype)


def _input_gradient(dy, kernel, shape, strides, pads):
    """The full correlation of dy, spread out by the strides, with the mirrored kernel."""
    sizes = zip(shape[1:3], dy.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    margins = [
        (k - 1 - low, size + low - stride * (out - 1) - 1)
        for size, out, k, stride, (low, _) in sizes
    ]
    gaps = (strides[0] - 1, strides[1] - 1)
    spread = _pad(dy, (margins[0], margins[1]), gaps)
    return _shifted_products(spread, kernel[::-1, ::-1], (1, 1), spread.dtype)


def _kernel_gradient(padded, dy, shape, strides):
    """Sum of window times dy over all positions, a tile of positions at a time.

    A plain reduction over [b, h, w] is what XLA does slowly. The sum of a few windows
    [b, kh, kw, c] is again one vectorised loop.
    """
    (kh, kw), (sh, sw), (b, height, width, c) = shape[:2], strides, dy.shape
    columns = min(width, _TILE)
    rows = min(height, max(1, _TILE // columns))
    n_rows, n_columns = -(-height // rows), -(-width // columns)
    extra = (n_rows * rows - height, n_columns * columns - width)  # where dy is 0, to fill tiles
    dy = jnp.pad(dy.astype(padded.dtype), ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0)))
    padded = jnp.pad(padded, ((0, 0), (0, extra[0] * sh), (0, extra[1] * sw), (0, 0)))
    size = (b, sh * (rows - 1) + kh, sw * (columns - 1) + kw, c)

    def cut(step):
        row, column = step // n_columns * rows, step % n_columns * columns
        patch = lax.dynamic_slice(padded, (0, row * sh, column * sw, 0), size)
        return patch, lax.dynamic_slice(dy, (0, row, column, 0), (b, rows, columns, c))

    def add_tile(step, carry):
        # A tile is cut out one step ahead: XLA would fuse a cut of the same step into each product,
        # where the moving offset prevents vectorisation (10 times as slow).
        total, patch, weights = carry
        for i in range(rows):
            for j in range(columns):
                window = patch[:, i * sh : i * sh + kh, j * sw : j * sw + kw]
                total += window * weights[:, i, None, j, None]
        return total, *cut(step + 1)

    zeros = jnp.zeros((b, kh, kw, c), padded.dtype)
    total, *_ = lax.fori_loop(0, n_rows * n_columns, add_tile, (zeros, *cut(0)))
    return total.sum(0)[:, :, None]
