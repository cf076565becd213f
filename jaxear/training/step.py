"""One step of training and one of evaluation, as pure functions of arrays.

They know nothing of devices: `sharding` compiles them for one, for many, or for many hosts. Under
`jax.pmap` alone they are told the name of the mapped axis, to average over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxear.config import TrainConfig
from jaxear.data.augment import augment
from jaxear.losses import kl_divergence, objective
from jaxear.metrics import edge_preservation, psnr, ssim
from jaxear.perceptual import Judge
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.packing import pack, unpack
from jaxear.training.state import Leaves, Skeleton, TrainState
from jaxear.vae import EarVAE, reparameterize

Metrics = Mapping[str, jax.Array]
TrainStep = Callable[[TrainState, Resident, TrainBatch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, jax.Array], tuple[Metrics, jax.Array]]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [b, h, w, 3] -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def make_train_step(
    config: TrainConfig,
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    steps_per_epoch: int,
    *,
    judge: Judge | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """The training step: (state, resident, batch) -> (state, metrics).

    Random numbers depend on the seed, the step and an image's place in the batch alone: neither on
    the devices that share the batch, nor on whether the run was interrupted.

    A step whose loss or gradients are not finite changes nothing but the count of such steps.

    Args:
        config: the settings of objective, augmentation and optimisation.
        skeleton: the model in training mode.
        optimizer, schedule: what moves the parameters, packed (`packing`), and the rate to report.
        steps_per_epoch: the unit of the warm-up of the KL weight.
        judge: the network of the perceptual term; by default the backbone itself.
        axis_name: the axis of `jax.pmap` that the batch is cut along, if it is.
    """
    warmup_steps = config.kl_warmup_epochs * steps_per_epoch

    def forward(
        model: EarVAE, batch: TrainBatch, resident: Resident, key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Reconstructions [b, h, w, 3], and what the objective compares them with."""
        images = resident.images[batch.rows] if batch.images is None else batch.images  # type: ignore[index]
        target, visible = to_float(images), None
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(batch.positions)
        if batch.features is not None:
            mu, logvar = model.encode(target, batch.features)
        else:
            view = augment(target, jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), config)
            mu, logvar = model.encode(view.input)
            target = view.target
            visible = view.visible if config.aug_occlusion > 0 else None
        noise = jax.vmap(lambda k: jax.random.normal(k, mu.shape[1:], mu.dtype))(keys)
        reconstruction = model.decode(reparameterize(mu, logvar, noise))
        return reconstruction, {"target": target, "visible": visible, "mu": mu, "logvar": logvar}

    def loss_fn(
        trainable: Leaves, state: TrainState, buffers: Leaves, resident: Resident, batch: TrainBatch
    ) -> tuple[jax.Array, tuple[Metrics, Leaves]]:
        model = skeleton.model(trainable, state.frozen, buffers)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        reconstruction, facts = forward(model, batch, resident, key)
        features = None
        if config.perceptual_weight > 0:
            see = _judge(judge, skeleton, trainable, state, resident)
            features = (see(reconstruction), jax.lax.stop_gradient(see(facts["target"])))
        progress = jnp.minimum(1.0, (state.step + 1) / warmup_steps) if warmup_steps else 1.0
        kl_weight = jnp.asarray(config.kl_weight * progress)
        loss, metrics = objective(
            config,
            reconstruction=reconstruction,
            kl_weight=kl_weight,
            features=features,
            subjects=batch.subjects,
            axis_name=axis_name,
            **facts,
        )
        metrics = {
            **metrics,
            "psnr": jnp.mean(psnr(reconstruction, facts["target"])),
            "kl_weight": kl_weight,
        }
        return loss, (metrics, skeleton.buffers_of(model, buffers))

    def gradients_of(
        state: TrainState, resident: Resident, batch: TrainBatch
    ) -> tuple[Leaves, Metrics, Leaves]:
        """Gradients and metrics of the batch, in as many parts as configured; the new buffers."""
        gradient = jax.grad(loss_fn, has_aux=True)
        if config.accumulate == 1:
            gradients, (metrics, buffers) = gradient(
                state.trainable, state, state.buffers, resident, batch
            )
            return gradients, metrics, buffers

        def part(buffers: Leaves, part: TrainBatch) -> tuple[Leaves, tuple[Leaves, Metrics]]:
            gradients, (metrics, buffers) = gradient(
                state.trainable, state, buffers, resident, part
            )
            return buffers, (gradients, metrics)

        # Every n-th image rather than n-th of the batch, so that each device keeps its images.
        def cut(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(-1, config.accumulate, *x.shape[1:]), 1, 0)

        return _mean_over_parts(part, state.buffers, jax.tree.map(cut, batch))

    def train_step(
        state: TrainState, resident: Resident, batch: TrainBatch
    ) -> tuple[TrainState, Metrics]:
        gradients, metrics, buffers = gradients_of(state, resident, batch)
        if axis_name is not None:
            gradients, metrics = jax.lax.pmean((gradients, metrics), axis_name)
        gradients, parameters, average = map(pack, (gradients, state.trainable, state.average))
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, parameters)
        trainable: Any = optax.apply_updates(parameters, updates)
        old = (parameters, state.buffers, state.opt_state, average)
        if config.ema_decay > 0:
            # As long as few steps were made, the average follows them closely.
            decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(trainable, average, 1 - decay)
        metrics = {
            **metrics,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "l2_gradients": norm,
        }
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = (trainable, buffers, opt_state, average)
        kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        trainable, buffers, opt_state, average = kept
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        new_state = TrainState(
            step=state.step + 1,
            trainable=unpack(trainable, state.trainable),
            frozen=state.frozen,
            buffers=buffers,
            opt_state=opt_state,
            average=unpack(average, state.average),
            bad_steps=bad_steps,
        )
        return new_state, {**metrics, "bad_steps": bad_steps}

    return train_step


