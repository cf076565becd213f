"""Several backbones that look at the same images in parallel."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from jaxear.backbones.base import Backbone


class HybridBackbone(nnx.Module):
    """Backbones side by side: images [b, h, w, 3] in [0, 1] -> one feature map of each.

    Attributes:
        backbones: the backbones, each with one feature map.
        name: "hybrid".
        stride: pixels per cell of the coarsest map.
        out_channels: channels of each map.
    """

    single = False

    def __init__(self, backbones: Sequence[Backbone]):
        self.backbones = nnx.List(backbones)
        self.name = "hybrid"
        self.stride = max(backbone.stride for backbone in backbones)
        self.out_channels = tuple(backbone.out_channels for backbone in backbones)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves([backbone(images) for backbone in self.backbones]))
