"""The way back: a trained encoder as the state dict of Meta's or timm's model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxear.backbones.base import Backbone
from jaxear.backbones.registry import full_name
from jaxear.backbones.sam import EPSILON, PATCH_SIZE, SamEncoder
from jaxear.backbones.weights import CLASSIFIER, named_leaves
from jaxear.command import run_command
from jaxear.errors import UserError
from jaxear.model import load_model
from jaxear.vae import EarVAE
from porting.atomic import replacing
from porting.rules import RuleTable, flax_to_torch
from porting.sam import ENCODER_TABLE
from porting.timm_models import PORTS

SUFFIXES = (".pth", ".safetensors")

# Parts of timm's models that `num_classes=0` leaves in place, though features come before them.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "mobilenetv3_large_100": ("conv_head",),
    "convnext_tiny": ("head",),
    "convnextv2_tiny": ("head",),
    "vgg16": ("pre_logits", "head"),
}


def export_encoder(backbone: Backbone, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of the torch model that a backbone's encoder was ported from.

    Args:
        backbone: one encoder, with or without its classifier.
        prefix: put before every name, e.g. "image_encoder." for the encoder of Meta's `Sam`.

    Returns:
        torch key -> array in the order of the parameters; `load_call` tells what loads it.

    Raises:
        UserError: the backbone has no single torch model, as a hybrid has not.
        PortingError: a leaf of the encoder is not in the family's rule table.
    """
    leaves = named_leaves(cast(nnx.Module, backbone.encoder))
    state = flax_to_torch(
        _table(backbone), {name: np.asarray(leaf[...]) for name, leaf in leaves.items()}
    )
    return {prefix + key: value for key, value in state.items()}


def _table(backbone: Backbone) -> RuleTable:
    if isinstance(backbone.encoder, SamEncoder):
        return ENCODER_TABLE
    if port := PORTS.get(backbone.name):
        return next(iter(port.tables.values()))
    raise UserError(
        f"A {backbone.name} backbone has no single torch model; those that can be exported are "
        f"SAM's encoders and {', '.join(PORTS)}."
    )


def load_call(backbone: Backbone, path: str | os.PathLike[str], *, prefix: str = "") -> str:
    """Python code that loads what `export_encoder` made from `backbone` into `model`, strictly.

    Args:
        backbone: the one exported.
        path: where the file is.
        prefix: the one given to `export_encoder`.

    Raises:
        UserError: a SAM encoder for images that are not square, which Meta's class cannot be.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        read = ["from safetensors.torch import load_file", f"state = load_file({str(path)!r})"]
    else:
        read = [f"state = torch.load({str(path)!r}, weights_only=True)"]
    if prefix:
        cut = f"state = {{key.removeprefix({prefix!r}): value for key, value in state.items()}}"
        read.append(cut)
    model = _meta_model if isinstance(backbone.encoder, SamEncoder) else _timm_model
    lines = ["import torch", *model(backbone), *read, "model.load_state_dict(state, strict=True)"]
    return "\n".join(lines)


def _timm_model(backbone: Backbone) -> list[str]:
    name = PORTS[backbone.name].timm_name
    leaves = named_leaves(cast(nnx.Module, backbone.encoder))
    if any(leaf.startswith(CLASSIFIER) for leaf in leaves):
        return ["import timm", f"model = timm.create_model({name!r})"]
    removed = [f"model.{part} = torch.nn.Identity()" for part in _HEADS.get(backbone.name, ())]
    return ["import timm", f"model = timm.create_model({name!r}, num_classes=0)", *removed]


def _meta_model(backbone: Backbone) -> list[str]:
    encoder = cast(SamEncoder, backbone.encoder)
    height, width = encoder.image_size
    if height != width:
        raise UserError(
            f"Meta's ImageEncoderViT takes square images only, and this encoder is for "
            f"{height}x{width}; train with square ones to export it."
        )
    config = encoder.config
    arguments = {
        "img_size": height,
        "patch_size": PATCH_SIZE,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_dim / config.embed_dim,
        "out_chans": config.out_channels,
        "norm_layer": f"partial(torch.nn.LayerNorm, eps={EPSILON})",
        "use_rel_pos": True,
        "window_size": config.window_size,
        "global_attn_indexes": config.global_attn_indexes,
    }
    return [
        "from functools import partial",
        "from segment_anything.modeling import ImageEncoderViT",
        "model = ImageEncoderViT(",
        *[f"    {name}={value}," for name, value in arguments.items()],
        ")",
    ]


def save_state(path: str | os.PathLike[str], state: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as plain tensors, the whole file or nothing.

    Args:
        path: ends in .pth (`torch.load(path, weights_only=True)` reads it) or .safetensors.
        state: torch key -> array.

    Raises:
        UserError: another ending, torch is not installed, or the file cannot be written.
    """
    path = check_suffix(path)
    if path.suffix == ".safetensors":
        arrays = {key: np.ascontiguousarray(value) for key, value in state.items()}
        with replacing(path) as temporary:
            save_file(arrays, temporary, {"format": "pt"})
        return
    try:
        import torch
    except ImportError:
        raise UserError(
            "Writing a .pth needs torch; pip install 'jaxear[port]', or choose a .safetensors."
        ) from None
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def check_suffix(path: str | os.PathLike[str]) -> Path:
    """The path, if its ending is one that `save_state` writes.

    Raises:
        UserError: it is not.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}.")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="export_torch.py",
        description="Write the encoder of a trained model as a state dict that Meta's or timm's "
        "model loads strictly, and say how.",
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="the run, e.g. runs/resnet50")
    add("--out", type=Path, required=True, metavar="FILE", help="a .pth or .safetensors file")
    add(
        "--checkpoint",
        default="best",
        help="'best' (the default), 'latest' or the number of a step",
    )
    add("--part", metavar="NAME", help="which backbone of a hybrid, e.g. sam")
    add("--prefix", default="", help="put before every name, e.g. image_encoder. for Meta's Sam")
    return parser


def _part(model: EarVAE, part: str | None) -> Backbone:
    """The model's backbone, or the one of a hybrid that is called `part`."""
    backbones = {backbone.name: backbone for backbone in model.backbones.values()}
    if part is None and len(backbones) == 1:
        return next(iter(backbones.values()))
    if part is None or full_name(part) not in backbones:
        raise UserError(f"Say which backbone by --part: {', '.join(backbones)}.")
    return backbones[full_name(part)]


def _run(arguments: argparse.Namespace) -> None:
    out = check_suffix(arguments.out)
    checkpoint = arguments.checkpoint
    model = load_model(
        arguments.run, checkpoint=int(checkpoint) if checkpoint.isdigit() else checkpoint
    )
    backbone = _part(model, arguments.part)
    how = load_call(backbone, out, prefix=arguments.prefix)
    state = export_encoder(backbone, prefix=arguments.prefix)
    save_state(out, state)
    print(
        f"Wrote {out}: {backbone.name} of {arguments.run}, step {model.checkpoint}, "
        f"{len(state)} tensors, {out.stat().st_size / 1e6:.0f} MB. It loads with\n\n{how}\n"
    )
