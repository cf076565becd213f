"""Rematerialisation: the same numbers and statistics, in less memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone, sam, staged
from jaxear.backbones.convnext import CONVNEXTV2_TINY, ConvNeXtEncoder
from jaxear.backbones.mobilenetv3 import MOBILENETV3_LARGE, MobileNetV3Encoder
from jaxear.backbones.registry import SPECS
from jaxear.backbones.sam import SamConfig, SamEncoder
from jaxear.backbones.vgg import VGGConfig, VGGEncoder
from tests.training.tiny import optimized

# What shows in the jaxpr of a gradient that something is computed again.
MARKS = {"cpu": "cond[", "gpu": "prevent_cse"}
SAM = SamConfig(32, 2, 4, (1,), 48, window_size=3, out_channels=16)


ENCODERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "sam": (SamEncoder, (SAM, (32, 32)), {}),
    "mobilenet": (
        MobileNetV3Encoder,
        (replace(MOBILENETV3_LARGE, stages=MOBILENETV3_LARGE.stages[:1], head=8),),
        {"batch_norm": "train"},
    ),
    "convnext": (ConvNeXtEncoder, (replace(CONVNEXTV2_TINY, depths=(1,), widths=(4,)),), {}),
    "vgg": (VGGEncoder, (VGGConfig(depths=(1, 2), widths=(4, 4)),), {}),
}


def split(kind: str, *, remat: bool) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The encoder in training mode: graph, random parameters, statistics."""
    build, arguments, options = ENCODERS[kind]
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    encoder = nnx.eval_shape(
        lambda: build(*arguments, remat=remat, rngs=nnx.Rngs(0), **dtypes, **options)
    )
    encoder.train()
    rng = np.random.default_rng(0)
    graph, params, statistics = nnx.split(encoder, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)) / 2, params)
    return graph, params, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), statistics)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_values_gradients_and_statistics_are_the_same(kind, backend, monkeypatch, trace_anew):
    # What other backends are given runs on this one, too; only XLA makes less of it.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for module in (sam, staged):  # has the same mark
        monkeypatch.setattr(module, "computed_once", lambda x, block: x)
    trace_anew()
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)))
        found, jaxprs = [], []
        for remat in (False, True):
            graph, params, statistics = split(kind, remat=remat)

            def loss(params, x, statistics, graph=graph):
                # New variables, which may be changed under this gradient.
                encoder = nnx.merge(graph, *jax.tree.map(lambda leaf: leaf, (params, statistics)))
                y = encoder(x)
                return jnp.sum(jnp.sin(y)), (y, nnx.state(encoder, nnx.BatchStat))

            gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
            jaxprs.append(str(jax.make_jaxpr(gradient)(params, x, statistics)))
            found.append(jax.jit(gradient)(params, x, statistics))
        plain, remat = (jaxpr.count(MARKS[backend]) for jaxpr in jaxprs)
        assert remat > plain
        if (
            backend == "gpu" and kind != "sam"
        ):  # which does so by itself where attention is in chunks
            assert not plain
        plain, remat = map(jax.tree.leaves, found)
        assert len(plain) == len(remat)
        for one, other in zip(plain, remat, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
        if "batch_norm" in ENCODERS[kind][2]:
            moved = jax.tree.leaves(found[1][0][1][1])
            before = jax.tree.leaves(statistics)
            assert all(
                np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(moved, before, strict=True)
            )


def small_sam(depth: int, *, remat: bool) -> tuple[Any, nnx.State, jax.ShapeDtypeStruct]:
    """A function (state, images) -> features, and the shapes of what it takes."""
    config = replace(SAM, embed_dim=64, depth=depth, mlp_dim=256, window_size=14)
    encoder = nnx.eval_shape(lambda: SamEncoder(config, (128, 128), remat=remat, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(encoder)
    images = jax.ShapeDtypeStruct((4, 128, 128, 3), jnp.float32)
    return lambda state, images: nnx.merge(graph, state)(images), state, images


def test_much_less_is_kept_for_the_gradient():
    """What the backward pass gets of the forward pass, parameters included, by JAX's account."""

    def kept(*, remat: bool) -> int:
        run, *shapes = small_sam(6, remat=remat)
        backward = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept(remat=True) < 0.3 * kept(remat=False)


@pytest.mark.slow
def test_xla_keeps_less_too():
    """It might find that what is computed again is there already, and keep that after all."""

    def temporaries(*, remat: bool) -> int:
        run, *shapes = small_sam(3, remat=remat)
        gradient = jax.grad(lambda *args: jnp.sum(run(*args)), (0, 1))
        with optimized():
            analysis = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporaries(remat=True) < 0.6 * temporaries(remat=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sam", {"depth": 2, "global_attn_indexes": (1,)}),
        ("resnet50", {}),
        ("efficientnet_lite0", {}),
        ("mobilenet", {}),
        ("convnext", {}),
        ("vgg16", {}),
    ],
)
def test_it_is_an_option_of_every_backbone(name, options):
    backbone = nnx.eval_shape(lambda: create_backbone(name, weights="none", remat=True, **options))
    image = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda backbone, image: backbone(image))(backbone, image)
    assert "custom_vjp_call" in str(jaxpr)


def test_no_backbone_lacks_the_option():
    assert all("remat" in spec.options for spec in SPECS.values())
