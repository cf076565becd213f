"""Meta's own image encoder in torch, to verify ports with."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxear.backbones.sam import EPSILON, PATCH_SIZE, SamConfig
from jaxear.errors import UserError


def meta_encoder_module() -> Any:
    """`segment_anything.modeling.image_encoder`, without the package around it.

    The package imports torchvision, which need not be there nor work with the installed torch; the
    encoder needs torch alone.

    Raises:
        UserError: segment-anything is not installed.
    """
    name = "_segment_anything_modeling"
    if name not in sys.modules:
        found = importlib.util.find_spec("segment_anything")
        if found is None or not found.submodule_search_locations:
            raise UserError(
                "Verification runs Meta's code, and segment-anything is not installed; "
                "pip install 'jaxear[port]', or pass --no-verify."
            )
        package = types.ModuleType(name)
        package.__path__ = [f"{found.submodule_search_locations[0]}/modeling"]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.image_encoder")


def torch_encoder(
    config: SamConfig,
    state: Mapping[str, np.ndarray],
    *,
    native_size: tuple[int, int],
    image_size: tuple[int, int],
) -> Any:
    """Meta's `ImageEncoderViT` with a state dict, loaded strictly, made to take images of a size.

    Only its position embedding is changed for that, by torch's own bicubic antialiased
    interpolation; the relative positions are interpolated by Meta's code when it runs.

    Args:
        config: the architecture.
        state: the state dict of the encoder alone (no prefix).
        native_size: (height, width) that its position tables are for.
        image_size: (height, width) of the images to come.
    """
    import torch

    grid = tuple(side // PATCH_SIZE for side in native_size)
    with torch.device("meta"):
        model = meta_encoder_module().ImageEncoderViT(
            img_size=native_size[0],
            patch_size=PATCH_SIZE,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.embed_dim,
            out_chans=config.out_channels,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=EPSILON),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        )
        # Meta's constructor knows only squares; its forward pass does not mind.
        model.pos_embed = torch.nn.Parameter(torch.empty(1, *grid, config.embed_dim))
        for i in config.global_attn_indexes:
            attention = model.blocks[i].attn
            width = attention.rel_pos_w.shape[1]
            attention.rel_pos_w = torch.nn.Parameter(torch.empty(2 * grid[1] - 1, width))
    tensors = {
        k: torch.from_numpy(np.require(v, requirements=["C", "W"])) for k, v in state.items()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    if native_size != image_size:
        target = tuple(side // PATCH_SIZE for side in image_size)
        resized = torch.nn.functional.interpolate(
            model.pos_embed.detach().permute(0, 3, 1, 2),
            size=target,
            mode="bicubic",
            antialias=True,
        )
        model.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1))
    return model.eval()


def torch_activations(model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """What `SamEncoder.intermediates` returns, by Meta's code.

    Args:
        model: from `torch_encoder`.
        images: normalised, [b, h, w, 3].

    Returns:
        "embed", "blocks.0", .., "neck", each [b, h / 16, w / 16, channels].
    """
    import torch

    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value.numpy()

    hooks = [
        model.blocks[0].register_forward_pre_hook(lambda _, inputs: keep("embed", inputs[0])),
        *(
            block.register_forward_hook(lambda _, __, out, name=f"blocks.{i}": keep(name, out))
            for i, block in enumerate(model.blocks)
        ),
    ]
    try:
        with torch.no_grad():
            out = model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    finally:
        for hook in hooks:
            hook.remove()
    return found | {"neck": out.permute(0, 2, 3, 1).numpy()}
