"""ConvNeXt and ConvNeXt V2.

Liu et al., "A ConvNet for the 2020s" (2022); Woo et al., "ConvNeXt V2: Co-designing and Scaling
ConvNets with Masked Autoencoders" (2023); timm.models.convnext.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec, FeatureInfo
from jaxear.backbones.depthwise import depthwise_conv
from jaxear.backbones.lean import LayerNorm, gelu
from jaxear.backbones.staged import StagedEncoder
from jaxear.errors import UserError

_SMALLEST = 32  # pixels: the patches of the stem (4) and of three halvings


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Blocks and channels per stage; V1 scales its branches, V2 normalises their responses."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    layer_scale: float | None = 1e-6
    response_norm: bool = False
    kernel_size: int = 7
    expansion: int = 4
    classes: int = 1000
    epsilon: float = 1e-6


CONVNEXT_TINY = ConvNeXtConfig(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768))
CONVNEXTV2_TINY = ConvNeXtConfig(
    depths=(3, 3, 9, 3), widths=(96, 192, 384, 768), layer_scale=None, response_norm=True
)

_KERNEL_INIT = nnx.initializers.truncated_normal(0.02)


def _patch_conv(in_channels: int, out_channels: int, size: int, **kwargs: Any) -> nnx.Conv:
    """A linear map of patches that do not overlap; a rest at the right and bottom is dropped."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        strides=size,
        padding="VALID",
        kernel_init=_KERNEL_INIT,
        **kwargs,
    )


