from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxear.backbones.base import Backbone
from jaxear.backbones.registry import create_backbone, get_spec
from jaxear.backbones.vgg import VGGConfig, VGGEncoder
from jaxear.backbones.weights import FORMAT, fill, named_leaves
from jaxear.config import TrainConfig
from jaxear.errors import WeightsNotFoundError
from jaxear.perceptual import LAYERS, Judge, create_judge, lpips_style_distance


@pytest.fixture(scope="module")
def network() -> Backbone:
    """A narrow VGG-16, so that it takes no time."""
    config = VGGConfig(widths=(4, 5, 6, 7, 8))

    def build() -> Backbone:
        kwargs = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        return Backbone(VGGEncoder(config, **kwargs), get_spec("vgg16"), features=LAYERS)

    network = nnx.eval_shape(build)
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(0, 0.2, variable.shape).astype(np.float32)
        for name, variable in named_leaves(network.encoder).items()
    }
    fill(network.encoder, leaves, source="random")
    return network


@pytest.fixture(scope="module")
def images() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.uniform(size=(2, 32, 32, 3)), jnp.float32) for _ in range(2))


def test_features_are_those_of_the_arrays_given(network, images):
    judge = Judge.of(network)
    compiled = jax.jit(judge.features)
    maps = compiled(judge.leaves, images[0])
    for ours, theirs in zip(maps, network(images[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert [map_.shape for map_ in maps] == [
        (2, 32, 32, 4), (2, 16, 16, 5), (2, 8, 8, 6), (2, 4, 4, 7), (2, 2, 2, 8),
    ]  # fmt: skip
    silent = compiled(jax.tree.map(jnp.zeros_like, judge.leaves), images[0])
    assert all((map_ == 0).all() for map_ in silent)
    assert "encoder.stages.0.0.kernel" in judge.leaves


def test_distance_is_that_of_unit_features(network, images):
    expected = []
    for a, b in zip(*map(jax.jit(network), images), strict=True):
        a, b = (np.asarray(m, np.float64) for m in (a, b))
        a, b = (m / np.sqrt((m**2).sum(-1, keepdims=True) + 1e-6) for m in (a, b))
        expected.append(((a - b) ** 2).sum(-1).mean((1, 2)))
    judge = Judge.of(network)
    compiled = jax.jit(lpips_style_distance)
    ours = compiled(judge, *images)
    np.testing.assert_allclose(ours, np.mean(expected, axis=0), rtol=1e-4)
    assert (ours > 1e-3).all()
    np.testing.assert_allclose(compiled(judge, images[0], images[0]), 0, atol=1e-9)


def test_the_judge_of_a_run_has_the_ported_vgg16(monkeypatch, tmp_path):
    shapes = create_backbone("vgg16", image_size=32, weights="none", abstract=True).encoder
    leaves = {
        name: np.full(variable.shape, i, np.float32)
        for i, (name, variable) in enumerate(named_leaves(shapes).items())
    }
    metadata = {"format": json.dumps(FORMAT), "backbone": json.dumps("vgg16")}
    save_file(leaves, tmp_path / "vgg16.safetensors", metadata)
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path))

    config = TrainConfig(perceptual="vgg16", perceptual_weight=1.0, dtype="bfloat16")
    judge = create_judge(config, 32)
    assert judge is not None
    assert sorted(float(leaf.max()) for leaf in judge.leaves.values()) == list(range(26))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    maps = jax.eval_shape(judge.features, judge.leaves, images)
    assert [map_.shape[1:] for map_ in maps] == [
        (32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512), (2, 2, 512),
    ]  # fmt: skip
    assert {map_.dtype for map_ in maps} == {jnp.dtype(jnp.bfloat16)}


def test_no_judge_where_none_is_asked_for():
    assert create_judge(TrainConfig(perceptual="vgg16"), 32) is None
    assert create_judge(TrainConfig(perceptual_weight=1.0), 32) is None


def test_missing_weights_are_reported_with_the_way_to_get_them():
    with pytest.raises(WeightsNotFoundError, match=r"port_timm\.py --model vgg16"):
        create_judge(TrainConfig(perceptual="vgg16", perceptual_weight=1.0), 32)
