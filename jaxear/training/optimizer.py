"""AdamW with a schedule, its rates and decay by a parameter's place in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from jaxear.config import OptimConfig
from jaxear.training.packing import is_kernel
from jaxear.training.state import Leaves, Partition, Path, Skeleton, split_model
from jaxear.vae import EarVAE


def trainable_parameters(model: EarVAE, freeze: str | int, image_size: int) -> frozenset[str]:
    """The dotted paths of the parameters that the optimiser moves.

    Not among them are the backbone's stem and first N blocks, or all of it, as `freeze` says, the
    pixel path, which is fitted before, nor parameters on which no code depends: what lies deeper
    than the features in use gets no gradient, and weight decay alone would wear it away.
    """
    skeleton, leaves = split_model(model)
    used = _leaves_of_codes(skeleton, leaves, image_size)

    def is_free(name: str, path: Path) -> bool:
        for prefix, backbone in model.backbones.items():
            if path[: len(prefix)] == prefix:
                if name not in used:
                    return False
                if freeze in ("none", "all"):
                    return freeze == "none"
                depth = backbone.encoder.block_index(path[len(prefix) :])
                return int(freeze) == 0 or depth > int(freeze)
        return path[0] != "pixels"

    return frozenset(name for name in leaves.trainable if is_free(name, skeleton.paths[name]))


def _leaves_of_codes(skeleton: Skeleton, leaves: Partition, image_size: int) -> set[str]:
    """The leaves on which a code depends, as JAX finds when it drops unused arguments."""
    arrays = {**leaves.trainable, **leaves.frozen, **leaves.buffers}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)

    def encode(arrays: Leaves, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return skeleton.model(arrays).encode(images)

    exported = jax.export.export(jax.jit(encode), platforms=["cpu"])(abstract, images)
    names = sorted(arrays)  # the order in which JAX flattens a dictionary
    return {names[i] for i in exported.module_kept_var_idx if i < len(names)}


def create_schedule(config: OptimConfig, steps_per_epoch: int) -> optax.Schedule:
    """Steps done -> learning rate: a linear warm-up, then half a cosine down to 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=total,
    )


def rate_scales(model: EarVAE, config: OptimConfig) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by, by its dotted path.

    1 for head and decoder; for the backbone its own scale, times `layer_decay` for every block from
    the parameter's own to the last: lower layers, which see what all images have in common, move
    least (Bao et al., "BEiT" (2022), section 3.1; Clark et al., "ELECTRA" (2020)). What lies beyond
    the last block has the backbone's scale alone.
    """
    skeleton, leaves = split_model(model)

    def scale(path: Path) -> float:
        for prefix, backbone in model.backbones.items():
            if path[: len(prefix)] == prefix:
                encoder = backbone.encoder
                above = encoder.n_blocks + 1 - encoder.block_index(path[len(prefix) :])
                return config.backbone_lr_scale * config.layer_decay**above
        return 1.0

    return {name: scale(skeleton.paths[name]) for name in leaves.trainable}


def create_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    rate_scales: Mapping[str, float | np.ndarray] | None = None,
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with the decay on matrices and kernels alone.

    Its parameters are leaves by their names, packed (`packing.pack`) or not.

    Args:
        config: clipping and decay.
        schedule: steps done -> learning rate.
        rate_scales: parameter -> what its rate is multiplied by; see `rate_scales`, and
            `packing.pack_factors`. By default all have the schedule's.
    """

    def decayed(params: Any) -> dict[str, bool]:
        return {name: is_kernel(name) for name in params}

    def scale(updates: Any, params: Any = None) -> Leaves:
        if rate_scales is None:
            return updates
        return {name: update * rate_scales[name] for name, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decayed),
        optax.stateless(scale),
    )
