"""Checkpoints of Segment Anything with random numbers, as small as one likes."""

from __future__ import annotations

from jaxear.backbones.sam import SamConfig
from tests.sam_parity import meta_state
from tests.torch_reference import torch

TINY = SamConfig(32, 2, 2, (1,), 128, out_channels=16)
NATIVE = (256, 256)


def meta_tensors(config: SamConfig, native: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The checkpoint of a SAM with a random encoder, by Meta's names."""
    state = meta_state(config, native)
    tensors = {f"image_encoder.{name}": torch.from_numpy(x) for name, x in state.items()}
    return tensors | {"prompt_encoder.no_mask_embed.weight": torch.ones(1, 256)}
