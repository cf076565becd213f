"""The pictures: for the screen as PNG, for print as PDF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from jaxear.eigenears import EigenEars

TRAVERSAL = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
DPI = 200


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, black where they are not finite; uint8 passes."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(255 * np.clip(np.nan_to_num(images, posinf=1), 0, 1)).astype(np.uint8)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write a uint8 picture [h, w, 3] as PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as `stem`.png and `stem`.pdf; makes the folder."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(stem.with_suffix(suffix), dpi=DPI)


def reconstruction_grid(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Ears above their reconstructions: two [n, h, w, 3] -> one picture, uint8, thin white gaps."""
    rows = [to_uint8(images), to_uint8(reconstructions)]
    padded = [np.pad(row, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0)


def traversals(eigenears: EigenEars, n_components: int = 8) -> Figure:
    """Each component from -3 to +3 standard deviations, and where the two ends differ.

    The last column is the luminance at +3 minus that at -3: red is brighter at the positive end,
    blue darker, all rows on one scale.
    """
    n = min(n_components, eigenears.n_components)
    rows = [eigenears.traverse(component, TRAVERSAL) for component in range(n)]
    differences = [(row[-1] - row[0]).mean(axis=-1) for row in rows]
    limit = max(float(np.abs(difference).max()) for difference in differences)
    scale = Normalize(-limit, limit)
    columns = len(TRAVERSAL) + 1
    cell, left, top, bottom = 0.86, 0.95, 0.3, 0.45
    width, height = left + columns * cell + 0.25, top + n * cell + bottom
    figure = Figure(figsize=(width, height))
    for i, row in enumerate(rows):
        for j in range(columns):
            x = (left + j * cell + (0.08 if j == columns - 1 else 0)) / width
            y = (bottom + (n - 1 - i) * cell) / height
            axes = figure.add_axes((x, y, 0.97 * cell / width, 0.97 * cell / height))
            axes.set_axis_off()
            if j < len(TRAVERSAL):
                axes.imshow(to_uint8(row[j]), interpolation="lanczos")
                title = "mean" if TRAVERSAL[j] == 0 else f"{TRAVERSAL[j]:+.0f} SD"
            else:
                axes.imshow(differences[i], cmap="RdBu_r", norm=scale)
                title = "difference"
            if i == 0:
                axes.set_title(title, fontsize=8, pad=3)
        share = 100 * eigenears.explained_variance_ratio_[i]
        figure.text(
            (left - 0.1) / width,
            (bottom + (n - 0.5 - i) * cell) / height,
            f"PC{i + 1}\n{share:.1f} %",
            ha="right",
            va="center",
            fontsize=8,
        )
    bar = figure.add_axes(
        ((left + 7 * cell + 0.08) / width, 0.27 / height, 0.83 / width, 0.07 / height)
    )
    figure.colorbar(ScalarMappable(scale, "RdBu_r"), cax=bar, orientation="horizontal")
    bar.set_xticks([-limit, 0, limit], [f"{-limit:.1f}", "0", f"{limit:.1f}"])
    bar.tick_params(labelsize=6, length=2, pad=1)
    return figure


def scree(ratios: np.ndarray) -> Figure:
    """Share of the codes' variance that each component explains, and their running total."""
    numbers = np.arange(1, len(ratios) + 1)
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(numbers, 100 * ratios, color="#4878a8", label="each component")
    axes.set_xlabel("Component")
    axes.set_ylabel("Explained variance (%)")
    axes.set_xticks(numbers if len(numbers) <= 20 else numbers[:: len(numbers) // 10])
    total = axes.twinx()
    total.plot(numbers, 100 * np.cumsum(ratios), "o-", color="#b04a3a", ms=3, lw=1, label="total")
    total.set_ylabel("Cumulative (%)")
    total.set_ylim(0, 100)
    for side in (axes, total):
        side.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *total.get_legend_handles_labels()[0]]
    axes.legend(
        handles, ["each component", "running total"], frameon=False, loc="center right", fontsize=8
    )
    return figure
