"""ResNet, EfficientNet and MobileNetV3: features, depths, options. Their numbers: tests/porting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxear.backbones import Backbone, create_backbone, get_spec
from jaxear.backbones.resnet import ResNetConfig, ResNetEncoder
from jaxear.backbones.weights import named_leaves
from jaxear.errors import UserError

# name: parameters with the classifier (as timm's), blocks, channels of the feature maps
FAMILIES = {
    "resnet50": (25_557_032, 16, (256, 512, 1024, 2048, 2048)),
    "efficientnet_b3": (12_233_232, 26, (24, 32, 48, 136, 384, 1536)),
    "tf_efficientnet_b3": (12_233_232, 26, (24, 32, 48, 136, 384, 1536)),
    "efficientnet_lite0": (4_652_008, 16, (16, 24, 40, 112, 320, 1280)),
    "mobilenetv3_large_100": (5_483_032, 15, (16, 24, 40, 112, 960, 960)),
}


def abstract(name: str, **options) -> Backbone:
    """A backbone without values, which costs no time."""
    return nnx.eval_shape(lambda: create_backbone(name, weights="none", **options))


def shapes(module, method, *args, size=(64, 64)):
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(lambda m, x: getattr(m, method)(x, *args), module, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_feature_maps(name):
    parameters, blocks, channels = FAMILIES[name]
    encoder = abstract(name, classifier=True).encoder
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder, nnx.Param))) == parameters
    assert encoder.n_blocks == blocks
    info = encoder.feature_info
    assert [entry.channels for entry in info.values()] == list(channels)
    for size in ((33, 47), (1, 1)):
        for entry, found in zip(
            info.values(), shapes(encoder, "features", tuple(info), size=size), strict=True
        ):
            height, width = (-(-side // entry.stride) for side in size)
            assert found.shape == (2, height, width, entry.channels)
    assert shapes(encoder, "logits").shape == (2, 1000)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_counted_through(name):
    encoder = abstract(name, classifier=True).encoder
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(encoder))]
    depths = [encoder.block_index(path) for path in paths]
    assert set(depths) == set(range(encoder.n_blocks + 2))
    stem, beyond = 0, encoder.n_blocks + 1
    for path, depth in zip(paths, depths, strict=True):
        assert (depth == stem) == (path[0] in ("conv1", "conv_stem", "bn1"))
        if path[0] == "classifier":
            assert depth == beyond


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0", "mobilenetv3_large_100"])
def test_features_compute_no_deeper_than_asked(name):
    encoder = abstract(name).encoder

    def operations(feature: str) -> int:
        x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        run = jax.make_jaxpr(lambda e, x: e.features(x, (feature,)))
        return len(run(encoder, x).eqns)

    assert operations("stage1") < 0.5 * operations("stage3") < 0.5 * operations("last")


@pytest.mark.parametrize("name", FAMILIES)
def test_classifier_and_batch_norm_are_options(name):
    plain = abstract(name).encoder
    assert not any(leaf.startswith("classifier.") for leaf in named_leaves(plain))
    assert get_spec(name).options == ("classifier", "batch_norm", "remat")


def test_unknown_modes_and_features_are_refused():
    with pytest.raises(UserError, match="'frozen' or 'train'"):
        abstract("efficientnet_lite0", batch_norm="running")
    with pytest.raises(UserError, match="has no feature map 'stage9'; choose from stage1"):
        abstract("efficientnet_lite0", features="stage9")


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_only_trained_statistics_move(mode):
    config = ResNetConfig(depths=(1, 1, 1, 1), width=4)
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    encoder = nnx.jit(lambda rngs: ResNetEncoder(config, batch_norm=mode, rngs=rngs, **kinds))(
        nnx.Rngs(0)
    )
    encoder.train()
    graph, state = nnx.split(encoder)

    @jax.jit
    def step(state, x):
        encoder = nnx.merge(graph, state)
        encoder.features(x, ("stage2",))
        return nnx.state(encoder, nnx.BatchStat)

    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    after = dict(nnx.to_flat_state(step(state, x)))
    before = dict(nnx.to_flat_state(nnx.state(encoder, nnx.BatchStat)))
    moved = {path for path in before if not jnp.array_equal(before[path][...], after[path][...])}
    if mode == "frozen":
        assert not moved
    else:  # those of the layers that ran, all of them and no others
        assert moved == {path for path in before if encoder.block_index(path) <= 2}
