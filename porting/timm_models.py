"""The encoders that come from timm: which model it is there, its rule tables, its weights.

A family's module holds its tables (`TABLES`: naming scheme -> table, timm's own first); here each
backbone gets its `PortSpec`. The script, the tests and the way back all start from `PORTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from porting import convnext, efficientnet, mobilenetv3, resnet, vgg
from porting.rules import RuleTable


def stages(model: Any, x: Any, *, skip: int = 0) -> dict[str, Any]:
    """The feature maps of a timm model, NCHW: "stage1" .. "stageN" and "last" (`forward_features`).

    Args:
        model: a timm model with its classifier, not `features_only`.
        x: normalised images [b, 3, h, w].
        skip: how many of timm's feature maps come before "stage1" (ResNet's stem is one).
    """
    maps = model.forward_intermediates(x, intermediates_only=True)[skip:]
    named = {f"stage{i}": feature_map for i, feature_map in enumerate(maps, start=1)}
    return named | {"last": model.forward_features(x)}


@dataclass(frozen=True)
class PortSpec:
    """How a backbone comes from timm.

    Attributes:
        timm_name: the architecture's name in timm.
        tables: naming scheme ("timm", "torchvision", ..) -> rules; a checkpoint's keys tell which
            one it needs, the first is timm's and serves the way back.
        tags: timm's tags of the pretrained weights that fit (architecture, normalisation) ->
            licence. The first is what is downloaded where none is asked for.
        stages: timm model, normalised images [b, 3, h, w] -> feature maps by the names that the
            Flax encoder gives them, NCHW (see `stages`).
        classifier: whether the Flax encoder has `logits`, equal to the timm model's output.
        refused: a key that gives away a scheme without a table -> why there is none.
    """

    timm_name: str
    tables: Mapping[str, RuleTable]
    tags: Mapping[str, str]
    stages: Callable[[Any, Any], dict[str, Any]] = stages
    classifier: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)


PORTS: Mapping[str, PortSpec] = {
    "resnet50": PortSpec(
        "resnet50",
        resnet.TABLES,
        {"a1_in1k": "apache-2.0", "tv_in1k": "bsd-3-clause", "tv2_in1k": "bsd-3-clause"},
        stages=partial(stages, skip=1),
    ),
    "efficientnet_b3": PortSpec("efficientnet_b3", efficientnet.TABLES, {"ra2_in1k": "apache-2.0"}),
    "tf_efficientnet_b3": PortSpec(
        "tf_efficientnet_b3",
        efficientnet.TABLES,
        {"ns_jft_in1k": "apache-2.0", "aa_in1k": "apache-2.0", "in1k": "apache-2.0"},
    ),
    "efficientnet_lite0": PortSpec(
        "tf_efficientnet_lite0", efficientnet.LITE_TABLES, {"in1k": "apache-2.0"}
    ),
    "mobilenetv3_large_100": PortSpec(
        "mobilenetv3_large_100",
        mobilenetv3.TABLES,
        {"ra_in1k": "apache-2.0"},
        refused=mobilenetv3.REFUSED,
    ),
    "convnext_tiny": PortSpec(
        "convnext_tiny",
        convnext.TABLES,
        {
            "fb_in22k_ft_in1k": "apache-2.0",
            "in12k_ft_in1k": "apache-2.0",
            "fb_in1k": "apache-2.0",
        },
    ),
    "convnextv2_tiny": PortSpec(
        "convnextv2_tiny",
        convnext.V2_TABLES,
        {
            "fcmae_ft_in22k_in1k": "cc-by-nc-4.0",
            "fcmae_ft_in1k": "cc-by-nc-4.0",
            "fcmae": "cc-by-nc-4.0",  # before fine-tuning: no classifier
        },
    ),
    "vgg16": PortSpec("vgg16", vgg.TABLES, {"tv_in1k": "bsd-3-clause"}, stages=vgg.stages),
}
