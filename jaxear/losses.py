"""The terms of the objective; each a pure function that returns one number per image, [b].

Images are floats in [0, 1], [b, h, w, 3]; weights of pixels [h, w] have a mean of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxear.config import LossConfig
from jaxear.metrics import kl_per_dimension, sobel, ssim


def l1(x: jax.Array, target: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Mean absolute error, pixels weighted."""
    return jnp.mean(jnp.abs(x - target) * _per_pixel(weights), axis=(1, 2, 3))


def mse(x: jax.Array, target: jax.Array, weights: jax.Array | float = 1.0) -> jax.Array:
    """Mean squared error, pixels weighted."""
    return jnp.mean(jnp.square(x - target) * _per_pixel(weights), axis=(1, 2, 3))


def _per_pixel(weights: jax.Array | float) -> jax.Array | float:
    return weights[None, :, :, None] if isinstance(weights, jax.Array) else weights


def dissimilarity(x: jax.Array, target: jax.Array) -> jax.Array:
    """(1 - SSIM) / 2, between 0 (equal) and 1."""
    return 0.5 * (1.0 - ssim(x, target))


def edge(x: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference of the Sobel derivatives of the luminance."""
    differences = [jnp.abs(a - b) for a, b in zip(sobel(x), sobel(target), strict=True)]
    return sum((jnp.mean(d, axis=(1, 2)) for d in differences), jnp.zeros(x.shape[0]))


def perceptual(features: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared difference of channel-normalised features [b, h, w, c], as LPIPS compares them.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features" (2018), equation 1, with equal
    weights for all channels.
    """
    return jnp.mean(jnp.sum(jnp.square(_unit(features) - _unit(target)), -1), axis=(1, 2))


def _unit(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-6)


def kl_divergence(mu: jax.Array, logvar: jax.Array, free_bits: float = 0.0) -> jax.Array:
    """KL(q(z|x) || N(0, I)) in nats; mu, logvar [b, d].

    With `free_bits` (in nats per dimension) no dimension counts less than that, on the batch's
    average: Kingma et al., "Improved Variational Inference with Inverse Autoregressive
    Flow" (2016), equation 15.
    """
    kl = kl_per_dimension(mu, logvar)
    if free_bits > 0:
        excess = jnp.maximum(free_bits - jnp.mean(kl, axis=0), 0.0)
        return jnp.sum(kl, axis=1) + jnp.sum(excess)
    return jnp.sum(kl, axis=1)


def center_weights(height: int, width: int, strength: float) -> jax.Array:
    """Pixel weights [h, w] of mean one, heavier towards the centre by a Gaussian of a quarter size.

    `strength` 0 weighs all pixels alike; s makes the centre 1 + s times as heavy as the far corner.
    """
    y = jnp.linspace(-1.0, 1.0, height)[:, None]
    x = jnp.linspace(-1.0, 1.0, width)[None, :]
    weights = 1.0 + strength * jnp.exp(-0.5 * (x**2 + y**2) / 0.5**2)
    return weights / jnp.mean(weights)


def objective(
    config: LossConfig,
    *,
    reconstruction: jax.Array,
    target: jax.Array,
    mu: jax.Array,
    logvar: jax.Array,
    kl_weight: jax.Array | float,
    features: tuple[Any, Any] | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The training objective and its terms, means over the batch.

    loss = sum of weight * term + kl_weight * KL / (h * w * 3)

    All terms are per number of the image, so that their balance does not depend on the size. With
    the MSE term alone at weight 1, kl_weight = 2 sigma^2 gives the exact evidence lower bound for
    Gaussian pixels of standard deviation sigma, up to a factor and a constant.

    Args:
        config: the weights of the terms; terms of weight 0 are not computed.
        reconstruction, target: images [b, h, w, 3].
        mu, logvar: [b, d].
        kl_weight: the present weight of the KL term (it may be warming up).
        features: those of the reconstruction and of the target, for the perceptual term; each a
            map [b, h, w, c], or a tuple of maps, over which the mean is taken.
    """
    _, height, width, channels = target.shape
    weights: Any = 1.0
    if config.center_weight > 0:
        weights = center_weights(height, width, config.center_weight)
    terms: dict[str, jax.Array] = {}
    if config.mse_weight > 0:
        terms["mse"] = mse(reconstruction, target, weights)
    if config.l1_weight > 0:
        terms["l1"] = l1(reconstruction, target, weights)
    if config.ssim_weight > 0:
        terms["ssim"] = dissimilarity(reconstruction, target)
    if config.edge_weight > 0:
        terms["edge"] = edge(reconstruction, target)
    if config.perceptual_weight > 0:
        assert features is not None, "the perceptual term needs features"
        distances = jax.tree.leaves(jax.tree.map(perceptual, *features))
        terms["perceptual"] = sum(distances, jnp.zeros(())) / len(distances)
    means = {name: jnp.mean(value) for name, value in terms.items()}
    reconstruction_loss = sum(
        (getattr(config, f"{name}_weight") * value for name, value in means.items()),
        jnp.zeros(()),
    )
    kl = jnp.mean(kl_divergence(mu, logvar, config.free_bits))
    loss = reconstruction_loss + kl_weight * kl / (height * width * channels)
    return loss, {"loss": loss, "reconstruction": reconstruction_loss, "kl": kl, **means}
