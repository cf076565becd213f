"""What EfficientNet and MobileNetV3 are made of: inverted residuals with squeeze-excite.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019), which
calls them MBConv; Sandler et al., "MobileNetV2" (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import FeatureInfo
from jaxear.backbones.layers import Activation, BatchNorm, BatchNormMode, Padding, batch_norms, conv
from jaxear.backbones.staged import StagedEncoder


class Block(NamedTuple):
    """The shape of an inverted residual; `reduced` are the channels of its squeeze-excite."""

    kernel_size: int
    expanded: int
    channels: int
    reduced: int | None
    activation: Activation
    stride: int


@dataclass(frozen=True)
class MBConvConfig:
    """Channels of the stem, blocks by stage, channels of the 1x1 convolution after them."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    head: int
    activation: Activation = jax.nn.silu
    squeeze_activation: Activation = jax.nn.silu
    gate: Activation = jax.nn.sigmoid
    padding: Padding = "symmetric"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    classes: int = 1000

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return tuple(map(len, self.stages))


class SqueezeExcite(nnx.Module):
    """Channel attention (Hu et al. 2018): gates each channel by all channels' spatial means."""

    def __init__(
        self,
        channels: int,
        reduced: int,
        *,
        activation: Activation,
        gate: Activation,
        **kwargs: Any,
    ):
        self.reduce = conv(channels, reduced, 1, bias=True, **kwargs)
        self.expand = conv(reduced, channels, 1, bias=True, **kwargs)
        self.activation = activation
        self.gate = gate

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same shape."""
        pooled = jnp.mean(x, (1, 2), keepdims=True)
        return x * self.gate(self.expand(self.activation(self.reduce(pooled))))


class InvertedResidual(nnx.Module):
    """Expand, filter each channel, squeeze and excite, project.

    Without expansion (`expanded == in_channels`) it is a depthwise separable convolution; without
    `reduced` there is no squeeze-excite. The input is added where the shape stays the same.
    """

    def __init__(
        self,
        in_channels: int,
        shape: Block,
        config: MBConvConfig,
        *,
        norm: Callable[[int], BatchNorm],
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kernel_size, expanded, channels, reduced, self.activation, stride = shape
        self.has_expansion = expanded != in_channels
        if self.has_expansion:
            self.expand = conv(in_channels, expanded, 1, round_weights=False, **kwargs)
            self.expand_bn = norm(expanded)
        self.depthwise = conv(
            expanded,
            expanded,
            kernel_size,
            stride=stride,
            depthwise=True,
            padding=config.padding,
            round_weights=False,
            **kwargs,
        )
        self.depthwise_bn = norm(expanded)
        self.has_squeeze = reduced is not None
        if reduced is not None:
            self.squeeze = SqueezeExcite(
                expanded,
                reduced,
                activation=config.squeeze_activation,
                gate=config.gate,
                **kwargs | {"dtype": param_dtype},
            )
        self.project = conv(expanded, channels, 1, round_weights=False, **kwargs)
        self.project_bn = norm(channels)
        self.has_shortcut = stride == 1 and in_channels == channels
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, in_channels] -> [b, h / stride, w / stride, channels], in `dtype`."""
        shortcut = x
        if self.has_expansion:
            x = self.activation(self.expand_bn(self.expand(x)))
        x = self.activation(self.depthwise_bn(self.depthwise(x)))
        if self.has_squeeze:
            x = self.squeeze(x)
        x = self.project_bn(self.project(x))
        return (x + shortcut if self.has_shortcut else x).astype(self.dtype)


class MBConvEncoder(StagedEncoder):
    """A strided stem, stages of inverted residuals, a 1x1 convolution; see `base.Encoder`.

    "stage1" to "stage5" are the last maps of strides 2, 4, 8, 16 and 32, "last" is what the 1x1
    convolution makes of the deepest. A family adds that convolution, `head`. In bfloat16 it rounds
    as `mixed` says: the stem (three channels), norms and squeeze-excite compute in float32.
    """

    stem = ("conv_stem", "bn1")
    body = "blocks"

    def __init__(
        self,
        config: MBConvConfig,
        *,
        batch_norm: BatchNormMode,
        remat: bool,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, remat=remat)
        self.dtype = dtype
        kwargs: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        norm = batch_norms(config, batch_norm, dtype=param_dtype, param_dtype=param_dtype)
        self.conv_stem = conv(
            3, config.stem, 3, stride=2, padding=config.padding, dtype=param_dtype, **kwargs
        )
        self.bn1 = norm(config.stem)
        channels = config.stem
        stages = []
        for shapes in config.stages:
            blocks = []
            for shape in shapes:
                blocks.append(
                    InvertedResidual(channels, shape, config, norm=norm, dtype=dtype, **kwargs)
                )
                channels = shape.channels
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        levels, stride = {}, 2
        for stage in self.config.stages:
            stride *= stage[0].stride
            levels[stride] = FeatureInfo(stage[-1].channels, stride)  # the last stage of a stride
        named = {f"stage{i}": info for i, info in enumerate(levels.values(), start=1)}
        return named | {"last": FeatureInfo(self.config.head, stride)}

    def head(self, x: jax.Array) -> jax.Array:
        """The deepest map [b, h, w, c] -> [b, h, w, config.head], not rounded yet."""
        raise NotImplementedError

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        x = self.config.activation(self.bn1(self.conv_stem(x))).astype(self.dtype)
        level = 1
        for shapes, blocks in zip(self.config.stages, self.blocks, strict=True):
            if shapes[0].stride == 2:
                yield f"stage{level}", x
                level += 1
            x = self.run(blocks, x)
        yield f"stage{level}", x
        yield "last", self.head(x).astype(self.dtype)
