"""MobileNetV3: timm's names to `jaxear.backbones.mobilenetv3`."""

from __future__ import annotations

from porting.batch_norm import batch_norm
from porting.efficientnet import SQUEEZE_EXCITE, mbconv
from porting.rules import Rule, RuleTable
from porting.transforms import CONV, LINEAR

TIMM = RuleTable(
    (
        Rule("conv_stem.weight", "conv_stem.kernel", CONV),
        *batch_norm("bn1", "bn1"),
        *mbconv(5),
        *SQUEEZE_EXCITE,
        Rule("blocks.6.0.conv.weight", "conv_last.kernel", CONV),
        *batch_norm("blocks.6.0.bn1", "bn_last"),
        Rule("conv_head.weight", "classifier.conv_head.kernel", CONV),
        Rule("conv_head.bias", "classifier.conv_head.bias"),
        Rule("classifier.weight", "classifier.linear.kernel", LINEAR),
        Rule("classifier.bias", "classifier.linear.bias"),
    )
)

TABLES = {"timm": TIMM}
REFUSED = {
    "features.0.0.weight": "torchvision's mobilenet_v3_large has the same shapes but is another "
    "function: its BatchNorm adds 1e-3 to the variance, timm's mobilenetv3_large_100 1e-5"
}
