"""VGG-16: names of timm and torchvision to `jaxear.backbones.vgg`."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxear.backbones.vgg import VGG16
from porting.rules import Rule, RuleTable
from porting.transforms import CONV, LINEAR, Transform

POINTWISE = Transform(
    "1x1 conv: [out, in, 1, 1] -> [in, out]",
    lambda x: np.ascontiguousarray(x[:, :, 0, 0].T),
    lambda x: np.ascontiguousarray(x.T)[:, :, None, None],
)


def _flattened(x: np.ndarray) -> np.ndarray:
    return CONV.forward(x.reshape(len(x), -1, VGG16.grid, VGG16.grid))


FLATTENED = Transform(
    "linear on flattened features: [out, in * h * w] -> HWIO",
    _flattened,
    lambda x: CONV.inverse(x).reshape(x.shape[-1], -1),
)


def _convolutions() -> tuple[Rule, ...]:
    """torch counts the layers of all stages: convolutions, ReLUs and poolings."""
    rules, index = [], 0
    for stage, depth in enumerate(VGG16.depths):
        for layer in range(depth):
            flax = f"stages.{stage}.{layer}"
            rules.append(Rule(f"features.{index}.weight", f"{flax}.kernel", CONV))
            rules.append(Rule(f"features.{index}.bias", f"{flax}.bias"))
            index += 2
        index += 1
    return tuple(rules)


def _table(fc1: str, fc2: str, fc3: str, transforms: tuple[Transform, Transform]) -> RuleTable:
    return RuleTable(
        (
            *_convolutions(),
            Rule(f"{fc1}.weight", "classifier.fc1.kernel", transforms[0]),
            Rule(f"{fc1}.bias", "classifier.fc1.bias"),
            Rule(f"{fc2}.weight", "classifier.fc2.kernel", transforms[1]),
            Rule(f"{fc2}.bias", "classifier.fc2.bias"),
            Rule(f"{fc3}.weight", "classifier.fc3.kernel", LINEAR),
            Rule(f"{fc3}.bias", "classifier.fc3.bias"),
        )
    )


TABLES = {
    "timm": _table("pre_logits.fc1", "pre_logits.fc2", "head.fc", (CONV, POINTWISE)),
    "torchvision": _table("classifier.0", "classifier.3", "classifier.6", (FLATTENED, LINEAR)),
}


def stages(model: Any, x: Any) -> dict[str, Any]:
    """The feature maps of timm's vgg16 by the names that `VGGEncoder` gives them, NCHW."""
    *maps, last = model.forward_intermediates(x, intermediates_only=True)
    named = {f"stage{i}": feature_map for i, feature_map in enumerate(maps, start=1)}
    return named | dict(zip(VGG16.relu_names, maps, strict=True)) | {"last": last}
