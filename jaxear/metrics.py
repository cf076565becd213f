"""Measures of an image's reconstruction and of a latent code's health; pure functions of arrays.

Images are floats in [0, 1], [b, h, w, c]; every function returns one number per image, [b].
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. (2003), section 3.2


def psnr(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, for a peak of 1: -10 log10(mean squared error)."""
    mse = jnp.mean(jnp.square(images - reference), axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(mse, 1e-12))


def ssim(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Structural similarity with the 11x11 Gaussian window (sigma 1.5) of Wang et al. (2004).

    Equal to scikit-image's with gaussian_weights=True, sigma=1.5, use_sample_covariance=False and
    data_range=1: the mean over pixels whose window lies inside the image, and over channels.

    Raises:
        ValueError: an image is smaller than the window.
    """
    luminance_term, structure_term = _ssim_terms(images, reference)
    return jnp.mean(luminance_term * structure_term, axis=(1, 2, 3))


def ms_ssim(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Multi-scale structural similarity: Wang, Simoncelli & Bovik (2003), equation 7.

    Structure is compared at five scales, each half as large as the one before (means of 2x2 pixels;
    an odd last row or column is left out), and luminance at the smallest. Per channel the product
    of their means is taken, with the exponents of the paper, then the mean over channels. Negative
    means count as 0.

    An image below 176 pixels has no room for the 11x11 window at all five scales. It is compared at
    the k scales that have, the exponents of these scaled to the sum of all five (1.0001): four
    scales from 88 pixels, three from 44, two from 22, and from 11 one, as good as SSIM. Values of
    different k do not compare.

    Raises:
        ValueError: an image is smaller than the window.
    """
    room = max(min(images.shape[1:3]) // SSIM_WINDOW, 1)  # below 1, _ssim_terms refuses
    scales = min(len(MS_SSIM_EXPONENTS), room.bit_length())
    exponents = np.asarray(MS_SSIM_EXPONENTS[:scales])
    exponents *= sum(MS_SSIM_EXPONENTS) / exponents.sum()
    product = jnp.ones(())
    for scale, exponent in enumerate(exponents, start=1):
        if scale > 1:
            images, reference = _halve(images), _halve(reference)
        luminance_term, term = _ssim_terms(images, reference)
        if scale == scales:
            term = luminance_term * term
        product = product * jnp.maximum(jnp.mean(term, axis=(1, 2)), 0.0) ** exponent
    return jnp.mean(product, axis=1)


def _ssim_terms(images: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM's comparison of luminance and that of contrast and structure, [b, h - 10, w - 10, c]."""
    if min(images.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of 11x11 pixels at least, not {images.shape[1:3]}.")
    mean_x, mean_y = _gaussian_filter(images), _gaussian_filter(reference)
    var_x = _gaussian_filter(jnp.square(images)) - jnp.square(mean_x)
    var_y = _gaussian_filter(jnp.square(reference)) - jnp.square(mean_y)
    covariance = _gaussian_filter(images * reference) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance_term = (2 * mean_x * mean_y + c1) / (jnp.square(mean_x) + jnp.square(mean_y) + c1)
    structure_term = (2 * covariance + c2) / (var_x + var_y + c2)
    return luminance_term, structure_term


def _halve(images: jax.Array) -> jax.Array:
    """Means of 2x2 pixels: [b, h, w, c] -> [b, h // 2, w // 2, c]."""
    b, h, w, c = images.shape
    even = images[:, : h - h % 2, : w - w % 2]
    return jnp.mean(even.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


def _gaussian_filter(images: jax.Array) -> jax.Array:
    """The window of SSIM, valid part only, as two matrix products (far quicker than convolutions
    of one channel, on a CPU above all): [..., h, w, c] -> [..., h - 10, w - 10, c]."""
    h, w = images.shape[-3:-1]
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,...hwc->...iwc", _band(h), images, precision=precision)
    return jnp.einsum("jw,...iwc->...ijc", _band(w), x, precision=precision)


def _band(size: int) -> jax.Array:
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-0.5 * np.square(offsets / SSIM_SIGMA))
    window /= window.sum()
    rows = size - SSIM_WINDOW + 1
    band = np.zeros((rows, size), np.float32)
    for i in range(rows):
        band[i, i : i + SSIM_WINDOW] = window
    return jnp.asarray(band)


def luminance(images: jax.Array) -> jax.Array:
    """Luma of ITU-R BT.601 from RGB: [b, h, w, 3] -> [b, h, w]."""
    return images @ jnp.asarray([0.299, 0.587, 0.114], images.dtype)


def sobel(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Horizontal and vertical Sobel derivatives of the luminance: two [b, h - 2, w - 2]."""
    y = luminance(images)
    rows = y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    columns = y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]
    return (rows[:, :, 2:] - rows[:, :, :-2]) / 8, (columns[:, 2:] - columns[:, :-2]) / 8


def edge_preservation(images: jax.Array, reference: jax.Array) -> jax.Array:
    """How much of the reference's edges is kept, 1 for all: the correlation of gradient fields.

    sum(g . r) / sqrt(sum |g|^2 sum |r|^2) over all pixels, g and r the Sobel gradients of the
    luminance. It is the edge preservation index of Sattar et al., "Image enhancement based on a
    nonlinear multiscale method" (1997), with Sobel derivatives in place of their Laplacian.
    """
    gx, gy = sobel(images)
    rx, ry = sobel(reference)
    total = partial(jnp.sum, axis=(1, 2))
    norm = jnp.sqrt(total(gx**2 + gy**2) * total(rx**2 + ry**2))
    return total(gx * rx + gy * ry) / jnp.maximum(norm, 1e-12)


def kl_per_dimension(mu: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, per latent dimension: [b, d]."""
    return 0.5 * (jnp.square(mu) + jnp.exp(logvar) - 1.0 - logvar)


def active_units(mu: jax.Array, threshold: float = 0.01) -> jax.Array:
    """How many latent dimensions vary with the image: variance of mu [n, d] above `threshold`.

    Burda, Grosse & Salakhutdinov, "Importance Weighted Autoencoders" (2016), section 5.2.
    """
    return jnp.sum(jnp.var(mu, axis=0) > threshold)


def negative_elbo(mse: jax.Array, kl: jax.Array, numbers: int) -> jax.Array:
    """Bits per number of the image: the bound of the VAE with the best shared pixel variance.

    The likelihood is a Gaussian around the reconstruction whose variance is the mean squared error
    itself, its maximum-likelihood value (Rybkin et al., "Simple and Effective VAE Training with
    Calibrated Decoders", 2021, section 3.2), so that runs of different KL weights compare.

    Args:
        mse: mean squared error per number, over the data set.
        kl: KL divergence per image in nats, mean over the data set.
        numbers: how many an image has (h * w * c).
    """
    nats = 0.5 * numbers * (jnp.log(2 * jnp.pi * mse) + 1.0) + kl
    return nats / (numbers * jnp.log(2.0))
