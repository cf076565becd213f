"""Classic eigenears: the pixels themselves in the place of a model's codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxear.errors import UserError


class PixelModel(nnx.Module):
    """A "model" whose code of an image is the image: what it is to linear PCA of pixels.

    `EigenEars.fit(PixelModel(128), images)` are the eigenpictures of Sirovich & Kirby,
    "Low-dimensional procedure for the characterization of human faces" (1987), with mean and scores
    as everywhere here: the linear baseline of any trained model. It has nothing to train.

    Args:
        image_size: side of the square images, or (height, width), in pixels.

    Attributes:
        image_size: (height, width).
        latent_dim: numbers in a code, height * width * 3.
        n_pose: how many of them are the ear's pose: none.
    """

    n_pose = 0

    def __init__(self, image_size: int | tuple[int, int]):
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        self.image_size: tuple[int, int] = (height, width)
        self.latent_dim: int = height * width * 3

    def encode(self, images: jax.Array) -> tuple[jax.Array, None]:
        """Images [b, H, W, 3] in [0, 1] -> their numbers [b, H * W * 3], and no variance.

        Raises:
            UserError: the images are of another size.
        """
        if images.shape[1:] != (*self.image_size, 3):
            size = "x".join(map(str, self.image_size))
            raise UserError(f"The images are {images.shape[1:]}, but the pixel model's are {size}.")
        return images.reshape(len(images), self.latent_dim), None

    def decode(self, z: jax.Array) -> jax.Array:
        """Codes [b, H * W * 3] -> images [b, H, W, 3]; what lies outside [0, 1] is cut off."""
        return jnp.clip(z, 0.0, 1.0).reshape(len(z), *self.image_size, 3)
