"""The variational autoencoder: a pretrained backbone, a latent head, a convolutional decoder.

    images [b, H, W, 3] -> Backbone -> LatentHead -> mu, logvar [b, d]
                                                     z = mu + exp(logvar / 2) * noise
    images [b, H, W, 3] <- Decoder <---------------- z

With a pixel path (`jaxear.pixel_path`), code and image start from those of linear PCA, and what is
drawn above adds to them.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2014), is the source of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxear.backbones.base import Backbone
from jaxear.backbones.hybrid import HybridBackbone
from jaxear.backbones.lean import GroupNorm, LayerNorm, silu
from jaxear.backbones.staged import run
from jaxear.errors import UserError
from jaxear.pixel_path import PixelPath

# Standard deviations from 1e-3 to 55: what lies beyond is a numerical accident.
LOGVAR_RANGE = (-14.0, 8.0)


class VAEOutput(NamedTuple):
    """What a pass through the model gives: reconstruction [b, H, W, 3]; mu, logvar, z [b, d]."""

    reconstruction: jax.Array
    mu: jax.Array
    logvar: jax.Array
    z: jax.Array


def reparameterize(mu: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
    """z ~ N(mu, exp(logvar)) of noise ~ N(0, I), differentiably in both; all [b, d]."""
    return mu + jnp.exp(0.5 * logvar) * noise


class LatentHead(nnx.Module):
    """Features [b, h, w, c] -> mu, logvar [b, d], keeping where in the picture each feature lies.

    The channels are cut by a 1x1 convolution to about `width` numbers in all, whatever the grid, so
    that every backbone meets a head of the same capacity. As a correction of a code that is there
    already (`jaxear.pixel_path`) it starts with a mean of 0.
    """

    def __init__(
        self,
        features: tuple[int, int, int],
        latent_dim: int,
        *,
        width: int,
        correction: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        *grid, channels = features
        cells = grid[0] * grid[1]
        squeezed = max(8, width // cells)
        self.norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.squeeze = nnx.Linear(channels, squeezed, dtype=dtype, rngs=rngs)
        mu_init = nnx.initializers.zeros if correction else nnx.initializers.lecun_normal()
        self.mu = nnx.Linear(
            cells * squeezed, latent_dim, kernel_init=mu_init, dtype=dtype, rngs=rngs
        )
        self.logvar = nnx.Linear(
            cells * squeezed,
            latent_dim,
            # Starts at a standard deviation of exp(-2): codes that carry the image from the first
            # step, while the KL term still has something to spread. A correction starts at exp(-4),
            # which costs the code that it corrects next to nothing.
            kernel_init=nnx.initializers.normal(1e-3),
            bias_init=nnx.initializers.constant(-8.0 if correction else -4.0),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = silu(self.squeeze(self.norm(features)))
        x = x.reshape(x.shape[0], -1)
        mu = self.mu(x).astype(jnp.float32)
        logvar = self.logvar(x).astype(jnp.float32)
        return mu, jnp.clip(logvar, *LOGVAR_RANGE)


class FusedHead(nnx.Module):
    """Several feature maps -> mu, logvar [b, d]: a head for each, fused by a linear layer.

    Each head gives its share of the latent dimensions; the fusion mixes them.
    """

    def __init__(
        self,
        features: Sequence[tuple[int, int, int]],
        latent_dim: int,
        *,
        width: int,
        correction: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        if latent_dim % len(features):
            raise UserError(
                f"latent_dim must be a multiple of {len(features)}, the number of feature maps, "
                f"not {latent_dim}."
            )
        share = latent_dim // len(features)
        self.heads = nnx.List(
            [
                LatentHead(shape, share, width=width, correction=correction, dtype=dtype, rngs=rngs)
                for shape in features
            ]
        )
        self.mu = nnx.Linear(latent_dim, latent_dim, dtype=dtype, rngs=rngs)
        # Starts by passing the heads' log-variances on as they are.
        self.logvar = nnx.Linear(
            latent_dim, latent_dim, kernel_init=_identity, dtype=dtype, rngs=rngs
        )

    def __call__(self, features: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        pairs = [head(map_) for head, map_ in zip(self.heads, features, strict=True)]
        mu, logvar = (jnp.concatenate(parts, axis=-1) for parts in zip(*pairs, strict=True))
        fused = self.logvar(logvar).astype(jnp.float32)
        return self.mu(mu).astype(jnp.float32), jnp.clip(fused, *LOGVAR_RANGE)


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)


class LatentEncoder(nnx.Module):
    """Images [b, H, W, 3] in [0, 1] -> mu, logvar [b, d]: a backbone and the head that reads it."""

    def __init__(self, backbone: Backbone | HybridBackbone, head: LatentHead | FusedHead):
        self.backbone = backbone
        self.head = head

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features: Any = self.backbone(images)
        return self.head(features)


def feature_shapes(
    backbone: Backbone | HybridBackbone, image_size: tuple[int, int]
) -> tuple[tuple[int, int, int], ...]:
    """The shapes (h, w, c) of a backbone's feature maps for images of this size."""
    graphdef, state = nnx.split(backbone)
    images = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    maps = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, images)
    return tuple(map_.shape[1:] for map_ in jax.tree.leaves(maps))


