"""Writes the report: HTML that is one file and opens anywhere, Markdown, JSON, figures."""

from __future__ import annotations

import base64
import logging
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from jaxear.comparison import figures
from jaxear.comparison.report import build_report
from jaxear.comparison.results import read_results
from jaxear.comparison.tables import TextTable, tables
from jaxear.figures import save_figure
from jaxear.files import replacing
from jaxear.training.logging import read_json, write_json

logger = logging.getLogger(__name__)

CAPTIONS = {
    "same_ears": "The same ears of held-out subjects (top) through every row, first seed, with the "
    "PSNR of each.",
    "quality_and_cost": "(a) PSNR of validation ears while training, every seed. (b, c) PSNR of "
    "held-out ears with its 95 % interval, against the time of an epoch and against memory.",
    "eigenears": "The first components of every row at two standard deviations to either side of "
    "the mean ear, and where the two differ (red: brighter at the positive end), with the variance "
    "that each explains.",
}


def write_reports(out: Path, *, command: str = "") -> dict[str, Any]:
    """Read the runs of a study and write `report.html`, `.md`, `.json` and `figures/`.

    Args:
        out: the study's folder.
        command: that repeats it, for the reader; that of the report before by default.

    Returns:
        What `report.json` holds.

    Raises:
        UserError: there is no study in the folder.
    """
    results = read_results(out)
    command = command or read_json(out / "report.json").get("command", "")
    report = build_report(results, command=command)
    drawn: dict[str, str] = {}
    if results.measured(backbones=True):
        cells = results.cells()
        for name, figure in {
            "same_ears": figures.same_ears(results),
            "quality_and_cost": figures.quality_and_cost(results, cells),
            "eigenears": figures.eigenears_side_by_side(results),
        }.items():
            save_figure(figure, out / "figures" / name)
            picture = (out / "figures" / name).with_suffix(".png").read_bytes()
            drawn[name] = base64.b64encode(picture).decode("ascii")
    write_json(out / "report.json", report)
    contents = {
        "report": report,
        "tables": {table.key: table for table in tables(report)},
        "figures": {name: (drawn[name], CAPTIONS[name]) for name in drawn},
    }
    for name in ("report.html", "report.md"):
        _write(out / name, _environment(name).get_template(name).render(**contents))
    logger.info("The report is in %s", out / "report.html")
    return report


def _environment(name: str) -> Environment:
    environment = Environment(
        loader=PackageLoader("jaxear.comparison", "templates"),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown_table
    environment.filters["code"] = _code
    return environment


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _markdown_table(table: TextTable) -> str:
    """A table in GitHub's Markdown."""
    starts = any(row.start for row in table.rows)
    heads = [f"{c.title} ({c.unit})" if c.unit else c.title for c in table.columns]
    lines = [_line(["", *([""] if starts else []), *heads])]
    lines.append(_line(["---", *(["---"] if starts else []), *["---:"] * len(heads)]))
    for row in table.rows:
        cells = [
            f"{cell.text} {cell.interval}".strip() if cell.kind != "verdict" else cell.text
            for cell in row.cells
        ]
        if row.reason:
            cells = [row.reason, *[""] * (len(heads) - 1)]
        lines.append(_line([row.label, *([row.start] if starts else []), *cells]))
    return "\n".join(lines)


def _code(text: str) -> Markup:
    """`Commands` in a text as HTML."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
