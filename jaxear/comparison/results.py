"""The runs of a study, read from their folders and summed up row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxear.comparison.measurement import LINEAR_PCA, MEASUREMENT, MEASURES, PICTURES
from jaxear.comparison.plan import Row, Study, load_study, missing_weights, run_folder
from jaxear.comparison.runner import FAILURE
from jaxear.comparison.statistics import DRAWS, Replicates, of_row, seed_variance
from jaxear.training.logging import read_json

DONE, FAILED, NOT_RUN = "measured", "failed", "not run"


@dataclass(frozen=True)
class Line:
    """A row of the tables, with its finished runs.

    Attributes:
        key: of the row, or "linear_pca".
        label: what it is called; of a backbone it says where its weights come from.
        row: the backbone's; None is linear PCA.
        state: `DONE`, `FAILED` or `NOT_RUN`.
        reason: why there are no figures, or fewer seeds than planned; empty else.
        runs: what `measurement.json` of each finished run holds.
        folder: of the first finished run.
    """

    key: str
    label: str
    row: Row | None
    state: str
    reason: str
    runs: list[dict[str, Any]]
    folder: Path | None

    @property
    def start(self) -> str:
        """What a table or a figure has to say of it: pretrained, from scratch, or not run."""
        if self.row is None:
            return "linear"
        return self.row.weights if self.state == DONE else NOT_RUN

    def replicates(self) -> dict[str, Replicates]:
        """Measures that all of its finished runs have, of their seeds."""
        found = {}
        for name in MEASURES:
            values = [run["measures"].get(name) for run in self.runs]
            if not values or any(value is None for value in values):
                continue
            draws = [
                run["replicates"].get(name, [value] * DRAWS)
                for run, value in zip(self.runs, values, strict=True)
            ]
            found[name] = Replicates(np.asarray(values, float), np.asarray(draws, float))
        return found

    def pictures(self) -> dict[str, np.ndarray]:
        """Those of its first finished run."""
        if self.folder is None:
            return {}
        with np.load(self.folder / PICTURES) as file:
            return {name: file[name] for name in file.files}


@dataclass(frozen=True)
class Results:
    """A study and its lines, linear PCA last, where it has been measured."""

    out: Path
    study: Study
    lines: list[Line]

    def measured(self, *, backbones: bool = False) -> list[Line]:
        """Lines with figures; only those of backbones, if asked."""
        return [line for line in self.lines if line.runs and not (backbones and line.row is None)]

    def cells(self) -> dict[str, dict[str, dict[str, float]]]:
        """Line -> measure -> value, the mean over seeds; of sampled ones low and high, 95 %."""
        replicates = {line.key: line.replicates() for line in self.measured()}
        table: dict[str, dict[str, dict[str, float]]] = {key: {} for key in replicates}
        for name, measure in MEASURES.items():
            having = {key: of[name] for key, of in replicates.items() if name in of}
            between = seed_variance([of.values for of in having.values()])
            for key, of in having.items():
                table[key][name] = {"value": float(of.values.mean())}
                if measure.sampled and np.ptp(of.draws) > 0:
                    figure = of_row(of, between, measure.most)
                    table[key][name] |= {"low": figure.low, "high": figure.high}
        return table


def read_results(out: Path) -> Results:
    """Everything that the report is made of.

    Raises:
        UserError: there is no study in the folder.
    """
    study = load_study(out)
    lines = [_line(study, row, out) for row in study.rows()]
    folder = out / "runs" / LINEAR_PCA
    if pca := read_json(folder / MEASUREMENT):
        lines.append(Line(LINEAR_PCA, "linear PCA", None, DONE, "", [pca], folder))
    return Results(out, study, lines)


def _line(study: Study, row: Row, out: Path) -> Line:
    runs: list[dict[str, Any]] = []
    reasons: list[str] = []
    first = None
    for seed in range(study.seeds):
        folder = run_folder(out, row, seed)
        if measurement := read_json(folder / MEASUREMENT):
            runs.append(measurement)
            first = first or folder
        elif failure := read_json(folder / FAILURE):
            reasons.append(f"failed: {failure['reason'].splitlines()[0]}")
        else:
            reasons.append(missing_weights(row) or "waiting to be run")
    reason = "; ".join(dict.fromkeys(reasons))
    if runs:
        lacking = f"{len(runs)} of {study.seeds} seeds ({reason})" if reason else ""
        return Line(row.key, row.label, row, DONE, lacking, runs, first)
    failed = reason.startswith("failed")
    return Line(row.key, row.label, row, FAILED if failed else NOT_RUN, reason, [], None)


def seeds_of(line: Line) -> str:
    """Which seeds a line's figures are of."""
    return ", ".join(str(run["seed"]) for run in line.runs)


def by_row(results: Results) -> Mapping[Row, Line]:
    """The lines of backbones."""
    return {line.row: line for line in results.lines if line.row is not None}
