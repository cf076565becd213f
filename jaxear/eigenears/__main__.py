"""Eigenears as a command: `jaxear eigenears --run runs/NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from rich.console import Console

from jaxear.command import run_command
from jaxear.eigenears.report import print_report
from jaxear.eigenears.writing import default_folder, write_eigenears, write_pixel_eigenears
from jaxear.errors import UserError
from jaxear.options import Parser
from jaxear.training.logging import read_json


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="jaxear eigenears",
        description="Fit eigenears, the principal directions in which ears vary, draw them and "
        "test them. With --run, they are those of a trained model's latent means; with --run and "
        "--pixels, or with --data alone, those of the pixels themselves: classic eigenears, which "
        "a model has to surpass. Written are the components (eigenears.safetensors), their "
        "numbers (eigenears.json), every ear's scores (scores.csv), figures as PNG and PDF "
        "(traversals, atlas, scree, scores, neighbours, meaning), and an animation of each "
        "component (components/pc01.gif, ...).",
    )
    parser.add_argument("--run", type=str, default=None, help="the run's directory.")
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="photographs, other than the run's own or without a run; needs --out.",
    )
    parser.add_argument(
        "--pixels", action="store_true", help="of the run's photographs, not of its model's codes."
    )
    parser.add_argument(
        "--one_pose",
        action="store_true",
        help="of ears in one pose, so that no component is where an ear lies, how large it is in "
        "the picture or how far turned; of a run with --pixel-registration.",
    )
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="where to write; by default RUN/eigenears, RUN/eigenears_pixels with --pixels, or "
        "RUN/eigenears_one_pose with --one-pose.",
    )
    parser.add_argument(
        "--split",
        type=str,
        default=None,
        help="train, val, test or all; by default train, and all of --data.",
    )
    parser.add_argument(
        "--image_size",
        type=Optional[int],  # noqa: UP045  (as jsonargparse shows it)
        default=None,
        help="without a run: side of the images in pixels, 128 by default.",
    )
    parser.add_argument("--n_components", type=int, default=16, help="how many to keep.")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, latest or a step.")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        help="draws of subjects for the confidence intervals of explained variance; 0 makes none.",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=100,
        help="draws for the test of how many components are more than chance; 0 does without.",
    )

    def command() -> None:
        options = parser.parse(argv)
        for name in ("bootstrap", "permutations"):
            if getattr(options, name) < 0:
                raise UserError(f"--{name} must be 0 or more, not {getattr(options, name)}.")
        common = {
            "n_components": options.n_components,
            "bootstrap": options.bootstrap,
            "permutations": options.permutations,
        }
        if options.run is None:
            if options.one_pose:
                raise UserError("--one-pose is for --run: pixels know nothing of a pose.")
            if options.data is None or options.out is None:
                raise UserError(
                    "Give --run RUN for the eigenears of a model, or --data DIR --out DIR for "
                    "those of the pixels of photographs."
                )
            out = options.out
            write_pixel_eigenears(
                options.data,
                out,
                split=options.split or "all",
                image_size=options.image_size,
                **common,
            )
        else:
            if options.image_size is not None:
                raise UserError("--image-size is for --data without --run: a run has its own.")
            name = default_folder(pixels=options.pixels, one_pose=options.one_pose)
            out = options.out or str(Path(options.run) / name)
            write_eigenears(
                options.run,
                split=options.split,
                checkpoint=options.checkpoint,
                data=options.data,
                pixels=options.pixels,
                one_pose=options.one_pose,
                out=options.out,
                **common,
            )
        print_report(read_json(Path(out) / "eigenears.json"), Path(out), Console())

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
