"""What a run computes, put together from its settings: model, optimiser, steps."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import optax

from jaxear.backbones.registry import check_choice
from jaxear.config import TrainConfig, validate
from jaxear.model import create_vae, random_stream
from jaxear.perceptual import Judge, create_judge
from jaxear.pixel_path import fit_pixel_path
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.optimizer import (
    create_optimizer,
    create_schedule,
    rate_scales,
    trainable_parameters,
)
from jaxear.training.packing import pack_factors
from jaxear.training.sharding import Parallel
from jaxear.training.state import Partition, Skeleton, TrainState, create_state, split_model
from jaxear.training.step import EvalStep, TrainStep, make_eval_step, make_train_step


@dataclass(frozen=True)
class Program:
    """The parts of a run that know neither its data nor its devices, nor its model's arrays.

    Attributes:
        shapes: the shapes and dtypes of the model's arrays, which `create_leaves` makes.
        eval_skeleton: the model in evaluation mode, without its arrays.
        optimizer: what moves the parameters.
        judge: the network of the perceptual term, where it is one of its own.
        train_step, eval_step: pure functions, not compiled.
    """

    shapes: Partition
    eval_skeleton: Skeleton
    optimizer: optax.GradientTransformation
    judge: Judge | None
    train_step: TrainStep
    eval_step: EvalStep


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work, and weights that are missing, before an image is read.

    Raises:
        UserError: says what to change, or which command makes the weights.
    """
    validate(config)
    size = config.image_size
    check_choice(
        config.backbone, image_size=size, weights=config.weights, **config.backbone_options
    )
    if config.perceptual_weight > 0 and config.perceptual == "vgg16":
        check_choice("vgg16", image_size=size)


def create_program(config: TrainConfig, parallel: Parallel, steps_per_epoch: int) -> Program:
    """Put together everything that trains the model; of its own arrays none is drawn or loaded.

    Args:
        config: all settings.
        parallel: how the devices share the work.
        steps_per_epoch: the unit of warm-ups and of the schedule.

    Raises:
        UserError: a setting cannot be used, or weights are missing.
    """
    rngs = random_stream(config.seed)
    model = create_vae(config, config.image_size, rngs=rngs, abstract=True)
    model.train()
    trainable = trainable_parameters(model, config.freeze, config.image_size)
    skeleton, shapes = split_model(model, trainable)
    scales = pack_factors(rate_scales(model, config), shapes.trainable)
    model.eval()
    eval_skeleton, _ = split_model(model)
    schedule = create_schedule(config, steps_per_epoch)
    optimizer = create_optimizer(config, schedule, scales)
    judge = create_judge(config, config.image_size)
    train_step = make_train_step(
        config,
        skeleton,
        optimizer,
        schedule,
        steps_per_epoch,
        judge=judge,
        axis_name=parallel.axis_name,
    )
    return Program(
        shapes, eval_skeleton, optimizer, judge, train_step, make_eval_step(eval_skeleton)
    )


def create_leaves(
    program: Program, config: TrainConfig, *, images: np.ndarray | None = None
) -> Partition:
    """The model's arrays before the first step: weights as configured, all else from random.

    Args:
        program: what was put together for these settings.
        config: all settings.
        images: the training images, uint8 [n, H, W, 3], which a pixel path is fitted to; without
            them it stays empty.

    Raises:
        UserError: weights are missing, or do not fit.
    """
    model = create_vae(config, config.image_size, rngs=random_stream(config.seed))
    if images is not None and model.pixels is not None:
        fit_pixel_path(model.pixels, images, config)
    return split_model(model, program.shapes.trainable)[1]


def _state_shapes(program: Program, config: TrainConfig) -> TrainState:
    """The shapes and dtypes of the run's state."""
    return jax.eval_shape(
        lambda leaves: create_state(leaves, program.optimizer, average=config.ema_decay > 0),
        program.shapes,
    )


def blank_batch(program: Program, config: TrainConfig, *, resident: bool) -> TrainBatch:
    """A process's share of a batch of zeros, with what the run's batches have, on the host.

    `resident` says that the images lie on the device, so that a batch has only their numbers.
    """
    n, size = config.batch_size // jax.process_count(), config.image_size
    rows = np.zeros(n, np.int32)
    images = None if resident else np.zeros((n, size, size, 3), np.uint8)
    features = None
    if config.cache_features:
        floats = jax.ShapeDtypeStruct((n, size, size, 3), np.float32)
        shapes = jax.eval_shape(
            lambda leaves, x: program.eval_skeleton.model(*leaves).backbone(x),
            program.shapes,
            floats,
        )
        features = jax.tree.map(lambda map_: np.zeros(map_.shape, np.float32), shapes)
    return TrainBatch(rows, np.arange(n, dtype=np.int32), rows, images, features)


def lower_step(
    program: Program, config: TrainConfig, parallel: Parallel, constants: Resident
) -> jax.stages.Lowered:
    """The training step, traced for a run and ready to be compiled.

    Of what stays on the devices shapes alone matter.
    """
    batch = blank_batch(program, config, resident=constants.images is not None)
    return parallel.lower_train(
        program.train_step, _state_shapes(program, config), constants, batch
    )


def resident_arrays(program: Program, images: np.ndarray | None) -> Resident:
    """What stays on the devices: the training images, if they do, and the judge's arrays."""
    return Resident(images, {} if program.judge is None else program.judge.leaves)
