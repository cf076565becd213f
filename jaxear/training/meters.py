"""What a run shows while it goes: mean metrics, the clock, the progress bar."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class MeanMetrics:
    """Means of metrics over the steps of an epoch that could be used."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0

    def add(self, metrics: Mapping[str, Any]) -> None:
        if metrics.get("bad_steps"):
            return
        self._count += 1
        for name, value in metrics.items():
            self._sums[name] += float(value)

    def result(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{name}": total / self._count for name, total in self._sums.items()}

    def __getitem__(self, name: str) -> float:
        return self._sums[name] / self._count if self._count else float("nan")


def peak_bytes(compiled: Any) -> int:
    """Memory that a compiled step needs on each device, by XLA's account: arguments, results and
    temporaries, what is written over counted once."""
    memory = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


class StepClock:
    """Times of compilation and of steps; the first step after it is not counted among them."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._seconds: list[float] = []
        self._compile_seconds = 0.0
        self._waited = 0.0

    @contextmanager
    def compilation(self) -> Iterator[None]:
        """Times a part of the compilation."""
        began = time.perf_counter()
        yield
        self._compile_seconds += time.perf_counter() - began

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one step; what is inside must wait for the step's result."""
        began = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - began)

    def wait(self, seconds: float) -> None:
        """Counts time for which a step had to wait for its batch."""
        self._waited += seconds

    def compiled(self, step: Any) -> dict[str, Any]:
        """Compilation's time, and the memory that the compiled step needs, by XLA's account."""
        seconds = round(self._compile_seconds, 3)
        return {"compile_seconds": seconds, "peak_bytes": peak_bytes(step)}

    @property
    def step_ms_median(self) -> float:
        """Median time of a step in milliseconds; nan before the first."""
        seconds = self._seconds[1:] or self._seconds
        return 1e3 * float(np.median(seconds)) if seconds else float("nan")

    @property
    def images_per_second(self) -> float:
        """Images per second at the median step."""
        return 1e3 * self._batch_size / self.step_ms_median

    def result(self) -> dict[str, float]:
        busy = sum(self._seconds)
        return {
            "images_per_second": round(self.images_per_second, 3),
            "step_ms_median": round(self.step_ms_median, 3),
            # Share of the time between steps that went into waiting for data
            "data_wait_share": round(self._waited / (self._waited + busy), 5) if busy else 0.0,
        }


class TrainingBar:
    """A progress bar over all steps, with loss, PSNR, speed and the time left.

    On anything but a terminal it prints one line per epoch and no bar.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, *, show: bool = True):
        self._console = Console(stderr=True)
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._show = show
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        self._task = self._progress.add_task(
            "training", total=self._epochs * self._steps_per_epoch, numbers=""
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, means: MeanMetrics, clock: StepClock) -> None:
        """After each step."""
        epoch = (step - 1) // self._steps_per_epoch + 1
        self._progress.update(
            self._task,
            completed=step,
            description=f"epoch {epoch}/{self._epochs}",
            numbers=f"loss {means['loss']:.4f}  PSNR {means['psnr']:.2f} dB  "
            f"{clock.images_per_second:.1f} images/s",
        )

    def epoch_done(self, row: Mapping[str, Any]) -> None:
        """After each epoch, with its row of metrics."""
        if self._show:
            loss = row.get("train_loss", float("nan"))  # where no step of the epoch could be used
            self._console.print(
                f"epoch {row['epoch']:>3}/{self._epochs}  loss {loss:.4f}  "
                f"KL {row['val_kl']:.1f} nats  validation: PSNR {row['val_psnr']:.2f} dB  "
                f"SSIM {row['val_ssim']:.3f}  ({row['images_per_second']:.1f} images/s)",
                highlight=False,
            )
