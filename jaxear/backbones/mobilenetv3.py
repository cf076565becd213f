"""MobileNetV3-Large, as timm's mobilenetv3_large_100 (BatchNorm eps 1e-5, torch's padding).

Howard et al., "Searching for MobileNetV3" (2019), table 1; timm.models.mobilenetv3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.layers import BatchNorm, BatchNormMode, InvertedResidual, conv, take


class Block(NamedTuple):
    """A row of the paper's table; `reduced` are the channels of its squeeze-excite, if any."""

    kernel_size: int
    expanded: int
    channels: int
    reduced: int | None
    activation: Literal["relu", "hard_swish"]
    stride: int


@dataclass(frozen=True)
class MobileNetV3Config:
    """Channels of the stem, blocks by stage, channels of last convolution and classifier."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    last: int
    head: int
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    classes: int = 1000


MOBILENETV3_LARGE = MobileNetV3Config(
    stem=16,
    stages=(
        (Block(3, 16, 16, None, "relu", 1),),
        (Block(3, 64, 24, None, "relu", 2), Block(3, 72, 24, None, "relu", 1)),
        (
            Block(5, 72, 40, 24, "relu", 2),
            Block(5, 120, 40, 32, "relu", 1),
            Block(5, 120, 40, 32, "relu", 1),
        ),
        (
            Block(3, 240, 80, None, "hard_swish", 2),
            Block(3, 200, 80, None, "hard_swish", 1),
            Block(3, 184, 80, None, "hard_swish", 1),
            Block(3, 184, 80, None, "hard_swish", 1),
        ),
        (
            Block(3, 480, 112, 120, "hard_swish", 1),
            Block(3, 672, 112, 168, "hard_swish", 1),
        ),
        (
            Block(5, 672, 160, 168, "hard_swish", 2),
            Block(5, 960, 160, 240, "hard_swish", 1),
            Block(5, 960, 160, 240, "hard_swish", 1),
        ),
    ),
    last=960,
    head=1280,
)


class Classifier(nnx.Module):
    """What follows the pooling: a 1x1 convolution to `head` channels, then the linear layer."""

    def __init__(self, channels: int, head: int, classes: int, **kwargs: Any):
        self.conv_head = conv(channels, head, 1, bias=True, **kwargs)
        self.linear = nnx.Linear(head, classes, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [b, h, w, c] -> logits [b, classes]."""
        pooled = jnp.mean(x, (1, 2), keepdims=True)
        return self.linear(jax.nn.hard_swish(self.conv_head(pooled))[:, 0, 0])


class MobileNetV3Encoder(nnx.Module):
    """MobileNetV3 up to its last 1x1 convolution, timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage5" are what timm's `features_only` gives: the last maps of strides 2, 4, 8, 16
    and 32; "stage5" includes the last convolution and so equals "last".
    """

    def __init__(
        self,
        config: MobileNetV3Config,
        *,
        classifier: bool = False,
        batch_norm: BatchNormMode = "frozen",
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = partial(
            BatchNorm,
            epsilon=config.norm_epsilon,
            momentum=config.norm_momentum,
            mode=batch_norm,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.config = config
        self.conv_stem = conv(3, config.stem, 3, stride=2, **kwargs)
        self.bn1 = norm(config.stem)
        channels = config.stem
        stages = []
        for stage in config.stages:
            blocks = []
            for block in stage:
                blocks.append(
                    InvertedResidual(
                        channels,
                        block.expanded,
                        block.channels,
                        block.kernel_size,
                        stride=block.stride,
                        reduced=block.reduced,
                        activation=getattr(jax.nn, block.activation),
                        squeeze_activation=jax.nn.relu,
                        gate=jax.nn.hard_sigmoid,
                        padding="symmetric",
                        norm=norm,
                        **kwargs,
                    )
                )
                channels = block.channels
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.conv_last = conv(channels, config.last, 1, **kwargs)
        self.bn_last = norm(config.last)
        if classifier:
            self.classifier = Classifier(config.last, config.head, config.classes, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        levels, stride = {}, 2
        for stage in self.config.stages:
            stride *= stage[0].stride
            levels[stride] = FeatureInfo(stage[-1].channels, stride)  # the last stage of a stride
        levels[stride] = FeatureInfo(self.config.last, stride)
        named = {f"stage{i}": info for i, info in enumerate(levels.values(), start=1)}
        return named | {"last": levels[stride]}

    @property
    def n_blocks(self) -> int:
        return sum(len(stage) for stage in self.config.stages)

    def block_index(self, path: tuple[str | int, ...]) -> int:
        if path[0] in ("conv_stem", "bn1"):
            return 0
        if path[0] == "blocks":
            before = self.config.stages[: int(path[1])]
            return 1 + sum(len(stage) for stage in before) + int(path[2])
        return self.n_blocks + 1

    def _maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        x = jax.nn.hard_swish(self.bn1(self.conv_stem(x)))
        level = 1
        for stage, blocks in zip(self.config.stages, self.blocks, strict=True):
            if stage[0].stride == 2:
                yield f"stage{level}", x
                level += 1
            for block in blocks:
                x = block(x)
        x = jax.nn.hard_swish(self.bn_last(self.conv_last(x)))
        yield f"stage{level}", x
        yield "last", x

    def features(self, x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        return take(self._maps(x), names)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.features(x, ("last",))[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> [b, classes]; needs `classifier=True`."""
        return self.classifier(self(x))


def _build(image_size: tuple[int, int], **options: Any) -> MobileNetV3Encoder:
    del image_size  # any size: the output is ceil(size / 32)
    return MobileNetV3Encoder(MOBILENETV3_LARGE, **options)


SPECS = (
    BackboneSpec(
        name="mobilenetv3_large_100",
        build=_build,
        source="https://huggingface.co/timm/mobilenetv3_large_100.ra_in1k",
        licence="Apache-2.0",
        port_command="python scripts/port_timm.py --model mobilenetv3_large_100",
        options=("classifier", "batch_norm"),
    ),
)
