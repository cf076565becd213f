"""SAM against Meta's own code, every parameter random."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.sam import PRESETS, SamConfig, SamEncoder, adapt
from jaxear.errors import UserError
from porting.rules import PortingError, torch_to_flax
from porting.sam import (
    ENCODER_TABLE,
    HUGGING_FACE,
    HUGGING_FACE_TABLE,
    META_TABLE,
    infer_architecture,
    leaf_shapes,
    port,
)
from porting.sam_torch import meta_encoder_module, torch_activations, torch_encoder
from porting.verify import compare
from tests.sam_parity import (
    cast,
    flax_activations,
    flax_encoder,
    gradient_errors,
    images,
    meta_state,
    parity,
)
from tests.torch_reference import import_timm, numpy_state, randomize, relative_error, torch

pytestmark = pytest.mark.torch

SMALL = SamConfig(64, 4, 4, (1, 3), 256, out_channels=32)
SHALLOW = dataclasses.replace(SMALL, depth=2, global_attn_indexes=(1,))
NATIVE = (256, 256)
SIZES = [(128, 128), (112, 176), (224, 224)]


@pytest.mark.parametrize("image_size", SIZES)
def test_every_block_in_float32(image_size):
    report = parity(SMALL, meta_state(SMALL, NATIVE), image_size, native=NATIVE)
    assert [row.name for row in report.rows] == [
        "embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "neck"
    ]  # fmt: skip
    assert report.passed, report.errors


def test_every_block_at_1024_in_float32():
    config = dataclasses.replace(SHALLOW, num_heads=2, embed_dim=32)
    state = meta_state(config, (1024, 1024))
    report = parity(config, state, (1024, 1024), native=(1024, 1024))
    assert report.passed, report.errors


@pytest.mark.usefixtures("compiled_sooner")
@pytest.mark.parametrize("image_size", [*SIZES, (240, 400)])
def test_every_block_in_float64(image_size):
    """Also 240x400: a grid of 15x25 has whole windows, and ragged ones to the right and below."""
    with jax.enable_x64(True):
        report = parity(
            SMALL,
            meta_state(SMALL, NATIVE),
            image_size,
            native=NATIVE,
            dtype=np.float64,
            tolerance=1e-12,
        )
    assert report.passed, report.errors


def test_a_checkpoint_that_is_not_square():
    with jax.enable_x64(True):
        report = parity(
            SMALL,
            meta_state(SMALL, (112, 176)),
            (64, 96),
            native=(112, 176),
            dtype=np.float64,
            tolerance=1e-12,
        )
    assert report.passed, report.errors


@pytest.mark.parametrize("name", ["sam_vit_l", "sam_vit_h"])
def test_large_presets_at_reduced_depth(name):
    config = dataclasses.replace(PRESETS[name], depth=2, global_attn_indexes=(1,))
    report = parity(config, meta_state(config, NATIVE), (128, 128), native=NATIVE)
    assert report.passed, report.errors


@pytest.mark.usefixtures("compiled_sooner")
@pytest.mark.parametrize("image_size", [(128, 128), (112, 176)])
def test_gradients_with_respect_to_the_input_and_every_parameter(image_size):
    state = cast(meta_state(SHALLOW, image_size), np.float64)
    leaves = torch_to_flax(ENCODER_TABLE, state, leaf_shapes(SHALLOW, image_size))
    with jax.enable_x64(True):
        errors = gradient_errors(flax_encoder(SHALLOW, leaves, image_size, jnp.float64))
    assert len(errors) == 1 + len(state) + SHALLOW.depth
    assert max(errors.values()) <= 1e-10, errors


@pytest.fixture(scope="module")
def small_state():
    return meta_state(SMALL, NATIVE)


def faulty(state, monkeypatch, trace_anew, fault: str):
    """End-to-end error of a port with one fault planted."""
    # Quiet tokens: the smaller their variance, the more the eps of LayerNorm matters.
    quiet = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    state = state | {name: state[name] * np.float32(0.1) for name in quiet}
    leaves = torch_to_flax(ENCODER_TABLE, state, leaf_shapes(SMALL, NATIVE))
    x = images((128, 128))
    model = torch_encoder(SMALL, state, native_size=NATIVE, image_size=(128, 128))
    reference = torch_activations(model, x)
    if fault == "tanh GELU":
        gelu = jax.nn.gelu
        monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: gelu(x, approximate=True))
    elif fault == "eps 1e-5":
        monkeypatch.setattr("jaxear.backbones.sam.EPSILON", 1e-5)
    elif fault == "padding masked":
        monkeypatch.setattr(
            "jaxear.backbones.window_attention.padding_logsumexp",
            lambda rel_h, rel_w, h, w: jnp.full(rel_h.shape[:-1], -jnp.inf),
        )
    elif fault == "scaled q in the relative positions":
        leaves = {k: v * 0.25 if "rel_pos" in k else v for k, v in leaves.items()}
    elif fault == "two tensors swapped":
        one, other = "blocks.0.norm1.bias", "blocks.0.norm2.bias"
        leaves |= {one: leaves[other], other: leaves[one]}
    trace_anew()
    outputs = flax_activations(flax_encoder(SMALL, leaves, (128, 128)), x)
    return compare(reference, reference, outputs)


@pytest.mark.usefixtures("compiled_sooner")
@pytest.mark.parametrize(
    "fault",
    [
        "tanh GELU",
        "eps 1e-5",
        "padding masked",
        "scaled q in the relative positions",
        "two tensors swapped",
    ],
)
def test_planted_faults_are_caught(small_state, monkeypatch, trace_anew, fault):
    report = faulty(small_state, monkeypatch, trace_anew, fault)
    assert not report.passed, report.errors
    assert report.passes(report.rows[0])  # the embedding is before all of them
    assert not report.passes(report.rows[1])


@pytest.mark.usefixtures("compiled_sooner")
def test_without_a_fault_nothing_is_caught(small_state, monkeypatch, trace_anew):
    report = faulty(small_state, monkeypatch, trace_anew, "none")
    assert report.passed, report.errors


def test_a_key_dropped_is_caught(small_state):
    state = {k: v for k, v in small_state.items() if k != "blocks.2.attn.rel_pos_w"}
    with pytest.raises(PortingError, match=r"missing key: blocks\.2\.attn\.rel_pos_w") as caught:
        port(state)
    assert len(caught.value.problems) == 1


def test_round_trip_is_exact_and_loads_in_meta_s_model(small_state):
    ported = port(small_state)
    back = ported.to_torch()
    assert back.keys() == small_state.keys()
    assert all(back[name].tobytes() == small_state[name].tobytes() for name in back)
    torch_encoder(SMALL, back, native_size=NATIVE, image_size=NATIVE)  # strict=True inside


def with_decoder(state: dict[str, np.ndarray], prefix="image_encoder.") -> dict[str, np.ndarray]:
    """The whole of a Sam, as its checkpoint is: the encoder's names prefixed, and the rest."""
    module = meta_encoder_module().__name__.rsplit(".", 1)[0]
    sam = __import__(f"{module}.mask_decoder", fromlist=["MaskDecoder"])
    transformer = __import__(f"{module}.transformer", fromlist=["TwoWayTransformer"])
    prompts = __import__(f"{module}.prompt_encoder", fromlist=["PromptEncoder"])
    with torch.device("meta"):
        decoder = sam.MaskDecoder(
            transformer_dim=256,
            transformer=transformer.TwoWayTransformer(
                depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048
            ),
        )
        encoder = prompts.PromptEncoder(256, (16, 16), (256, 256), 16)
    rest = {f"mask_decoder.{key}" for key in decoder.state_dict()}
    rest |= {f"prompt_encoder.{key}" for key in encoder.state_dict()}
    return {prefix + k: v for k, v in state.items()} | {k: np.zeros(1, np.float32) for k in rest}


