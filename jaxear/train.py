"""Train a variational autoencoder of ears: `python -m jaxear.train`, or `jaxear train`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxear import figures
from jaxear.backbones.registry import full_name
from jaxear.command import run_command
from jaxear.config import TrainConfig, from_dict, validate
from jaxear.data.pipeline import Batches, load_split
from jaxear.eigenears import write_eigenears
from jaxear.errors import UserError
from jaxear.model import create_vae, load_config, random_stream
from jaxear.options import parse_train_options
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.evaluation import evaluate_images
from jaxear.training.inherit import inherit
from jaxear.training.interrupt import Interrupt
from jaxear.training.logging import MetricsLog, read_json, write_json
from jaxear.training.meters import MeanMetrics, StepClock, TrainingBar
from jaxear.training.optimizer import create_optimizer, create_schedule, trainable_parameters
from jaxear.training.sharding import DataParallel
from jaxear.training.state import Partition, create_state, split_model
from jaxear.training.step import make_eval_step, make_train_step
from jaxear.training.summary import run_facts

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a model as configured, or go on with a run that stopped, and make its eigenears.

    Args:
        config: all settings; the run is written to `config.run_dir`.
        resume: go on from the latest checkpoint of that directory.
        progress: show a progress bar.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: the settings, the data or the directory cannot be used.
        KeyboardInterrupt: the run was interrupted; its state has been saved.
    """
    validate(config)
    parallel = DataParallel.over_local_devices()
    parallel.check_batch_size(config.batch_size)
    run_dir = config.run_dir
    _check_run_dir(run_dir, resume)

    # Data
    batches = Batches(load_split(config, "train", progress=progress).images, config)
    val_images = load_split(config, "val", progress=progress).images
    steps_per_epoch = batches.steps_per_epoch
    logger.info("%d images to train on, %d to validate", len(batches.images), len(val_images))

    # Model and optimiser
    model = create_vae(config, config.image_size, rngs=random_stream(config.seed))
    model.train()
    trainable = trainable_parameters(model, config.freeze, config.image_size)
    skeleton, leaves = split_model(model, trainable)
    model.eval()
    eval_skeleton, _ = split_model(model)
    schedule = create_schedule(config, steps_per_epoch)
    optimizer = create_optimizer(config, schedule)
    if config.init_from is not None and not resume:
        leaves = start_from(leaves, config)
    state = parallel.put_state(create_state(leaves, optimizer))
    del leaves

    run_dir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run_dir / "checkpoints") as checkpoints, Interrupt() as interrupt:
        if resume:
            state = checkpoints.restore(checkpoints.find("latest"), like=state)
            logger.info("Going on after step %d", int(state.step))
        config.save(run_dir / "config.yaml")
        log = MetricsLog(run_dir, resume_step=int(state.step))
        summary = (read_json(run_dir / "summary.json") if resume else {}) | run_facts(config, state)

        # The step, compiled ahead of time so that its cost and its memory are known
        clock = StepClock(config.batch_size)
        example = parallel.put_batch(batches.images[: config.batch_size])
        with clock.compilation():
            train_step = (
                jax.jit(
                    make_train_step(config, skeleton, optimizer, schedule, steps_per_epoch),
                    donate_argnums=0,
                )
                .lower(state, example)
                .compile()
            )
        eval_step = jax.jit(make_eval_step(eval_skeleton))
        summary |= clock.compiled(train_step)

        with TrainingBar(config.epochs, steps_per_epoch, show=progress) as bar:
            step = int(state.step)
            for epoch in range(step // steps_per_epoch, config.epochs):
                # One epoch of steps
                means = MeanMetrics()
                for images in batches.epoch(epoch, start=step % steps_per_epoch):
                    with clock.step():
                        state, metrics = train_step(state, parallel.put_batch(images))
                        means.add(jax.device_get(metrics))
                    step = int(state.step)
                    bar.update(step, means, clock)
                    if interrupt.requested and step % steps_per_epoch:
                        checkpoints.save(state)
                        break

                # Validation, pictures, checkpoint
                if step % steps_per_epoch == 0:
                    validation, grid = evaluate_images(
                        eval_step, state, val_images, parallel, config
                    )
                    row = {"epoch": epoch + 1, "step": step}
                    row |= means.result("train_") | validation | clock.result()
                    log.write(row)
                    figures.save_image(run_dir / "samples" / f"epoch_{epoch + 1:04d}.png", grid)
                    log.add_image("reconstructions", grid, step)
                    checkpoints.save(state, validation)
                    bar.epoch_done(row)
                    summary |= {"epochs": epoch + 1, "steps": step}
                    summary |= validation | clock.result()
                    write_json(run_dir / "summary.json", summary)

                if interrupt.requested and step < config.epochs * steps_per_epoch:
                    checkpoints.wait()
                    raise KeyboardInterrupt(
                        f"The run is saved at step {step}. Go on with: "
                        f"jaxear train --out {run_dir} --resume"
                    )
        log.close()

    # Eigenears of the best checkpoint
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


def _has_checkpoints(run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def _check_run_dir(run_dir: Path, resume: bool) -> None:
    started = _has_checkpoints(run_dir)
    if started and not resume:
        raise UserError(
            f"{run_dir} already holds a run. Go on with it by --resume, or give another --out."
        )
    if resume and not started:
        raise UserError(f"There is no run to resume in {run_dir}: it has no checkpoints.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        config, resume = parse_train_options(argv)
        run = train_stages if config.stages else train
        run(config, resume=resume)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
