"""ResNet: timm's and torchvision's names, which are the same, to `jaxear.backbones.resnet`."""

from __future__ import annotations

from porting.batch_norm import batch_norm
from porting.rules import Rule, RuleTable
from porting.transforms import CONV, LINEAR

_BLOCK = "layer{s}.{b}"

TIMM = RuleTable(
    (
        Rule("conv1.weight", "conv1.kernel", CONV),
        *batch_norm("bn1", "bn1"),
        Rule(_BLOCK + ".conv{n:1|2|3}.weight", _BLOCK + ".conv{n}.kernel", CONV),
        *batch_norm(_BLOCK + ".bn{n:1|2|3}", _BLOCK + ".bn{n}"),
        Rule(_BLOCK + ".downsample.0.weight", _BLOCK + ".downsample_conv.kernel", CONV),
        *batch_norm(_BLOCK + ".downsample.1", _BLOCK + ".downsample_bn"),
        Rule("fc.weight", "classifier.kernel", LINEAR),
        Rule("fc.bias", "classifier.bias"),
    )
)

TABLES = {"timm": TIMM, "torchvision": TIMM}
