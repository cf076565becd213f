"""The pixel path: a few hundred principal components of the training images, beside the deep path.

Linear PCA is a strong opponent of any autoencoder of aligned photographs. Here it is where a model
begins: the code of an image is that of PCA, to which backbone and head add, and the image of a code
is that of PCA, whose further components a small network foretells from the code, and to which the
convolutional decoder adds.

    images -> (images - mean) . components / deviations = u [b, k]
    mean of q(z|x)                = spread * (u[:, :d] + what the head makes of the features)
    image of a code z             = mean + (deviations * (v, 0) + net(v)) . components + decoder(z)
                                    with v = z / spread

Only `net` bends; it alone is worth half a decibel and more on people it has never seen. Where ears
lie in the space of components is what it learns, by regression on augmented views of the training
images, before the training of the deep path begins; from then on the whole path stays as it is.
"""

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
from rich.progress import track

from jaxear.config import AugmentConfig, TrainConfig
from jaxear.data.augment import augment
from jaxear.errors import UserError
from jaxear.pca import PCA

logger = logging.getLogger(__name__)

MOST_IMAGES_OF_PCA = 6144  # of 128x128: 1.2 GB as float32
COPIES = 10  # augmented ones of each image, for PCA
VIEWS_PER_STEP = 24  # of all images together, for the network: each is met about five times
MOST_VIEWS = 98_304
BATCH_SIZE = 128
STEPS_PER_CALL = 100
DROPOUT = 0.3

# In full precision on every device: elsewhere than on a CPU the default would round the pixels.
_EXACT = jax.lax.Precision.HIGHEST