def create_head(
    shapes: Sequence[tuple[int, int, int]], latent_dim: int, **kwargs: Any
) -> LatentHead | FusedHead:
    """The head for feature maps of these shapes: fused where there are several."""
    if len(shapes) == 1:
        return LatentHead(shapes[0], latent_dim, **kwargs)
    return FusedHead(shapes, latent_dim, **kwargs)


class UpsampleConv(nnx.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution: [b, h, w, c] -> [b, 2h, 2w, o].

    Computed as its four sub-pixel phases: an output pixel sees only 2x2 input pixels, so each phase
    is a convolution by a 2x2 kernel of summed taps, and no upsampled map is ever made. 16/36 of
    the multiplications; on a CPU forward and backward together take 0.6 of the plain form's time.
    (One 2x2 convolution for all four phases has a backward pass ten times as slow there.)
    """

    def __init__(self, channels: int, out_channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, out_channels, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, _ = x.shape
        kernel = self.conv.kernel[...].astype(x.dtype)
        # Taps of an even output row: [k0, k1 + k2] on rows (i - 1, i) of the input; of an odd one:
        # [k0 + k1, k2] on (i, i + 1). Likewise the columns.
        taps = jnp.asarray([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], x.dtype)
        padding = ((1, 0), (0, 1))

        def phase(row: int, column: int) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x,
                jnp.einsum("ri,sj,ijco->rsco", taps[row], taps[column], kernel),
                window_strides=(1, 1),
                padding=(padding[row], padding[column]),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
        y = jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)
        assert self.conv.bias is not None
        return y + self.conv.bias[...].astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), all [b, h, w, c]; starts as the identity."""

    def __init__(self, channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = _group_norm(channels, dtype, rngs)
        self.conv1 = nnx.Conv(channels, channels, (3, 3), dtype=dtype, rngs=rngs)
        self.norm2 = _group_norm(channels, dtype, rngs)
        self.conv2 = nnx.Conv(
            channels,
            channels,
            (3, 3),
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(silu(self.norm1(x)))
        return x + self.conv2(silu(self.norm2(y)))


def _group_norm(channels: int, dtype: Any, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, num_groups=min(8, channels), dtype=dtype, rngs=rngs)


class Decoder(nnx.Module):
    """Codes [b, d] -> images [b, H, W, 3] in [0, 1].

    A linear layer makes a small grid of `channels[0]` channels; each further entry of `channels`
    doubles the grid. Most parameters sit where the grid is small, most of the time goes where it is
    large: the last entries decide the speed. With `remat` the gradient computes the activations
    within each block again, to save memory. As a `correction` it starts at 0.5 everywhere.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        image_size: tuple[int, int],
        channels: Sequence[int],
        remat: bool = False,
        correction: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        factor = 2 ** (len(channels) - 1)
        if image_size[0] % factor or image_size[1] % factor:
            raise UserError(
                f"A decoder of {len(channels)} levels doubles its grid {len(channels) - 1} times, "
                f"so the image size must be a multiple of {factor}, not "
                f"{image_size[0]}x{image_size[1]}."
            )
        if any(c % min(8, c) for c in channels):
            raise UserError(f"decoder_channels must be multiples of 8, not {tuple(channels)}.")
        self.grid = (image_size[0] // factor, image_size[1] // factor)
        self.stem = nnx.Linear(
            latent_dim, self.grid[0] * self.grid[1] * channels[0], dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([ResidualBlock(c, dtype=dtype, rngs=rngs) for c in channels])
        self.upsamples = nnx.List(
            [UpsampleConv(c, c_next, dtype=dtype, rngs=rngs) for c, c_next in pairwise(channels)]
        )
        self.norm = _group_norm(channels[-1], dtype, rngs)
        out_init = nnx.initializers.zeros if correction else nnx.initializers.lecun_normal()
        self.out = nnx.Conv(channels[-1], 3, (3, 3), kernel_init=out_init, dtype=dtype, rngs=rngs)
        self.remat = remat
        self.dtype = dtype

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.stem(z.astype(self.dtype)).reshape(z.shape[0], *self.grid, -1)
        x = run(self.blocks[0], x, remat=self.remat)
        for upsample, block in zip(self.upsamples, self.blocks[1:], strict=True):
            x = run(upsample, x, remat=self.remat)
            x = run(block, x, remat=self.remat)
        x = self.out(silu(self.norm(x)))
        return nnx.sigmoid(x.astype(jnp.float32))


class EarVAE(nnx.Module):
    """A variational autoencoder of ear images.

    All images are floats in [0, 1], [b, H, W, 3], of the size that the model was made for.

    Attributes:
        latent_dim: numbers in a code.
        run_dir, checkpoint: the run and the step that `load_model` took it from; else None.
    """

    def __init__(
        self,
        encoder: LatentEncoder,
        decoder: Decoder,
        *,
        latent_dim: int,
        pixels: PixelPath | None = None,
    ):
        self.run_dir: str | None = None
        self.checkpoint: int | None = None
        self.encoder = encoder
        self.decoder = decoder
        self.pixels = pixels
        self.latent_dim = latent_dim

    @property
    def backbone(self) -> Backbone | HybridBackbone:
        """The backbone of the encoder."""
        return self.encoder.backbone

    @property
    def backbones(self) -> dict[tuple[str | int, ...], Backbone]:
        """The single backbones by the path of their encoder: one, or those of a hybrid."""
        path = ("encoder", "backbone")
        if isinstance(self.backbone, HybridBackbone):
            parts = enumerate(self.backbone.backbones)
            return {(*path, "backbones", i, "encoder"): backbone for i, backbone in parts}
        return {(*path, "encoder"): self.backbone}

    @property
    def n_pose(self) -> int:
        """How many numbers of a code, the first ones, are the ear's pose (`jaxear.pixel_path`)."""
        return 0 if self.pixels is None else self.pixels.n_pose

    def encode(self, images: jax.Array, features: Any | None = None) -> tuple[jax.Array, jax.Array]:
        """Images [b, H, W, 3] -> mean and log-variance of q(z|x), both [b, d], float32.

        Where the backbone's features of these images are known already they may be given.
        """
        mu, logvar = self.encoder(images) if features is None else self.encoder.head(features)
        if self.pixels is None:
            return mu, logvar
        spread = self.pixels.spread
        mu = spread * (self.pixels.encode(images) + mu)
        return mu, jnp.clip(logvar + 2 * jnp.log(spread), *LOGVAR_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """Codes [b, d] -> images [b, H, W, 3] in [0, 1], float32."""
        if self.pixels is None:
            return self.decoder(z)
        # The decoder's output begins at 0.5 everywhere.
        return jnp.clip(self.pixels.decode(z) + (self.decoder(z) - 0.5), 0.0, 1.0)

    def reconstruct(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] -> the images decoded from their mean codes."""
        return self.decode(self.encode(images)[0])

    def without_encoder(self) -> EarVAE:
        """The half that decodes, sharing its arrays: far less to hand over where that is all."""
        return EarVAE(None, self.decoder, latent_dim=self.latent_dim, pixels=self.pixels)  # pyright: ignore

    def sample(self, n: int, key: jax.Array) -> jax.Array:
        """Draw n images [n, H, W, 3] from the prior, z ~ N(0, I)."""
        return self.decode(jax.random.normal(key, (n, self.latent_dim)))

    def __call__(self, images: jax.Array, key: jax.Array) -> VAEOutput:
        """Images [b, H, W, 3] -> one stochastic pass."""
        mu, logvar = self.encode(images)
        z = reparameterize(mu, logvar, jax.random.normal(key, mu.shape, mu.dtype))
        return VAEOutput(self.decode(z), mu, logvar, z)
