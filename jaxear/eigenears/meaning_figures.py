"""The picture of what components mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from jaxear.data.synthetic import FACTORS

_KIND = {factor.name: factor.kind for factor in FACTORS}
# Form in greens, light in yellows, the colours of skin and hair near their own, greys for the rest.
_COLOURS = {
    "anatomy": "#1b7837",
    "pose": "#a6d38a",
    "light": "#f2b93b",
    "skin": "#d9774f",
    "background": "#7b5b48",
    "camera": "#6f8fb5",
    "unexplained": "#e4e4e4",
    "brightness": "#f2b93b",
    "contrast": "#b58216",
    "colour": "#d9774f",
    "shading": "#8d6aa3",
    "scale": "#3f9188",
    "position": "#a6d38a",
    "padding": "#7b5b48",
    "rest": "#e4e4e4",
}
_ROW = 0.145  # inches for a factor
_WORTH_A_ROW = 0.03


def meaning_figure(description: Mapping[str, Any], n: int = 8) -> Figure:
    """What the first n components are made of, as `meaning.describe_components` found.

    Where factors are known: a map of the shares of each, and of how much of it all scores together
    tell; bars by kind of factor; bars by statistics of the images. Else the last of these alone.
    Factors that neither the scores nor a component carry to 3 % have no row.
    """
    components = description["components"][:n]
    if "kinds" in components[0]:
        return _with_factors(description, components)
    figure = Figure(figsize=(5.2, 1.1 + 0.22 * len(components)), layout="constrained")
    axes = figure.add_subplot()
    if "statistics" in components[0]:
        _bars_by_statistics(axes, components)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "\n".join(description["notes"]), ha="center", wrap=True, fontsize=8)
    return figure


def _with_factors(description: Mapping[str, Any], components: list[dict[str, Any]]) -> Figure:
    readable = {factor["name"]: factor["r2"] for factor in description.get("factors", [])}
    shares = np.array([list(c["factors"].values()) for c in components]).T
    names = list(components[0]["factors"])
    worth = [
        i
        for i, name in enumerate(names)
        if max(readable.get(name, 0.0), *shares[i]) >= _WORTH_A_ROW
    ]
    height = 0.6 + max(_ROW * len(worth), 1.3 + 0.36 * len(components))
    figure = Figure(figsize=(7.4, height), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.15, 1.0])
    _map_of_factors(
        figure.add_subplot(grid[:, 0]),
        components,
        [names[i] for i in worth],
        shares[worth],
        readable,
    )
    by_kind = figure.add_subplot(grid[0, 1])
    kinds = [{**c["kinds"], "unexplained": c["unexplained"]} for c in components]
    _bars(by_kind, [c["component"] for c in components], kinds)
    _title(by_kind, "b  by kind of factor", 25)
    by_statistics = figure.add_subplot(grid[1, 1])
    _bars_by_statistics(by_statistics, components)
    _title(by_statistics, "c  by statistics of the images alone", 25)
    return figure


def _title(axes: Axes, text: str, above: float = 4) -> None:
    axes.set_title(text, loc="left", fontsize=8, fontweight="bold", pad=above)


def _map_of_factors(
    axes: Axes,
    components: list[dict[str, Any]],
    names: Sequence[str],
    shares: np.ndarray,
    readable: Mapping[str, float],
) -> None:
    """Shares [factors, components] as a map with numbers, and a column for all scores together."""
    columns = np.full(len(names), np.nan)
    if readable:
        columns = np.array([readable[name] for name in names])
    gap = np.full(len(names), np.nan)
    values = np.column_stack([shares, gap, columns])
    axes.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if value >= _WORTH_A_ROW:
            ink = "white" if value > 0.5 else "black"
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=5.5, color=ink
            )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=6)
    labels = [f"PC{c['component']}" for c in components]
    axes.set_xticks([*range(len(labels)), len(labels) + 1], [*labels, "all\nscores"], fontsize=6)
    axes.tick_params(length=0)
    kinds = [_KIND[name] for name in names]
    for row in range(1, len(names)):
        if kinds[row] != kinds[row - 1]:
            axes.axhline(row - 0.5, color="0.6", lw=0.5)
    for label, kind in zip(axes.get_yticklabels(), kinds, strict=True):
        label.set_color(_darker(kind))
    axes.spines[:].set_visible(False)
    _title(axes, "a  by factor (%)")


def _darker(kind: str) -> tuple[float, float, float]:
    """The kind's colour as ink that can be read on white."""
    red, green, blue = to_rgb(_COLOURS[kind])
    return 0.7 * red, 0.7 * green, 0.7 * blue


def _bars_by_statistics(axes: Axes, components: list[dict[str, Any]]) -> None:
    shares = [{**c["statistics"], "rest": c["rest"]} for c in components]
    _bars(axes, [c["component"] for c in components], shares)


def _bars(axes: Axes, numbers: Sequence[int], shares: Sequence[Mapping[str, float]]) -> None:
    """One bar for each component, cut up by its shares; what no component has gets no legend."""
    start = np.zeros(len(numbers))
    for name in shares[0]:
        lengths = np.array([max(100 * share[name], 0.0) for share in shares])
        if lengths.max() < 0.5:
            continue
        axes.barh(numbers, lengths, 0.78, left=start, color=_COLOURS[name], label=name, lw=0)
        for number, left, length in zip(numbers, start, lengths, strict=True):
            if length >= 8:
                axes.text(
                    left + length / 2,
                    number,
                    f"{length:.0f}",
                    ha="center",
                    va="center",
                    fontsize=5.5,
                    color="white" if sum(to_rgb(_COLOURS[name])) < 1.4 else "black",
                )
        start += lengths
    axes.set_yticks(numbers, [f"PC{number}" for number in numbers], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.tick_params(axis="x", labelsize=6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("share of the scores' variance (%)", fontsize=7)
    axes.legend(
        fontsize=6,
        frameon=False,
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.98),
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.0,
    )
