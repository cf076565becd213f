"""The command behind scripts/port_sam.py."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from jaxear.backbones.base import IMAGENET_MEAN, IMAGENET_STD
from jaxear.backbones.registry import get_spec
from jaxear.backbones.sam import PATCH_SIZE, SamEncoder, adapt
from jaxear.backbones.weights import fill, weights_path
from jaxear.command import run_command
from jaxear.errors import UserError
from porting.checkpoints import download, file_sha256, read_checkpoint
from porting.command import create_parser, write_port
from porting.sam import HUGGING_FACE, META_TABLE, SamPort, port
from porting.sam_torch import torch_activations, torch_encoder
from porting.verify import ParityReport, compare

DESCRIPTION = """\
Port the image encoder of Segment Anything to Flax, verify it against Meta's own code, and write it
to weights/<name>.safetensors, where jaxear looks for it.

Without arguments Meta's ViT-B is downloaded (375 MB; a download that broke off is resumed)."""
EXAMPLES = """\
examples:
  python scripts/port_sam.py                                   download and port ViT-B
  python scripts/port_sam.py --model vit_l                     the same for ViT-L (1.2 GB)
  python scripts/port_sam.py --checkpoint sam_vit_b_01ec64.pth port a file that is here already
  python scripts/port_sam.py --checkpoint medsam_vit_b.pth --out weights/medsam.safetensors
                                                               a fine-tuned one, beside SAM's own

A checkpoint may be Meta's .pth or one with the same names (MedSAM), the state dict of an
ImageEncoderViT alone, or the .safetensors or .bin of a Hugging Face SamModel; ViT-B, L or H is
found from the shapes. Nothing in it is executed. The output is complete or not there at all; it
replaces the port of the same checkpoint, but that of another one only with --force."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that Meta published: its size in bytes and SHA-256."""

    size: int
    sha256: str


PUBLISHED: Mapping[str, Published] = {
    "sam_vit_b": Published(
        375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "sam_vit_l": Published(
        1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "sam_vit_h": Published(
        2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = create_parser(
        "port_sam.py", DESCRIPTION, EXAMPLES, original="Meta's code", multiple=PATCH_SIZE
    )
    parser.add_argument(
        "--model",
        choices=("vit_b", "vit_l", "vit_h"),
        default="vit_b",
        help="which one to download (default: vit_b)",
    )
    parser.add_argument(
        "--allow-custom",
        action="store_true",
        help="also port encoders that are none of Meta's three, e.g. with fewer blocks",
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    size = arguments.verify_size
    if size < PATCH_SIZE or size % PATCH_SIZE:
        raise UserError(f"--verify-size must be a multiple of {PATCH_SIZE}, not {size}.")
    path = arguments.checkpoint or _fetched(f"sam_{arguments.model}")
    checkpoint = read_checkpoint(path)
    ported = port(checkpoint.state, source=str(path))
    _check_architecture(ported, path, allowed=arguments.allow_custom)
    spec = get_spec(ported.backbone)
    published = any(checkpoint.sha256 == known.sha256 for known in PUBLISHED.values())
    height, width = ported.image_size
    write_port(
        ported,
        checkpoint,
        arguments,
        what=f"{ported.backbone} for {height}x{width} pixels",
        original="Meta's code",
        verify=lambda size: verify(ported, checkpoint.state, size),
        facts={
            "architecture": dataclasses.asdict(ported.config),
            "image_size": ported.image_size,
            "source_url": spec.source if published else None,
            "licence": spec.licence
            if published
            else f"that of the checkpoint (SAM: {spec.licence})",
        },
    )


def _fetched(backbone: str) -> Path:
    """Meta's checkpoint, downloaded unless it is there already."""
    url = get_spec(backbone).source
    published = PUBLISHED[backbone]
    path = weights_path(backbone).with_name(url.rsplit("/", 1)[-1])
    if not path.exists():
        Console().print(f"Downloading {url} to {path}.", highlight=False)
        download(url, path, sha256=published.sha256, size=published.size)
    elif file_sha256(path) != published.sha256:
        raise UserError(
            f"{path} is there, but it is not Meta's file (its SHA-256 differs). Delete it to have "
            "it downloaded again, or pass it with --checkpoint if it is what you want."
        )
    return path


def _check_architecture(ported: SamPort, path: Path, *, allowed: bool) -> None:
    if ported.is_preset or allowed:
        return
    config = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(ported.config).items())
    raise UserError(
        f"{path} holds a SAM encoder that is none of ViT-B, L and H ({config}). If that is what it "
        "is meant to be, and nothing was lost, pass --allow-custom."
    )


def verify(
    ported: SamPort, state: Mapping[str, np.ndarray], image_size: tuple[int, int]
) -> ParityReport:
    """Run Meta's code and the port on random images of a size, and compare after every block.

    Meta's model is loaded from the checkpoint's own tensors where they have Meta's names, so that a
    wrong rule shows; those of other schemes are renamed by the rules.
    """
    if ported.naming == HUGGING_FACE:
        original = ported.to_torch()
    else:
        names = [name for name in state if not META_TABLE.is_exempt(name)]
        original = {name.removeprefix("image_encoder."): state[name] for name in names}
    images = np.random.default_rng(0).uniform(size=(2, *image_size, 3))
    x = ((images - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    model = torch_encoder(
        ported.config, original, native_size=ported.image_size, image_size=image_size
    )
    reference = torch_activations(model, x)

    encoder = nnx.eval_shape(lambda: SamEncoder(ported.config, image_size, rngs=nnx.Rngs(0)))
    fill(encoder, adapt(ported.leaves, encoder), source="the port")
    graph, weights = nnx.split(encoder)

    def forward(weights: nnx.State, x: jax.Array) -> dict[str, jax.Array]:
        return nnx.merge(graph, weights).intermediates(x)

    with jax.default_matmul_precision("highest"):  # accelerators round float32 more coarsely
        return compare(reference, reference, jax.jit(forward)(weights, x))
