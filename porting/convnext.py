"""ConvNeXt: names of timm and of Meta's own code to `jaxear.backbones.convnext`."""

from __future__ import annotations

import numpy as np

from porting.rules import Rule, RuleTable
from porting.transforms import CONV, LINEAR, Transform

SPREAD = Transform(
    "spread: [1, 1, 1, c] -> [c]",
    lambda x: np.reshape(x, x.shape[-1:]),
    lambda x: np.reshape(x, (1, 1, 1, -1)),
)


def _norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{flax}.scale"), Rule(f"{torch}.bias", f"{flax}.bias")


def _layer(torch: str, flax: str, transform: Transform) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{flax}.kernel", transform), Rule(
        f"{torch}.bias", f"{flax}.bias"
    )


def _timm(*, v2: bool) -> RuleTable:
    torch = flax = "stages.{s}.blocks.{b}"
    if v2:
        special = _norm(f"{torch}.mlp.grn", f"{flax}.response_norm")
    else:
        special = (Rule(f"{torch}.gamma", f"{flax}.gamma"),)
    return RuleTable(
        (
            *_layer("stem.0", "stem_conv", CONV),
            *_norm("stem.1", "stem_norm"),
            *_norm("stages.{s}.downsample.0", "stages.{s}.downsample_norm"),
            *_layer("stages.{s}.downsample.1", "stages.{s}.downsample_conv", CONV),
            *_layer(f"{torch}.conv_dw", f"{flax}.depthwise", CONV),
            *_norm(f"{torch}.norm", f"{flax}.norm"),
            *_layer(f"{torch}.mlp.fc1", f"{flax}.expand", LINEAR),
            *_layer(f"{torch}.mlp.fc2", f"{flax}.project", LINEAR),
            *special,
            *_norm("head.norm", "classifier.norm"),
            *_layer("head.fc", "classifier.linear", LINEAR),
        )
    )


def _meta(*, v2: bool) -> RuleTable:
    torch, flax = "stages.{s}.{b}", "stages.{s}.blocks.{b}"
    later = "{s:[1-9]}"  # Meta counts the stem as the first of the layers that make images smaller
    if v2:
        special = (
            Rule(f"{torch}.grn.gamma", f"{flax}.response_norm.scale", SPREAD),
            Rule(f"{torch}.grn.beta", f"{flax}.response_norm.bias", SPREAD),
        )
    else:
        special = (Rule(f"{torch}.gamma", f"{flax}.gamma"),)
    return RuleTable(
        (
            *_layer("downsample_layers.0.0", "stem_conv", CONV),
            *_norm("downsample_layers.0.1", "stem_norm"),
            *_norm(f"downsample_layers.{later}.0", "stages.{s}.downsample_norm"),
            *_layer(f"downsample_layers.{later}.1", "stages.{s}.downsample_conv", CONV),
            *_layer(f"{torch}.dwconv", f"{flax}.depthwise", CONV),
            *_norm(f"{torch}.norm", f"{flax}.norm"),
            *_layer(f"{torch}.pwconv1", f"{flax}.expand", LINEAR),
            *_layer(f"{torch}.pwconv2", f"{flax}.project", LINEAR),
            *special,
            *_norm("norm", "classifier.norm"),
            *_layer("head", "classifier.linear", LINEAR),
        )
    )


TABLES = {"timm": _timm(v2=False), "Meta's ConvNeXt": _meta(v2=False)}
V2_TABLES = {"timm": _timm(v2=True), "Meta's ConvNeXt V2": _meta(v2=True)}