def _judge(
    judge: Judge | None,
    skeleton: Skeleton,
    trainable: Leaves,
    state: TrainState,
    resident: Resident,
) -> Callable[[jax.Array], Any]:
    """Images -> the features that the perceptual term compares."""
    if judge is not None:
        return lambda images: judge.features(resident.judge, images)
    # The backbone as it stands: were it to learn from this term, it would learn to see no
    # differences.
    return skeleton.model(jax.lax.stop_gradient(trainable), state.frozen, state.buffers).backbone


def _mean_over_parts(
    part: Callable[[Leaves, TrainBatch], tuple[Leaves, tuple[Leaves, Metrics]]],
    buffers: Leaves,
    parts: TrainBatch,
) -> tuple[Leaves, Metrics, Leaves]:
    """Means of gradients and metrics over parts of a batch, with one part's memory at a time."""
    n = parts.rows.shape[0]
    _, shapes = jax.eval_shape(part, buffers, jax.tree.map(lambda x: x[0], parts))

    def add(carry: Any, one: TrainBatch) -> tuple[Any, None]:
        buffers, sums = carry
        buffers, values = part(buffers, one)
        return (buffers, jax.tree.map(lambda s, v: s + v / n, sums, values)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (buffers, (gradients, metrics)), _ = jax.lax.scan(add, (buffers, zeros), parts)
    return gradients, metrics, buffers


def make_eval_step(skeleton: Skeleton) -> EvalStep:
    """The evaluation step: (state, images uint8 [b, h, w, 3]) -> (metrics [b], reconstructions).

    Images are decoded from their mean codes. The skeleton is that of the model in evaluation mode.
    """

    def eval_step(state: TrainState, images: jax.Array) -> tuple[Metrics, jax.Array]:
        model = skeleton.model(*state.leaves)
        target = to_float(images)
        mu, logvar = model.encode(target)
        reconstruction = model.decode(mu)
        metrics = {
            "psnr": psnr(reconstruction, target),
            "ssim": ssim(reconstruction, target),
            "edge": edge_preservation(reconstruction, target),
            "mse": jnp.mean(jnp.square(reconstruction - target), axis=(1, 2, 3)),
            "kl": kl_divergence(mu, logvar),
        }
        return metrics, reconstruction

    return eval_step
