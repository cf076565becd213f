"""The tables of Meta's and torchvision's names, against timm's own translations of them."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from jaxear.backbones.convnext import ConvNeXtConfig, ConvNeXtEncoder
from jaxear.backbones.vgg import VGG16
from jaxear.backbones.weights import named_leaves
from porting import convnext, vgg
from porting.rules import flax_to_torch, torch_to_flax
from tests.torch_reference import import_timm, torch

pytestmark = pytest.mark.torch

SHAPE = {"depths": (1, 2, 1, 1), "widths": (8, 12, 16, 20), "classes": 7}


def random_leaves(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


@pytest.mark.parametrize("v2", [False, True])
def test_metas_convnext(v2):
    timm = import_timm()
    options = {"layer_scale": None, "response_norm": True} if v2 else {}
    encoder = nnx.eval_shape(
        lambda: ConvNeXtEncoder(
            ConvNeXtConfig(**SHAPE, **options),
            classifier=True,
            dtype=np.float32,
            param_dtype=np.float32,
            rngs=nnx.Rngs(0),
        )
    )
    shapes = {name: leaf.shape for name, leaf in named_leaves(encoder).items()}
    leaves = random_leaves(shapes)
    to_timm, to_meta = (convnext.V2_TABLES if v2 else convnext.TABLES).values()
    meta = flax_to_torch(to_meta, leaves)
    assert_equal(torch_to_flax(to_meta, meta, shapes), leaves)
    if v2:  # timm's translation takes any shape of so many numbers
        assert meta["stages.0.0.grn.gamma"].shape == meta["stages.0.0.grn.beta"].shape
        assert meta["stages.0.0.grn.beta"].shape == (1, 1, 1, 32)

    model = timm.models.convnext.ConvNeXt(
        depths=SHAPE["depths"],
        dims=SHAPE["widths"],
        num_classes=7,
        use_grn=v2,
        ls_init_value=None if v2 else 1e-6,
    )
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in meta.items()}
    translated = timm.models.convnext.checkpoint_filter_fn(tensors, model)
    model.load_state_dict(translated, strict=True)
    expected = flax_to_torch(to_timm, leaves)
    assert_equal({key: value.numpy() for key, value in translated.items()}, expected)


def test_torchvisions_vgg():
    import_timm()
    from timm.models.vgg import _filter_fn

    shapes, channels = {}, 3
    for stage, (depth, width) in enumerate(zip(VGG16.depths, VGG16.widths, strict=True)):
        for layer in range(depth):
            shapes[f"stages.{stage}.{layer}.kernel"] = (3, 3, channels, width)
            shapes[f"stages.{stage}.{layer}.bias"] = (width,)
            channels = width
    # timm's translation expects the real widths before the hidden layers, not their own.
    hidden = {"fc1": (7, 7, 512, 3), "fc2": (4096, 2), "fc3": (2, 5)}
    for name, shape in hidden.items():
        shapes[f"classifier.{name}.kernel"] = shape
        shapes[f"classifier.{name}.bias"] = shape[-1:]
    leaves = random_leaves(shapes)
    to_timm, to_torchvision = vgg.TABLES.values()
    torchvision = flax_to_torch(to_torchvision, leaves)
    assert torchvision["classifier.0.weight"].shape == (3, 512 * 7 * 7)
    assert_equal(torch_to_flax(to_torchvision, torchvision, shapes), leaves)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in torchvision.items()}
    translated = {key: value.numpy() for key, value in _filter_fn(tensors).items()}
    assert_equal(translated, flax_to_torch(to_timm, leaves))
