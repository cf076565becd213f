"""The layers that the ImageNet families share, against torch's and by what they promise."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.layers import BatchNorm, conv
from jaxear.backbones.mbconv import Block, InvertedResidual, MBConvConfig, SqueezeExcite
from jaxear.backbones.staged import take
from jaxear.errors import UserError

FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_norm(channels: int, **kwargs) -> BatchNorm:
    norm = BatchNorm(channels, **{**FLOAT32, **kwargs})
    norm.scale[...] = 1 + 0.2 * normal(channels, seed=1)
    norm.bias[...] = normal(channels, seed=2)
    norm.mean[...] = normal(channels, seed=3)
    norm.var[...] = 0.5 + normal(channels, seed=4) ** 2
    norm.num_batches_tracked[...] = jnp.int32(7)
    return norm


def statistics(norm: BatchNorm) -> list[np.ndarray]:
    return [np.asarray(leaf[...]) for leaf in (norm.mean, norm.var, norm.num_batches_tracked)]


@pytest.mark.torch
@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_batch_norm_in_training_is_torchs(momentum):
    torch = pytest.importorskip("torch")
    norm = batch_norm(5, mode="train", momentum=momentum, epsilon=1e-3)
    original = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=momentum)
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    leaves = (norm.scale, norm.bias, norm.mean, norm.var, norm.num_batches_tracked)
    original.load_state_dict(
        {
            name: torch.tensor(np.asarray(leaf[...]))
            for name, leaf in zip(names, leaves, strict=True)
        }
    )
    norm.train()
    x = 3 + 2 * normal(2, 3, 2, 5)  # few values, so that biased and unbiased variances differ
    for _ in range(2):
        expected = original(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        np.testing.assert_allclose(norm(x), expected.detach(), atol=2e-6)
    for found, name in zip(statistics(norm), names[2:], strict=True):
        np.testing.assert_allclose(found, original.state_dict()[name], rtol=2e-6)
    assert norm.num_batches_tracked[...] == 9


@pytest.mark.parametrize(("mode", "training"), [("frozen", True), ("train", False)])
def test_batch_norm_keeps_its_statistics(mode, training):
    norm = batch_norm(5, mode=mode)
    before = statistics(norm)
    norm.train() if training else norm.eval()
    x = normal(2, 4, 4, 5)
    mean, var, _ = before
    expected = (x - mean) / np.sqrt(var + 1e-5) * norm.scale[...] + norm.bias[...]
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)
    assert all(map(np.array_equal, before, statistics(norm)))


def test_statistics_get_no_gradient():
    graph, params, rest = nnx.split(batch_norm(3, mode="train"), nnx.Param, ...)
    assert sorted(str(path[0]) for path, _ in nnx.to_flat_state(params)) == ["bias", "scale"]
    assert {str(path[0]) for path, _ in nnx.to_flat_state(rest)} == {
        "mean",
        "num_batches_tracked",
        "var",
    }
    assert nnx.merge(graph, params, rest).num_batches_tracked.dtype == jnp.int32


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    norm = batch_norm(4, mode="train", dtype=jnp.bfloat16)
    norm.train()
    assert norm(jnp.ones((2, 4, 4, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in (norm.scale, norm.bias, norm.mean, norm.var)} == {
        jnp.dtype(jnp.float32)
    }


def test_batch_norm_refuses_a_single_value_and_unknown_modes():
    norm = batch_norm(4, mode="train")
    norm.train()
    with pytest.raises(UserError, match=r"more than one value per channel.*\[1, 1, 1, 4\]"):
        norm(jnp.ones((1, 1, 1, 4)))
    with pytest.raises(UserError, match="'frozen' or 'train', not 'frosty'"):
        BatchNorm(4, mode="frosty", **FLOAT32)  # type: ignore[arg-type]


@pytest.mark.torch
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_padding_is_timms(size, stride, kernel_size, depthwise, padding):
    from tests.torch_reference import import_timm, torch

    layer = conv(
        4,
        4,
        kernel_size,
        stride=stride,
        depthwise=depthwise,
        padding=padding,
        rngs=nnx.Rngs(0),
        **FLOAT32,
    )
    original = import_timm().layers.create_conv2d(
        4,
        4,
        kernel_size,
        stride=stride,
        depthwise=depthwise,
        padding="same" if padding == "same" else "",
    )
    kernel = np.transpose(layer.kernel[...], (3, 2, 0, 1))
    original.load_state_dict({"weight": torch.tensor(kernel)})
    x = normal(2, *size, 4)
    expected = original(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()
    found = layer(x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_initialisation_keeps_the_variance_of_what_a_channel_sees():
    for options in ({}, {"depthwise": True}):
        kernel = conv(256, 256, 3, rngs=nnx.Rngs(0), **options, **FLOAT32).kernel[...]
        fan = 9 * (1 if options else 256)
        assert np.var(kernel) == pytest.approx(2 / fan, rel=0.1)


def test_squeeze_excite_gates_whole_channels():
    layer = SqueezeExcite(
        4, 2, activation=jax.nn.relu, gate=jax.nn.sigmoid, rngs=nnx.Rngs(0), **FLOAT32
    )
    x = normal(2, 5, 6, 4)
    gates = layer(x) / x
    np.testing.assert_allclose(gates, np.broadcast_to(gates[:, :1, :1], x.shape), rtol=1e-4)
    assert 0 < gates.min() < gates.max() < 1


@pytest.mark.parametrize(
    ("expanded", "out_channels", "stride", "shortcut", "expands"),
    [
        (24, 8, 1, True, True),
        (8, 8, 1, True, False),
        (24, 8, 2, False, True),
        (24, 6, 1, False, True),
    ],
)
def test_inverted_residual_adds_its_input_where_the_shape_stays(
    expanded, out_channels, stride, shortcut, expands
):
    block = InvertedResidual(
        8,
        Block(3, expanded, out_channels, None, jax.nn.relu, stride),
        MBConvConfig(stem=8, stages=(), head=8),
        norm=partial(BatchNorm, **FLOAT32),
        rngs=nnx.Rngs(0),
        **FLOAT32,
    )
    assert hasattr(block, "expand") is expands
    block.project_bn.scale[...] = jnp.zeros(out_channels)
    x = normal(2, 6, 6, 8)
    found = block(x)
    assert found.shape == (2, 6 // stride, 6 // stride, out_channels)
    np.testing.assert_array_equal(found, x if shortcut else np.zeros(found.shape))


def test_take_goes_no_deeper_than_it_must():
    computed = []

    def network():
        for name in ("a", "b", "c"):
            computed.append(name)
            yield name, name.upper()

    assert take(network(), ("b", "a", "b")) == ("B", "A", "B")
    assert computed == ["a", "b"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [7, 8])
def test_a_1x1_convolution_is_that_of_xla(size, padding, stride):
    layer = conv(3, 5, 1, stride=stride, padding=padding, **FLOAT32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = normal(2, size, size, 3)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout
        )

    expected, pull_back = jax.vjp(plain, x, layer.kernel[...])
    found, ours_back = jax.vjp(lambda x, params: nnx.merge(graph, params)(x), x, params)
    cotangent = normal(*expected.shape, seed=1)
    gradients = jax.tree.leaves(ours_back(cotangent))
    for one, other in zip((found, *gradients), (expected, *pull_back(cotangent)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
