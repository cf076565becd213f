"""The depthwise convolution against `lax.conv_general_dilated`, which it stands for."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.depthwise import depthwise_conv


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def arrays(shape, size, dtype=np.float64):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(*size, 1, shape[-1]))
    return jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(kernel, dtype)


CASES = [
    # Stages of ConvNeXt, down to images smaller than the kernel, and a width of several tiles.
    ((2, 8, 8, 3), (7, 7), (1, 1), ((3, 3), (3, 3))),
    ((2, 1, 2, 3), (7, 7), (1, 1), ((3, 3), (3, 3))),
    ((2, 5, 37, 3), (7, 7), (1, 1), ((3, 3), (3, 3))),
    # EfficientNet and MobileNet: stride 2, torch's and TensorFlow's padding, odd and even sizes.
    ((2, 8, 9, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 35, 34, 4), (5, 5), (2, 2), ((2, 2), (2, 2))),
    ((2, 8, 9, 4), (5, 5), (2, 2), "SAME"),
    ((2, 9, 8, 4), (3, 3), (2, 2), "SAME"),
    # What nobody needs yet: no padding, more than the kernel's, unequal sides.
    ((1, 9, 11, 2), (3, 5), (2, 1), "VALID"),
    ((1, 6, 5, 2), (3, 3), (1, 2), ((4, 0), (0, 5))),
    ((1, 9, 9, 2), (2, 2), (3, 3), "VALID"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "size", "strides", "padding"), CASES)
def test_values_and_gradients_are_those_of_the_plain_form(shape, size, strides, padding):
    x, kernel = arrays(shape, size)
    reference, plain_vjp = jax.vjp(lambda x, kernel: plain(x, kernel, strides, padding), x, kernel)
    value, vjp = jax.vjp(lambda x, kernel: depthwise_conv(x, kernel, strides, padding), x, kernel)
    np.testing.assert_allclose(value, reference, rtol=0, atol=1e-13)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=value.shape))
    for gradient, expected in zip(vjp(dy), plain_vjp(dy), strict=True):
        assert gradient.dtype == jnp.float64
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


def test_bfloat16_sums_in_float32():
    """Summed in bfloat16, 49 products would lose several times what rounding the result does."""
    x, kernel = arrays((2, 12, 12, 8), (7, 7), jnp.bfloat16)
    value = depthwise_conv(x, kernel)
    exact = plain(*(a.astype(jnp.float32) for a in (x, kernel)), (1, 1), "SAME")
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, exact.astype(jnp.bfloat16))


def test_gradients_keep_the_dtypes_of_their_arguments():
    x, kernel = arrays((1, 4, 4, 2), (3, 3), jnp.bfloat16)
    dx, dk = jax.grad(lambda x, k: depthwise_conv(x, k).sum().astype(jnp.float32), (0, 1))(
        x, kernel
    )
    assert (dx.dtype, dk.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_takes_the_place_of_the_convolution_of_a_layer():
    layers = [
        nnx.Conv(4, 4, (3, 3), strides=2, feature_group_count=4, rngs=nnx.Rngs(0), **options)
        for options in ({}, {"conv_general_dilated": depthwise_conv})
    ]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 8, 4)), jnp.float32)
    ordinary, fast = (nnx.jit(layer)(x) for layer in layers)
    np.testing.assert_allclose(fast, ordinary, atol=1e-6)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_only_a_cpu_takes_another_form(platform, convolutions):
    x, kernel = arrays((1, 4, 4, 2), (3, 3), np.float32)

    @jax.jit
    def step(x, kernel):
        y, vjp = jax.vjp(depthwise_conv, x, kernel)
        return y, vjp(y)

    lowered = step.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ((3, 3, 4, 4), {}, r"kernel \[kh, kw, 1, 4\], got \[3, 3, 4, 4\]"),
        ((3, 3, 1, 8), {}, r"got \[3, 3, 1, 8\]"),
        ((3, 3, 1, 4), {"feature_group_count": 2}, "4 groups"),
        ((3, 3, 1, 4), {"rhs_dilation": (2, 2)}, "dilated"),
        ((3, 3, 1, 4), {"lhs_dilation": (1, 2)}, "dilated"),
    ],
)
def test_refuses_what_is_not_a_plain_depthwise_convolution(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.zeros((1, 5, 5, 4)), jnp.zeros(kernel), **options)
