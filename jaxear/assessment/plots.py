"""The figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from jaxear.assessment.measures import Estimate
from jaxear.figures import to_uint8

STYLES = {
    "model": {"color": "#4878a8", "marker": "o"},
    "pca": {"color": "#b04a3a", "marker": "s"},
}
PER_GROUP = 3


class Example(NamedTuple):
    """An ear [H, W, 3], what "model" and "pca" make of it, and their PSNR; `group` as headed."""

    group: str
    image: np.ndarray
    reconstructions: dict[str, np.ndarray]
    psnr: dict[str, float]


def choose_examples(psnr: np.ndarray, subjects: np.ndarray) -> list[tuple[str, int]]:
    """The best, the median and the worst ears, of different subjects if possible.

    Three of each, from a third of the ears each, so that no two are the same; fewer where that
    third has fewer. Of one or two ears, all are taken.

    Args:
        psnr: of each ear, [n].
        subjects: whose each is, [n].

    Returns:
        Heading and row of each, from the best to the worst.
    """
    order = np.argsort(-psnr, kind="stable")
    third = len(order) // 3
    if third == 0:
        return [("all", int(row)) for row in order]
    middle = order[third : len(order) - third]
    off_centre = np.abs(np.arange(len(middle)) - (len(middle) - 1) / 2)
    candidates = {
        "best": order[:third],
        "median": middle[np.argsort(off_centre, kind="stable")],
        "worst": order[::-1][:third],
    }
    place = {int(row): i for i, row in enumerate(order)}
    chosen = []
    for group, rows in candidates.items():
        _, first = np.unique(subjects[rows], return_index=True)
        others = np.setdiff1d(np.arange(len(rows)), first)
        picked = rows[np.concatenate([np.sort(first), others])[: min(PER_GROUP, third)]]
        chosen += [(group, row) for row in sorted(map(int, picked), key=place.__getitem__)]
    return chosen


def reconstructions(
    examples: Sequence[Example], names: Mapping[str, str], numbers: Mapping[str, int]
) -> Figure:
    """Ears above what the model and PCA make of them, with the PSNR of each."""
    coders = list(examples[0].reconstructions)
    groups = [(group, list(of)) for group, of in groupby(examples, lambda e: e.group)]
    cell, caption, gap, left, top = 0.66, 0.13, 0.1, 0.95, 0.24
    width = left + len(examples) * cell + (len(groups) - 1) * gap + 0.05
    height = top + cell + len(coders) * (cell + caption) + 0.03
    figure = Figure(figsize=(width, height))

    def show(image: np.ndarray, x: float, y: float) -> None:
        size = 0.96 * cell
        axes = figure.add_axes((x / width, 1 - (y + size) / height, size / width, size / height))
        axes.set_axis_off()
        axes.imshow(to_uint8(image), interpolation="lanczos")

    def write(text: str, x: float, y: float, size: float, **options: Any) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, **options)

    rows = [top + i * cell + max(i - 1, 0) * caption for i in range(1 + len(coders))]
    labels = ["photograph", *(f"{names[key]}\n{numbers[key]} numbers" for key in coders)]
    for label, y in zip(labels, rows, strict=True):
        write(label, left - 0.08, y + cell / 2, 7, ha="right", va="center")
    x = left
    for group, of in groups:
        middle = x + len(of) * cell / 2
        write(group, middle, top / 2 + 0.02, 8, ha="center", va="center")
        for example in of:
            show(example.image, x, rows[0])
            for coder, y in zip(coders, rows[1:], strict=True):
                show(example.reconstructions[coder], x, y)
                text = f"{example.psnr[coder]:.1f} dB"
                write(text, x + cell / 2, y + cell + caption / 2, 6, ha="center", va="center")
            x += cell
        x += gap
    return figure


def recognition(
    curves: Mapping[str, Mapping[str, Mapping[str, list[float]]]],
    estimates: Mapping[str, Mapping[str, Estimate]],
    names: Mapping[str, str],
) -> Figure:
    """CMC and ROC curves with their bands: 95 %, by the bootstrap over subjects."""
    figure = Figure(figsize=(6.9, 3.2), layout="constrained")
    cmc, roc = figure.subplots(1, 2)
    for coder, of in curves.items():
        style: dict[str, Any] = STYLES[coder]
        x = np.arange(1, len(of["cmc"]["value"]) + 1)
        label = f"{names[coder]}: rank-1 {_percent(estimates[coder]['rank1'])}"
        _band(cmc, x, of["cmc"], label, **style, markersize=3)
        label = f"{names[coder]}: EER {_percent(estimates[coder]['eer'])}"
        _band(roc, 100 * np.asarray(of["roc"]["far"]), of["roc"], label, color=style["color"])
    cmc.set_xlabel("Rank")
    cmc.set_ylabel("Identification rate (%)")
    lowest = min(min(of["cmc"]["low"]) for of in curves.values())
    cmc.set_ylim(max(0, 10 * np.floor(10 * lowest) - 10), 101)
    ranks = len(next(iter(curves.values()))["cmc"]["value"])
    cmc.set_xticks([1, *range(5, ranks + 1, 5)] if ranks > 10 else range(1, ranks + 1))
    far = 100 * np.asarray(next(iter(curves.values()))["roc"]["far"])
    roc.plot(far, far, ":", color="0.6", lw=0.8, zorder=0)
    roc.set_xscale("log")
    roc.set_xlim(far[0], 100)
    roc.set_ylim(0, 101)
    roc.set_xlabel("False acceptance rate (%)")
    roc.set_ylabel("Verification rate (%)")
    roc.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for axes in (cmc, roc):
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.02, 1))
        _plain(axes)
    return figure


def _band(axes: Axes, x: np.ndarray, of: Mapping[str, Any], label: str, **style: Any) -> None:
    value, low, high = (100 * np.asarray(of[key]) for key in ("value", "low", "high"))
    axes.plot(x, value, lw=1.2, label=label, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, lw=0)


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * float(x or 0) for x in estimate[:3])
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def psnr_by_subject(
    subjects: Mapping[str, Mapping[str, float]],
    estimates: Mapping[str, Estimate],
    names: Mapping[str, str],
) -> Figure:
    """Each subject's mean PSNR by the model and by PCA, a line between; the means with intervals.

    Subjects come in the order of the difference, the one that gains most from the model on top.
    """
    coders = list(estimates)
    values = {coder: np.asarray([s[coder] for s in subjects.values()]) for coder in coders}
    order = np.argsort(values["model"] - values["pca"])
    n = len(order)
    y = np.arange(n)
    figure = Figure(figsize=(4.6, float(np.clip(1.3 + 0.15 * n, 2.2, 6.5))), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(200 / n, 1, 4.5))
    model, pca = values["model"][order], values["pca"][order]
    axes.hlines(y, np.minimum(model, pca), np.maximum(model, pca), color="0.75", lw=size / 4)
    for coder in coders:
        style: dict[str, Any] = STYLES[coder]
        estimate = estimates[coder]
        interval = f"[{estimate.low:.1f}, {estimate.high:.1f}]"
        label = f"{names[coder]}: mean {estimate.value:.1f} {interval} dB"
        axes.plot(values[coder][order], y, ls="", ms=size, mew=0, label=label, **style)
        axes.axvline(float(estimate.value or 0), color=style["color"], lw=0.8, zorder=0)
        axes.axvspan(
            float(estimate.low or 0), float(estimate.high or 0),
            color=style["color"], alpha=0.12, lw=0, zorder=0,
        )  # fmt: skip
    labels = list(subjects)
    if n <= 40:
        axes.set_yticks(y, [labels[i] for i in order], fontsize=7)
        axes.set_ylabel("Subject")
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"Subjects ({n})")
    axes.set_ylim(-1, n)
    axes.set_xlabel("PSNR (dB), mean of a subject's ears")
    figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
