"""Settings of runs that take seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxear.config import TrainConfig

TINY_SAM = {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": [1]}


def tiny(photographs: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of three epochs on small pictures with a small encoder."""
    config = TrainConfig(
        data=str(photographs),
        image_size=32,
        val_fraction=0.2,
        weights="none",
        backbone_options=TINY_SAM,
        latent_dim=8,
        head_width=256,
        decoder_channels=(32, 16, 8),
        epochs=3,
        batch_size=8,
        out=str(out),
    )
    return dataclasses.replace(config, **changes)
