"""ResNet-50, version 1.5: the stride is in the 3x3 convolution, as in torchvision and timm.

He et al., "Deep Residual Learning for Image Recognition" (2016); timm.models.resnet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.layers import BatchNormMode, batch_norms, conv
from jaxear.backbones.pooling import max_pool
from jaxear.backbones.staged import PooledLinear, StagedEncoder


@dataclass(frozen=True)
class ResNetConfig:
    """Blocks per stage and the width that their 3x3 convolutions start from."""

    depths: tuple[int, int, int, int]
    width: int = 64
    expansion: int = 4
    classes: int = 1000
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1


RESNET50 = ResNetConfig(depths=(3, 4, 6, 3))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut, which a strided or widening block projects."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        *,
        stride: int,
        norm: Any,
        **kwargs: Any,
    ):
        self.conv1 = conv(in_channels, width, 1, **kwargs)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride, **kwargs)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1, **kwargs)
        self.bn3 = norm(out_channels)
        self.has_projection = stride != 1 or in_channels != out_channels
        if self.has_projection:
            self.downsample_conv = conv(in_channels, out_channels, 1, stride=stride, **kwargs)
            self.downsample_bn = norm(out_channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_channels] -> [b, h / stride, w / stride, out_channels]."""
        shortcut = x
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = jax.nn.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        if self.has_projection:
            shortcut = self.downsample_bn(self.downsample_conv(shortcut))
        return jax.nn.relu(x + shortcut)


class ResNetEncoder(StagedEncoder):
    """ResNet up to its last stage, equal to timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage4" are layer1 to layer4, of strides 4, 8, 16 and 32; "last" is "stage4".
    """

    stem = ("conv1", "bn1")

    def __init__(
        self,
        config: ResNetConfig,
        *,
        classifier: bool = False,
        batch_norm: BatchNormMode = "frozen",
        remat: bool = False,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, remat=remat)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = batch_norms(config, batch_norm, dtype=dtype, param_dtype=param_dtype)
        self.conv1 = conv(3, config.width, 7, stride=2, **kwargs)
        self.bn1 = norm(config.width)
        channels = config.width
        for stage, depth in enumerate(config.depths):
            width = config.width * 2**stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                out_channels = width * config.expansion
                blocks.append(
                    Bottleneck(channels, width, out_channels, stride=stride, norm=norm, **kwargs)
                )
                channels = out_channels
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        if classifier:
            self.classifier = PooledLinear(channels, config.classes, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        width = self.config.width * self.config.expansion
        stages = {f"stage{i + 1}": FeatureInfo(width * 2**i, 4 * 2**i) for i in range(4)}
        return stages | {"last": stages["stage4"]}

    def block_index(self, path: tuple[str | int, ...]) -> int:
        part = str(path[0])
        if part.startswith("layer"):
            path = (self.body, int(part.removeprefix("layer")) - 1, *path[1:])
        return super().block_index(path)

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = max_pool(x, 3, 2, margin=1)
        for stage in range(1, 5):
            x = self.run(getattr(self, f"layer{stage}"), x)
            yield f"stage{stage}", x
        yield "last", x


def _build(image_size: tuple[int, int], **options: Any) -> ResNetEncoder:
    del image_size  # any size: the output is ceil(size / 32)
    return ResNetEncoder(RESNET50, **options)


SPECS = (
    BackboneSpec(
        name="resnet50",
        build=_build,
        source="https://huggingface.co/timm/resnet50.a1_in1k",
        licence="Apache-2.0",
        port_command="python scripts/port_timm.py --model resnet50",
        options=("classifier", "batch_norm", "remat"),
    ),
)
