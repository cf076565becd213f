"""SAM's encoder against its plain form, in which the padding is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones import create_backbone
from jaxear.backbones.sam import VIT_B, Block, SamConfig, SamEncoder, adapt
from jaxear.backbones.weights import fill, named_leaves
from jaxear.backbones.window_attention import attend, padding_logsumexp, window_attention
from jaxear.errors import UserError
from tests.plain_sam import plain_tokens

SMALL = SamConfig(32, 3, 4, (1,), 48, window_size=3, out_channels=16)
# Grids of 8x8, 7x9, .. in windows of 3: whole ones, ragged to the right, below, in the corner.
SIZES = [(128, 128), (112, 144), (144, 96), (96, 112), (16, 32)]


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_encoder(config: SamConfig, image_size, *, dtype=jnp.float32, scale=0.3) -> SamEncoder:
    """An encoder in which every parameter is random, biases and position tables too."""
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    encoder = nnx.eval_shape(
        lambda: SamEncoder(
            config, image_size, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
    )
    rng = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    leaves = {
        name: rng.normal(size=shape) * scale + name.endswith("scale")
        for name, shape in shapes.items()
    }
    fill(encoder, leaves, source="the test")
    return encoder


def images(image_size, batch=2, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(batch, *image_size, 3)).astype(dtype)


def relative_error(value, reference) -> float:
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def compiled(encoder: SamEncoder, function):
    """`function(encoder, x)`, jitted over the encoder's split state."""
    graph, state = nnx.split(encoder)
    jitted = jax.jit(lambda state, x: function(nnx.merge(graph, state), x))
    return lambda x: jitted(state, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("image_size", SIZES)
def test_tokens_equal_those_of_the_plain_form(image_size):
    encoder = random_encoder(dataclasses.replace(SMALL, depth=2), image_size, dtype=jnp.float64)
    x = images(image_size, dtype=np.float64)
    tokens = compiled(encoder, SamEncoder.tokens)(x)
    assert tokens.shape == (2, image_size[0] // 16, image_size[1] // 16, 32)
    assert tokens.dtype == jnp.float64
    assert relative_error(tokens, compiled(encoder, plain_tokens)(x)) < 1e-13


@pytest.mark.usefixtures("x64")
def test_padding_is_attended_to_and_not_masked():
    encoder = random_encoder(SMALL, (32, 32), dtype=jnp.float64)
    x = images((32, 32), dtype=np.float64)
    masked = compiled(encoder, partial(plain_tokens, mask_padding=True))(x)
    assert relative_error(compiled(encoder, SamEncoder.tokens)(x), masked) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients_equal_those_of_the_plain_form():
    encoder = random_encoder(SMALL, (112, 80), dtype=jnp.float64)
    x = images((112, 80), batch=1, dtype=np.float64)
    weights = np.random.default_rng(2).normal(size=(1, 7, 5, 32))
    graph, state = nnx.split(encoder)

    def loss(forward):
        return lambda state, x: jnp.sum(forward(nnx.merge(graph, state), x) * weights)

    ours, ours_x = jax.jit(jax.grad(loss(SamEncoder.tokens), argnums=(0, 1)))(state, x)
    plain, plain_x = jax.jit(jax.grad(loss(plain_tokens), argnums=(0, 1)))(state, x)
    assert relative_error(ours_x, plain_x) < 1e-12
    ours, plain = (dict(nnx.to_flat_state(gradients)) for gradients in (ours, plain))
    compared = 0
    for path, value in ours.items():
        value, reference = np.asarray(value[...]), np.asarray(plain[path][...])
        if path[-2:] == ("qkv", "bias"):
            # The true gradient of the key bias is zero; the plain form has rounding noise there.
            (q, k, v), (q_, k_, v_) = np.split(value, 3), np.split(reference, 3)
            assert not k.any()
            assert np.abs(k_).max() < 1e-12 * np.abs(reference).max()
            value, reference = np.stack([q, v]), np.stack([q_, v_])
        if path[0] != "neck":
            assert relative_error(value, reference) < 1e-11, path
            compared += 1
    assert compared == 3 + 14 * SMALL.depth


@pytest.mark.usefixtures("x64")
def test_huge_logits_of_padding_do_not_overflow():
    """Without the padding in the maximum exp(padding - peak) is infinite, and the gradient NaN."""
    encoder = random_encoder(dataclasses.replace(SMALL, depth=2), (32, 32), dtype=jnp.float64)
    for block in encoder.blocks:
        block.attn.rel_pos_h[...] *= 1e5
    x = images((32, 32), dtype=np.float64)

    def both(forward):
        return lambda encoder, x: jax.value_and_grad(lambda x: jnp.sum(forward(encoder, x) ** 2))(x)

    value, gradient = compiled(encoder, both(SamEncoder.tokens))(x)
    expected, expected_gradient = compiled(encoder, both(plain_tokens))(x)
    assert relative_error(value, expected) < 1e-8
    assert relative_error(gradient, expected_gradient) < 1e-6


def test_padding_is_the_sum_over_the_two_rectangles():
    rng = np.random.default_rng(0)
    rel_h, rel_w = rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 5, 7))
    for h, w in [(6, 3), (2, 7), (4, 5)]:
        terms = np.exp(rel_h[..., :, None] + rel_w[..., None, :])
        terms[..., :h, :w] = 0
        expected = np.log(terms.sum((-1, -2)))
        np.testing.assert_allclose(padding_logsumexp(rel_h, rel_w, h, w), expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_chunks_is_the_same_attention(padded):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, 24, 8)) for _ in range(3))
    rel_h, rel_w = rng.normal(size=(2, 3, 24, 4)), rng.normal(size=(2, 3, 24, 6))
    padding = rng.normal(size=(2, 3, 24)) if padded else None

    def total(*arguments, **settings):
        out = attend(*arguments, padding, **settings)
        return jnp.sum(out**2), out

    def compute(**settings):
        gradient = jax.value_and_grad(
            partial(total, **settings), argnums=(0, 1, 2, 3, 4), has_aux=True
        )
        return jax.jit(gradient)(q, k, v, rel_h, rel_w)

    whole, chunks = compute(), compute(max_logits=2 * 3 * 24 * 5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), whole, chunks
    )


