"""The pictures of eigenears: what each component does, how much of it is real, which ears show it.

Widths are those of a page's text (7.2 inches), type is 6 points at least. Colour-blind readers can
tell the colours apart (Okabe & Ito, "Color Universal Design", 2008), and each has its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jaxear.eigenears.exemplars import most_photographed
from jaxear.figures import Sheet, to_uint8

WIDTH = 7.2
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#8C8C8C"
SUBJECT_STYLES = (
    (BLUE, "o"),
    (VERMILION, "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
MINUS = "\N{MINUS SIGN}"
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in jaxear.metrics


class Traverses(NamedTuple):
    """The mean ear moved along each component: images [k, m, H, W, 3] in [0, 1] at scores [m]."""

    images: np.ndarray
    scores: np.ndarray

    def at(self, scores: Sequence[float]) -> np.ndarray:
        """Those at some of the scores, [k, len(scores), H, W, 3]."""
        return self.images[:, [int(np.abs(self.scores - s).argmin()) for s in scores]]


INTEGERS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


def score_name(score: float) -> str:
    """What stands above a column."""
    return "mean" if score == 0 else f"{score:+.0f} SD".replace("-", MINUS)


def traversals(traverses: Traverses, ratios: np.ndarray, n_components: int = 8) -> Figure:
    """Each component from -3 to +3 standard deviations, and where the two ends differ.

    It shows no photograph, so that it may be printed where photographs may not. The last column is
    the luminance at +3 minus that at -3: red is brighter at the positive end, blue darker, all rows
    on one scale.
    """
    return _component_rows(traverses, ratios, n_components)


def atlas(
    traverses: Traverses,
    ratios: np.ndarray,
    lowest: Sequence[np.ndarray],
    highest: Sequence[np.ndarray],
    n_components: int = 8,
) -> Figure:
    """As `traversals`, between the real ears of the lowest and those of the highest scores.

    lowest, highest: for each component, photographs [a few, H, W, 3] by rising score.
    """
    return _component_rows(traverses, ratios, n_components, lowest, highest)


def _component_rows(
    traverses: Traverses,
    ratios: np.ndarray,
    n_components: int,
    lowest: Sequence[np.ndarray] = (),
    highest: Sequence[np.ndarray] = (),
) -> Figure:
    n = min(n_components, len(traverses.images))
    decoded = traverses.at(INTEGERS)[:n]
    differences = (decoded[:, -1] - decoded[:, 0]) @ LUMA
    limit = max(float(np.abs(differences).max()), 1e-3)
    real = len(lowest[0]) if len(lowest) else 0
    columns = 2 * real + len(INTEGERS) + 1
    left, between, top, bottom = 0.52, 0.08, 0.4 if real else 0.26, 0.34
    gaps = 3 if real else 1
    cell = (WIDTH - left - between * gaps - 0.12) / columns
    size = 0.97 * cell
    sheet = Sheet(WIDTH, top + n * cell + bottom)
    start = left + real * cell + (between if real else 0)  # of the decoded ears
    after = start + len(INTEGERS) * cell + between
    last = after + (real * cell + between if real else 0)
    for i in range(n):
        y = top + i * cell
        label = f"PC{i + 1}\n{100 * ratios[i]:.1f} %"
        sheet.text(label, left - 0.07, y + size / 2, ha="right", linespacing=1.25)
        for j, image in enumerate(to_uint8(decoded[i])):
            sheet.picture(image, start + j * cell, y, size)
        for j in range(real):
            sheet.picture(to_uint8(lowest[i][j]), left + j * cell, y, size)
            sheet.picture(to_uint8(highest[i][j]), after + j * cell, y, size)
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        sheet.picture(differences[i], last, y, size, **scale)
    for j, score in enumerate(INTEGERS):
        sheet.text(score_name(score), start + j * cell + size / 2, top - 0.09)
    sheet.text("difference", last + size / 2, top - 0.09, fontsize=7 if cell > 0.6 else 6)
    if real:
        groups = {
            "lowest real ears": (left, real),
            "decoded": (start, len(INTEGERS)),
            "highest real ears": (after, real),
        }
        for words, (x, count) in groups.items():
            sheet.text(words, x + (count * cell - 0.03 * cell) / 2, 0.1)
            sheet.line(x, x + count * cell - 0.03 * cell, 0.2)
    _difference_bar(sheet, last, size, limit)
    return sheet.figure


def _difference_bar(sheet: Sheet, x: float, size: float, limit: float) -> None:
    width, height = sheet.figure.get_size_inches()
    bar = sheet.figure.add_axes((x / width, 0.2 / height, size / width, 0.06 / height))
    sheet.figure.colorbar(
        ScalarMappable(Normalize(-limit, limit), "RdBu_r"), cax=bar, orientation="horizontal"
    )
    shown = np.floor(10 * limit) / 10 or limit
    bar.set_xticks([-shown, 0, shown], [f"{MINUS}{shown:.1g}", "0", f"{shown:.1g}"])
    bar.tick_params(labelsize=6, length=2, width=0.5, pad=1)
    bar.spines["outline"].set_linewidth(0.5)


def neighbours(
    traverses: Traverses,
    places: Sequence[float],
    photographs: Sequence[np.ndarray],
    scores: np.ndarray,
    ratios: np.ndarray,
) -> Figure:
    """What is decoded at places along components, above the real ears that stand there.

    Args:
        traverses: of at least as many components as there are photographs.
        places: scores, of the traverses'.
        photographs: for each component, [places, H, W, 3].
        scores: theirs on the component, [components, places]; nan where there is none.
        ratios: explained variance.
    """
    n, columns = len(photographs), len(places)
    left, top, gap, caption = 0.95, 0.26, 0.1, 0.15
    cell = min((WIDTH - left - 0.08) / columns, 0.85)
    size = 0.97 * cell
    row = 2 * cell + caption + gap
    sheet = Sheet(left + columns * cell + 0.08, top + n * row)
    decoded = traverses.at(places)
    for i in range(n):
        y = top + i * row
        middle = y + cell
        sheet.text(f"PC{i + 1}\n{100 * ratios[i]:.1f} %", 0.42, middle, ha="right")
        sheet.text("decoded", left - 0.07, y + size / 2, ha="right", fontsize=6.5)
        sheet.text("real", left - 0.07, middle + size / 2, ha="right", fontsize=6.5)
        for j in range(columns):
            x = left + j * cell
            sheet.picture(to_uint8(decoded[i, j]), x, y, size)
            if np.isfinite(scores[i, j]):
                sheet.picture(to_uint8(photographs[i][j]), x, middle, size)
                found = f"{scores[i, j]:+.2f}".replace("-", MINUS)
                sheet.text(found, x + size / 2, y + 2 * cell + 0.05, fontsize=6, color="0.3")
            if i == 0:
                sheet.text(score_name(places[j]), x + size / 2, top - 0.09)
    return sheet.figure


def scree(
    ratios: np.ndarray,
    intervals: np.ndarray | None = None,
    chance: np.ndarray | None = None,
    n_real: int | None = None,
    hidden: np.ndarray | None = None,
) -> Figure:
    """How much of the variance each component explains, how sure that is, and what chance does.

    Args:
        ratios: explained variance as a share of all, [k].
        intervals: of their confidence, [k, 2].
        chance: what the k-th component of data without structure stays below, [k].
        n_real: how many of the first components are more than that; they are drawn filled.
        hidden: which of the others cannot be told from chance even if they are more, bool [k].
    """
    k = len(ratios)
    numbers = np.arange(1, k + 1)
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    single, running = figure.subplots(1, 2, width_ratios=(3, 2))
    if chance is not None:
        single.fill_between(numbers, 1e-9, 100 * chance, color="0.92", lw=0)
        label = "95th percentile of permuted codes"
        single.plot(numbers, 100 * chance, "--", color="0.35", lw=1, label=label)
    if intervals is not None:
        reach = 100 * np.abs(intervals.T - ratios)
        bars = {
            "fmt": "none",
            "ecolor": "black",
            "elinewidth": 0.8,
            "capsize": 2.5,
            "capthick": 0.8,
        }
        single.errorbar(numbers, 100 * ratios, reach, label="95 % confidence interval", **bars)
    real = numbers <= (k if n_real is None else n_real)
    name = "component" if n_real is None else "more than chance (p < 0.05)"
    single.plot(numbers[real], 100 * ratios[real], "o", color=BLUE, ms=3.8, label=name)
    hidden = ~real & (np.zeros(k, bool) if hidden is None else hidden)
    for which, marker, name in (
        (~real & ~hidden, "o", "not more than chance"),
        (hidden, "D", "not testable: along one dimension"),
    ):
        if which.any():
            hollow = {"mfc": "white", "color": BLUE, "ms": 3.8, "label": name}
            single.plot(numbers[which], 100 * ratios[which], marker, **hollow)
    single.set_ylabel("Explained variance (%)")
    lowest = min(array.min() for array in (ratios, chance) if array is not None)
    single.set_yscale("log")
    single.set_ylim(100 * max(lowest, 1e-4) / 1.6, None)
    single.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    single.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    single.yaxis.set_minor_locator(NullLocator())
    single.legend(frameon=False, fontsize=7, loc="upper right")
    running.plot(numbers, 100 * np.cumsum(ratios), "o-", color=BLUE, ms=3, lw=1, clip_on=False)
    running.set_ylabel("Running total (%)")
    running.set_ylim(0, 100)
    for axes in (single, running):
        _plain(axes)
        axes.set_xlabel("Component")
        axes.set_xlim(0.4, k + 0.6)
        axes.set_xticks(numbers if k <= 8 else numbers[:: max(k // 8, 1)])
    return figure


def score_scatter(
    scores: np.ndarray, subjects: np.ndarray, ratios: np.ndarray, n_subjects: int = 6
) -> Figure:
    """Every ear by its scores, on the first two components and on the next two.

    Colours and shapes are for the subjects with most images, of equal ones the first by name, as
    more could not be told apart; their images are joined to their mean. The rest is grey. Where
    every subject has one image, all are alike.

    Args:
        scores: [n, k], in standard deviations.
        subjects: whose each ear is, [n].
        ratios: explained variance, [k].
        n_subjects: how many to tell apart, up to 6.
    """
    pairs = [(0, 1), (2, 3)][: max(scores.shape[1] // 2, 1)]
    shown = most_photographed(subjects, min(n_subjects, len(SUBJECT_STYLES)))
    rest = ~np.isin(subjects, shown)
    figure = Figure(figsize=(WIDTH, 3.9 if shown else 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (a, b) in zip(panels, pairs, strict=False):
        b = min(b, scores.shape[1] - 1)
        colour, size = ("0.72", 5) if shown else (BLUE, 7)
        axes.scatter(scores[rest, a], scores[rest, b], s=size, c=colour, lw=0, alpha=0.75)
        for name, (colour, marker) in zip(shown, SUBJECT_STYLES, strict=False):
            own = scores[subjects == name][:, [a, b]]
            for point in own:
                axes.plot(*np.stack([own.mean(axis=0), point]).T, color=colour, lw=0.6, alpha=0.7)
            style = {"s": 22, "c": colour, "marker": marker, "lw": 0.4, "edgecolors": "white"}
            axes.scatter(*own.T, **style, label=name, zorder=3)
        reach = 1.08 * float(np.abs(scores[:, [a, b]]).max())
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.axhline(0, color="0.85", lw=0.6, zorder=0)
        axes.axvline(0, color="0.85", lw=0.6, zorder=0)
        axes.set_xlabel(f"PC{a + 1} score (SD), {100 * ratios[a]:.1f} %")
        axes.set_ylabel(f"PC{b + 1} score (SD), {100 * ratios[b]:.1f} %")
        _plain(axes)
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    if shown:
        total = len(np.unique(subjects))
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            title=f"{len(shown)} of {total} subjects: those with most images, then by name",
            title_fontsize=7,
            fontsize=7,
            ncols=len(shown),
            loc="outside lower center",
            frameon=False,
            handletextpad=0.1,
        )
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, width=0.6, length=2.5)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
