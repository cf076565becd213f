"""The bar that is shown while photographs are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.text import Text


class _SpeedColumn(TextColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} images/s")


@contextmanager
def reading_bar(show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears with the first call report(done, total), if wanted and on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _SpeedColumn(""),
        RemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:

        def report(done: int, total: int) -> None:
            if not bar.task_ids:
                bar.add_task("Reading images", total=total)
            bar.update(bar.task_ids[0], completed=done)

        yield report
