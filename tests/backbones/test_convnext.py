"""ConvNeXt: small copies against timm's code, features, options and errors."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone, get_spec
from jaxear.backbones.base import Backbone, FeatureInfo
from jaxear.backbones.convnext import (
    CONVNEXT_TINY,
    ConvNeXtConfig,
    ConvNeXtEncoder,
    ConvNeXtStage,
    GlobalResponseNorm,
)
from jaxear.backbones.weights import fill, named_leaves
from jaxear.errors import UserError

V1 = ConvNeXtConfig(depths=(1, 2, 1, 1), widths=(8, 12, 16, 20), classes=7)
V2 = ConvNeXtConfig(
    depths=(1, 2, 1, 1), widths=(8, 12, 16, 20), classes=7, layer_scale=None, response_norm=True
)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def encoder_of(config, *, dtype=jnp.float32, classifier=False) -> ConvNeXtEncoder:
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    return ConvNeXtEncoder(
        config, classifier=classifier, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
    )


def images(height=64, width=64, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(dtype)


def jitted(encoder, function):
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, x: function(nnx.merge(graph, state), x)), state


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("config", "size"), [(V1, (50, 87)), (V2, (64, 64))], ids=["v1", "v2"])
def test_logits_and_gradients_equal_timms(config, size):
    from porting.convnext import TABLES, V2_TABLES
    from porting.rules import flax_to_torch, torch_to_flax
    from tests.torch_reference import import_timm, numpy_state, randomize, relative_error, torch

    timm = import_timm()
    original = timm.models.convnext.ConvNeXt(
        depths=config.depths,
        dims=config.widths,
        num_classes=config.classes,
        use_grn=config.response_norm,
        ls_init_value=config.layer_scale,
    )
    original = randomize(original.double()).eval()
    encoder = nnx.eval_shape(lambda: encoder_of(config, dtype=jnp.float64, classifier=True))
    table = (V2_TABLES if config is V2 else TABLES)["timm"]
    shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    fill(encoder, torch_to_flax(table, numpy_state(original), shapes), source="the test")

    x = images(*size, dtype=np.float64)
    function, state = jitted(encoder, lambda e, x: e.logits(x))
    logits, vjp = jax.vjp(function, state, x)
    torch_x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    torch_logits = original(torch_x)
    assert relative_error(logits, torch_logits.detach()) < 1e-12

    dy = np.random.default_rng(2).normal(size=logits.shape)
    torch_logits.backward(torch.tensor(dy))
    state_gradient, x_gradient = vjp(jnp.asarray(dy))
    assert relative_error(x_gradient, torch_x.grad.permute(0, 2, 3, 1)) < 1e-11
    leaves = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(state_gradient)
    }
    gradients = flax_to_torch(table, leaves)
    expected = {name: p.grad.numpy() for name, p in original.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-11, name


@pytest.mark.parametrize(("size", "last"), [((64, 96), (2, 3)), ((35, 79), (1, 2))])
def test_features_of_any_size(size, last):
    names = ("last", "stage1", "stage3")
    maps = nnx.eval_shape(lambda x: encoder_of(V2).features(x, names), images(*size))
    sides = [last, tuple(side // 4 for side in size), tuple(side // 16 for side in size)]
    assert [m.shape for m in maps] == [
        (2, *side, channels) for side, channels in zip(sides, (20, 8, 16), strict=True)
    ]
    info = nnx.eval_shape(lambda: encoder_of(V2)).feature_info
    assert info["stage3"] == FeatureInfo(16, 16)
    assert info["last"] == info["stage4"] == FeatureInfo(20, 32)


def test_nothing_deeper_than_asked_for_is_computed(monkeypatch):
    calls = []
    forward = ConvNeXtStage.__call__
    monkeypatch.setattr(ConvNeXtStage, "__call__", lambda s, x: calls.append(s) or forward(s, x))
    encoder = encoder_of(V1)
    jax.eval_shape(lambda x: encoder.features(x, ("stage2", "stage1")), images())
    assert calls == [encoder.stages[0], encoder.stages[1]]


def test_blocks_are_counted_from_the_stem_to_the_classifier():
    encoder = nnx.eval_shape(lambda: encoder_of(V1, classifier=True))
    index = {
        name: encoder.block_index(tuple(int(p) if p.isdigit() else p for p in name.split(".")))
        for name in named_leaves(encoder)
    }
    assert encoder.n_blocks == 5
    assert index["stem_conv.kernel"] == index["stem_norm.scale"] == 0
    assert index["stages.0.blocks.0.gamma"] == 1
    assert index["stages.1.downsample_conv.bias"] == index["stages.1.blocks.0.norm.bias"] == 2
    assert index["stages.1.blocks.1.depthwise.kernel"] == 3
    assert index["stages.3.blocks.0.project.kernel"] == 5
    assert index["classifier.norm.scale"] == index["classifier.linear.kernel"] == 6


def test_bfloat16_computes_near_float32_with_parameters_in_float32():
    exact, rounded = encoder_of(V2), encoder_of(V2, dtype=jnp.bfloat16)
    for encoder in (exact, rounded):
        rng = np.random.default_rng(0)
        shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
        leaves = {
            n: rng.normal(size=s) * 0.3 + n.endswith("scale") for n, s in sorted(shapes.items())
        }
        fill(encoder, leaves, source="the test")
    assert {leaf.dtype for leaf in named_leaves(rounded).values()} == {jnp.dtype(jnp.float32)}
    reference, value = exact(images()), rounded(images())
    assert value.dtype == jnp.bfloat16
    error = jnp.abs(value.astype(jnp.float32) - reference).max() / jnp.abs(reference).max()
    assert 1e-4 < error < 3e-2


def test_a_silent_channel_has_a_finite_gradient():
    norm = GlobalResponseNorm(3, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.float32)
    norm.scale[...] = jnp.ones(3)
    x = jnp.asarray(images()[..., :3]).at[..., 1].set(0)
    gradient = jax.grad(lambda x: jnp.square(norm(x)).sum())(x)
    assert jnp.isfinite(gradient).all()
    assert (gradient[..., 0] != 0).all()


def test_the_norm_keeps_its_digits_far_from_zero():
    """E[x^2] - E[x]^2 would leave nothing of a variance of 1 around 4000 in float32."""
    encoder = encoder_of(V1)
    x = images()[..., :1] + np.arange(8) + 4000
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(
        -1, keepdims=True, dtype=np.float64
    )
    np.testing.assert_allclose(encoder.stem_norm(x), exact, atol=1e-3)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny"])
def test_the_real_architectures(name):
    backbone = nnx.eval_shape(lambda: create_backbone(name, weights="none", classifier=True))
    leaves = named_leaves(backbone.encoder)
    # The published counts (28.6M for both), and what timm's classes count.
    count = {"convnext_tiny": 28_589_128, "convnextv2_tiny": 28_635_496}[name]
    assert sum(leaf.size for leaf in leaves.values()) == count
    assert (backbone.stride, backbone.out_channels, backbone.encoder.n_blocks) == (32, 768, 18)
    without = nnx.eval_shape(lambda: create_backbone(name, weights="none"))
    assert not hasattr(without.encoder, "classifier")


def test_licences_are_those_of_the_weights():
    assert get_spec("convnext_tiny").licence == "Apache-2.0"
    assert get_spec("convnextv2_tiny").licence == "CC-BY-NC-4.0"


def test_errors_say_what_there_is():
    with pytest.raises(UserError, match=r"at least 32x32 pixels, not 31x64"):
        create_backbone("convnext_tiny", image_size=(31, 64), weights="none")
    with pytest.raises(UserError, match=r"no option batch_norm; it has features, classifier"):
        create_backbone("convnext_tiny", weights="none", batch_norm="train")
    with pytest.raises(UserError, match=r"no feature map 'stage5'; choose from stage1, .*last"):
        Backbone(encoder_of(V1), get_spec("convnext_tiny"), features="stage5")
    assert CONVNEXT_TINY.epsilon == 1e-6
