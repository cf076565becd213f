"""The figures of a study: the same ears and the eigenears of every row, quality against cost.

Every one names all rows: those without figures are listed below it, with the reason.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from jaxear.comparison.plan import FROZEN, SCRATCH, TITLES
from jaxear.comparison.results import Line, Results
from jaxear.eigenears.figures import GREY, LUMA, SUBJECT_STYLES, WIDTH, score_name
from jaxear.figures import Sheet, to_uint8

LABELS = 1.72  # inches that the rows' names take
NOTE = 0.12  # inches, a line about rows without figures
NOTE_LETTERS = 150  # that such a line has room for
SOFT = "0.4"
BLACK = "#000000"


def same_ears(results: Results) -> Figure:
    """The same held-out ears through every row, with the PSNR of each."""
    pictures = _pictures(results)
    ears = next(iter(pictures.values()))["ears"]
    cell = min((WIDTH - LABELS - 0.05) / len(ears), 0.92)
    size, caption, top = 0.97 * cell, 0.13, 0.04
    lines, notes = results.measured(), _missing(results)
    height = top + cell + 0.03 + len(lines) * (cell + caption)
    sheet = Sheet(LABELS + cell * len(ears) + 0.05, height + NOTE * len(notes) + 0.05)
    sheet.text("held-out ear", LABELS - 0.08, top + cell / 2, ha="right")
    for j, ear in enumerate(ears):
        sheet.picture(to_uint8(ear), LABELS + j * cell, top, size)
    for i, line in enumerate(lines):
        y = top + cell + 0.03 + i * (cell + caption)
        _name(sheet, line, y + cell / 2)
        of = pictures[line.key]
        for j, picture in enumerate(of["reconstructions"]):
            x = LABELS + j * cell
            sheet.picture(to_uint8(picture), x, y, size)
            words = f"{of['psnr'][j]:.1f} dB"
            sheet.text(words, x + size / 2, y + cell + 0.045, fontsize=6, color="0.3")
    _write_below(sheet, notes, height)
    return sheet.figure


def eigenears_side_by_side(results: Results) -> Figure:
    """The first components of every row, two standard deviations to either side, and where these
    differ: red is brighter at the positive end, blue darker, a row on one scale."""
    pictures = _pictures(results)
    first = next(iter(pictures.values()))["eigenears"]
    shown = min(3, len(first))
    gap = 0.1
    cell = min((WIDTH - LABELS - 0.05 - gap * (shown - 1)) / (3 * shown), 0.7)
    size, caption, top = 0.97 * cell, 0.13, 0.36
    lines, notes = results.measured(), _missing(results)
    height = top + len(lines) * (cell + caption)
    starts = [LABELS + i * (3 * cell + gap) for i in range(shown)]
    sheet = Sheet(starts[-1] + 3 * cell + 0.05, height + NOTE * len(notes) + 0.05)
    for i, x in enumerate(starts):
        sheet.text(f"PC{i + 1}", x + 1.5 * cell, 0.09, fontsize=8)
        sheet.line(x, x + 3 * cell - 0.03, 0.18)
        for j, words in enumerate((score_name(-2), score_name(2), "difference")):
            sheet.text(words, x + j * cell + size / 2, 0.27, fontsize=6)
    for row, line in enumerate(lines):
        y = top + row * (cell + caption)
        _name(sheet, line, y + cell / 2)
        of = pictures[line.key]
        ends = to_uint8(of["eigenears"])[:shown]
        differences = (ends[:, -1].astype(np.float32) - ends[:, 0]) @ LUMA / 255
        limit = max(float(np.abs(differences).max()), 1e-3)
        for i, x in enumerate(starts[: len(ends)]):
            sheet.picture(ends[i, 0], x, y, size)
            sheet.picture(ends[i, -1], x + cell, y, size)
            scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            sheet.picture(differences[i], x + 2 * cell, y, size, **scale)
            share = f"{100 * of['ratios'][i]:.1f} %"
            sheet.text(share, x + 1.5 * cell, y + cell + 0.045, fontsize=6, color="0.3")
    _write_below(sheet, notes, height)
    return sheet.figure


def quality_and_cost(
    results: Results, cells: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Figure:
    """PSNR while training; of held-out ears against the time of an epoch, and against memory."""
    lines = results.measured(backbones=True)
    colours = _colours(results)
    notes = _missing(results)
    figure = Figure(figsize=(WIDTH, 3.45 + NOTE * len(notes)), layout="constrained")
    training, time, memory = figure.subplots(1, 3)
    for line in lines:
        style = _style(line, colours)
        for i, run in enumerate(line.runs):
            curve = np.asarray(run["curve"], float).reshape(-1, 2)
            step_seconds = run["measures"]["training_seconds"] / run["steps"]
            training.plot(
                curve[:, 0] * step_seconds / 60, curve[:, 1], lw=1.1, color=style["color"],
                ls=":" if line.row and line.row.mode == FROZEN else
                "--" if line.row and line.row.weights == SCRATCH else "-",
                alpha=1 if i == 0 else 0.5, marker="o", ms=2,
            )  # fmt: skip
        psnr = cells[line.key]["psnr"]
        error = [[psnr["value"] - psnr["low"]], [psnr["high"] - psnr["value"]]]
        error = np.maximum(error, 0) if "low" in psnr else None
        for axes, name, times in ((time, "seconds_per_epoch", 1), (memory, "peak_bytes", 1e-9)):
            x = times * cells[line.key][name]["value"]
            bars = {"elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7}
            axes.errorbar(x, psnr["value"], error, ls="", ms=5.5, mew=1.1, **style, **bars)
    pca = cells.get("linear_pca", {}).get("psnr")
    for axes in (time, memory):
        if pca:
            axes.axhline(pca["value"], color=GREY, ls="-.", lw=1)
        axes.set_ylabel("PSNR of held-out ears (dB)")
    training.set_xlabel("Training (minutes)")
    training.set_ylabel("PSNR of validation ears (dB)")
    time.set_xlabel("Epoch (s)")
    memory.set_xlabel("Memory in training (GB)")
    for axes, letter in ((training, "a"), (time, "b"), (memory, "c")):
        _plain(axes)
        axes.set_title(letter, loc="left", fontsize=8, fontweight="bold")
    _logarithmic(time, [cells[line.key]["seconds_per_epoch"]["value"] for line in lines])
    handles = _legend(lines, colours, pca is not None)
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=6, color=SOFT, ha="left", x=0.01)
    return figure


def _legend(lines: Sequence[Line], colours: Mapping[str, str], pca: bool) -> list[Line2D]:
    backbones = dict.fromkeys(line.row.backbone for line in lines if line.row)
    handles = [
        Line2D([], [], color=colours[name], lw=2.5, label=TITLES.get(name, name))
        for name in backbones
    ]
    starts: dict[str, dict[str, Any]] = {
        "pretrained": {"ls": "-", "marker": "o", "mfc": BLACK},
        "from scratch": {"ls": "--", "marker": "o", "mfc": "white"},
        "pretrained, frozen": {"ls": ":", "marker": "s", "mfc": BLACK},
    }
    present = {_start(line) for line in lines}
    handles += [
        Line2D([], [], color=BLACK, lw=1, ms=4.5, label=name, **style)
        for name, style in starts.items()
        if name in present
    ]
    if pca:
        handles.append(Line2D([], [], color=GREY, ls="-.", lw=1, label="linear PCA"))
    return handles


def _start(line: Line) -> str:
    frozen = ", frozen" if line.row and line.row.mode == FROZEN else ""
    return f"{line.start}{frozen}"


def _colours(results: Results) -> dict[str, str]:
    palette = [colour for colour, _ in SUBJECT_STYLES] + ["#F0E442", "#999999", BLACK]
    backbones = results.study.backbones
    return {name: palette[i % len(palette)] for i, name in enumerate(backbones)}


def _style(line: Line, colours: Mapping[str, str]) -> dict[str, Any]:
    assert line.row is not None
    colour = colours[line.row.backbone]
    return {
        "color": colour,
        "marker": "s" if line.row.mode == FROZEN else "o",
        "mfc": "white" if line.row.weights == SCRATCH else colour,
    }


def _pictures(results: Results) -> dict[str, dict[str, np.ndarray]]:
    return {line.key: line.pictures() for line in results.measured()}


def _name(sheet: Sheet, line: Line, y: float) -> None:
    """The row's name at the left, and below it where it starts from."""
    if line.row is None:
        sheet.text("linear PCA\nof the pixels", LABELS - 0.08, y, ha="right", linespacing=1.3)
        return
    words = f"{line.row.title}\n{_start(line)}"
    sheet.text(words, LABELS - 0.08, y, ha="right", linespacing=1.3)


def _missing(results: Results) -> list[str]:
    """The rows without figures, a line for each reason and as many as it takes."""
    labels: dict[str, list[str]] = {}
    for line in results.lines:
        if not line.runs:
            reason = line.reason.removeprefix("failed: ").split(", run ")[0].split(";")[0][:80]
            labels.setdefault(f"{line.state}: {reason}", []).append(line.label)
    notes = []
    for reason, names in labels.items():
        words = f"{reason[0].upper()}{reason[1:]} ({'; '.join(names)})"
        notes += textwrap.wrap(words, NOTE_LETTERS, subsequent_indent="   ")
    return notes


def _write_below(sheet: Sheet, notes: Sequence[str], y: float) -> None:
    for i, words in enumerate(notes):
        sheet.text(words, 0.05, y + (i + 0.6) * NOTE, ha="left", fontsize=6, color=SOFT)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where the values span much."""
    if values and max(values) > 4 * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: "")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, width=0.6, length=2.5)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
