"""Trains and measures the runs of a study, one after the other, and goes on where it stopped.

What a run has come to is told by its folder alone, so that the program may be killed anywhere:

    measurement.json          it is finished and measured
    failure.json              it failed, for the reason there; given again, the study tries it again
    checkpoints/              it is begun, and goes on from the latest one
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxear.comparison.measurement import MEASUREMENT, WEIGHTS_FILES, measure_run
from jaxear.comparison.plan import (
    PRETRAINED,
    Row,
    Study,
    missing_weights,
    run_folder,
    save_study,
    weights_files,
)
from jaxear.config import TrainConfig
from jaxear.data.pipeline import Batches, load_split
from jaxear.data.records import subject_numbers
from jaxear.errors import UserError
from jaxear.train import train
from jaxear.training.batch import Resident
from jaxear.training.feed import Feed
from jaxear.training.lock import exclusive
from jaxear.training.logging import read_json, write_json
from jaxear.training.program import create_leaves, create_program, lower_step
from jaxear.training.sharding import create_parallel
from jaxear.training.state import create_state

logger = logging.getLogger(__name__)

FAILURE = "failure.json"
PACE = "pace.json"  # of a row, where the budget is in seconds
TIMED_STEPS = 3


def run_study(study: Study, out: Path, *, progress: bool = True) -> None:
    """Train and measure every run of the study that can be and is not yet.

    One seed of all rows comes before the next seed of any, so that a study that is cut short
    compares all of them.

    Args:
        study: the plan.
        out: its folder.
        progress: show bars, on a terminal.

    Raises:
        UserError: the folder holds another study, or the data cannot be used.
        KeyboardInterrupt: it was interrupted; all is saved.
    """
    with exclusive(out):
        save_study(study, out)
        runs = [(row, seed) for seed in range(study.seeds) for row in study.rows()]
        reasons = {row: missing_weights(row) for row in study.rows()}
        open_runs = [
            (row, seed)
            for row, seed in runs
            if not reasons[row] and not (run_folder(out, row, seed) / MEASUREMENT).is_file()
        ]
        print_plan(study, out, reasons)
        if not open_runs:
            return
        steps_per_epoch = _steps_per_epoch(study, out, progress=progress)
        began = time.perf_counter()
        for i, (row, seed) in enumerate(open_runs):
            left = (time.perf_counter() - began) / i * (len(open_runs) - i) / 60 if i else None
            logger.info(
                "Run %d of %d: %s, seed %d%s",
                i + 1,
                len(open_runs),
                row.label,
                seed,
                "" if left is None else f" (about {left:.0f} minutes left, if all took alike)",
            )
            _run_or_record(study, row, seed, out, steps_per_epoch, progress=progress)


def _run_or_record(
    study: Study, row: Row, seed: int, out: Path, steps_per_epoch: int, *, progress: bool
) -> None:
    """One run; where it fails, its reason."""
    folder = run_folder(out, row, seed)
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        config = study.config(row, seed, out)
        config = dataclasses.replace(config, epochs=_epochs(study, row, out, steps_per_epoch))
        _train(config, row, progress=progress)
        measure_run(config, row, seed, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("All is saved; the same command goes on.") from None
    except Exception as error:  # whatever it is, the other runs need not suffer from it
        reason = str(error).strip() or type(error).__name__
        write_json(
            folder / FAILURE,
            {
                "reason": reason
                if isinstance(error, UserError)
                else f"{type(error).__name__}: {reason}",
                "traceback": traceback.format_exc(),
            },
        )
        logger.error(
            "%s, seed %d failed: %s\nThe study goes on; the same command tries it again.",
            row.label,
            seed,
            reason.splitlines()[0],
        )
    finally:
        _release()


def _release() -> None:
    """Lets go of the programs and arrays of a run, which the next one's memory needs."""
    jax.clear_caches()
    gc.collect()


def _train(config: TrainConfig, row: Row, *, progress: bool) -> None:
    """Train from the start, from the latest checkpoint, or not at all where that is done."""
    folder = config.run_dir
    if "pc1" in read_json(folder / "summary.json"):  # the last thing that `train` writes
        return
    if row.weights == PRETRAINED and not (folder / WEIGHTS_FILES).is_file():
        files = [file._asdict() for file in weights_files(row.backbone)]
        write_json(folder / WEIGHTS_FILES, {"files": files})
    checkpoints = folder / "checkpoints"
    begun = checkpoints.is_dir() and any(c.name.isdigit() for c in checkpoints.iterdir())
    train(config, resume=begun, progress=progress)


def _steps_per_epoch(study: Study, out: Path, *, progress: bool) -> int:
    """Steps of an epoch, the same for all rows; reads the data, so that its faults come first."""
    config = study.config(study.rows()[0], 0, out)
    for split in ("val", "test"):
        load_split(config, split, progress=progress)
    training = load_split(config, "train", progress=progress)
    return Batches(training, batch_size=config.batch_size, seed=0).steps_per_epoch


def _epochs(study: Study, row: Row, out: Path, steps_per_epoch: int) -> int:
    """The budget in whole epochs, to the nearest, one at least."""
    steps = study.budget_steps or 0
    if study.budget_seconds is not None:
        path = run_folder(out, row, 0).parent / PACE
        pace = read_json(path).get("seconds_per_step")
        if pace is None:
            logger.info("Timing a step of %s", row.label)
            pace = seconds_per_step(study.config(row, 0, out))
            write_json(path, {"seconds_per_step": pace})
        steps = study.budget_seconds / pace
    return max(1, round(steps / steps_per_epoch))


def seconds_per_step(config: TrainConfig) -> float:
    """Median time of a training step once it is compiled, on the run's own images."""
    ears = load_split(config, "train", progress=False)
    parallel = create_parallel(config.parallel, config.batch_size, config.accumulate)
    program = create_program(config, parallel, 1000)
    compiled = lower_step(program, config, parallel, Resident()).compile()
    leaves = create_leaves(program, config)
    state = create_state(leaves, program.optimizer, average=config.ema_decay > 0)
    state, resident = parallel.put_state(state), parallel.put_resident(Resident())
    batches = Batches(ears, batch_size=config.batch_size, seed=config.seed)
    batch: Any = next(Feed(batches, subject_numbers(ears.records), parallel).iterate(0, 1))
    taken = []
    for _ in range(TIMED_STEPS + 1):
        began = time.perf_counter()
        state, metrics = compiled(state, resident, batch)
        parallel.scalars(metrics)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[TIMED_STEPS // 2]  # the first one warms up


def print_plan(study: Study, out: Path, reasons: dict[Row, str]) -> None:
    """What there is to do, and what cannot be done and why."""
    table = Table(
        title=f"The study in {out}: {study.budget}, batch {study.settings.get('batch_size')}, "
        f"{study.settings.get('latent_dim')} numbers per ear",
        caption="Ctrl-C saves and stops; the same command goes on.",
    )
    table.add_column("row")
    table.add_column("state")
    for row in study.rows():
        done = sum(
            (run_folder(out, row, seed) / MEASUREMENT).is_file() for seed in range(study.seeds)
        )
        seeds = f"{study.seeds} seed{'s' * (study.seeds > 1)}"
        state = f"{done} of {seeds} measured" if done else f"{seeds} to run"
        table.add_row(row.label, f"not run: {reasons[row]}" if reasons[row] and not done else state)
    Console(stderr=True).print(table)
