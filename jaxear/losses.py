"""The terms of the objective; each a pure function that returns one number per image, [b].

Images are floats in [0, 1], [b, h, w, 3]; weights of pixels, [h, w] or [b, h, w], have a mean of
one over each image.

Where a batch is spread over the devices of `jax.pmap`, what is not a mean over images takes the
name of the mapped axis; the mean over devices of losses and gradients is then that of one device.
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
    return weights[..., None] if isinstance(weights, jax.Array) else weights


def dissimilarity(x: jax.Array, target: jax.Array) -> jax.Array:
    """(1 - SSIM) / 2, between 0 (equal) and 1."""
    return 0.5 * (1.0 - ssim(x, target))


def edge(x: jax.Array, target: jax.Array) -> jax.Array:
    """Mean absolute difference of the Sobel derivatives of the luminance."""
    differences = [jnp.abs(a - b) for a, b in zip(sobel(x), sobel(target), strict=True)]
    return sum((jnp.mean(d, axis=(1, 2)) for d in differences), jnp.zeros(x.shape[0]))


def perceptual(features: Any, target: Any) -> jax.Array:
    """Mean squared difference of channel-normalised features, as LPIPS compares them.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features" (2018), equation 1, with equal
    weights for all channels, and the mean over maps where there are several.

    Args:
        features, target: each a map [b, h, w, c], or a tuple of maps.
    """
    distances = jax.tree.leaves(jax.tree.map(_map_distance, features, target))
    return jnp.mean(jnp.stack(distances), axis=0)


def _map_distance(features: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(_unit(features) - _unit(target)), -1), axis=(1, 2))


def _unit(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-6)


def kl_divergence(
    mu: jax.Array, logvar: jax.Array, free_bits: float = 0.0, axis_name: str | None = None
) -> jax.Array:
    """KL(q(z|x) || N(0, I)) in nats; mu, logvar [b, d].

    With `free_bits` (in nats per dimension) no dimension counts less than that, on the batch's
    average: Kingma et al., "Improved Variational Inference with Inverse Autoregressive
    Flow" (2016), equation 15.
    """
    kl = kl_per_dimension(mu, logvar)
    if free_bits > 0:
        average = jnp.mean(kl, axis=0)
        if axis_name is not None:
            average = jax.lax.pmean(average, axis_name)
        return jnp.sum(kl, axis=1) + jnp.sum(jnp.maximum(free_bits - average, 0.0))
    return jnp.sum(kl, axis=1)


def supervised_contrastive(
    mu: jax.Array, subjects: jax.Array, temperature: float, axis_name: str | None = None
) -> jax.Array:
    """How far codes are from lying by their subject's others and away from all others'.

    For each image, the mean over the other images of its subject in the batch of
    -log softmax(cosine similarity / temperature), the softmax being over all images but itself:
    Khosla et al., "Supervised Contrastive Learning" (2020), equation 2. An image whose subject has
    no other in the batch counts 0.

    Args:
        mu: [b, d].
        subjects: whose ear each image shows, as numbers [b].
        temperature: above 0; small ones heed the nearest codes most.
    """
    codes = _unit(mu)
    everyone, everyones_subjects, first = codes, subjects, 0
    if axis_name is not None:
        everyone, everyones_subjects = jax.lax.all_gather((codes, subjects), axis_name, tiled=True)
        first = jax.lax.axis_index(axis_name) * len(codes)
    similarity = jnp.matmul(codes, everyone.T, precision=jax.lax.Precision.HIGHEST) / temperature
    others = jnp.arange(len(everyone)) != first + jnp.arange(len(codes))[:, None]
    positive = others & (subjects[:, None] == everyones_subjects)
    log_softmax = similarity - jax.nn.logsumexp(similarity, axis=1, keepdims=True, where=others)
    count = jnp.sum(positive, axis=1)
    return -jnp.sum(log_softmax, axis=1, where=positive) / jnp.maximum(count, 1)


def center_weights(height: int, width: int, strength: float) -> jax.Array:
    """Pixel weights [h, w] of mean one, heavier towards the centre by a Gaussian of a quarter size.

    `strength` 0 weighs all pixels alike; s makes the centre 1 + s times as heavy as the far corner.
    """
    y = jnp.linspace(-1.0, 1.0, height)[:, None]
    x = jnp.linspace(-1.0, 1.0, width)[None, :]
    weights = 1.0 + strength * jnp.exp(-0.5 * (x**2 + y**2) / 0.5**2)
    return weights / jnp.mean(weights)


def pixel_weights(
    config: LossConfig, height: int, width: int, visible: jax.Array | None = None
) -> jax.Array | float:
    """How much each pixel counts: [h, w], [b, h, w] where `visible` is given, or 1.0 for all alike.

    Args:
        visible: [b, h, w], 0 where the input hides the pixel, else 1. An image that is hidden
            whole, hidden pixels counting nothing, has no weight at all.
    """
    weights: jax.Array | float = 1.0
    if config.center_weight > 0:
        weights = center_weights(height, width, config.center_weight)
    if visible is not None and config.occlusion_weight != 1:
        weights = weights * (visible + config.occlusion_weight * (1 - visible))
        mean = jnp.mean(weights, axis=(1, 2), keepdims=True)
        weights = weights / jnp.maximum(mean, 1e-6)
    return weights


def objective(
    config: LossConfig,
    *,
    reconstruction: jax.Array,
    target: jax.Array,
    mu: jax.Array,
    logvar: jax.Array,
    kl_weight: jax.Array | float,
    features: tuple[Any, Any] | None = None,
    visible: jax.Array | None = None,
    subjects: jax.Array | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The training objective and its terms, means over the batch.

    loss = sum of weight * term + kl_weight * KL / (h * w * 3)

    All terms of the image are per number, so that their balance does not depend on the size. With
    the MSE term alone at weight 1, kl_weight = 2 sigma^2 gives the exact evidence lower bound for
    Gaussian pixels of standard deviation sigma, up to a factor and a constant.

    Args:
        config: the weights of the terms; terms of weight 0 are not computed.
        reconstruction, target: images [b, h, w, 3].
        mu, logvar: [b, d].
        kl_weight: the present weight of the KL term (it may be warming up).
        features: those of the reconstruction and of the target, for the perceptual term; each a
            map [b, h, w, c], or a tuple of maps, over which the mean is taken.
        visible: [b, h, w], 0 where a patch hid the pixel from the encoder, else 1; weighs mean
            squared and absolute errors. All are visible by default.
        subjects: whose ear each image shows, as numbers [b], for the contrastive term.
        axis_name: the axis of `jax.pmap` that the batch is cut along, if it is.
    """
    _, height, width, channels = target.shape
    weights = pixel_weights(config, height, width, visible)
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
        terms["perceptual"] = perceptual(*features)
    means = {name: jnp.mean(value) for name, value in terms.items()}
    reconstruction_loss = sum(
        (getattr(config, f"{name}_weight") * value for name, value in means.items()),
        jnp.zeros(()),
    )
    kl = jnp.mean(kl_divergence(mu, logvar, config.free_bits, axis_name))
    loss = reconstruction_loss + kl_weight * kl / (height * width * channels)
    metrics = {"reconstruction": reconstruction_loss, "kl": kl, **means}
    if config.contrastive_weight > 0:
        assert subjects is not None, "the contrastive term needs subjects"
        distances = supervised_contrastive(mu, subjects, config.contrastive_temperature, axis_name)
        metrics["contrastive"] = jnp.mean(distances)
        loss = loss + config.contrastive_weight * metrics["contrastive"]
    return loss, {"loss": loss, **metrics}
