"""From settings, or from a run's directory, to a model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.backbones.registry import create_backbone, without_arrays
from jaxear.config import ModelConfig, TrainConfig
from jaxear.errors import UserError
from jaxear.options import parse_train_options
from jaxear.pixel_path import PixelPath
from jaxear.training.state import split_model
from jaxear.vae import (
    Decoder,
    EarVAE,
    FusedHead,
    LatentEncoder,
    LatentHead,
    create_head,
    feature_shapes,
)


def compute_dtype(name: str) -> Any:
    """The dtype called `name`; "auto" is bfloat16 where there is an accelerator, else float32."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def create_vae(
    config: ModelConfig, image_size: int, *, rngs: nnx.Rngs, abstract: bool = False
) -> EarVAE:
    """Build a model: the backbone with its weights as configured, head and decoder from random.

    Args:
        config: the model's settings.
        image_size: side of the square images, in pixels.
        rngs: the source of the random initialisation.
        abstract: draw and load nothing; in place of its arrays the model has their shapes and
            dtypes, as a file of weights may determine them.

    Raises:
        UserError: a setting cannot be used, or the backbone's weights are missing.
    """
    dtype = compute_dtype(config.dtype)
    size = (image_size, image_size)
    backbone = create_backbone(
        config.backbone,
        image_size=size,
        weights=config.weights,
        abstract=abstract,
        dtype=dtype,
        rngs=rngs,
        features=config.features,
        **config.backbone_options,
    )
    shapes = feature_shapes(backbone, size)

    def random_parts(
        rngs: nnx.Rngs,
    ) -> tuple[LatentHead | FusedHead, Decoder, PixelPath | None]:
        correction = config.pixel_components > 0
        head = create_head(
            shapes,
            config.latent_dim,
            width=config.head_width,
            correction=correction,
            dtype=dtype,
            rngs=rngs,
        )
        decoder = Decoder(
            config.latent_dim,
            image_size=size,
            channels=config.decoder_channels,
            remat=config.remat,
            correction=correction,
            dtype=dtype,
            rngs=rngs,
        )
        pixels = None
        if correction:
            pixels = PixelPath(
                config.pixel_components,
                config.latent_dim,
                size,
                registered=config.pixel_registration,
                rngs=rngs,
            )
        return head, decoder, pixels

    # Compiled as one program: one by one, the random draws take many times as long to compile.
    head, decoder, pixels = (
        without_arrays(random_parts) if abstract else nnx.jit(random_parts)(rngs)
    )
    model = EarVAE(
        LatentEncoder(backbone, head), decoder, latent_dim=config.latent_dim, pixels=pixels
    )
    for one in model.backbones.values():
        one.encoder.remat |= config.remat
    return model


def random_stream(seed: int) -> nnx.Rngs:
    """The source of a model's random initialisation.

    XLA's own generator compiles several times as fast as JAX's default one; the price is that one
    seed gives other values on another kind of device.
    """
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


def load_config(run_dir: str | os.PathLike[str]) -> TrainConfig:
    """The settings that a run was made with; of a staged run, those of its last stage.

    Raises:
        UserError: the folder is not a run, or its config.yaml cannot be used.
    """
    return _last_stage(run_dir)[1]


def _last_stage(run_dir: str | os.PathLike[str]) -> tuple[Path, TrainConfig]:
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run_dir} is not a run: it has no config.yaml. Give one such as runs/sam."
        )
    config = parse_train_options(["--config", str(path)])[0]
    if config.stages:
        return _last_stage(Path(run_dir) / f"stage{len(config.stages)}")
    return Path(run_dir), config


def load_model(run_dir: str | os.PathLike[str], checkpoint: str | int = "best") -> EarVAE:
    """Load a trained model; the ported weights it started from are not needed.

    Args:
        run_dir: the run's directory; of a staged run, its last stage is taken.
        checkpoint: "best" (by PSNR on the validation split), "latest", or a step.

    Returns:
        The model in evaluation mode; `.run_dir` says where it came from.

    Raises:
        UserError: not a run, or no such checkpoint in it.
    """
    from jaxear.training.checkpoints import Checkpoints  # here, as Orbax takes long to import

    run_dir, config = _last_stage(run_dir)
    filled = dataclasses.replace(config, weights="none")  # by the checkpoint
    model = create_vae(filled, config.image_size, rngs=nnx.Rngs(0), abstract=True)
    skeleton, abstract = split_model(model)
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.find(checkpoint)
        leaves = checkpoints.load_leaves(step)
    expected = {name: leaf.shape for group in abstract for name, leaf in group.items()}
    found = {name: np.shape(leaf) for name, leaf in leaves.items()}
    if expected != found:
        different = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise UserError(
            f"The checkpoint in {run_dir} does not fit its config.yaml: {', '.join(different[:5])} "
            f"({len(different)} in all) differ. Was the file edited after training?"
        )
    loaded = skeleton.model({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    loaded.eval()
    loaded.run_dir = str(run_dir)
    loaded.checkpoint = step
    return loaded
