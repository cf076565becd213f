"""EfficientNet-B3 in timm's and in TensorFlow's padding, and EfficientNet-Lite0.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019);
timm.models.efficientnet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.typing import Dtype

from jaxear.backbones.base import BackboneSpec
from jaxear.backbones.layers import Activation, BatchNormMode, batch_norms, conv
from jaxear.backbones.mbconv import Block, MBConvConfig, MBConvEncoder
from jaxear.backbones.staged import PooledLinear


class Stage(NamedTuple):
    """`depth` blocks of one kind; the first one has the stride."""

    kernel_size: int
    stride: int
    expansion: int
    channels: int
    depth: int


def _blocks(
    stem: int, stages: tuple[Stage, ...], *, squeeze: bool, activation: Activation
) -> tuple[tuple[Block, ...], ...]:
    """The blocks of each stage; squeeze-excite is to a quarter of a block's input."""
    channels, blocks = stem, []
    for stage in stages:
        inputs = (channels, *[stage.channels] * (stage.depth - 1))
        blocks.append(
            tuple(
                Block(
                    stage.kernel_size,
                    given * stage.expansion,
                    stage.channels,
                    given // 4 if squeeze else None,
                    activation,
                    stage.stride if number == 0 else 1,
                )
                for number, given in enumerate(inputs)
            )
        )
        channels = stage.channels
    return tuple(blocks)


_B3 = (
    Stage(3, 1, 1, 24, 2),
    Stage(3, 2, 6, 32, 3),
    Stage(5, 2, 6, 48, 3),
    Stage(3, 2, 6, 96, 5),
    Stage(5, 1, 6, 136, 5),
    Stage(5, 2, 6, 232, 6),
    Stage(3, 1, 6, 384, 2),
)
_LITE0 = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)
EFFICIENTNET_B3 = MBConvConfig(
    stem=40, stages=_blocks(40, _B3, squeeze=True, activation=jax.nn.silu), head=1536
)
TF_EFFICIENTNET_B3 = replace(EFFICIENTNET_B3, padding="same", norm_epsilon=1e-3)
EFFICIENTNET_LITE0 = MBConvConfig(
    stem=32,
    stages=_blocks(32, _LITE0, squeeze=False, activation=jax.nn.relu6),
    head=1280,
    activation=jax.nn.relu6,
    padding="same",
    norm_epsilon=1e-3,
)


class EfficientNetEncoder(MBConvEncoder):
    """EfficientNet up to its head convolution, timm's `forward_features`; see `base.Encoder`.

    "stage1" to "stage5" are what timm's `features_only` gives.
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
        self.conv_head = conv(channels, config.head, 1, round_weights=False, **kwargs)
        self.bn2 = norm(config.head)
        if classifier:
            self.classifier = PooledLinear(config.head, config.classes, **kwargs)

    def head(self, x: jax.Array) -> jax.Array:
        return self.config.activation(self.bn2(self.conv_head(x)))


def _spec(name: str, config: MBConvConfig, hub: str, **kwargs: Any) -> BackboneSpec:
    def build(image_size: tuple[int, int], **options: Any) -> EfficientNetEncoder:
        del image_size  # any size: the output is ceil(size / 32)
        return EfficientNetEncoder(config, **options)

    return BackboneSpec(
        name=name,
        build=build,
        source=f"https://huggingface.co/timm/{hub}",
        licence="Apache-2.0",
        port_command=f"python scripts/port_timm.py --model {name}",
        options=("classifier", "batch_norm", "remat"),
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
