"""An evaluation as a table on the screen, and as files: JSON, CSV, figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxear.assessment import plots
from jaxear.assessment.measures import MEASURES, Estimate
from jaxear.assessment.plots import Example
from jaxear.data.records import Record
from jaxear.figures import save_figure
from jaxear.files import replacing
from jaxear.training.logging import write_json

COLUMNS = (
    "run", "checkpoint", "data", "split", "model", "numbers_per_ear", "measure", "value", "low",
    "high", "n", "of", "interval", "unit", "better", "note",
)  # fmt: skip
GROUPS = {
    "reconstruction": "reconstruction",
    "code": "codes",
    "stability": "instability",
    "identity": "identity",
    "time": "time",
}


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a run.

    Attributes:
        about: run, checkpoint, data, split, counts of images and subjects, machine.
        names: "model", "pca" and "difference" -> what they are called.
        numbers: of a code: "model" and "pca" -> how many.
        estimates: "model", "pca", "difference" -> measure (`MEASURES`) -> figure. A measure that
            makes no sense for one of them is missing there; one that could not be taken has no
            value, and a note.
        notes: what a reader has to know besides.
        curves: of recognition (`Recognition`); none where it is not possible.
        records: the ears, n.
        values: "model", "pca" -> measure -> of each ear [n].
        examples: some of them with their reconstructions.
    """

    about: dict[str, Any]
    names: dict[str, str]
    numbers: dict[str, int]
    estimates: dict[str, dict[str, Estimate]]
    notes: list[str]
    curves: dict[str, dict[str, dict[str, list[float]]]]
    records: Sequence[Record]
    values: dict[str, dict[str, np.ndarray]]
    examples: list[Example]

    @property
    def psnr_by_subject(self) -> dict[str, dict[str, float]]:
        """Subject -> n_images, and the mean PSNR of "model" and "pca"."""
        names, numbers = np.unique([r.subject for r in self.records], return_inverse=True)
        counts = np.bincount(numbers)
        means = {
            coder: np.bincount(numbers, weights=values["psnr"]) / counts
            for coder, values in self.values.items()
        }
        return {
            str(name): {
                "n_images": int(counts[i]),
                **{coder: float(mean[i]) for coder, mean in means.items()},
            }
            for i, name in enumerate(names)
        }


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write evaluation.json, evaluation.csv, images.csv and the figures into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", as_json(evaluation))
    _write_csv(out / "evaluation.csv", COLUMNS, _rows(evaluation))
    images = list(_image_rows(evaluation))
    _write_csv(out / "images.csv", list(images[0]), images)
    names = evaluation.names
    subjects = evaluation.psnr_by_subject
    if len(subjects) > 1:
        estimates = {key: evaluation.estimates[key]["psnr"] for key in ("model", "pca")}
        save_figure(plots.psnr_by_subject(subjects, estimates, names), out / "psnr_by_subject")
    save_figure(
        plots.reconstructions(evaluation.examples, names, evaluation.numbers),
        out / "reconstructions",
    )
    if evaluation.curves:
        save_figure(
            plots.recognition(evaluation.curves, evaluation.estimates, names), out / "identity"
        )


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the single images, in plain types."""
    return {
        **evaluation.about,
        "notes": evaluation.notes,
        "names": evaluation.names,
        "numbers_per_ear": evaluation.numbers,
        "measures": {
            coder: {name: estimate._asdict() for name, estimate in estimates.items()}
            for coder, estimates in evaluation.estimates.items()
        },
        "curves": evaluation.curves,
        "psnr_by_subject": evaluation.psnr_by_subject,
        "definitions": {name: measure.definition for name, measure in MEASURES.items()},
    }


def _rows(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    """The lines of evaluation.csv: one per coder and measure."""
    for coder, estimates in evaluation.estimates.items():
        for name, estimate in estimates.items():
            yield {
                **{key: evaluation.about[key] for key in COLUMNS[:4]},
                "model": evaluation.names[coder],
                "numbers_per_ear": evaluation.numbers.get(coder, ""),
                "measure": name,
                **estimate._asdict(),
                "unit": MEASURES[name].unit,
                "better": MEASURES[name].better,
            }


def _image_rows(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    """The lines of images.csv: one per coder and ear."""
    columns = list(dict.fromkeys(name for v in evaluation.values.values() for name in v))
    for coder, values in evaluation.values.items():
        for i, record in enumerate(evaluation.records):
            yield {
                "model": evaluation.names[coder],
                "path": str(record.path),
                "subject": record.subject,
                **{name: float(values[name][i]) if name in values else "" for name in columns},
            }


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)  # numbers as Python's repr, which reads back to the same


def print_report(evaluation: Evaluation, console: Console) -> None:
    """The report as a table, and what there is to know about it."""
    about, names = evaluation.about, evaluation.names
    more, less = "↑↓" if console.encoding.lower().startswith("utf") else "+-"
    numbers = {key: f"\n{n} numbers" for key, n in evaluation.numbers.items()}
    table = Table(
        title=f"{about['n_images']} ears of {about['n_subjects']} subjects "
        f"({about['data']}, split {about['split']})",
        caption="Means over ears and 95 % intervals over subjects (times: medians and quartiles). "
        f"{more} more is better, {less} less is. `jaxear evaluate --help` defines each line.",
    )
    table.add_column("")
    for key, name in names.items():
        heading = "difference" if key == "difference" else name + numbers[key]
        table.add_column(heading, justify="right", no_wrap=True)
    gap = " " if console.width >= 110 else "\n"
    notes = dict.fromkeys(evaluation.notes)
    for group, title in GROUPS.items():
        lines = [name for name, measure in MEASURES.items() if measure.group == group]
        shown = [n for n in lines if any(n in figures for figures in evaluation.estimates.values())]
        if shown:
            table.add_section()
            table.add_row(Text(title, style="bold"))
        for name in shown:
            cells = []
            for coder in names:
                estimate = evaluation.estimates[coder].get(name)
                cells.append(_cell(estimate, MEASURES[name].digits, gap))
                if estimate is not None and estimate.value is None:
                    notes[f"{MEASURES[name].title}: {estimate.note}"] = None
            sign = {"higher": more, "lower": less, "": ""}[MEASURES[name].better]
            table.add_row(Text(f" {MEASURES[name].title} {sign}".rstrip()), *cells)
    console.print(table)
    for note in notes:
        console.print(Text(f"* {note}"))


def _cell(estimate: Estimate | None, digits: int, gap: str) -> Text:
    if estimate is None:
        return Text("")
    if estimate.value is None:
        return Text("*")
    text = f"{estimate.value:.{digits}f}"
    if estimate.low is not None and estimate.high is not None:
        text += f"{gap}[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return Text(text)
