"""What turns ears into codes and back: a trained model, and linear PCA with as many numbers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.data.pipeline import padded_batches
from jaxear.errors import UserError
from jaxear.inference import BATCH_SIZE, as_float, decode_arrays, encode_arrays
from jaxear.pca import PCA
from jaxear.vae import EarVAE


class Code(NamedTuple):
    """Codes of a batch: `mean` [b, d], and `logvar` [b, d] where they are distributions."""

    mean: jax.Array
    logvar: jax.Array | None = None


class Coder(Protocol):
    """Encodes and decodes batches, compiled once for each size of batch.

    Attributes:
        name: what figures and tables call it.
        numbers: how many a code has, d.
    """

    name: str
    numbers: int

    def encode(self, images: np.ndarray) -> Code:
        """uint8 [b, H, W, 3] -> their codes."""
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes [b, d] -> images, float32 [b, H, W, 3] in [0, 1]."""
        ...


class ModelCoder:
    """A trained model: an ear's code is the mean of q(z|x)."""

    def __init__(self, model: EarVAE, name: str):
        self.name = name
        self.numbers = model.latent_dim
        self._graphdef, self._state = nnx.split(model)

    def encode(self, images: np.ndarray) -> Code:
        return Code(*encode_arrays(self._graphdef, self._state, images))

    def decode(self, codes: jax.Array) -> jax.Array:
        return decode_arrays(self._graphdef, self._state, codes)


class LinearCoder:
    """Linear PCA of the pixels: an ear's code is its coordinates on the principal components.

    Made of a mean image [p] and components [k, p], p = H W 3, for images of `shape` [H, W, 3].
    """

    name = "linear PCA"

    def __init__(self, mean: np.ndarray, components: np.ndarray, shape: tuple[int, ...]):
        self.numbers = len(components)
        self._mean = jnp.asarray(mean, jnp.float32)
        self._components = jnp.asarray(components, jnp.float32)
        self._shape = shape

    @classmethod
    def fit(cls, images: np.ndarray, numbers: int) -> LinearCoder:
        """Principal components of images, uint8 [n, H, W, 3]: `numbers` of them.

        Of n images there are n - 1 at most, and none further can be had.

        Raises:
            UserError: fewer than two images.
        """
        if len(images) < 2:
            raise UserError(f"Linear PCA needs two training images at least, not {len(images)}.")
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        pca = PCA(n_components=min(numbers, len(pixels) - 1)).fit(pixels)
        return cls(pca.mean_, pca.components_, images.shape[1:])

    def encode(self, images: np.ndarray) -> Code:
        return Code(_project(self._mean, self._components, images))

    def decode(self, codes: jax.Array) -> jax.Array:
        flat = _synthesize(self._mean, self._components, codes)
        return flat.reshape(len(codes), *self._shape)


# In full precision on every device: elsewhere than on a CPU the default would round the pixels.
_EXACT = jax.lax.Precision.HIGHEST


@jax.jit
def _project(mean: jax.Array, components: jax.Array, images: jax.Array) -> jax.Array:
    pixels = as_float(images).reshape(len(images), -1)
    # In this order: of a single image the other takes many times as long on a CPU.
    return jnp.matmul(components, (pixels - mean).T, precision=_EXACT).T


@jax.jit
def _synthesize(mean: jax.Array, components: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.clip(mean + jnp.matmul(codes, components, precision=_EXACT), 0, 1)


def encode_all(coder: Coder, images: np.ndarray) -> np.ndarray:
    """Codes of images uint8 [n, H, W, 3]: float32 [n, d]."""
    batches = padded_batches(images, min(BATCH_SIZE, len(images)))
    return np.concatenate([np.asarray(coder.encode(batch).mean)[:n] for batch, n in batches])
