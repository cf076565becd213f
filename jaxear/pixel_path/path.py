"""The pixel path: a few hundred principal components of the training images, beside the deep path.

Linear PCA is a strong opponent of any autoencoder of aligned photographs. Here it is where a model
begins: the code of an image is that of PCA, which a small network bends, and to which backbone and
head add; the image of a code is that of PCA, whose further components the network foretells, and to
which the convolutional decoder adds.

    images -> (images - mean) . components / deviations = s [b, k] -> net.encode -> u [b, d]
    mean of q(z|x)                = spread * (u + what the head makes of the features)
    image of a code z             = mean + deviations * net.decode(z / spread) . components
                                    + decoder(z)

With a registration, components are those of pictures brought to one pose, and the first four
numbers of a code are the pose (`jaxear.pixel_path.registration`).

The path is fitted to the training images before the training of the deep path begins
(`jaxear.pixel_path.fitting`); from then on it stays as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxear.errors import UserError
from jaxear.pixel_path.autoencoder import ScoreAutoencoder
from jaxear.pixel_path.registration import POSE, Registration

# In full precision on every device: elsewhere than on a CPU the default would round the pixels.
_EXACT = jax.lax.Precision.HIGHEST


class PixelPath(nnx.Module):
    """Principal components of images, and a network between their scores and the code.

    Made empty; `fit_pixel_path` fills it. Scores are kept in units such that those of the first
    component have variance 1: the codes' own components are then those of the pixels.

    Args:
        n_components: components kept, k; at least `latent_dim`.
        latent_dim: numbers in a code, d; with a registration more than 4.
        image_size: (height, width).
        registered: bring images to one pose first.
        width: units in each of the hidden layers of the network.
        rngs: the source of the network's initialisation.

    Attributes:
        n_pose: how many numbers of a code, the first ones, are the pose: 4, or 0.

    Raises:
        UserError: fewer components than the code has numbers, or no number beside the pose.
    """

    def __init__(
        self,
        n_components: int,
        latent_dim: int,
        image_size: tuple[int, int],
        *,
        registered: bool = False,
        width: int = 1024,
        rngs: nnx.Rngs,
    ):
        if n_components < latent_dim:
            raise UserError(
                f"pixel_components must be 0 or at least latent_dim, {latent_dim}, not "
                f"{n_components}."
            )
        if registered and latent_dim <= POSE:
            raise UserError(
                f"latent_dim must be above {POSE}, the numbers of a pose, with "
                f"pixel_registration, not {latent_dim}."
            )
        self.latent_dim = latent_dim
        self.registration = Registration(image_size) if registered else None
        self.size = self.registration.straight_size if self.registration else image_size
        self.mean = nnx.Param(jnp.zeros(self.size[0] * self.size[1] * 3))
        self.components = nnx.Param(jnp.zeros((n_components, len(self.mean))))
        self.deviations = nnx.Param(jnp.ones(n_components))
        self.n_pose = POSE if registered else 0
        code_dim = latent_dim - self.n_pose
        self.network = ScoreAutoencoder(n_components, code_dim, width=width, rngs=rngs)

    @property
    def spread(self) -> jax.Array:
        """Standard deviations of the codes [d], that of the first component being 1."""
        deviations = self.deviations[...]
        scores = deviations[: self.network.code_dim]
        if self.registration is not None:
            scores = jnp.concatenate([self.registration.effects[...], scores])
        return scores / deviations[0]

    def straighten(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [b, H, W, 3] in [0, 1] -> what components are of, [b, pixels], and poses [b, 4];
        without a registration the images themselves, and [b, 0]."""
        if self.registration is None:
            return images.reshape(len(images), -1).astype(jnp.float32), jnp.zeros(
                (len(images), self.n_pose)
            )
        poses = self.registration.poses(images)
        straight = self.registration.straighten(images.astype(jnp.float32), poses)
        return straight.reshape(len(images), -1), poses

    def scores(self, straight: jax.Array) -> jax.Array:
        """Straightened images [b, pixels] -> scores on all components [b, k], of variance 1."""
        # In this order: of a single image the other takes many times as long on a CPU.
        centred = straight - self.mean[...]
        scores = jnp.matmul(self.components[...], centred.T, precision=_EXACT).T
        return scores / self.deviations[...]

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] in [0, 1] -> codes [b, d], each number of variance 1."""
        straight, poses = self.straighten(images)
        code = self.network.fit_code(self.scores(straight), self.deviations[...])
        if self.registration is None:
            return code
        return jnp.concatenate([poses / self.registration.deviations[...], code], axis=1)

    def decode(self, z: jax.Array) -> jax.Array:
        """Codes [b, d], as `encode`'s times `spread` -> images [b, H, W, 3], not yet cut off at 0
        and 1."""
        pose, code = jnp.split(z / self.spread, [self.n_pose], axis=1)
        coordinates = self.network.decode(code) * self.deviations[...]
        flat = self.mean[...] + jnp.matmul(coordinates, self.components[...], precision=_EXACT)
        straight = flat.reshape(len(z), *self.size, 3)
        if self.registration is None:
            return straight
        return self.registration.put_back(straight, pose * self.registration.deviations[...])
