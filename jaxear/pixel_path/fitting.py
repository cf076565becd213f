"""Fitting a pixel path to the training images: registration, components, network."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from jaxear.config import AugmentConfig, TrainConfig
from jaxear.data.augment import augment
from jaxear.errors import UserError
from jaxear.pixel_path.autoencoder import NOISE, ScoreAutoencoder
from jaxear.pixel_path.path import PixelPath
from jaxear.pixel_path.registration import fit_registration

logger = logging.getLogger(__name__)

MOST_IMAGES_OF_PCA = 6144  # of 128x128: 1.2 GB as float32, straightened 1.7
COPIES = 10  # augmented ones of each image, for PCA
VIEWS_PER_STEP = 24  # of all images together, for the network: each is met about ten times
MOST_VIEWS = 98_304
BATCH_SIZE = 128  # of images
STEP_BATCH_SIZE = 256  # of scores
STEPS_PER_CALL = 100


def fit_pixel_path(
    path: PixelPath, images: np.ndarray, config: TrainConfig, *, progress: bool = True
) -> None:
    """Fill a pixel path: registration, PCA of the images and of augmented copies, then the network.

    The same settings and images give the same path on the same machine.

    Args:
        path: the empty path; it is filled in place.
        images: of the training split, uint8 [n, H, W, 3].
        config: augmentation, seed, and `pixel_steps` of the network's training.
        progress: show a bar, on a terminal.

    Raises:
        UserError: there are fewer images and copies than components; or more than one process.
    """
    if jax.process_count() > 1:
        raise UserError(
            "pixel_components is fitted by one process: train the first steps in one, then go on "
            "with --resume in as many as you like."
        )
    sample = views_for_pca(images, config)
    n_components = len(path.deviations)
    if len(sample) <= n_components:
        raise UserError(
            f"{len(sample)} images and augmented copies have no {n_components} principal "
            f"components: set --pixel-components to {len(sample) - 1} at most, or augment "
            "(--aug-rotation 12 --aug-scale 0.15 --aug-shift 0.06)."
        )
    logger.info("Pixel path: %d principal components of %d pictures", n_components, len(sample))
    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        if path.registration is not None:
            fit_registration(path.registration, sample, progress=bar)
        _fit_components(path, sample)
        del sample
        if config.pixel_steps:
            bank = _scores_of_views(path, images, config, bar)
            _fit_network(path, bank, config, bar)


# What the encoder alone sees, and an amount that does nothing by itself.
_NOT_OF_THE_TARGET = ("aug_blur", "aug_noise", "aug_occlusion", "aug_occlusion_size")


def augments(config: TrainConfig) -> bool:
    """Whether two views of one image differ in what the decoder shall make of them."""
    names = (field.name for field in dataclasses.fields(AugmentConfig))
    return any(getattr(config, name) for name in names if name not in _NOT_OF_THE_TARGET)


def views_for_pca(images: np.ndarray, config: TrainConfig) -> np.ndarray:
    """The images, and augmented copies of each as far as there is room: uint8 [m, H, W, 3]."""
    if len(images) > MOST_IMAGES_OF_PCA:
        chosen = np.linspace(0, len(images) - 1, MOST_IMAGES_OF_PCA).astype(int)
        return images[np.unique(chosen)]
    copies = min(COPIES, MOST_IMAGES_OF_PCA // len(images) - 1) if augments(config) else 0
    views = _views(images, config, range(copies))
    rounded = [np.asarray(jnp.round(255 * batch).astype(jnp.uint8)) for batch in views]
    return np.concatenate([np.asarray(images), *rounded])


def _views(images: np.ndarray, config: TrainConfig, rounds: range) -> Iterator[jax.Array]:
    """Augmented views in batches, all images once in each round: [b, H, W, 3] in [0, 1]."""

    @jax.jit
    def view(batch: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(batch))
        return augment(batch.astype(jnp.float32) / 255, keys, config).target

    root = jax.random.fold_in(jax.random.key(config.seed), 0x9A7)
    for round_ in rounds:
        for first in range(0, len(images), BATCH_SIZE):
            key = jax.random.fold_in(jax.random.fold_in(root, round_), first)
            yield view(np.asarray(images[first : first + BATCH_SIZE]), key)


def _fit_components(path: PixelPath, sample: np.ndarray) -> None:
    """Mean and components of a sample, uint8 [n, H, W, 3], straightened."""
    from jaxear.pca import PCA  # scikit-learn takes seconds, which other runs need not wait for

    graphdef, state = nnx.split(path)

    @jax.jit
    def straighten(state: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graphdef, state).straighten(images.astype(jnp.float32) / 255)

    batches = [slice(i, i + BATCH_SIZE) for i in range(0, len(sample), BATCH_SIZE)]
    flat = np.empty((len(sample), len(path.mean)), np.float32)
    poses = np.empty((len(sample), path.n_pose), np.float32)
    for rows in batches:
        flat[rows], poses[rows] = straighten(state, jnp.asarray(sample[rows]))
    if path.registration is not None:
        few = slice(0, None, -(-len(flat) // BATCH_SIZE))
        some = jnp.asarray(flat[few]).reshape(-1, *path.size, 3)
        path.registration.measure(some, jnp.asarray(poses[few]), poses.std(axis=0))
    pca = PCA(len(path.deviations), svd_solver="randomized", random_state=0).fit(flat)
    path.mean[...] = jnp.asarray(pca.mean_, jnp.float32)
    path.components[...] = jnp.asarray(pca.components_, jnp.float32)
    path.deviations[...] = jnp.sqrt(jnp.asarray(pca.explained_variance_, jnp.float32))


def _scores_of_views(
    path: PixelPath, images: np.ndarray, config: TrainConfig, bar: Progress
) -> jax.Array:
    """Scores of augmented views of all images [m, k]; without augmentation of each image once."""
    n_views = min(VIEWS_PER_STEP * config.pixel_steps, MOST_VIEWS)
    rounds = max(1, n_views // len(images)) if augments(config) else 1
    graphdef, state = nnx.split(path)

    @jax.jit
    def scores(state: Any, batch: jax.Array) -> jax.Array:
        path = nnx.merge(graphdef, state)
        return path.scores(path.straighten(batch)[0])

    views = _views(images, config, range(COPIES, COPIES + rounds))
    total = rounds * -(-len(images) // BATCH_SIZE)
    bank = [scores(state, batch) for batch in bar.track(views, total, description="views")]
    return jnp.concatenate(bank)


def _fit_network(path: PixelPath, bank: jax.Array, config: TrainConfig, bar: Progress) -> None:
    """Autoencoding of scores [m, k], by mean squared error of the pixels."""
    network, parameters = nnx.split(path.network)
    deviations = path.deviations[...]
    calls = -(-config.pixel_steps // STEPS_PER_CALL)
    total = calls * STEPS_PER_CALL
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, total // 15, total)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )

    def loss(parameters: Any, scores: jax.Array, key: jax.Array) -> jax.Array:
        coder: ScoreAutoencoder = nnx.merge(network, parameters)
        encoder_key, decoder_key, noise_key = jax.random.split(key, 3)
        code = coder.encode(scores, encoder_key)
        code += NOISE * jax.random.normal(noise_key, code.shape)
        made = coder.decode(code, decoder_key)
        return jnp.mean(jnp.sum(jnp.square((made - scores) * deviations), axis=1))

    def step(carry: Any, key: jax.Array, bank: jax.Array) -> tuple[Any, None]:
        parameters, opt_state = carry
        row_key, loss_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (STEP_BATCH_SIZE,), 0, len(bank))
        gradients = jax.grad(loss)(parameters, bank[rows], loss_key)
        updates, opt_state = optimizer.update(gradients, opt_state, parameters)
        return (optax.apply_updates(parameters, updates), opt_state), None

    @partial(jax.jit, donate_argnums=0)
    def steps(carry: Any, key: jax.Array, bank: jax.Array) -> Any:
        keys = jax.random.split(key, STEPS_PER_CALL)
        return jax.lax.scan(partial(step, bank=bank), carry, keys)[0]

    carry = parameters, optimizer.init(parameters)
    root = jax.random.fold_in(jax.random.key(config.seed), 0x9A8)
    for i in bar.track(range(calls), description="network"):
        carry = steps(carry, jax.random.fold_in(root, i), bank)
    nnx.update(path.network, carry[0])
