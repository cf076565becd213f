"""What the two porting commands share: their arguments, and the way from a checkpoint to a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from jaxear.backbones.weights import weights_path
from porting.checkpoints import Checkpoint, check_output, versions, write_weights
from porting.verify import ParityReport


class Port(Protocol):
    """A ported checkpoint."""

    @property
    def backbone(self) -> str:
        """jaxear's name of the architecture."""
        ...

    @property
    def naming(self) -> str:
        """Whose names the checkpoint has."""
        ...

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """Dotted Flax path -> array."""
        ...


def create_parser(
    prog: str, description: str, examples: str, *, original: str, multiple: int = 1
) -> argparse.ArgumentParser:
    """A parser with the arguments that both commands have.

    Args:
        prog: the script's name.
        description: what it does.
        examples: how it is called.
        original: what a port is verified against.
        multiple: what `--verify-size` must be a multiple of.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="port this file instead of downloading")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write (default: <name>.safetensors in weights/ or $JAXEAR_WEIGHTS)",
    )
    of = f", a multiple of {multiple}" if multiple > 1 else ""
    add(
        "--verify-size",
        type=int,
        default=128,
        metavar="PIXELS",
        help=f"side of the images to verify with{of} (default: 128)",
    )
    add("--no-verify", action="store_true", help=f"write without running {original}")
    add("--force", action="store_true", help="replace the port of another checkpoint")
    return parser


def write_port(
    ported: Port,
    checkpoint: Checkpoint,
    arguments: argparse.Namespace,
    *,
    what: str,
    original: str,
    verify: Callable[[tuple[int, int]], ParityReport],
    facts: Mapping[str, Any],
) -> None:
    """Verify a port, unless told not to, and write it with what is known of it.

    Args:
        ported: the port.
        checkpoint: what it was made from.
        arguments: of `create_parser`.
        what: the architecture in words, for the user.
        original: what it is verified against.
        verify: (height, width) of the images -> the comparison.
        facts: metadata of the file, beside those that every port has.

    Raises:
        UserError: there is the port of another checkpoint already, or the file cannot be written.
        ParityError: the port does not compute what the original does; nothing is written.
    """
    start = time.perf_counter()
    console = Console()
    out = arguments.out or weights_path(ported.backbone)
    check_output(out, checkpoint.sha256, force=arguments.force)
    console.print(
        f"{checkpoint.path}: {what}, named as in {ported.naming}.", highlight=False, soft_wrap=True
    )
    if checkpoint.converted:
        console.print(f"Stored as {', '.join(checkpoint.converted)}; written as float32.")
    for note in facts.get("notes", ()):
        console.print(note)
    parity, side = None, arguments.verify_size
    if arguments.no_verify:
        console.print("Not verified (--no-verify).")
    else:
        report = verify((side, side))
        console.print(report.table(f"{ported.backbone} against {original}, {side}x{side} pixels"))
        report.check()
        parity = {
            "image_size": [side, side],
            "measure": "max |difference| / max |reference|, float32",
            "tolerance": report.tolerance,
            "errors": report.errors,
        }
    common = {
        "backbone": ported.backbone,
        "source_file": checkpoint.path.name,
        "source_sha256": checkpoint.sha256,
        "source_naming": ported.naming,
        "source_dtypes": checkpoint.converted or ["float32"],
        "versions": versions(),
        "parity": parity,
    }
    write_weights(out, ported.leaves, {**common, **facts})
    seconds = time.perf_counter() - start
    console.print(f"Wrote {out} ({out.stat().st_size / 1e6:.0f} MB) in {seconds:.0f} s.")
