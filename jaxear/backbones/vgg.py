"""VGG-16, whose features make the perceptual loss.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015);
Johnson et al., "Perceptual Losses" (2016) for the layers; torchvision.models.vgg, timm.models.vgg.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.layers import conv
from jaxear.backbones.pooling import max_pool
from jaxear.backbones.staged import StagedEncoder, run
from jaxear.errors import UserError


@dataclass(frozen=True)
class VGGConfig:
    """3x3 convolutions per stage and their channels, widths of the classifier."""

    depths: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, int] = (4096, 4096)
    classes: int = 1000
    grid: int = 7  # cells per side that the classifier takes

    @property
    def relu_names(self) -> tuple[str, ...]:
        """The last activation of each stage, as the literature calls it: "relu1_2" .. "relu5_3"."""
        return tuple(f"relu{stage}_{n}" for stage, n in enumerate(self.depths, start=1))

    @property
    def smallest(self) -> int:
        """Pixels per side below which nothing is left after the poolings."""
        return 2 ** len(self.depths)


VGG16 = VGGConfig()


class Classifier(nnx.Module):
    """Three linear layers, the first over a grid of 7x7 cells; sliding windows on larger features.

    Features smaller than the grid are spread onto it by adaptive average pooling, as in timm.
    """

    def __init__(self, config: VGGConfig, **kwargs: Any):
        first, second = config.hidden
        self.grid = config.grid
        self.fc1 = nnx.Conv(
            config.widths[-1], first, (config.grid, config.grid), padding="VALID", **kwargs
        )
        self.fc2 = nnx.Linear(first, second, **kwargs)
        self.fc3 = nnx.Linear(second, config.classes, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [b, h, w, c] -> logits [b, classes]."""
        if min(x.shape[1:3]) < self.grid:
            for axis in (1, 2):
                x = adaptive_mean(x, axis, max(self.grid, x.shape[axis]))
        x = jax.nn.relu(self.fc1(x))
        x = jax.nn.relu(self.fc2(x))
        return self.fc3(jnp.mean(x, (1, 2)))


def adaptive_mean(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Resize one axis as torch's `adaptive_avg_pool2d`, which overlaps cells where it must.

    Cell i is the mean of elements floor(i n / size) to ceil((i + 1) n / size), exclusive.
    """
    n = x.shape[axis]
    weights = np.zeros((n, size))
    for i in range(size):
        cell = slice(i * n // size, -(-(i + 1) * n // size))
        weights[cell, i] = 1 / (cell.stop - cell.start)
    resized = jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 0))
    return jnp.moveaxis(resized, -1, axis)


class VGGEncoder(StagedEncoder):
    """VGG's convolutions, equal to timm's `forward_features`; see `base.Encoder`.

    "relu1_2" .. "relu5_3" are the activations before each pooling, of strides 1 to 16; "stage1" to
    "stage5" are other names for them. "last" is "relu5_3" pooled, of stride 32. There is no stem:
    every convolution is a block.
    """

    def __init__(
        self,
        config: VGGConfig,
        *,
        classifier: bool = False,
        remat: bool = False,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, remat=remat)
        stages, channels = [], 3
        for depth, width in zip(config.depths, config.widths, strict=True):
            inputs = (channels, *[width] * (depth - 1))
            stages.append(nnx.List([conv(c, width, 3, bias=True, **kwargs) for c in inputs]))
            channels = width
        self.stages = nnx.List(stages)
        if classifier:
            self.classifier = Classifier(config, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        maps = [FeatureInfo(c, 2**i) for i, c in enumerate(self.config.widths)]
        stages = {f"stage{i}": info for i, info in enumerate(maps, start=1)}
        relus = dict(zip(self.config.relu_names, maps, strict=True))
        return relus | stages | {"last": FeatureInfo(maps[-1].channels, 2 * maps[-1].stride)}

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        for number, (name, stage) in enumerate(
            zip(self.config.relu_names, self.stages, strict=True), start=1
        ):
            x = run(stage, x, remat=self.remat, call=_stage)
            yield name, x
            yield f"stage{number}", x
            x = max_pool(x, 2, 2)
        yield "last", x


def _stage(layers: nnx.List, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = jax.nn.relu(layer(x))
    return x


def _build(image_size: tuple[int, int], *, config: VGGConfig = VGG16, **options: Any) -> VGGEncoder:
    smallest = config.smallest
    if min(image_size) < smallest:
        raise UserError(
            f"VGG-16 takes images of at least {smallest}x{smallest} pixels, not "
            f"{image_size[0]}x{image_size[1]}; enlarge them."
        )
    return VGGEncoder(config, **options)


SPECS = (
    BackboneSpec(
        name="vgg16",
        build=_build,
        source="https://huggingface.co/timm/vgg16.tv_in1k",
        licence="BSD-3-Clause",
        port_command="python scripts/port_timm.py --model vgg16",
        options=("classifier", "remat"),
    ),
)