def test_chunks_bound_the_memory():
    def temporaries(max_logits):
        shapes = [(1, 2, 1024, 8)] * 3 + [(1, 2, 1024, 32)] * 2
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(lambda *a: attend(*a, max_logits=max_logits)).lower(*arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2**15) < temporaries(2**24) / 5


def test_no_attention_leaves_its_window():
    """Changing a token changes its window's output only, in a ragged grid."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 8, 7, 2, 4)).astype(np.float32) for _ in range(3))
    table = rng.normal(size=(5, 4)).astype(np.float32)
    attention = jax.jit(lambda v: window_attention(q, k, v, table, table, (3, 3)))
    before = np.asarray(attention(v))
    v[0, 7, 6] += 1
    changed = np.any(attention(v) != before, axis=(0, 3, 4))
    assert changed[6:, 6:].all()
    assert changed.sum() == 2


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    def both(encoder, x):
        return encoder(x), encoder.tokens(x)

    encoder = random_encoder(SMALL, (96, 112), dtype=jnp.bfloat16, scale=0.1)
    reference = random_encoder(SMALL, (96, 112), scale=0.1)
    assert {leaf.dtype for leaf in named_leaves(encoder).values()} == {jnp.dtype(jnp.float32)}
    x = images((96, 112))
    out, tokens = compiled(encoder, both)(x)
    assert out.dtype == tokens.dtype == jnp.bfloat16
    assert relative_error(out, compiled(reference, both)(x)[0]) < 0.05


def test_logits_are_float32_under_bfloat16():
    """Next to 128 the step of bfloat16 is 1: logits of 128 and 128.3 would be the same."""
    q = jnp.full((1, 1, 1, 2), 8.0, jnp.bfloat16)
    k = jnp.full((1, 1, 2, 2), 8.0, jnp.bfloat16)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 1, 2, 1)
    rel_h, rel_w = jnp.zeros((1, 1, 1, 1)), jnp.array([0.0, 0.3]).reshape(1, 1, 1, 2)
    out = attend(q, k, v.repeat(2, axis=-1), rel_h, rel_w)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1 / (1 + np.exp(-0.3)), rtol=0.01)


def test_features_are_taken_where_they_say():
    encoder = random_encoder(SMALL, (48, 64))
    x = images((48, 64))
    activations = compiled(encoder, SamEncoder.intermediates)(x)
    assert activations.keys() == {"embed", "blocks.0", "blocks.1", "blocks.2", "neck"}
    names = ("neck", "stage1", "last")
    maps = compiled(encoder, lambda encoder, x: encoder.features(x, names))(x)
    taken_at = ("neck", "blocks.1", "blocks.2")
    for name, value, place in zip(names, maps, taken_at, strict=True):
        assert value.shape == (2, 3, 4, encoder.feature_info[name].channels)
        np.testing.assert_array_equal(value, activations[place])
    assert set(encoder.feature_info) == {"stage1", "last", "neck"}
    assert {info.stride for info in encoder.feature_info.values()} == {16}


def test_features_compute_no_deeper_than_needed(monkeypatch):
    encoder = random_encoder(SMALL, (32, 32))
    calls = []
    call = Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, x: calls.append(self) or call(self, x))
    compiled(encoder, lambda encoder, x: encoder.features(x, ("stage1",)))(images((32, 32)))
    assert len(calls) == 2


def test_every_parameter_has_a_depth():
    encoder = random_encoder(SMALL, (32, 32))
    depths = {path: encoder.block_index(path) for path, _ in nnx.to_flat_state(nnx.state(encoder))}
    assert encoder.n_blocks == 3
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    assert depths["pos_embed",] == depths["patch_embed", "kernel"] == 0
    assert depths["blocks", 2, "attn", "rel_pos_h"] == 3
    assert depths["neck", "conv1", "kernel"] == 4


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"\[b, 32, 48, 3\], not \[2, 48, 32, 3\]"):
        random_encoder(SMALL, (32, 48)).tokens(images((48, 32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "embed_dim=32 cannot be divided among num_heads=5"),
        ({"depth": 1}, r"global_attn_indexes=\(1,\) name blocks outside 0\.\.0"),
        ({"window_size": 0}, "window_size=0"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_backbone_takes_a_shrunken_architecture():
    shrunken = {**dataclasses.asdict(SMALL), "embed_dim": 64}
    backbone = nnx.eval_shape(
        lambda: create_backbone(
            "sam", image_size=(48, 64), weights="none", features=["stage1", "neck"], **shrunken
        )
    )
    graph, state = nnx.split(backbone)
    image = jax.ShapeDtypeStruct((1, 48, 64, 3), np.float32)
    stage1, neck = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, image)
    assert (stage1.shape, neck.shape) == ((1, 3, 4, 64), (1, 3, 4, 16))
    assert (backbone.name, backbone.stride, backbone.out_channels) == ("sam_vit_b", 16, (64, 16))


def test_forward_at_128_costs_two_thirds_of_the_plain_form():
    """XLA's own count of ViT-B's operations, which does not depend on the machine's load."""
    encoder = nnx.eval_shape(lambda: SamEncoder(VIT_B, (128, 128), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(encoder)
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)

    def flops(forward):
        function = jax.jit(lambda state, x: forward(nnx.merge(graph, state), x))
        return function.lower(state, x).compile().cost_analysis()["flops"]

    assert flops(SamEncoder.tokens) <= 0.70 * flops(plain_tokens)


def leaves_for(image_size) -> dict[str, np.ndarray]:
    encoder = random_encoder(SMALL, image_size)
    return {name: np.asarray(leaf[...]) for name, leaf in named_leaves(encoder).items()}


def target(image_size) -> SamEncoder:
    return nnx.eval_shape(lambda: SamEncoder(SMALL, image_size, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("native", [(256, 256), (96, 160), (64, 64)])
def test_adapted_tables_fit_whatever_the_native_size(native):
    leaves, encoder = leaves_for(native), target((128, 176))
    adapted = adapt(leaves, encoder)
    wanted = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    assert {name: leaf.shape for name, leaf in adapted.items()} == wanted
    changed = {name for name in leaves if adapted[name] is not leaves[name]}
    assert changed == {"pos_embed"} | {
        f"blocks.{i}.attn.rel_pos_{axis}" for i in SMALL.global_attn_indexes for axis in "hw"
    }


def test_nothing_is_adapted_at_the_native_size():
    leaves = leaves_for((128, 176))
    adapted = adapt(leaves, target((128, 176)))
    assert all(adapted[name] is leaves[name] for name in leaves)


def test_cropping_keeps_the_central_part():
    leaves = leaves_for((256, 256))
    adapted = adapt(leaves, target((128, 192)), pos_embed="crop", rel_pos="crop")
    np.testing.assert_array_equal(adapted["pos_embed"], leaves["pos_embed"][:, 4:12, 2:14])
    table = "blocks.1.attn.rel_pos_"
    # 31 entries, the distance 0 at 15; 15 and 23 are kept
    np.testing.assert_array_equal(adapted[f"{table}h"], leaves[f"{table}h"][8:23])
    np.testing.assert_array_equal(adapted[f"{table}w"], leaves[f"{table}w"][4:27])
    np.testing.assert_array_equal(adapted[f"{table}h"][7], leaves[f"{table}h"][15])


@pytest.mark.parametrize("option", ["pos_embed", "rel_pos"])
def test_cropping_to_a_larger_size_is_refused(option):
    with pytest.raises(UserError, match=rf"{option}='crop' .* use {option}='interpolate'"):
        adapt(leaves_for((64, 64)), target((128, 64)), **{option: "crop"})


def test_unknown_ways_to_adapt_are_refused():
    with pytest.raises(UserError, match="'interpolate' or 'crop', not 'nearest'"):
        adapt(leaves_for((64, 64)), target((64, 64)), rel_pos="nearest")


def test_interpolation_keeps_constants_and_extends_the_ends():
    leaves = leaves_for((64, 64))
    leaves = {name: np.full_like(leaf, 3.0) for name, leaf in leaves.items()}
    for image_size in ((16, 48), (240, 112)):
        adapted = adapt(leaves, target(image_size))
        for leaf in adapted.values():
            np.testing.assert_allclose(leaf, 3.0, rtol=1e-12)
