"""The study of backbones: `jaxear compare`, or `python -m jaxear.compare`."""

from __future__ import annotations

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # before the imports below, which take seconds

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import yaml
from jsonargparse import DefaultHelpFormatter
from rich.console import Console
from rich.table import Table

from jaxear.command import run_command
from jaxear.comparison.plan import (
    DEFAULT_BACKBONES,
    MODES,
    PROTOCOL,
    WEIGHTS,
    Study,
    load_study,
    make_study,
)
from jaxear.comparison.runner import run_study
from jaxear.comparison.tables import tables
from jaxear.comparison.writing import write_reports
from jaxear.errors import UserError
from jaxear.options import Parser

logger = logging.getLogger(__name__)

SCREEN_COLUMNS = 5  # of the main table, which fit a terminal

DESCRIPTION = """\
Train the same variational autoencoder on each of several backbones, under one protocol, and write
a report: which reconstructs ears best, at what cost, what its eigenears show, and which claims of
the document behind this project hold.

Every run is a folder of its own, OUT/runs/ROW/seedN, an ordinary run of jaxear train. The study may
be stopped or killed at any moment; the same command goes on. Rows whose pretrained weights are not
at hand are left out, and the report says so, with the command that gets them. A run that fails is
recorded with its reason and does not stop the others.

Written to OUT:

  report.html           everything, in one file that opens in any browser and prints
  report.md, .json      the same for a README, and for programs
  figures/*.png, .pdf   the same ears through every row; eigenears; quality against cost"""

EXAMPLES = f"""\
examples:
  jaxear compare                                   on synthetic ears
  jaxear compare --data photographs/               on photographs, one folder per person
  jaxear compare --data photographs/ --budget-seconds 600 --seeds 3
  jaxear compare --backbones resnet50 sam --weights pretrained --modes frozen
  jaxear compare --out runs/compare --report-only  the report again, from the runs there are

what all runs share, unless --config says otherwise (the rest is as in jaxear train --help):
  {", ".join(f"{name} {value}" for name, value in PROTOCOL.items())}

pretrained weights are looked for in weights/, or in $JAXEAR_WEIGHTS:
  python scripts/port_sam.py                       Segment Anything's
  python scripts/port_timm.py --model resnet50     timm's; --list shows all"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description and the examples."""


def compare_parser() -> Parser:
    """The options of the command."""
    parser = Parser(
        prog="jaxear compare",
        usage="jaxear compare [--data DIR] [--backbones NAME ...] [--out DIR] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=str, default=None, help="ear photographs, as for jaxear train; without it, "
        "synthetic ears, whose anatomy is known.")  # fmt: skip
    add("--out", type=str, default="runs/compare", help="the study's folder.")
    add("--backbones", type=str, nargs="+", default=list(DEFAULT_BACKBONES), metavar="NAME",
        help="which to compare; names as for jaxear train.")  # fmt: skip
    add("--weights", type=str, nargs="+", default=[w.replace(" ", "-") for w in WEIGHTS],
        metavar="START", help="where rows start from: pretrained, from-scratch.")  # fmt: skip
    add("--modes", type=str, nargs="+", default=list(MODES), metavar="MODE",
        help="fine-tuned, frozen (pretrained rows only).")  # fmt: skip
    add("--seeds", type=int, default=2, help="runs of each row.")
    add("--budget_steps", type=int, default=90, help="optimiser steps of each run, rounded to "
        "whole epochs, one at least.")  # fmt: skip
    add("--budget_seconds", type=Optional[float], default=None,  # noqa: UP045
        help="instead: seconds of training of each run, at the pace measured first; compilation, "
        "validation and evaluation come on top.")  # fmt: skip
    add("--config", type=str, default=None, metavar="FILE", help="YAML of jaxear train's settings "
        "that all runs share, such as latent_dim, batch_size, image_size, aug_rotation; "
        "backbone_options by backbone.")  # fmt: skip
    add("--report_only", action="store_true", help="write the report of the runs in --out again, "
        "and train nothing.")  # fmt: skip
    return parser


def compare(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command; what `report.json` holds.

    Raises:
        UserError: an option, the data or the folder cannot be used.
        KeyboardInterrupt: it was interrupted; the report of what there is has been written.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = compare_parser().parse(arguments)
    out = Path(options.out)
    command = shlex.join(["jaxear", "compare", *arguments])
    if options.report_only:
        load_study(out)
        return write_reports(out)
    study = _study(options)
    try:
        run_study(study, out)
    except KeyboardInterrupt:
        if any(out.glob("runs/*/seed*/measurement.json")):
            write_reports(out, command=command)
        raise
    return write_reports(out, command=command)


def _study(options: Any) -> Study:
    return make_study(
        backbones=tuple(options.backbones),
        weights=tuple(name.replace("-", " ") for name in options.weights),
        modes=tuple(options.modes),
        seeds=options.seeds,
        budget_steps=options.budget_steps,
        budget_seconds=options.budget_seconds,
        data=options.data,
        settings=_settings(options.config),
    )


def _settings(path: str | None) -> dict[str, Any]:
    """The settings in a YAML file."""
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold settings, one `name: value` a line.")
    return values


def print_quality(report: dict[str, Any], console: Console) -> None:
    """The main figures, and what was found, on the screen."""
    quality = tables(report)[0]
    columns = quality.columns[:SCREEN_COLUMNS]
    table = Table(title=quality.title, caption="Means over held-out ears and seeds.")
    table.add_column("")  # where the screen is narrow, names are wrapped, and no figure is cut
    for column in columns:
        head = "\n".join([*column.title.split(), column.unit])
        table.add_column(head, justify="right", no_wrap=True)
    for line, row in zip(report["lines"], quality.rows, strict=True):
        if not row.reason:
            table.add_row(line["label"], *(cell.text for cell in row.cells[: len(columns)]))
    console.print(table)
    notes = [f"{row.label}: {row.reason}" for row in quality.rows if row.reason]
    for note in [*report["findings"], *notes]:
        console.print(f"* {note}", markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(lambda: print_quality(compare(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
