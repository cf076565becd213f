"""The command behind scripts/port_sam.py."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
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
from jaxear.errors import UserError
from porting.checkpoints import (
    Checkpoint,
    check_output,
    download,
    file_sha256,
    read_checkpoint,
    versions,
    write_weights,
)
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
    try:
        _run(arguments, Console())
    except UserError as error:
        print(f"port_sam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("port_sam: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="port_sam.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="port this file instead of downloading")
    add(
        "--model",
        choices=("vit_b", "vit_l", "vit_h"),
        default="vit_b",
        help="which one to download (default: vit_b)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write (default: <name>.safetensors in weights/ or $JAXEAR_WEIGHTS)",
    )
    add(
        "--verify-size",
        type=int,
        default=128,
        metavar="PIXELS",
        help="side of the images to verify with, a multiple of 16 (default: 128)",
    )
    add("--no-verify", action="store_true", help="write without running Meta's code")
    add("--force", action="store_true", help="replace the port of another checkpoint")
    add(
        "--allow-custom",
        action="store_true",
        help="also port encoders that are none of Meta's three, e.g. with fewer blocks",
    )
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    size = arguments.verify_size
    if size < PATCH_SIZE or size % PATCH_SIZE:
        raise UserError(f"--verify-size must be a multiple of {PATCH_SIZE}, not {size}.")
    path = arguments.checkpoint or _fetched(f"sam_{arguments.model}", console)
    checkpoint = read_checkpoint(path)
    ported = port(checkpoint.state, source=str(path))
    _check_architecture(ported, path, allowed=arguments.allow_custom)
    sha256 = file_sha256(path)
    out = arguments.out or weights_path(ported.backbone)
    check_output(out, sha256, force=arguments.force)
    console.print(
        f"{path}: {ported.backbone} for {ported.image_size[0]}x{ported.image_size[1]} pixels, "
        f"named as in {ported.naming}.",
        highlight=False,
    )
    if checkpoint.converted:
        console.print(f"Stored as {', '.join(checkpoint.converted)}; written as float32.")
    report = None
    if arguments.no_verify:
        console.print("Not verified (--no-verify).")
    else:
        report = verify(ported, checkpoint.state, (size, size))
        console.print(report.table(f"{ported.backbone} against Meta's code, {size}x{size} pixels"))
        report.check()
    write_weights(out, ported.leaves, metadata(ported, checkpoint, sha256, report, size))
    seconds = time.perf_counter() - start
    console.print(f"Wrote {out} ({out.stat().st_size / 1e6:.0f} MB) in {seconds:.0f} s.")


def _fetched(backbone: str, console: Console) -> Path:
    """Meta's checkpoint, downloaded unless it is there already."""
    url = get_spec(backbone).source
    published = PUBLISHED[backbone]
    path = weights_path(backbone).with_name(url.rsplit("/", 1)[-1])
    if not path.exists():
        console.print(f"Downloading {url} to {path}.", highlight=False)
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


def metadata(
    ported: SamPort,
    checkpoint: Checkpoint,
    sha256: str,
    report: ParityReport | None,
    verify_size: int,
) -> dict[str, object]:
    """The facts that go into the file, beside the weights."""
    spec = get_spec(ported.backbone)
    published = any(sha256 == known.sha256 for known in PUBLISHED.values())
    parity = report and {
        "image_size": [verify_size, verify_size],
        "measure": "max |difference| / max |reference|, float32",
        "tolerance": report.tolerance,
        "errors": report.errors,
    }
    return {
        "backbone": ported.backbone,
        "architecture": dataclasses.asdict(ported.config),
        "image_size": ported.image_size,
        "source_file": checkpoint.path.name,
        "source_sha256": sha256,
        "source_url": spec.source if published else None,
        "source_naming": ported.naming,
        "source_dtypes": checkpoint.converted or ["float32"],
        "licence": spec.licence if published else f"that of the checkpoint (SAM: {spec.licence})",
        "versions": versions(),
        "parity": parity,
    }
