"""Parity of a port with its torch original: a measure, a table, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from jaxear.errors import UserError

# Rounding in float32 gives about 1e-6; more than 1e-5 would hide a wrong activation.
TOLERANCE = 1e-5


class ParityError(UserError):
    """A port does not compute what its original computes."""


@dataclass(frozen=True)
class ParityRow:
    """One activation compared: max |difference| / max |reference|, and max |reference|."""

    name: str
    shape: tuple[int, ...]
    error: float
    scale: float


@dataclass(frozen=True)
class ParityReport:
    """All activations compared, in the order of the network."""

    rows: tuple[ParityRow, ...]
    tolerance: float

    def passes(self, row: ParityRow) -> bool:
        """Whether one activation is within the tolerance; NaN is not."""
        return row.error <= self.tolerance

    @property
    def passed(self) -> bool:
        """Whether every activation is within the tolerance."""
        return all(map(self.passes, self.rows))

    @property
    def errors(self) -> dict[str, float]:
        """Name -> max |difference| / max |reference|, e.g. for a file's metadata."""
        return {row.name: row.error for row in self.rows}

    def table(self, title: str = "") -> Table:
        """The report as a table to print."""
        table = Table(title=title or None)
        table.add_column("activation")
        table.add_column("shape")
        table.add_column("max |reference|", justify="right")
        table.add_column("max |difference|\n/ max |reference|", justify="right")
        table.add_column("")
        for row in self.rows:
            verdict = "ok" if self.passes(row) else "[bold red]DIFFERS[/]"
            shape = "x".join(map(str, row.shape))
            table.add_row(row.name, shape, f"{row.scale:.4g}", f"{row.error:.1e}", verdict)
        return table

    def check(self) -> None:
        """Raise unless it passed.

        Raises:
            ParityError: names the first activation that differs.
        """
        if self.passed:
            return
        first = next(row for row in self.rows if not self.passes(row))
        raise ParityError(
            f"The port does not compute what the original does: from {first.name} on it differs by "
            f"{first.error:.1e} of the scale, and {self.tolerance:.0e} is allowed. Nothing was "
            "written. Please report this, with the name of the checkpoint."
        )


def compare(
    names: Iterable[str],
    torch_outputs: Mapping[str, Any],
    flax_outputs: Mapping[str, Any],
    *,
    tolerance: float = TOLERANCE,
) -> ParityReport:
    """Compare activations by name.

    Args:
        names: which, in the order of the report.
        torch_outputs: the reference, arrays laid out as the Flax ones (NHWC).
        flax_outputs: what the port gives.
        tolerance: allowed max |difference| / max |reference|; 1e-5 suits float32.

    Raises:
        KeyError: a name is not in both.
        ValueError: shapes differ (a transposed layout would otherwise be broadcast away), or there
            is nothing to compare.
    """
    rows = []
    for name in names:
        reference = np.asarray(torch_outputs[name], np.float64)
        value = np.asarray(flax_outputs[name], np.float64)
        if value.shape != reference.shape:
            raise ValueError(f"{name}: torch gives {reference.shape}, the port {value.shape}")
        scale = float(np.max(np.abs(reference)))
        difference = float(np.max(np.abs(value - reference)))
        error = difference / scale if scale else float("inf")
        rows.append(ParityRow(name, value.shape, error, scale))
    if not rows:
        raise ValueError("nothing to compare")
    return ParityReport(tuple(rows), tolerance)
