"""ConvNeXt: features, depths, options and errors. Its numbers: tests/porting."""

from __future__ import annotations

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
from jaxear.backbones.weights import named_leaves
from jaxear.errors import UserError

V1 = ConvNeXtConfig(depths=(1, 2, 1, 1), widths=(8, 12, 16, 20), classes=7)
V2 = ConvNeXtConfig(
    depths=(1, 2, 1, 1), widths=(8, 12, 16, 20), classes=7, layer_scale=None, response_norm=True
)


def encoder_of(config, *, dtype=jnp.float32, classifier=False) -> ConvNeXtEncoder:
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    return ConvNeXtEncoder(
        config, classifier=classifier, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
    )


def images(height=64, width=64, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(dtype)


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
    forward = ConvNeXtStage.downsample
    monkeypatch.setattr(ConvNeXtStage, "downsample", lambda s, x: calls.append(s) or forward(s, x))
    encoder = nnx.eval_shape(lambda: encoder_of(V1))
    jax.eval_shape(lambda e, x: e.features(x, ("stage2", "stage1")), encoder, images())
    assert [len(stage.blocks) for stage in calls] == [1, 2]


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


def test_a_silent_channel_has_a_finite_gradient():
    norm = GlobalResponseNorm(3, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.float32)
    norm.scale[...] = jnp.ones(3)
    x = jnp.asarray(images()[..., :3]).at[..., 1].set(0)
    gradient = jax.jit(jax.grad(lambda x: jnp.square(norm(x)).sum()))(x)
    assert jnp.isfinite(gradient).all()
    assert (gradient[..., 0] != 0).all()


def test_the_norm_keeps_its_digits_far_from_zero():
    """E[x^2] - E[x]^2 would leave nothing of a variance of 1 around 4000 in float32."""
    norm = nnx.jit(lambda: encoder_of(V1).stem_norm)()
    x = images()[..., :1] + np.arange(8) + 4000
    exact = (x - x.mean(-1, keepdims=True, dtype=np.float64)) / x.std(
        -1, keepdims=True, dtype=np.float64
    )
    np.testing.assert_allclose(norm(x), exact, atol=1e-3)


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
    with pytest.raises(UserError, match=r"no option batch_norm; it has features, cl.*, remat"):
        create_backbone("convnext_tiny", weights="none", batch_norm="train")
    with pytest.raises(UserError, match=r"no feature map 'stage5'; choose from stage1, .*last"):
        Backbone(
            nnx.eval_shape(lambda: encoder_of(V1)), get_spec("convnext_tiny"), features="stage5"
        )
    assert CONVNEXT_TINY.epsilon == 1e-6