def test_a_whole_sam_checkpoint_is_recognised(small_state):
    ported = port(with_decoder(small_state))
    assert ported.naming == "segment_anything"
    assert (ported.config, ported.image_size) == (SMALL, NATIVE)
    assert not ported.is_preset
    alone = port(small_state)
    assert alone.naming == "segment_anything's image encoder alone"
    assert all(np.array_equal(ported.leaves[k], alone.leaves[k]) for k in alone.leaves)


def test_an_extra_tensor_is_refused_wherever_it_is(small_state):
    for name in ("image_encoder.blocks.0.gamma", "mask_decoder.extra.weight", "ema.step"):
        with pytest.raises(PortingError, match=re.escape(f"unexpected key: {name}")):
            port(with_decoder(small_state) | {name: np.zeros(3, np.float32)})


@pytest.fixture(scope="module")
def hugging_face():
    import_timm()  # transformers imports torchvision
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_dim": 256,
            "image_size": 256,
            "output_channels": 32,
            "window_size": 14,
            "global_attn_indexes": [1, 3],
        }
    )
    return randomize(transformers.SamModel(config)).eval()


def test_hugging_face_s_naming_and_numbers(hugging_face):
    ported = port(numpy_state(hugging_face))
    assert ported.naming == HUGGING_FACE
    assert (ported.config, ported.image_size) == (SMALL, NATIVE)
    x = images(NATIVE, batch=1)
    with torch.no_grad():
        out = hugging_face.vision_encoder(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    expected = out.last_hidden_state.permute(0, 2, 3, 1).numpy()
    activations = flax_activations(flax_encoder(SMALL, ported.leaves, NATIVE), x)
    assert relative_error(activations["neck"], expected) <= 1e-5


def test_every_exemption_of_hugging_face_s_names_is_of_a_real_key(hugging_face):
    keys = list(hugging_face.state_dict())
    for exempt in HUGGING_FACE_TABLE.exempt:
        assert any(re.fullmatch(exempt.regex, key) for key in keys), exempt
    for exempt in META_TABLE.exempt[:2]:
        assert any(re.fullmatch(exempt.regex, key) for key in with_decoder({})), exempt


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_those_of_meta_s_build_sam(name):
    """Found again from the shapes of Meta's own model, and written with Meta's own numbers."""
    numbers = {
        "sam_vit_b": (768, 12, 12, (2, 5, 8, 11)),
        "sam_vit_l": (1024, 24, 16, (5, 11, 17, 23)),
        "sam_vit_h": (1280, 32, 16, (7, 15, 23, 31)),
    }[name]
    dim, depth, heads, indexes = numbers
    with torch.device("meta"):
        model = meta_encoder_module().ImageEncoderViT(
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            global_attn_indexes=indexes,
            use_rel_pos=True,
            window_size=14,
        )
    shapes = {
        path: tuple(value.shape)
        for key, value in model.state_dict().items()
        for rule in ENCODER_TABLE.rules
        if (path := rule.to_flax(key)) is not None
    }
    assert infer_architecture(shapes) == (PRESETS[name], (1024, 1024))


def test_the_architecture_survives_any_one_missing_tensor(small_state, monkeypatch):
    monkeypatch.setattr("porting.sam.leaf_shapes", cache(leaf_shapes))
    for missing in small_state:
        state = {key: value for key, value in small_state.items() if key != missing}
        with pytest.raises(PortingError) as caught:
            port(state)
        assert len(caught.value.problems) == 1, missing
        assert f"missing key: {missing}," in str(caught.value)


def test_other_models_are_refused_by_what_they_hold():
    vit = {f"blocks.0.{k}.weight": np.zeros((2, 2), np.float32) for k in ("norm1", "attn.qkv")}
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    for state in (vit, resnet, {}):
        with pytest.raises(UserError, match="not a Segment Anything checkpoint"):
            port(state)


@pytest.mark.parametrize("side", [7, 8, 14, 32])
def test_interpolated_relative_positions_are_rounded_as_torch_rounds_them(side):
    """With exact positions the tables, and with them the output, differ by ten times as much."""
    table = np.random.default_rng(0).normal(size=(127, 8)).astype(np.float32)
    encoder = nnx.eval_shape(lambda: SamEncoder(SMALL, (side * 16, 16), rngs=nnx.Rngs(0)))
    adapted = adapt({"blocks.1.attn.rel_pos_h": table}, encoder)["blocks.1.attn.rel_pos_h"]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).T[None], size=2 * side - 1, mode="linear"
    )
    np.testing.assert_allclose(adapted, expected[0].T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 11), (64, 64), (20, 5), (16, 16)])
