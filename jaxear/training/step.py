"""One step of training and one of evaluation, as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxear.config import TrainConfig
from jaxear.losses import kl_divergence, objective
from jaxear.metrics import edge_preservation, psnr, ssim
from jaxear.training.state import Leaves, Skeleton, TrainState

Metrics = Mapping[str, jax.Array]


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [b, h, w, 3] -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def make_train_step(
    config: TrainConfig,
    skeleton: Skeleton,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    steps_per_epoch: int,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """The training step: (state, images uint8 [b, h, w, 3]) -> (state, metrics).

    The noise depends on the seed and the step alone, so a resumed run draws what an uninterrupted
    one would have drawn.
    """
    warmup_steps = config.kl_warmup_epochs * steps_per_epoch

    def loss_fn(
        trainable: Leaves, state: TrainState, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Leaves]]:
        model = skeleton.model(trainable, state.frozen, state.buffers)
        target = to_float(images)
        output = model(target, key)
        features = None
        if config.perceptual_weight > 0:
            # The judge is the backbone as it stands: were it to learn from this term, it would
            # learn to see no differences.
            judge = skeleton.model(
                jax.lax.stop_gradient(trainable), state.frozen, state.buffers
            ).backbone
            features = (judge(output.reconstruction), jax.lax.stop_gradient(judge(target)))
        progress = jnp.minimum(1.0, (state.step + 1) / warmup_steps) if warmup_steps else 1.0
        loss, metrics = objective(
            config,
            reconstruction=output.reconstruction,
            target=target,
            mu=output.mu,
            logvar=output.logvar,
            kl_weight=config.kl_weight * progress,
            features=features,
        )
        metrics = {
            **metrics,
            "psnr": jnp.mean(psnr(output.reconstruction, target)),
            "kl_weight": jnp.asarray(config.kl_weight * progress),
        }
        return loss, (metrics, skeleton.buffers_of(model, state.buffers))

    def train_step(state: TrainState, images: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, (metrics, buffers) = jax.grad(loss_fn, has_aux=True)(
            state.trainable, state, images, key
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        metrics = {
            **metrics,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "l2_gradients": optax.tree.norm(gradients),
            "l2_parameters": optax.tree.norm(trainable),
            "l2_updates": optax.tree.norm(updates),
        }
        new_state = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            buffers=buffers,
            opt_state=opt_state,
        )
        return new_state, metrics

    return train_step


def make_eval_step(
    skeleton: Skeleton,
) -> Callable[[TrainState, jax.Array], tuple[Metrics, jax.Array]]:
    """The evaluation step: (state, images uint8 [b, h, w, 3]) -> (metrics [b], reconstructions).

    Images are decoded from their mean codes. The skeleton is that of the model in evaluation mode.
    """

    def eval_step(state: TrainState, images: jax.Array) -> tuple[Metrics, jax.Array]:
        model = skeleton.model(state.trainable, state.frozen, state.buffers)
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