class Completion(nnx.Module):
    """The first scores [b, d] -> all scores [b, k], of variance 1 each; starts as linear PCA does,
    with the further ones 0.
    """

    def __init__(self, latent_dim: int, n_components: int, *, width: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.further = n_components - latent_dim
        self.hidden = nnx.List(
            [
                nnx.Linear(latent_dim, width, kernel_init=init, rngs=rngs),
                nnx.Linear(width, width, kernel_init=init, rngs=rngs),
            ]
        )
        self.out = nnx.Linear(width, n_components, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, scores: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """With keys [b] hidden units are dropped out, as in training."""
        x = scores
        for i, layer in enumerate(self.hidden):
            x = nnx.silu(layer(x))
            if keys is not None:
                x = _dropout(x, keys, i)
        # The scale keeps the first steps of the training small.
        return jnp.pad(scores, ((0, 0), (0, self.further))) + 0.3 * self.out(x)


class PixelPath(nnx.Module):
    """Principal components of images, and a network from the first `latent_dim` scores to all.

    Made empty; `fit_pixel_path` fills it. Scores are kept in units such that those of the first
    component have variance 1: the codes' own components are then those of the pixels.

    Args:
        n_components: components kept, k; at least `latent_dim`.
        latent_dim: numbers in a code, d.
        image_size: (height, width).
        width: units in each of the two hidden layers of the network.
        rngs: the source of the network's initialisation.

    Raises:
        UserError: fewer components than the code has numbers.
    """

    def __init__(
        self,
        n_components: int,
        latent_dim: int,
        image_size: tuple[int, int],
        *,
        width: int = 1024,
        rngs: nnx.Rngs,
    ):
        if n_components < latent_dim:
            raise UserError(
                f"pixel_components must be 0 or at least latent_dim, {latent_dim}, not "
                f"{n_components}."
            )
        pixels = image_size[0] * image_size[1] * 3
        self.image_size = image_size
        self.latent_dim = latent_dim
        self.mean = nnx.Param(jnp.zeros(pixels))
        self.components = nnx.Param(jnp.zeros((n_components, pixels)))
        self.deviations = nnx.Param(jnp.ones(n_components))
        self.network = Completion(latent_dim, n_components, width=width, rngs=rngs)

    @property
    def spread(self) -> jax.Array:
        """Standard deviations of the codes [d], the first being 1."""
        deviations = self.deviations[...][: self.latent_dim]
        return deviations / deviations[0]

    def scores(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] in [0, 1] -> scores on all components [b, k], of variance 1."""
        pixels = images.reshape(len(images), -1).astype(jnp.float32) - self.mean[...]
        # In this order: of a single image the other takes many times as long on a CPU.
        scores = jnp.matmul(self.components[...], pixels.T, precision=_EXACT).T
        return scores / self.deviations[...]

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] in [0, 1] -> the first scores [b, d], of variance 1."""
        return self.scores(images)[:, : self.latent_dim]

    def decode(self, z: jax.Array) -> jax.Array:
        """Codes [b, d] -> images [b, H, W, 3], not yet cut off at 0 and 1."""
        coordinates = self.network(z / self.spread) * self.deviations[...]
        flat = self.mean[...] + jnp.matmul(coordinates, self.components[...], precision=_EXACT)
        return flat.reshape(len(z), *self.image_size, 3)


def _dropout(x: jax.Array, keys: jax.Array, layer: int) -> jax.Array:
    def kept(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - DROPOUT, x.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), x / (1 - DROPOUT), 0.0)


def fit_pixel_path(
    path: PixelPath, images: np.ndarray, config: TrainConfig, *, progress: bool = True
) -> None:
    """Fill a pixel path: PCA of the images and of augmented copies, then the network.

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
    flat = sample.reshape(len(sample), -1).astype(np.float32) / 255
    pca = PCA(n_components, svd_solver="randomized", random_state=0).fit(flat)
    del sample, flat
    path.mean[...] = jnp.asarray(pca.mean_, jnp.float32)
    path.components[...] = jnp.asarray(pca.components_, jnp.float32)
    path.deviations[...] = jnp.sqrt(jnp.asarray(pca.explained_variance_, jnp.float32))
    if config.pixel_steps:
        _fit_network(path, images, config, progress=progress)


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


def _fit_network(
    path: PixelPath, images: np.ndarray, config: TrainConfig, *, progress: bool
) -> None:
    """Regression of all scores on the first ones, by mean squared error of the pixels."""
    n_views = min(VIEWS_PER_STEP * config.pixel_steps, MOST_VIEWS)
    rounds = max(1, n_views // len(images)) if augments(config) else 1
    graphdef, state = nnx.split(path)
    scores = jax.jit(lambda state, batch: nnx.merge(graphdef, state).scores(batch))
    console = Console(stderr=True)
    bar = partial(track, console=console, disable=not (progress and console.is_terminal))
    bank = [
        scores(state, batch)
        for batch in bar(
            _views(images, config, range(COPIES, COPIES + rounds)),
            description="pixel path: views",
            total=rounds * -(-len(images) // BATCH_SIZE),
        )
    ]
    everything = jnp.concatenate(bank)
    del bank
    network, parameters = nnx.split(path.network)
    deviations, n_first = path.deviations[...], path.latent_dim
    calls = -(-config.pixel_steps // STEPS_PER_CALL)
    total = calls * STEPS_PER_CALL
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, total // 15, total)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )

    def loss(parameters: Any, scores: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(scores))
        completed = nnx.merge(network, parameters)(scores[:, :n_first], keys)
        return jnp.mean(jnp.sum(jnp.square((completed - scores) * deviations), axis=1))

    def step(carry: Any, key: jax.Array, bank: jax.Array) -> tuple[Any, None]:
        parameters, opt_state = carry
        row_key, dropout_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (BATCH_SIZE,), 0, len(bank))
        gradients = jax.grad(loss)(parameters, bank[rows], dropout_key)
        updates, opt_state = optimizer.update(gradients, opt_state, parameters)
        return (optax.apply_updates(parameters, updates), opt_state), None

    @partial(jax.jit, donate_argnums=0)
    def steps(carry: Any, key: jax.Array, bank: jax.Array) -> Any:
        keys = jax.random.split(key, STEPS_PER_CALL)
        return jax.lax.scan(partial(step, bank=bank), carry, keys)[0]

    carry = parameters, optimizer.init(parameters)
    root = jax.random.fold_in(jax.random.key(config.seed), 0x9A8)
    for i in bar(range(calls), description="pixel path: network"):
        carry = steps(carry, jax.random.fold_in(root, i), everything)
    nnx.update(path.network, carry[0])