def test_position_embedding_is_resampled_as_timm_does(size):
    table = np.random.default_rng(0).normal(size=(1, 16, 16, 8))
    config = dataclasses.replace(SMALL, embed_dim=8)
    encoder = nnx.eval_shape(
        lambda: SamEncoder(config, (size[0] * 16, size[1] * 16), rngs=nnx.Rngs(0))
    )
    resampled = adapt({"pos_embed": table}, encoder)["pos_embed"]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True
    )
    np.testing.assert_allclose(resampled, expected.permute(0, 2, 3, 1), atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("side", [1, 7, 8, 16, 64, 90])
def test_relative_positions_are_interpolated_as_meta_s_get_rel_pos_does(side, dtype, tolerance):
    table = np.random.default_rng(0).normal(size=(127, 8)).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        encoder = nnx.eval_shape(
            lambda: SamEncoder(SMALL, (side * 16, 16), param_dtype=dtype, rngs=nnx.Rngs(0))
        )
    adapted = adapt({"blocks.1.attn.rel_pos_h": table}, encoder)["blocks.1.attn.rel_pos_h"]
    expected = meta_encoder_module().get_rel_pos(side, side, torch.from_numpy(table)).numpy()
    index = np.arange(side)[:, None] - np.arange(side) + side - 1
    np.testing.assert_allclose(adapted[index], expected, rtol=0, atol=tolerance)


def test_a_report_fails_on_nan_and_on_shapes():
    x = np.ones((2, 3))
    assert compare(["a"], {"a": x}, {"a": x + 1e-6}).passed
    assert not compare(["a"], {"a": x}, {"a": x + 1e-4}).passed
    assert not compare(["a"], {"a": x}, {"a": np.full_like(x, np.nan)}).passed
    assert not compare(["a"], {"a": 0 * x}, {"a": 0 * x}).passed  # nothing was compared
    with pytest.raises(ValueError, match=r"torch gives \(2, 3\)"):
        compare(["a"], {"a": x}, {"a": x[:1]})
