"""Augmentation of training images on the device: one warp, one colour map, then what is hidden.

Every amount is drawn per image from its own key, so that the result does not depend on how a batch
is cut over devices. What is switched off costs nothing and changes nothing. For ears a fair
beginning is rotation 12, scale 0.15, shift 0.06, brightness, contrast, saturation and gamma 0.15,
hue 0.02.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxear.config import AugmentConfig


class Augmented(NamedTuple):
    """Augmented images.

    `input` [b, h, w, 3] in [0, 1] is what the encoder sees; `target` [b, h, w, 3] in [0, 1] what
    the decoder shall make of it, the same without blur, noise and occlusion; `visible` [b, h, w] is
    0 where a patch hides the target in `input`, and 1 elsewhere.
    """

    input: jax.Array
    target: jax.Array
    visible: jax.Array


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> Augmented:
    """Images as a camera might have taken them on another day, and with parts hidden.

    Args:
        images: float [b, h, w, 3] in [0, 1].
        keys: random keys [b], one per image.
        config: how much of what; static under `jax.jit`.
    """
    return jax.vmap(partial(_augment, config=config))(images, keys)


def _augment(image: jax.Array, key: jax.Array, config: AugmentConfig) -> Augmented:
    """The same for one image [h, w, 3]."""
    warp_key, colour_key, blur_key, noise_key, patch_key = jax.random.split(key, 5)
    shape = (image.shape[0], image.shape[1])
    target = image
    if any(
        (
            config.aug_rotation,
            config.aug_scale,
            config.aug_shift,
            config.aug_crop,
            config.aug_mirror,
        )
    ):
        target = warp(target, random_affine(warp_key, shape, config))
    if config.aug_gamma:
        gamma_key, colour_key = jax.random.split(colour_key)
        target = target ** _ratio(gamma_key, config.aug_gamma)
    if any((config.aug_brightness, config.aug_contrast, config.aug_saturation, config.aug_hue)):
        target = random_colour(colour_key, target, config)
    seen, visible = target, jnp.ones(shape, image.dtype)
    if config.aug_blur:
        sigma = config.aug_blur * jax.random.uniform(blur_key)
        seen = blur(seen, sigma, radius=int(np.ceil(3 * config.aug_blur)))
    if config.aug_noise:
        amount_key, noise_key = jax.random.split(noise_key)
        sd = config.aug_noise * jax.random.uniform(amount_key)
        seen = jnp.clip(seen + sd * jax.random.normal(noise_key, seen.shape, seen.dtype), 0, 1)
    if config.aug_occlusion:
        place_key, colour_key = jax.random.split(patch_key)
        visible = random_patch(place_key, shape, config).astype(image.dtype)
        colour = jax.random.uniform(colour_key, (3,), image.dtype)
        seen = jnp.where(visible[..., None] > 0, seen, colour)
    return Augmented(seen, target, visible)


def _within(key: jax.Array, most: float, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniform in [-most, most]."""
    return jax.random.uniform(key, shape, minval=-most, maxval=most)


def _ratio(key: jax.Array, most: float) -> jax.Array:
    """Log-uniform in [1 / (1 + most), 1 + most]."""
    return (1 + most) ** _within(key, 1.0)


def random_affine(key: jax.Array, shape: tuple[int, int], config: AugmentConfig) -> jax.Array:
    """The affine map [2, 3] from an augmented image's pixels (x, y, 1), counted from its centre, to
    those of the image that it is made of: turned, zoomed, moved, cropped, mirrored.
    """
    keys = jax.random.split(key, 6)
    size = jnp.array([shape[1], shape[0]], jnp.float32)
    angle = jnp.deg2rad(_within(keys[0], config.aug_rotation))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]]) / _ratio(keys[1], config.aug_scale)
    flip = jnp.where(jax.random.bernoulli(keys[2], config.aug_mirror), -1.0, 1.0)
    linear = jnp.array([[flip], [1.0]]) * turn
    cropped = config.aug_crop * jax.random.uniform(keys[3])
    start = (
        _within(keys[4], 0.5, (2,)) * cropped * size
        - _within(keys[5], config.aug_shift, (2,)) * size
    )
    return jnp.concatenate([linear * (1 - cropped), (linear @ start)[:, None]], axis=1)


