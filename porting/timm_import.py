"""Importing timm whatever torchvision does.

The CPU build of torch may stand beside a torchvision built for CUDA, whose import then fails
because its operators (nms, and qnms in newer ones) were never registered, and timm's with it.
Declaring them lets the import through; nothing here ever calls them.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxear.errors import UserError

_declarations: list[Any] = []  # they hold for as long as these objects live


def import_timm() -> Any:
    """timm, with torchvision's missing operators declared where, and only where, its import fails.

    Raises:
        UserError: timm or torch is not installed, or cannot be imported for another reason.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
            library = importlib.import_module("torch").library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            _declarations.append(library)
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise UserError(f"timm cannot be imported ({error}); pip install 'jaxear[port]'.") from None
