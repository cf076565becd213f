"""What a run writes about itself: metrics.csv, TensorBoard events, pictures, summary.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxear.files import replacing
from jaxear.training.distributed import is_main

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class MetricsLog:
    """Rows of numbers, one per epoch, to `metrics.csv` and TensorBoard.

    Opened again after an interruption, it drops the rows beyond the step that training goes on
    from, so that no epoch stands in the file twice. In a run of several processes only the first
    writes.
    """

    def __init__(self, run_dir: Path, *, resume_step: int = 0):
        self.path = run_dir / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self._folder = run_dir / "tensorboard"
        self._resume_step = resume_step
        self._writer: SummaryWriter | None = None
        if self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= resume_step]

    def _events(self) -> SummaryWriter:
        """Opened with the first row: where torch is installed, tensorboardX imports it too, which
        takes seconds."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # Events of steps beyond the one resumed from are dropped by TensorBoard itself.
            self._writer = SummaryWriter(str(self._folder), purge_step=self._resume_step + 1)
        return self._writer

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it must have "epoch" and "step". On disk when this returns."""
        self.rows.append(dict(row))
        if not is_main():
            return
        fields = list(dict.fromkeys(key for row in self.rows for key in row))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(self.rows)
        events = self._events()
        for key, value in row.items():
            if key not in ("epoch", "step"):
                events.add_scalar(key.replace("_", "/", 1), value, row["step"])
        events.flush()

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Show a picture, uint8 [h, w, 3], in TensorBoard."""
        if is_main():
            self._events().add_image(name, image, step, dataformats="HWC")

    def gained_nothing_for(self, epochs: int) -> bool:
        """Whether the best validation PSNR is at least so many epochs old; 0 is never."""
        values = [float(row["val_psnr"]) for row in self.rows]
        return 0 < epochs <= len(values) - 1 - int(np.argmax(values)) if values else False

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; nothing where there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}