def warp(image: jax.Array, affine: jax.Array, shape: tuple[int, int] | None = None) -> jax.Array:
    """The image [h, w, 3] seen through `affine` [2, 3] (`random_affine`), bilinearly interpolated.

    Pixels from outside the image are the nearest pixel of its border. What is seen has as many
    pixels as the image, or `shape` of them about the same centre.
    """
    h, w, c = image.shape
    rows, columns = shape or (h, w)
    x, y = jnp.arange(columns) - (columns - 1) / 2, jnp.arange(rows)[:, None] - (rows - 1) / 2
    x, y = (
        jnp.clip(m[0] * x + m[1] * y + m[2] + (n - 1) / 2, 0, n - 1)
        for m, n in zip(affine, (w, h), strict=True)
    )
    x0, y0 = (
        jnp.minimum(jnp.floor(at).astype(jnp.int32), max(n - 2, 0)) for at, n in ((x, w), (y, h))
    )
    fx, fy = (x - x0)[..., None].astype(image.dtype), (y - y0)[..., None].astype(image.dtype)
    pixels = image.reshape(h * w, c)
    corner = y0 * w + x0
    right, below = min(1, w - 1), w * min(1, h - 1)
    top = _lerp(pixels[corner], pixels[corner + right], fx)
    bottom = _lerp(pixels[corner + below], pixels[corner + below + right], fx)
    return _lerp(top, bottom, fy)


def _lerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    return a + t * (b - a)


# RGB -> YIQ (NTSC, 1953): brightness and two axes of colour. A change of hue is a turn in their
# plane and one of saturation a zoom, and neither changes a grey pixel.
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)
_RGB = np.linalg.inv(_YIQ)


def random_colour(key: jax.Array, image: jax.Array, config: AugmentConfig) -> jax.Array:
    """The image [h, w, 3] with another hue, saturation, contrast (about its mean grey) and
    brightness, all in one affine map of its colours, cut off at 0 and 1.
    """
    keys = jax.random.split(key, 4)
    angle = 2 * np.pi * _within(keys[0], config.aug_hue)
    saturation = _ratio(keys[1], config.aug_saturation)
    contrast = _ratio(keys[2], config.aug_contrast)
    cos, sin = saturation * jnp.cos(angle), saturation * jnp.sin(angle)
    chroma = jnp.eye(3).at[1:, 1:].set(jnp.array([[cos, -sin], [sin, cos]]))
    exact = jax.lax.Precision.HIGHEST  # matrices of colours, on devices that would round them
    matrix = contrast * jnp.matmul(jnp.matmul(_RGB, chroma, precision=exact), _YIQ, precision=exact)
    mean_grey = image.mean((0, 1)) @ _YIQ[0]
    offset = (1 - contrast) * mean_grey + _within(keys[3], config.aug_brightness)
    # Written out: as a matrix product XLA would not fuse it.
    r, g, b = (image[..., i, None] * matrix[:, i].astype(image.dtype) for i in range(3))
    return jnp.clip(r + g + b + offset.astype(image.dtype), 0, 1)


def blur(image: jax.Array, sigma: jax.Array, radius: int) -> jax.Array:
    """The image [h, w, 3] blurred by a Gaussian of `sigma` pixels, cut off at `radius`; beyond its
    border are the border's pixels.
    """
    offsets = np.arange(-radius, radius + 1)
    weights = jnp.exp(-0.5 * (offsets / jnp.maximum(sigma, 1e-3)) ** 2)
    weights = (weights / weights.sum()).astype(image.dtype)
    for axis in (0, 1):
        n = image.shape[axis]
        pad = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        padded = jnp.pad(image, pad, mode="edge")
        parts = (jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(len(offsets)))
        image = sum(
            (w * part for w, part in zip(weights, parts, strict=True)), jnp.zeros_like(image)
        )
    return image


def random_patch(key: jax.Array, shape: tuple[int, int], config: AugmentConfig) -> jax.Array:
    """Bool `shape`: False in a rectangle that lies inside the image, where there is one."""
    whether, sides, places = jax.random.split(key, 3)
    low = config.aug_occlusion_size / 3
    side = jax.random.uniform(sides, (2,), minval=low, maxval=config.aug_occlusion_size)
    start = jax.random.uniform(places, (2,)) * (1 - side)
    end = start + side
    y = (jnp.arange(shape[0]) + 0.5)[:, None] / shape[0]
    x = (jnp.arange(shape[1]) + 0.5) / shape[1]
    inside = (start[0] <= y) & (y < end[0]) & (start[1] <= x) & (x < end[1])
    return ~(inside & jax.random.bernoulli(whether, config.aug_occlusion))