class GlobalResponseNorm(nnx.Module):
    """Scales each channel by its share of the image's response (Woo et al. 2023, section 3.3).

    The norms over h and w are taken in float32 at least.
    """

    def __init__(self, channels: int, *, epsilon: float, dtype: Dtype, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.zeros(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same shape."""
        wide = x.astype(self.scale.dtype)
        energy = jnp.sum(jnp.square(wide), (1, 2), keepdims=True)
        # A silent channel's norm has derivative 0, as torch's; the square root's would be infinite.
        silent = energy == 0
        norm = jnp.where(silent, 0, jnp.sqrt(jnp.where(silent, 1, energy)))
        share = norm / (jnp.mean(norm, -1, keepdims=True) + self.epsilon)
        factor = 1 + self.scale[...] * share
        return x * factor.astype(self.dtype) + self.bias[...].astype(self.dtype)


class ConvNeXtBlock(nnx.Module):
    """A depthwise convolution, then a perceptron over the channels, around a shortcut."""

    def __init__(
        self,
        channels: int,
        config: ConvNeXtConfig,
        *,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        linear = partial(nnx.Linear, kernel_init=_KERNEL_INIT, rngs=rngs, **kwargs)
        margin = config.kernel_size // 2
        self.depthwise = nnx.Conv(
            channels,
            channels,
            (config.kernel_size, config.kernel_size),
            padding=((margin, margin), (margin, margin)),
            feature_group_count=channels,
            kernel_init=_KERNEL_INIT,
            conv_general_dilated=depthwise_conv,
            rngs=rngs,
            **kwargs,
        )
        self.norm = LayerNorm(channels, epsilon=config.epsilon, rngs=rngs, **kwargs)
        self.expand = linear(channels, config.expansion * channels)
        self.has_response_norm = config.response_norm
        if config.response_norm:
            self.response_norm = GlobalResponseNorm(
                config.expansion * channels, epsilon=config.epsilon, **kwargs
            )
        self.project = linear(config.expansion * channels, channels)
        self.has_layer_scale = config.layer_scale is not None
        if config.layer_scale is not None:
            self.gamma = nnx.Param(jnp.full(channels, config.layer_scale, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same shape."""
        shortcut = x
        x = self.norm(self.depthwise(x))
        x = gelu(self.expand(x))
        if self.has_response_norm:
            x = self.response_norm(x)
        x = self.project(x)
        if self.has_layer_scale:
            x = x * self.gamma[...].astype(x.dtype)
        return x + shortcut


class ConvNeXtStage(nnx.Module):
    """Blocks of one width; all stages but the first halve the size before them."""

    def __init__(
        self, in_channels: int, channels: int, depth: int, config: ConvNeXtConfig, **kwargs: Any
    ):
        self.halves = in_channels != channels
        if self.halves:
            self.downsample_norm = LayerNorm(in_channels, epsilon=config.epsilon, **kwargs)
            self.downsample_conv = _patch_conv(in_channels, channels, 2, **kwargs)
        self.blocks = nnx.List([ConvNeXtBlock(channels, config, **kwargs) for _ in range(depth)])

    def downsample(self, x: jax.Array) -> jax.Array:
        """What comes before the blocks: [b, h, w, in_channels] -> [b, h', w', channels]."""
        return self.downsample_conv(self.downsample_norm(x)) if self.halves else x


class Classifier(nnx.Module):
    """Mean over the image, LayerNorm, linear layer."""

    def __init__(self, channels: int, config: ConvNeXtConfig, **kwargs: Any):
        self.norm = LayerNorm(channels, epsilon=config.epsilon, **kwargs)
        self.linear = nnx.Linear(channels, config.classes, kernel_init=_KERNEL_INIT, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features [b, h, w, c] -> logits [b, classes]."""
        return self.linear(self.norm(jnp.mean(x, (1, 2))))


class ConvNeXtEncoder(StagedEncoder):
    """ConvNeXt up to its last stage, equal to timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage4" have strides 4, 8, 16 and 32; "last" is "stage4". The norm before the
    classifier belongs to the classifier.
    """

    stem = ("stem_conv", "stem_norm")

    def __init__(
        self,
        config: ConvNeXtConfig,
        *,
        classifier: bool = False,
        remat: bool = False,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, remat=remat)
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.stem_conv = _patch_conv(3, config.widths[0], 4, **kwargs)
        self.stem_norm = LayerNorm(config.widths[0], epsilon=config.epsilon, **kwargs)
        before = (config.widths[0], *config.widths[:-1])
        self.stages = nnx.List(
            [
                ConvNeXtStage(*shape, config, **kwargs)
                for shape in zip(before, config.widths, config.depths, strict=True)
            ]
        )
        if classifier:
            self.classifier = Classifier(config.widths[-1], config, **kwargs)

    @property
    def feature_info(self) -> dict[str, FeatureInfo]:
        widths = self.config.widths
        stages = {f"stage{i + 1}": FeatureInfo(c, 4 * 2**i) for i, c in enumerate(widths)}
        return stages | {"last": stages[f"stage{len(widths)}"]}

    def maps(self, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        x = self.stem_norm(self.stem_conv(x))
        for number, stage in enumerate(self.stages, start=1):
            x = self.run(stage.blocks, stage.downsample(x))
            yield f"stage{number}", x
        yield "last", x


def _build(
    image_size: tuple[int, int], *, config: ConvNeXtConfig, **options: Any
) -> ConvNeXtEncoder:
    if min(image_size) < _SMALLEST:
        raise UserError(
            f"ConvNeXt takes images of at least {_SMALLEST}x{_SMALLEST} pixels, not "
            f"{image_size[0]}x{image_size[1]}; enlarge them."
        )
    return ConvNeXtEncoder(config, **options)


def _spec(name: str, config: ConvNeXtConfig, tag: str, licence: str) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        build=partial(_build, config=config),
        source=f"https://huggingface.co/timm/{name}.{tag}",
        licence=licence,
        port_command=f"python scripts/port_timm.py --model {name}",
        options=("classifier", "remat"),
    )


SPECS = (
    _spec("convnext_tiny", CONVNEXT_TINY, "fb_in22k_ft_in1k", "Apache-2.0"),
    # Not for commercial use, unlike everything else here. The FCMAE weights before fine-tuning
    # (without a classifier) are at timm/convnextv2_tiny.fcmae, under the same licence.
    _spec("convnextv2_tiny", CONVNEXTV2_TINY, "fcmae_ft_in22k_in1k", "CC-BY-NC-4.0"),
)
