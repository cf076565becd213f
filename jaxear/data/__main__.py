"""The command `jaxear data prepare`: photographs -> a store that is read without decoding."""

from __future__ import annotations

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # as `jaxear data` does

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxear.command import run_command
from jaxear.data.dataset import from_store
from jaxear.data.progress import reading_bar
from jaxear.data.sources import data_root, load_records
from jaxear.data.store import PIXELS, Settings, prepare_store
from jaxear.errors import UserError
from jaxear.options import Parser

USAGE = "jaxear data prepare DATA --out CACHE [options]"


def data_parser() -> Parser:
    """The options of the command."""
    parser = Parser(
        prog="jaxear data",
        usage=USAGE,
        description=(
            "Decode, crop and resize photographs once, in parallel, into a folder that training "
            "maps into memory and that needs the photographs no more. Training does this by itself "
            "under --cache-dir; do it beforehand to see how the data fares, to keep the result in "
            "a place of your own, or to take it to another machine. Started again, the command "
            "goes on where it stopped, and prepares only photographs that are new or changed. "
            "Example: jaxear data prepare photographs/ --out prepared/ && "
            "jaxear train --data prepared/ --backbone sam"
        ),
    )
    parser.add_argument("action", choices=["prepare"], help="what to do.")
    parser.add_argument(
        "data",
        help="a folder of ear photographs (AMI, IIT Delhi, AWE and EarVN1.0 are recognised), a "
        "CSV, a COCO JSON file or an .npy list of boxes.",
    )
    parser.add_argument("--out", required=True, help="the folder to keep the result in.")
    parser.add_argument("--layout", default="auto", help="how to read DATA; auto recognises it.")
    parser.add_argument(
        "--image_size", type=int, default=128, help="side of the square images, in pixels."
    )
    parser.add_argument(
        "--fit",
        type=Literal["pad", "stretch", "crop"],
        default="pad",
        help="how a photograph that is not square becomes so.",
    )
    parser.add_argument(
        "--box_margin",
        type=float,
        default=0.0,
        help="how much context to keep around an ear's box, as a fraction of its size.",
    )
    parser.add_argument(
        "--mirror_left",
        type=bool,
        default=True,
        help="turn ears known to be left into right ones.",
    )
    parser.add_argument(
        "--normalize_colour",
        type=bool,
        default=False,
        help="give every picture the same mean and spread of each colour.",
    )
    parser.add_argument(
        "--max_bad", type=float, default=0.05, help="share of unreadable files to put up with."
    )
    parser.add_argument(
        "--workers", type=int, help="threads that decode; one per core where it is not given."
    )
    return parser


def prepare(argv: Sequence[str] | None) -> None:
    """Run the command.

    Raises:
        UserError: the options, the data or the folder cannot be used.
    """
    options = data_parser().parse(argv)
    least = {"image_size": 1, "workers": 1, "box_margin": 0, "max_bad": 0}
    for name, low in least.items():
        value = options[name]
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    records = load_records(options.data, options.layout)
    settings = Settings(
        image_size=options.image_size,
        fit=options.fit,
        box_margin=options.box_margin,
        mirror_left=options.mirror_left,
        normalize_colour=options.normalize_colour,
    )
    start = time.perf_counter()
    with reading_bar(True) as report:
        store = prepare_store(
            options.out,
            records,
            data_root(options.data),
            settings,
            workers=options.workers,
            report=report,
        )
    seconds = time.perf_counter() - start
    ears = from_store(store, store.records, max_bad=options.max_bad)
    megabytes = Path(options.out, PIXELS).stat().st_size / 1e6
    print(
        f"{len(ears)} images of {len({r.subject for r in ears.records})} subjects are in "
        f"{options.out} ({megabytes:.0f} MB, {seconds:.1f} s); {len(ears.rejected)} left out.\n"
        f"Now: jaxear train --data {options.out} --image-size {options.image_size} "
        f"--fit {options.fit} --box-margin {options.box_margin:g} "
        f"--mirror-left {str(options.mirror_left).lower()} "
        f"--normalize-colour {str(options.normalize_colour).lower()}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(lambda: prepare(argv))


if __name__ == "__main__":
    sys.exit(main())
