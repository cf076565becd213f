"""The facts of a run that do not change while it goes."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import jax

from jaxear.backbones.registry import full_name
from jaxear.config import TrainConfig
from jaxear.training.state import TrainState

PACKAGES = ("jaxear", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def run_facts(config: TrainConfig, state: TrainState) -> dict[str, Any]:
    """The part of `summary.json` that is known before the first step."""
    trainable = sum(leaf.size for leaf in state.trainable.values())
    frozen = sum(leaf.size for leaf in state.frozen.values())
    return {
        "backbone": full_name(config.backbone),
        "weights": config.weights,
        "latent_dim": config.latent_dim,
        "image_size": config.image_size,
        "params_total": trainable + frozen,
        "params_trainable": trainable,
        "seed": config.seed,
        "device": jax.devices()[0].device_kind,
        "n_devices": jax.device_count(),
        "parallel": config.parallel,
        "versions": versions(),
    }
