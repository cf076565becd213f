"""MobileNetV3-Large, as timm's mobilenetv3_large_100 (BatchNorm eps 1e-5, torch's padding).

Howard et al., "Searching for MobileNetV3" (2019), table 1; timm.models.mobilenetv3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.nn import hard_swish, relu

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.layers import BatchNormMode, batch_norms, conv
from jaxear.backbones.mbconv import Block, MBConvConfig, MBConvEncoder

CLASSIFIER_WIDTH = 1280

MOBILENETV3_LARGE = MBConvConfig(
    stem=16,
    stages=(
        (Block(3, 16, 16, None, relu, 1),),
        (Block(3, 64, 24, None, relu, 2), Block(3, 72, 24, None, relu, 1)),
        (
            Block(5, 72, 40, 24, relu, 2),
            Block(5, 120, 40, 32, relu, 1),
            Block(5, 120, 40, 32, relu, 1),
        ),
        (
            Block(3, 240, 80, None, hard_swish, 2),
            Block(3, 200, 80, None, hard_swish, 1),
            Block(3, 184, 80, None, hard_swish, 1),
            Block(3, 184, 80, None, hard_swish, 1),
        ),
        (
            Block(3, 480, 112, 120, hard_swish, 1),
            Block(3, 672, 112, 168, hard_swish, 1),
        ),
        (
            Block(5, 672, 160, 168, hard_swish, 2),
            Block(5, 960, 160, 240, hard_swish, 1),
            Block(5, 960, 160, 240, hard_swish, 1),
        ),
    ),
    head=960,
    activation=hard_swish,
    squeeze_activation=relu,
    gate=jax.nn.hard_sigmoid,
)


class Classifier(nnx.Module):
    """What follows the pooling: a 1x1 convolution to `hidden` channels, then the linear layer."""

    def __init__(self, channels: int, hidden: int, classes: int, **kwargs: Any):
        self.conv_head = conv(channels, hidden, 1, bias=True, **kwargs)
        self.linear = nnx.Linear(hidden, classes, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [b, h, w, c] -> logits [b, classes]."""
        pooled = jnp.mean(x, (1, 2), keepdims=True)
        return self.linear(hard_swish(self.conv_head(pooled))[:, 0, 0])


class MobileNetV3Encoder(MBConvEncoder):
    """MobileNetV3 up to its last 1x1 convolution, timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage5" are what timm's `features_only` gives; "stage5" includes the last
    convolution and so equals "last".
    """

    def __init__(
        self,
        config: MBConvConfig,
        *,
        classifier: bool = False,
        batch_norm: BatchNormMode = "frozen",
        remat: bool = False,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, batch_norm=batch_norm, remat=remat, **kwargs)
        norm = batch_norms(config, batch_norm, dtype=param_dtype, param_dtype=param_dtype)
        channels = config.stages[-1][-1].channels
        self.conv_last = conv(channels, config.head, 1, round_weights=False, **kwargs)
        self.bn_last = norm(config.head)
        if classifier:
            self.classifier = Classifier(config.head, CLASSIFIER_WIDTH, config.classes, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        info = super().feature_info
        return info | {"stage5": info["last"]}

    def head(self, x: jax.Array) -> jax.Array:
        return self.config.activation(self.bn_last(self.conv_last(x)))

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        for name, feature_map in super().maps(x):
            if name == "last":
                yield "stage5", feature_map
            if name != "stage5":
                yield name, feature_map


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
        options=("classifier", "batch_norm", "remat"),
    ),
)
