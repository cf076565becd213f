"""Train a variational autoencoder of ears: `python -m jaxear.train`, or `jaxear train`."""

from __future__ import annotations

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # before the imports below, which take seconds

import dataclasses
import gc
import logging
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxear import figures
from jaxear.backbones.registry import full_name
from jaxear.command import run_command
from jaxear.config import AUTO_BATCH_SIZE, TrainConfig, from_dict
from jaxear.data.pipeline import load_split
from jaxear.data.records import subject_numbers
from jaxear.errors import UserError
from jaxear.model import load_config
from jaxear.options import parse_train_options
from jaxear.training import distributed
from jaxear.training.disk import disk_may_be_full
from jaxear.training.distributed import any_process, is_main
from jaxear.training.evaluation import evaluate_images
from jaxear.training.features import prepare_features
from jaxear.training.feed import Feed, create_batches, stays_on_device
from jaxear.training.forecast import forecast, print_forecast, with_batch_size
from jaxear.training.inherit import inherit
from jaxear.training.interrupt import Interrupt
from jaxear.training.lock import exclusive
from jaxear.training.logging import MetricsLog, read_json, write_json
from jaxear.training.meters import MeanMetrics, StepClock, TrainingBar
from jaxear.training.program import (
    check,
    create_leaves,
    create_program,
    lower_step,
    resident_arrays,
)
from jaxear.training.sharding import create_parallel
from jaxear.training.state import Partition, create_state
from jaxear.training.summary import run_facts
from jaxear.training.watch import Watch

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model as configured, or go on with a run that stopped, and make its eigenears.

    In a run of several processes all of them call this, after `distributed.initialize`; the first
    writes what people read.

    Args:
        config: all settings; the run is written to `config.run_dir`.
        resume: go on from the latest checkpoint of that directory.
        progress: show a progress bar.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: the settings, the data or the directory cannot be used; the disk is full; or
            steps keep failing. What was trained until then is saved.
        KeyboardInterrupt: the run was interrupted; its state has been saved.
    """
    check(config)
    parallel = create_parallel(config.parallel, config.batch_size, config.accumulate)
    run_dir = config.run_dir
    _check_run_dir(run_dir, resume)
    if resume and config.batch_size == AUTO_BATCH_SIZE:
        config = dataclasses.replace(config, batch_size=load_config(run_dir).batch_size)
    progress = progress and is_main()

    # Data
    ears = load_split(config, "train", progress=progress)
    config = with_batch_size(config, ears)
    batches = create_batches(config, ears)
    val_images = load_split(config, "val", progress=progress).images
    steps_per_epoch = batches.steps_per_epoch
    logger.info("%d images to train on, %d to validate", len(ears), len(val_images))

    # Model and optimiser
    program = create_program(config, parallel, steps_per_epoch)
    resident = stays_on_device(config, len(ears) * val_images[0].nbytes)
    constants = resident_arrays(program, ears.images if resident else None)
    eval_step = parallel.compile_eval(program.eval_step)

    with (
        exclusive(run_dir) if is_main() else nullcontext(),
        disk_may_be_full(run_dir),
        ExitStack() as contexts,
        Interrupt() as interrupt,
    ):
        if is_main():
            config.save(run_dir / "config.yaml")

        # The step, compiled ahead of time so that its cost and its memory are known. XLA does so
        # beside what follows, which takes as long; tracing would only take turns with it
        clock = StepClock(config.batch_size)
        with clock.compilation():
            lowered = lower_step(program, config, parallel, constants)

        def compile_timed() -> Any:
            with clock.compilation():
                return lowered.compile()

        compiler = ThreadPoolExecutor(1)
        compiling = compiler.submit(compile_timed)
        compiler.shutdown(wait=False)

        # Imported meanwhile, as Orbax takes long
        from jaxear.training.checkpoints import BEST_METRIC, Checkpoints

        checkpoints = contexts.enter_context(
            Checkpoints(
                run_dir / "checkpoints",
                keep_best=config.keep_best,
                minutes=config.checkpoint_minutes,
            )
        )

        # What lies on the devices
        leaves = create_leaves(program, config, images=None if resume else ears.images)
        if config.init_from is not None and not resume:
            leaves = start_from(leaves, config)
        features = None
        if config.cache_features:
            features = prepare_features(
                config, program.eval_skeleton, leaves, ears, progress=progress
            )
        state = create_state(leaves, program.optimizer, average=config.ema_decay > 0)
        summary = (read_json(run_dir / "summary.json") if resume else {}) | run_facts(config, state)
        state = parallel.put_state(state)
        step = 0
        if resume:
            saved = checkpoints.restore_latest(like=parallel.savable(state))
            step = int(saved.step)
            state = parallel.put_state(saved)
            del saved
        # The arrays that the model began with lie beside those of the state: let them go.
        del leaves
        constants = parallel.put_resident(constants)
        feed = Feed(
            batches, subject_numbers(ears.records), parallel, resident=resident, features=features
        )

        compiled = compiling.result()
        summary |= clock.compiled(compiled)

        log = MetricsLog(run_dir, resume_step=step)
        watch = Watch(config, ears.records, batches)
        with TrainingBar(config.epochs, steps_per_epoch, show=progress) as bar:
            for epoch in range(step // steps_per_epoch, config.epochs):
                if log.gained_nothing_for(config.patience):
                    logger.info("Validation PSNR has not risen for %d epochs.", config.patience)
                    break

                # One epoch of steps
                means = MeanMetrics()
                end = (epoch + 1) * steps_per_epoch
                for batch in feed.iterate(step, end):
                    with clock.step():
                        state, metrics = compiled(state, constants, batch)
                        metrics = parallel.scalars(metrics)
                    step += 1
                    clock.wait(feed.take_waited())
                    means.add(metrics)
                    bar.update(step, means, clock)
                    watch.step(step, metrics)
                    stopping = any_process(interrupt.requested)
                    due = stopping or any_process(checkpoints.is_due())
                    if due and step < end and watch.well:
                        checkpoints.save(parallel.savable(state))
                    if stopping or watch.failed:
                        break

                # Validation, pictures, checkpoint
                if step == end and not watch.failed:
                    validation, grid = evaluate_images(
                        eval_step, state, val_images, parallel, config
                    )
                    row = {"epoch": epoch + 1, "step": step}
                    row |= means.result("train_") | validation | clock.result()
                    log.write(row)
                    log.add_image("reconstructions", grid, step)
                    if watch.well and math.isfinite(validation[BEST_METRIC]):
                        checkpoints.save(parallel.savable(state), validation)
                    bar.epoch_done(row)
                    summary |= {"epochs": epoch + 1, "steps": step}
                    summary |= validation | clock.result()
                    if is_main():
                        figures.save_image(run_dir / "samples" / f"epoch_{epoch + 1:04d}.png", grid)
                        write_json(run_dir / "summary.json", summary)

                if watch.failed:
                    checkpoints.wait()
                    raise UserError(watch.report(run_dir, checkpoints.steps()))
                if any_process(interrupt.requested) and step < config.epochs * steps_per_epoch:
                    checkpoints.wait()
                    raise KeyboardInterrupt(
                        f"The run is saved at step {checkpoints.find('latest')}. Go on with: "
                        f"jaxear train --out {run_dir} --resume"
                    )
        log.close()

    # Eigenears of the best checkpoint
    if is_main():
        # Imported here for the sake of the first step: statistics and figures take seconds.
        from jaxear.eigenears import write_eigenears

        eigenears = write_eigenears(run_dir, progress=progress)
        ratios = eigenears.explained_variance_ratio_
        summary |= {"pc1": float(ratios[0]), "pc_first5": float(ratios[:5].sum())}
        write_json(run_dir / "summary.json", summary)
        logger.info("The run is in %s, its eigenears in %s", run_dir, run_dir / "eigenears")
    return summary


def start_from(leaves: Partition, config: TrainConfig) -> Partition:
    """The leaves with those of the run `config.init_from` in place of them, as far as they fit."""
    run_dir = str(config.init_from)
    before = load_config(run_dir)
    taken, _ = inherit(
        {name: leaf.shape for group in leaves for name, leaf in group.items()},
        run_dir,
        same_backbone=full_name(before.backbone) == full_name(config.backbone),
    )
    return Partition(*({n: taken.get(n, leaf) for n, leaf in group.items()} for group in leaves))


def train_stages(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> None:
    """Train the stages of a configuration one after the other, each from the model before it.

    Stage i is a run of its own in `stage<i>/` of the run's directory. Resuming passes over the
    stages that are finished.

    Raises:
        UserError: a stage sets something that is not a setting; and as `train`.
    """
    run_dir = config.run_dir
    if not resume and (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} already holds a run. Go on by --resume, or give another --out.")
    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(run_dir / "config.yaml")
    previous = config.init_from
    for i, settings in enumerate(config.stages, start=1):
        values = {**dataclasses.asdict(config), "out": str(run_dir / f"stage{i}"), "stages": []}
        stage = from_dict({**values, "init_from": previous, **settings})
        begun = _has_checkpoints(stage.run_dir)
        logger.info("Stage %d of %d: %s", i, len(config.stages), settings)
        train(stage, resume=resume and begun, progress=progress)
        previous = stage.out


def tell_cost(config: TrainConfig) -> None:
    """Print what a run, or each of its stages, would cost."""
    for stage in [{**settings, "stages": []} for settings in config.stages] or [{}]:
        facts = forecast(from_dict({**dataclasses.asdict(config), **stage}))
        if is_main():
            print_forecast(facts, Console())


def _has_checkpoints(run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def _check_run_dir(run_dir: Path, resume: bool) -> None:
    if not resume and _has_checkpoints(run_dir):
        raise UserError(
            f"{run_dir} already holds a run. Go on with it by --resume, or give another --out."
        )
    if resume and not (run_dir / "config.yaml").is_file():
        raise UserError(f"There is no run to resume in {run_dir}: it has no config.yaml.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> Any:
        config, resume, dry_run = parse_train_options(argv)
        distributed.initialize(config)
        if dry_run:
            return tell_cost(config)
        run = train_stages if config.stages else train
        return run(config, resume=resume)

    return run_command(command)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: looking through it again and again takes a second
    sys.exit(main())
