"""Synthetic ears: pictures whose every cause is known and comes back with them.

A right ear seen from the side, face to the right, as in ear photographs: a height field of ridges
and hollows (`anatomy`), lit, coloured and photographed (`shading`), drawn from named causes
(`factors`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxear.errors import UserError

from .anatomy import raise_ear
from .factors import ANATOMY, FACTORS, NUISANCES, Factor, Factors, draw_factors
from .shading import Chance, photograph, shade

__all__ = [
    "ANATOMY",
    "FACTORS",
    "NUISANCES",
    "Factor",
    "Factors",
    "mean_factors",
    "render",
    "sample_factors",
    "synthetic_ears",
]

HALF_HEIGHT = 37.0  # mm from the picture's middle to its upper edge, at scale 1
LEAN = 8.0  # degrees by which the ear's top lies behind its lobule
SMALLEST = 16  # pixels; the widest horizon would leave a smaller picture
BATCH = 32  # one compiled shape, so that an image is the same to the bit however many are drawn


@partial(jax.jit, static_argnames="n")
def sample_factors(key: jax.Array, n: int) -> Factors:
    """Draw the factors of n ears, each ear a subject of its own.

    Returns:
        {name: [n] float32} for every factor in `FACTORS`, in its unit, within its low and high.
        The i-th values depend on the key and i, not on n.
    """
    return jax.vmap(lambda i: draw_factors(key, i, i))(jnp.arange(n))


def mean_factors(n: int = 1) -> Factors:
    """The mean ear in the mean picture, n times: {name: [n] float32}, to change and render."""
    return {factor.name: jnp.full((n,), factor.mean, jnp.float32) for factor in FACTORS}


def render(
    factors: Factors, *, image_size: int | tuple[int, int] = 128, key: jax.Array
) -> jax.Array:
    """Photograph the ears that the factors describe; differentiable in the factors.

    Args:
        factors: {name: [n]}, exactly the names in `FACTORS`, in their units.
        image_size: side of the square picture, or (height, width), in pixels.
        key: for what is no factor: strands of hair, spots of the skin, the sensor's noise. That
            of the i-th image depends on the key and i, not on n.

    Returns:
        images [n, H, W, 3] in [0, 1], float32.

    Raises:
        UserError: factors are missing or unknown, or the picture is too small.
    """
    names = {factor.name for factor in FACTORS}
    if names != factors.keys():
        raise UserError(
            f"Factors of synthetic ears: missing {sorted(names - factors.keys())}, unknown "
            f"{sorted(factors.keys() - names)}; start from mean_factors() or sample_factors()."
        )
    return _render(factors, key, jnp.arange(len(factors["yaw"])), _checked(image_size))


def synthetic_ears(
    seed: int,
    n: int,
    image_size: int | tuple[int, int] = 128,
    *,
    images_per_subject: int = 1,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a data set of synthetic ears and what each was made from.

    Image i shows subject i // images_per_subject; the images of a subject share their anatomy
    exactly and differ in all the rest. Image i depends on seed, i, image_size and
    images_per_subject, not on n.

    Returns:
        images [n, H, W, 3] uint8, and {name: [n] float32} for every factor in `FACTORS`.

    Raises:
        UserError: n or images_per_subject below 1, or the picture is too small.
    """
    if n < 1 or images_per_subject < 1:
        raise UserError(
            f"Synthetic ears: n is {n} and images_per_subject {images_per_subject}; "
            "both have to be 1 or more."
        )
    size = _checked(image_size)
    images = np.empty((n, *size, 3), np.uint8)
    factors = {factor.name: np.empty(n, np.float32) for factor in FACTORS}
    for start in range(0, n, BATCH):
        stop = min(start + BATCH, n)
        drawn, values = _draw(jax.random.key(seed), start, images_per_subject, size)
        images[start:stop] = np.asarray(drawn)[: stop - start]
        for name, column in factors.items():
            column[start:stop] = np.asarray(values[name])[: stop - start]
    return images, factors


@partial(jax.jit, static_argnames="size")
def _draw(
    key: jax.Array, start: int, images_per_subject: int, size: tuple[int, int]
) -> tuple[jax.Array, Factors]:
    index = start + jnp.arange(BATCH)
    k_factors, k_images = jax.random.split(key)
    factors = jax.vmap(partial(draw_factors, k_factors))(index // images_per_subject, index)
    images = _render(factors, k_images, index, size)
    return jnp.round(images * 255).astype(jnp.uint8), factors


@partial(jax.jit, static_argnames="size")
def _render(factors: Factors, key: jax.Array, index: jax.Array, size: tuple[int, int]) -> jax.Array:
    return jax.vmap(lambda f, i: _render_one(f, jax.random.fold_in(key, i), size))(factors, index)


def _render_one(f: Factors, key: jax.Array, size: tuple[int, int]) -> jax.Array:
    """One image [H, W, 3] from scalar factors."""
    rows, columns = size
    pixel = 2 * HALF_HEIGHT / rows
    x = (np.arange(columns) - (columns - 1) / 2) * pixel
    y = (np.arange(rows) - (rows - 1) / 2) * pixel
    x, y = jnp.meshgrid((x - f["shift_x"]) / f["scale"], (y - f["shift_y"]) / f["scale"])
    head_x, head_y = _turn(x, y, -f["rotation"])
    ear_x, ear_y = _turn(head_x, head_y, LEAN)
    chance = Chance.draw(key, size)
    pixel = pixel / f["scale"]
    scene = shade(f, chance, raise_ear(f, ear_x, ear_y), head_x, head_y, pixel)
    return photograph(f, chance, scene, pixel)


def _turn(x: jax.Array, y: jax.Array, degrees: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    angle = jnp.deg2rad(degrees)
    return (
        x * jnp.cos(angle) - y * jnp.sin(angle),
        x * jnp.sin(angle) + y * jnp.cos(angle),
    )


def _checked(image_size: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (image_size,) * 2 if isinstance(image_size, int) else image_size
    if min(rows, columns) < SMALLEST:
        raise UserError(
            f"Synthetic ears of {rows}x{columns} pixels show nothing; "
            f"give an image_size of {SMALLEST} or more."
        )
    return rows, columns
