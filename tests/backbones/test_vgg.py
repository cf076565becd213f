"""VGG: small copies against timm's code, the names of its features, the classifier at any size."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone
from jaxear.backbones.base import FeatureInfo
from jaxear.backbones.vgg import VGG16, VGGConfig, VGGEncoder, adaptive_mean
from jaxear.backbones.weights import fill, named_leaves
from jaxear.errors import UserError

SMALL = VGGConfig(widths=(4, 5, 6, 7, 8), hidden=(16, 4096), classes=9)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def encoder_of(config, *, dtype=jnp.float32, classifier=False) -> VGGEncoder:
    return VGGEncoder(
        config, classifier=classifier, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
    )


def images(height, width, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(dtype)


@pytest.fixture(scope="module")
def original():
    """timm's VGG of the same small shape; its second hidden width is always 4096."""
    from tests.torch_reference import import_timm, randomize

    layers = []
    for depth, width in zip(SMALL.depths, SMALL.widths, strict=True):
        layers += [*[width] * depth, "M"]
    ratio = SMALL.hidden[0] / SMALL.hidden[1]
    model = import_timm().models.vgg.VGG(layers, num_classes=SMALL.classes, mlp_ratio=ratio)
    return randomize(model.double()).eval()


@pytest.mark.torch
@pytest.mark.usefixtures("x64")
# Grids of 1x2 (spread onto 7x7), 2x8 (half spread) and 7x9 (sliding windows).
@pytest.mark.parametrize("size", [(32, 70), (64, 256), (224, 300)])
def test_features_and_logits_equal_timms(original, size):
    from porting.rules import torch_to_flax
    from porting.vgg import TABLES, stages
    from tests.torch_reference import numpy_state, relative_error, torch

    encoder = nnx.eval_shape(lambda: encoder_of(SMALL, dtype=jnp.float64, classifier=True))
    shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    fill(encoder, torch_to_flax(TABLES["timm"], numpy_state(original), shapes), source="the test")
    x = images(*size, dtype=np.float64)
    graph, state = nnx.split(encoder)
    names = tuple(encoder.feature_info)
    maps, logits = jax.jit(
        lambda state, x: (
            nnx.merge(graph, state).features(x, names),
            nnx.merge(graph, state).logits(x),
        )
    )(state, x)
    with torch.no_grad():
        torch_x = torch.tensor(x).permute(0, 3, 1, 2)
        reference = stages(original, torch_x)
        assert relative_error(logits, original(torch_x)) < 1e-12
    assert reference.keys() == set(names)
    for name, value in zip(names, maps, strict=True):
        assert relative_error(value, reference[name].permute(0, 2, 3, 1)) < 1e-12, name


@pytest.mark.torch
@pytest.mark.parametrize(("n", "size"), [(1, 7), (4, 7), (6, 7), (10, 7), (7, 7)])
def test_adaptive_mean_is_torchs(n, size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, n, 3)).astype(np.float32)
    pooled = torch.nn.functional.adaptive_avg_pool1d(torch.tensor(x).permute(0, 2, 1), size)
    np.testing.assert_allclose(
        adaptive_mean(jnp.asarray(x), 1, size), pooled.permute(0, 2, 1).numpy(), atol=1e-6
    )


def test_features_by_the_names_of_the_literature():
    info = nnx.eval_shape(lambda: encoder_of(SMALL)).feature_info
    assert VGG16.relu_names == ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
    assert info["relu1_2"] == info["stage1"] == FeatureInfo(4, 1)
    assert info["relu4_3"] == info["stage4"] == FeatureInfo(7, 8)
    assert info["last"] == FeatureInfo(8, 32)


def test_nothing_deeper_than_asked_for_is_computed():
    encoder = nnx.eval_shape(lambda: encoder_of(SMALL))
    features = jax.make_jaxpr(lambda e, x: e.features(x, ("relu2_2", "relu1_2")))
    jaxpr = features(encoder, images(32, 32))
    assert str(jaxpr).count("conv_general_dilated[") == 4
    relu2, relu1 = jaxpr.out_avals
    assert (relu2.shape, relu1.shape) == ((2, 16, 16, 5), (2, 32, 32, 4))


def test_every_convolution_is_a_block():
    encoder = nnx.eval_shape(lambda: encoder_of(SMALL, classifier=True))
    assert encoder.n_blocks == 13
    assert encoder.block_index(("stages", 0, 0, "kernel")) == 1
    assert encoder.block_index(("stages", 2, 1, "bias")) == 6
    assert encoder.block_index(("stages", 4, 2, "kernel")) == 13
    assert encoder.block_index(("classifier", "fc1", "kernel")) == 14


def test_the_real_architecture():
    backbone = nnx.eval_shape(
        lambda: create_backbone("vgg16", weights="none", classifier=True, features=["relu3_3"])
    )
    leaves = named_leaves(backbone.encoder)
    assert sum(leaf.size for leaf in leaves.values()) == 138_357_544  # as published
    assert (backbone.stride, backbone.out_channels) == (4, (256,))


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match="at least 32x32 pixels, not 32x16"):
        create_backbone("vgg16", image_size=(32, 16), weights="none")
