"""Eigenears from variational autoencoders on pretrained encoders, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxear.version import __version__

if TYPE_CHECKING:
    from jaxear.backbones import Backbone, create_backbone, list_backbones
    from jaxear.eigenears import EigenEars
    from jaxear.model import load_model
    from jaxear.pixels import PixelModel
    from jaxear.vae import EarVAE

__all__ = [
    "Backbone",
    "EarVAE",
    "EigenEars",
    "PixelModel",
    "__version__",
    "create_backbone",
    "list_backbones",
    "load_model",
]

# Imported when first asked for: `jaxear --help` need not wait for JAX, and `python -m jaxear.X`
# must not find X imported already.
_HOMES = {
    "Backbone": "jaxear.backbones",
    "EarVAE": "jaxear.vae",
    "EigenEars": "jaxear.eigenears",
    "PixelModel": "jaxear.pixels",
    "create_backbone": "jaxear.backbones",
    "list_backbones": "jaxear.backbones",
    "load_model": "jaxear.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxear' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
