"""Models without their arrays."""

from __future__ import annotations

import pytest
from flax import nnx

from jaxear.backbones.registry import SPECS, without_arrays


@pytest.mark.parametrize("name", ["sam_vit_b", "resnet50", "mobilenetv3_large_100", "vgg16"])
def test_without_arrays_a_model_is_what_nnx_makes_of_it(name):
    def build(rngs: nnx.Rngs) -> nnx.Module:
        kinds = {"dtype": "float32", "param_dtype": "float32"}
        return SPECS[name].build(image_size=(64, 64), rngs=rngs, **kinds)

    found, expected = (
        nnx.split(module)
        for module in (without_arrays(build), nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    )
    assert found[0] == expected[0]
    leaves, expected_leaves = (dict(nnx.to_flat_state(state)) for _, state in (found, expected))
    assert leaves.keys() == expected_leaves.keys()
    for path, leaf in leaves.items():
        one, other = leaf.get_value(), expected_leaves[path].get_value()
        assert (one.shape, one.dtype) == (other.shape, other.dtype), path
