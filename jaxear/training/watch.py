"""Steps that could not be used: how many in a row, and which images they were made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxear.config import OptimConfig
from jaxear.data.pipeline import Batches
from jaxear.data.records import Record

logger = logging.getLogger(__name__)

_LISTED = 20


class Watch:
    """Follows training for losses and gradients that are not finite.

    Such a step changes nothing; but if the parameters are to blame, they were so before it, and
    must not take the place of an older checkpoint.

    Attributes:
        well: whether the latest step was good.
        failed: whether `max_bad_steps` in a row were not.
    """

    def __init__(self, config: OptimConfig, records: Sequence[Record], batches: Batches):
        self._limit = config.max_bad_steps
        self._records = records
        self._batches = batches
        self._step = 0
        self.well = True
        self.failed = False

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After the step that makes the count `step`."""
        self._step = step
        self.well = not metrics["bad_steps"]
        if self.well:
            return
        logger.warning(
            "Step %d was skipped: its loss (%g) or its gradients (norm %g) are not finite. "
            "Its images: %s",
            step, metrics["loss"], metrics["l2_gradients"], self._names(),
        )  # fmt: skip
        self.failed = metrics["bad_steps"] >= self._limit

    def report(self, run_dir: Path, saved: Sequence[int]) -> str:
        """What to tell when training stops for it; `saved` are the steps of the checkpoints."""
        advice = "Look at these images, or lower --learning-rate or --clip-norm, and "
        if saved:
            advice += f"go on from step {saved[-1]} with: jaxear train --out {run_dir} --resume"
        else:
            advice += "start again; nothing was saved yet."
        return (
            f"Stopped at step {self._step}: {self._limit} steps in a row had a loss or gradients "
            f"that are not finite. The last batch was {self._names()}. {advice}"
        )

    def _names(self) -> str:
        rows = self._batches.rows(self._step - 1)
        names = [str(self._records[row].path) for row in rows[:_LISTED]]
        more = len(rows) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")
