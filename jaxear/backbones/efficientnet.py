"""EfficientNet-B3 in timm's and in TensorFlow's padding, and EfficientNet-Lite0.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019);
timm.models.efficientnet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.layers import (
    Activation,
    BatchNorm,
    BatchNormMode,
    InvertedResidual,
    Padding,
    conv,
    take,
)


class Stage(NamedTuple):
    """`depth` blocks of one kind; the first one has the stride."""

    kernel_size: int
    stride: int
    expansion: int
    channels: int
    depth: int


@dataclass(frozen=True)
class EfficientNetConfig:
    """Channels of stem and head, the stages between; `squeeze` is to a quarter of the input."""

    stem: int
    stages: tuple[Stage, ...]
    head: int
    squeeze: bool = True
    activation: Activation = jax.nn.silu
    padding: Padding = "symmetric"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    classes: int = 1000


EFFICIENTNET_B3 = EfficientNetConfig(
    stem=40,
    stages=(
        Stage(3, 1, 1, 24, 2),
        Stage(3, 2, 6, 32, 3),
        Stage(5, 2, 6, 48, 3),
        Stage(3, 2, 6, 96, 5),
        Stage(5, 1, 6, 136, 5),
        Stage(5, 2, 6, 232, 6),
        Stage(3, 1, 6, 384, 2),
    ),
    head=1536,
)
TF_EFFICIENTNET_B3 = replace(EFFICIENTNET_B3, padding="same", norm_epsilon=1e-3)
EFFICIENTNET_LITE0 = EfficientNetConfig(
    stem=32,
    stages=(
        Stage(3, 1, 1, 16, 1),
        Stage(3, 2, 6, 24, 2),
        Stage(5, 2, 6, 40, 2),
        Stage(3, 2, 6, 80, 3),
        Stage(5, 1, 6, 112, 3),
        Stage(5, 2, 6, 192, 4),
        Stage(3, 1, 6, 320, 1),
    ),
    head=1280,
    squeeze=False,
    activation=jax.nn.relu6,
    padding="same",
    norm_epsilon=1e-3,
)


class EfficientNetEncoder(nnx.Module):
    """EfficientNet up to its head convolution, timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage5" are what timm's `features_only` gives: the last blocks of strides 2, 4, 8,
    16 and 32. "last" is the head's output, also of stride 32.
    """

    def __init__(
        self,
        config: EfficientNetConfig,
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
        self.conv_stem = conv(3, config.stem, 3, stride=2, padding=config.padding, **kwargs)
        self.bn1 = norm(config.stem)
        channels = config.stem
        stages = []
        for stage in config.stages:
            blocks = []
            for block in range(stage.depth):
                blocks.append(
                    InvertedResidual(
                        channels,
                        channels * stage.expansion,
                        stage.channels,
                        stage.kernel_size,
                        stride=stage.stride if block == 0 else 1,
                        reduced=channels // 4 if config.squeeze else None,
                        activation=config.activation,
                        squeeze_activation=config.activation,
                        gate=jax.nn.sigmoid,
                        padding=config.padding,
                        norm=norm,
                        **kwargs,
                    )
                )
                channels = stage.channels
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.conv_head = conv(channels, config.head, 1, **kwargs)
        self.bn2 = norm(config.head)
        if classifier:
            self.classifier = nnx.Linear(config.head, config.classes, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        stages, stride = {}, 2
        for stage in self.config.stages:
            stride *= stage.stride
            stages[stride] = FeatureInfo(stage.channels, stride)  # the last stage of each stride
        named = {f"stage{i}": info for i, info in enumerate(stages.values(), start=1)}
        return named | {"last": FeatureInfo(self.config.head, stride)}

    @property
    def n_blocks(self) -> int:
        return sum(stage.depth for stage in self.config.stages)

    def block_index(self, path: tuple[str | int, ...]) -> int:
        if path[0] in ("conv_stem", "bn1"):
            return 0
        if path[0] == "blocks":
            before = self.config.stages[: int(path[1])]
            return 1 + sum(stage.depth for stage in before) + int(path[2])
        return self.n_blocks + 1

    def _maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        x = self.config.activation(self.bn1(self.conv_stem(x)))
        level = 1
        for stage, blocks in zip(self.config.stages, self.blocks, strict=True):
            if stage.stride == 2:
                yield f"stage{level}", x
                level += 1
            for block in blocks:
                x = block(x)
        yield f"stage{level}", x
        yield "last", self.config.activation(self.bn2(self.conv_head(x)))

    def features(self, x: jax.Array, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
        return take(self._maps(x), names)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.features(x, ("last",))[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """Normalised images [b, h, w, 3] -> [b, classes]; needs `classifier=True`."""
        return self.classifier(jnp.mean(self(x), (1, 2)))


def _spec(name: str, config: EfficientNetConfig, hub: str, **kwargs: Any) -> BackboneSpec:
    def build(image_size: tuple[int, int], **options: Any) -> EfficientNetEncoder:
        del image_size  # any size: the output is ceil(size / 32)
        return EfficientNetEncoder(config, **options)

    return BackboneSpec(
        name=name,
        build=build,
        source=f"https://huggingface.co/timm/{hub}",
        licence="Apache-2.0",
        port_command=f"python scripts/port_timm.py --model {name}",
        options=("classifier", "batch_norm"),
        **kwargs,
    )


_HALF = (0.5, 0.5, 0.5)
SPECS = (
    _spec("efficientnet_b3", EFFICIENTNET_B3, "efficientnet_b3.ra2_in1k"),
    _spec("tf_efficientnet_b3", TF_EFFICIENTNET_B3, "tf_efficientnet_b3.ns_jft_in1k"),
    _spec(
        "efficientnet_lite0",
        EFFICIENTNET_LITE0,
        "tf_efficientnet_lite0.in1k",
        mean=_HALF,
        std=_HALF,
    ),
)
