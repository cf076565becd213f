"""What is written about eigenears: their figures, their numbers, and a table for the screen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxear.data.dataset import EarImages
from jaxear.eigenears import exemplars
from jaxear.eigenears import figures as draw
from jaxear.eigenears.meaning import describe_components, meaning_figure, print_description
from jaxear.eigenears.significance import (
    ParallelAnalysis,
    along_one_column,
    confidence_intervals,
    parallel_analysis,
)
from jaxear.figures import save_animation, save_figure
from jaxear.files import replacing
from jaxear.training.logging import write_json

if TYPE_CHECKING:
    from jaxear.eigenears.components import EigenEars

STEPS = np.linspace(-3.0, 3.0, 19)
"""Scores of an animation's frames, in standard deviations; every third one is in the figures."""
AT_EACH_END = 2
NEIGHBOURED = 4  # components that `neighbours` shows


def write_report(
    eigenears: EigenEars,
    codes: np.ndarray,
    ears: EarImages,
    out: Path,
    facts: dict[str, Any],
    *,
    bootstrap: int = 200,
    permutations: int = 100,
) -> dict[str, Any]:
    """Draw and measure eigenears on the ears that they were fitted to.

    Args:
        eigenears: fitted to `codes`.
        codes: of the ears, [n, d].
        ears: the photographs and whose they are; of synthetic ones, what they were made from.
        out: the folder for the figures, `scores.csv`, `eigenears.json` and `components/`.
        facts: what else to note in the JSON.
        bootstrap: draws for confidence intervals; 0 makes none.
        permutations: draws for the test of how many components are real; 0 makes none.

    Returns:
        What `eigenears.json` holds; without draws, None in place of what they would tell.
    """
    ratios, k = eigenears.explained_variance_ratio_, eigenears.n_components
    subjects = np.asarray([record.subject for record in ears.records])
    scores = eigenears.project_codes(codes)
    intervals = test = None
    if bootstrap and len(np.unique(subjects)) >= 3:
        intervals = confidence_intervals(codes, subjects, k, draws=bootstrap)
    if permutations:
        test = parallel_analysis(codes, k, permutations=permutations)
    hidden = along_one_column(eigenears.components_)

    traverses = draw.Traverses(eigenears.traverses(STEPS), STEPS)
    ends = [exemplars.extremes(column, subjects, AT_EACH_END) for column in scores.T]
    places = draw.INTEGERS
    stand = np.stack([exemplars.along(scores, i, places, subjects) for i in range(k)])
    statistics = (intervals, test, hidden)
    _draw_figures(out, ears, traverses, scores, subjects, ratios, statistics, ends, stand)
    for i, frames in enumerate(traverses.images):
        save_animation(out / "components" / f"pc{i + 1:02d}.gif", frames, STEPS)
    _write_scores(out / "scores.csv", ears, scores)
    meaning = describe_components(scores, ears.images, ears.factors)
    save_figure(meaning_figure(meaning), out / "meaning")

    def ear(row: int, component: int) -> dict[str, Any]:
        record = ears.records[row]
        score = float(scores[row, component])
        return {"image": str(record.path), "subject": record.subject, "score": score}

    components = [
        {
            "component": i + 1,
            "lowest": [ear(row, i) for row in ends[i][0]],
            "highest": [ear(row, i) for row in ends[i][1]],
            "along": [
                {"place": place, **ear(row, i)}
                for place, row in zip(places, stand[i], strict=True)
                if row >= 0
            ],
        }
        for i in range(k)
    ]
    report = facts | {
        "n_samples": len(ears),
        "n_subjects": len(np.unique(subjects)),
        "explained_variance_ratio": _listed(ratios),
        "explained_variance_ratio_ci95": _listed(intervals),
        "bootstrap_draws": bootstrap,
        "p_values": None if test is None else _listed(test.p_values),
        "chance_ratio_95": None if test is None else _listed(test.chance),
        "n_real_components": None if test is None else test.n_real,
        # Those that the test cannot tell from chance, real or not.
        "components_along_one_dimension": [int(i) + 1 for i in np.flatnonzero(hidden)],
        "permutations": permutations,
        "pc1": float(ratios[0]),
        "pc_first5": float(ratios[:5].sum()),
        "components": components,
        "meaning": meaning,
    }
    write_json(out / "eigenears.json", report)
    return report


