"""EfficientNet: names of timm and efficientnet_pytorch to `jaxear.backbones.efficientnet`."""

from __future__ import annotations

from jaxear.backbones.efficientnet import EFFICIENTNET_LITE0
from jaxear.backbones.mbconv import MBConvConfig
from porting.batch_norm import batch_norm
from porting.rules import Rule, RuleTable
from porting.transforms import CONV, LINEAR


def mbconv(last_stage: int) -> tuple[Rule, ...]:
    """Rules of the blocks of timm's EfficientNet and MobileNetV3, of stages 0 to `last_stage`.

    The first stage does not expand, and timm counts the layers of its blocks differently.
    """
    first = "blocks.{s:0}.{b}"
    other = f"blocks.{{s:[1-{last_stage}]}}.{{b}}"
    target = "blocks.{s}.{b}"
    return (
        Rule(f"{first}.conv_dw.weight", f"{target}.depthwise.kernel", CONV),
        *batch_norm(f"{first}.bn1", f"{target}.depthwise_bn"),
        Rule(f"{first}.conv_pw.weight", f"{target}.project.kernel", CONV),
        *batch_norm(f"{first}.bn2", f"{target}.project_bn"),
        Rule(f"{other}.conv_pw.weight", f"{target}.expand.kernel", CONV),
        *batch_norm(f"{other}.bn1", f"{target}.expand_bn"),
        Rule(f"{other}.conv_dw.weight", f"{target}.depthwise.kernel", CONV),
        *batch_norm(f"{other}.bn2", f"{target}.depthwise_bn"),
        Rule(f"{other}.conv_pwl.weight", f"{target}.project.kernel", CONV),
        *batch_norm(f"{other}.bn3", f"{target}.project_bn"),
    )


SQUEEZE_EXCITE = (
    Rule(
        "blocks.{s}.{b}.se.conv_{n:reduce|expand}.weight",
        "blocks.{s}.{b}.squeeze.{n}.kernel",
        CONV,
    ),
    Rule("blocks.{s}.{b}.se.conv_{n:reduce|expand}.bias", "blocks.{s}.{b}.squeeze.{n}.bias"),
)
_ENDS = (
    Rule("conv_stem.weight", "conv_stem.kernel", CONV),
    *batch_norm("bn1", "bn1"),
    Rule("conv_head.weight", "conv_head.kernel", CONV),
    *batch_norm("bn2", "bn2"),
    Rule("classifier.weight", "classifier.kernel", LINEAR),
    Rule("classifier.bias", "classifier.bias"),
)


def _efficientnet_pytorch(config: MBConvConfig) -> RuleTable:
    """The names of the `efficientnet_pytorch` package, which counts blocks through all stages."""
    rules = [
        Rule("_conv_stem.weight", "conv_stem.kernel", CONV),
        *batch_norm("_bn0", "bn1"),
        Rule("_conv_head.weight", "conv_head.kernel", CONV),
        *batch_norm("_bn1", "bn2"),
        Rule("_fc.weight", "classifier.kernel", LINEAR),
        Rule("_fc.bias", "classifier.bias"),
    ]
    places = [(s, b) for s, depth in enumerate(config.depths) for b in range(depth)]
    for index, (s, b) in enumerate(places):
        torch, flax = f"_blocks.{index}", f"blocks.{s}.{b}"
        parts = ["depthwise", "project"] if s == 0 else ["expand", "depthwise", "project"]
        norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
        for part in parts:
            rules.append(Rule(f"{torch}._{part}_conv.weight", f"{flax}.{part}.kernel", CONV))
            rules.extend(batch_norm(f"{torch}.{norms[part]}", f"{flax}.{part}_bn"))
    return RuleTable(tuple(rules))


TABLES = {"timm": RuleTable((*_ENDS, *mbconv(6), *SQUEEZE_EXCITE))}
LITE_TABLES = {
    "timm": RuleTable((*_ENDS, *mbconv(6))),
    "efficientnet_pytorch": _efficientnet_pytorch(EFFICIENTNET_LITE0),
}