def _draw_figures(
    out: Path,
    ears: EarImages,
    traverses: draw.Traverses,
    scores: np.ndarray,
    subjects: np.ndarray,
    ratios: np.ndarray,
    statistics: tuple[np.ndarray | None, ParallelAnalysis | None, np.ndarray],
    ends: list[tuple[np.ndarray, np.ndarray]],
    stand: np.ndarray,
) -> None:
    intervals, test, hidden = statistics
    save_figure(draw.traversals(traverses, ratios), out / "traversals")
    lowest, highest = ([ears.take(rows) for rows in side] for side in zip(*ends, strict=True))
    save_figure(draw.atlas(traverses, ratios, lowest, highest), out / "atlas")
    chance, n_real = (None, None) if test is None else (test.chance, test.n_real)
    save_figure(draw.scree(ratios, intervals, chance, n_real, hidden), out / "scree")
    save_figure(draw.score_scatter(scores, subjects, ratios), out / "scores")
    rows = stand[:NEIGHBOURED]
    found = np.take_along_axis(scores.T[:NEIGHBOURED], np.maximum(rows, 0), axis=1)
    found = np.where(rows >= 0, found, np.nan)
    photographs = [ears.take(np.maximum(row, 0)) for row in rows]
    figure = draw.neighbours(traverses, draw.INTEGERS, photographs, found, ratios)
    save_figure(figure, out / "neighbours")


def _write_scores(path: Path, ears: EarImages, scores: np.ndarray) -> None:
    """Every ear's scores, for other programs."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"pc{i + 1:02d}" for i in range(scores.shape[1])]
        writer.writerow(["image", "subject", "side", *names])
        for record, row in zip(ears.records, scores, strict=True):
            writer.writerow([record.path, record.subject, record.side, *(f"{s:.5f}" for s in row)])


def _listed(values: np.ndarray | None) -> list | None:
    return None if values is None else np.asarray(values, float).tolist()


def print_report(report: dict[str, Any], out: Path, console: Console) -> None:
    """The report as a table."""
    n_real = report["n_real_components"]
    table = Table(
        title=f"Eigenears of {report['n_samples']} ears of {report['n_subjects']} subjects "
        f"({report['model']}, split {report['split']})",
        caption=f"{report['bootstrap_draws']} bootstrap draws of subjects, "
        f"{report['permutations']} permutations",
    )
    for title in ("component", "explained (%)", "95 % interval", "running total (%)", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    ratios = report["explained_variance_ratio"]
    for i, ratio in enumerate(ratios):
        interval, p = "", ""
        if report["explained_variance_ratio_ci95"]:
            low, high = report["explained_variance_ratio_ci95"][i]
            interval = f"[{100 * low:.1f}, {100 * high:.1f}]"
        if report["p_values"]:
            p = f"{report['p_values'][i]:.3f}"
        total = f"{100 * sum(ratios[: i + 1]):.1f}"
        style = "dim" if n_real is not None and i >= n_real else None
        table.add_row(f"PC{i + 1}", f"{100 * ratio:.1f}", interval, total, p, style=style)
    console.print(table)
    if n_real is not None:
        of = f"of the {len(ratios)} kept" if n_real < len(ratios) else "all that were kept"
        console.print(f"{n_real} components explain more than chance would ({of}).")
        if n_real + 1 in report["components_along_one_dimension"]:
            console.print(
                f"There may be more: from PC{n_real + 1} on, components lie along single "
                "dimensions of the code, where permutations cannot tell them from chance."
            )
    print_description(report["meaning"], console)
    console.print(f"The figures are in {out}")
