"""Light on the ear: horizons, skin, hair and the camera."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .anatomy import Ear, smoothstep
from .factors import Factors

HORIZON_DIRECTIONS = 8
HORIZON_REACH = (0.009, 0.018, 0.035, 0.06, 0.1, 0.16)  # of the picture's height


def horizons(height: jax.Array, pixel: jax.Array | float) -> jax.Array:
    """Tangent of the horizon's angle around every point [8, H, W], 0 where the view is free.

    Horizon maps: Max, "Horizon mapping: shadows for bump-mapped surfaces", 1988. Directions go
    from +x clockwise on the screen; `pixel` is a pixel's size in the unit of `height`.
    """
    rows, columns = height.shape
    steps = sorted({max(1, round(r * rows)) for r in HORIZON_REACH})
    pad = steps[-1]
    padded = jnp.pad(height, pad, mode="edge")
    tangents = []
    for k in range(HORIZON_DIRECTIONS):
        angle = 2 * np.pi * k / HORIZON_DIRECTIONS
        tangent = jnp.zeros_like(height)
        for step in steps:
            dx, dy = round(step * np.cos(angle)), round(step * np.sin(angle))
            there = padded[pad + dy : pad + dy + rows, pad + dx : pad + dx + columns]
            tangent = jnp.maximum(tangent, (there - height) / (np.hypot(dx, dy) * pixel))
        tangents.append(tangent)
    return jnp.stack(tangents)


def cloud(coarse: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Stretch a coarse random grid [c, c] smoothly over a picture [H, W]."""
    rows, columns = (jnp.asarray(_cubic(n, len(coarse))) for n in shape)
    return rows @ coarse @ columns.T


@cache
def _cubic(n: int, cells: int) -> np.ndarray:
    """Matrix [n, cells] of cubic B-spline weights, knots evenly over n samples."""
    u = (np.arange(n) + 0.5) / n * (cells - 3) + 1
    d = np.abs(u[:, None] - np.arange(cells))
    near, far = 2 / 3 - d**2 + d**3 / 2, np.maximum(2 - d, 0) ** 3 / 6
    return np.where(d < 1, near, far).astype(np.float32)


def grain(table: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Look up a periodic random table [c, c] at u, v [H, W], bilinear."""
    cells = len(table)
    fu, fv = jnp.floor(u), jnp.floor(v)
    tu, tv = u - fu, v - fv
    left, right = fu.astype(int) % cells, (fu.astype(int) + 1) % cells
    above, below = fv.astype(int) % cells, (fv.astype(int) + 1) % cells
    top = table[above, left] * (1 - tu) + table[above, right] * tu
    bottom = table[below, left] * (1 - tu) + table[below, right] * tu
    return top * (1 - tv) + bottom * tv


class Chance(NamedTuple):
    """All that is random about one scene, standard normal: one draw, as each costs compile time."""

    pores: jax.Array
    strands: jax.Array
    wave: jax.Array
    edge: jax.Array
    blood: jax.Array
    pigment: jax.Array
    sensor: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, shape: tuple[int, int]) -> Chance:
        shapes = (shape, (64, 64), (7, 7), (10, 10), (10, 10), (26, 26), (*shape, 3))
        sizes = [int(np.prod(shape)) for shape in shapes]
        values = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
        return cls(*(v.reshape(s) for v, s in zip(values, shapes, strict=True)))


def hair(f: Factors, chance: Chance, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cover [H, W] of the hair on the head, 0 to 1, and the brightness of its strands, 0 to 1."""
    wave = cloud(chance.wave, x.shape)
    flow = jnp.deg2rad(35.0) + 0.3 * wave + 0.006 * (x + y)
    along = y * jnp.cos(flow) - x * jnp.sin(flow)
    across = x * jnp.cos(flow) + y * jnp.sin(flow) + 2.0 * wave
    fine = grain(chance.strands, across * 1.3, along * 0.16)
    locks = grain(chance.strands, across * 0.4 + 17.0, along * 0.07)
    strands = jax.nn.sigmoid(1.6 * fine + 0.9 * locks)
    # Hairline: over the temple, above the ear, and down behind it.
    dx, dy = (x - 14.0) / 40.0, jnp.minimum(y - 20.0, 0.0) / 52.0
    beyond = (jnp.sqrt(dx * dx + dy * dy + 1e-6) - 1.0) * 40.0 + f["hair_coverage"]
    edge = beyond + 5.0 * (strands - 0.5) + 2.0 * cloud(chance.edge, x.shape)
    return smoothstep(edge, -3.0, 4.0), strands


def shade(
    f: Factors, chance: Chance, ear: Ear, x: jax.Array, y: jax.Array, pixel: jax.Array | float
) -> jax.Array:
    """Light an ear on its head; linear RGB [H, W, 3].

    x, y: mm in the head's axes; pixel: size of a pixel in mm.
    """
    cover_hair, strands = hair(f, chance, x, y)
    cover_hair = cover_hair * (1 - ear.cover)
    pores = chance.pores
    skull = -0.0025 * (x - 8.0) ** 2 - 0.0012 * y**2
    height = _smooth(ear.height + skull + 2.5 * cover_hair * strands)

    gy, gx = jnp.gradient(height, pixel)
    gx, gy = gx + 0.045 * pores, gy + 0.045 * jnp.roll(pores, 7, 0)
    length = jax.lax.rsqrt(gx * gx + gy * gy + 1.0)
    normal = jnp.stack([-gx, -gy, jnp.ones_like(gx)]) * length

    azimuth, elevation = jnp.deg2rad(f["light_azimuth"]), jnp.deg2rad(f["light_elevation"])
    light = jnp.stack(
        [
            jnp.sin(azimuth) * jnp.cos(elevation),
            -jnp.cos(azimuth) * jnp.cos(elevation),
            jnp.sin(elevation),
        ]
    )
    tangents = horizons(height, pixel)
    sky = jnp.mean(1 / (1 + tangents**2), 0)
    around = 2 * np.pi * np.arange(HORIZON_DIRECTIONS) / HORIZON_DIRECTIONS
    toward = jax.nn.softmax(4.0 * jnp.cos(around - (azimuth - jnp.pi / 2)))
    tangent = jnp.tensordot(toward, tangents, 1)
    lit = jax.nn.sigmoid((jnp.tan(elevation) - tangent) * 2.2)

    # Divided by what a flat surface gets, so that only `exposure` makes pictures brighter.
    facing = jnp.tensordot(light, normal, 1) / light[2]
    # Light that entered the skin nearby softens the terminator, red most (it travels farthest).
    wrap = jnp.asarray([0.35, 0.18, 0.14])
    diffuse = jnp.maximum((facing[..., None] + wrap) / (1 + wrap), 0.0)
    shadow = _powers(lit, (0.7, 1.0, 1.05))
    occluded = _powers(sky, (1.0, 1.5, 1.6))
    ambient = f["light_ambient"]
    tint = jnp.exp(f["light_warmth"] * jnp.asarray([1.0, 0.0, -1.0]))
    light_in = ambient * occluded + (1 - ambient) * diffuse * shadow * (0.4 + 0.6 * occluded)

    blood = f["redness"] * (1 + 0.75 * jnp.clip(ear.flush, 0, 1)) + f["blotches"] * 1.5 * cloud(
        chance.blood, x.shape
    )
    pigment = f["melanin"] + f["blotches"] * (cloud(chance.pigment, x.shape) + 0.5 * pores)
    density = pigment[..., None] * jnp.asarray([0.75, 1.15, 1.6]) + blood[..., None] * jnp.asarray(
        [0.10, 0.75, 0.65]
    )
    skin = jnp.asarray([0.84, 0.63, 0.49]) * jnp.exp(-density)
    skin = skin * (1 - 0.85 * jnp.clip(ear.canal, 0, 1))[..., None]
    strand = (0.1 + 3.0 * strands**3) * f["hair_tone"]
    hair_colour = strand[..., None] * jnp.asarray([1.0, 0.76, 0.56])
    albedo = skin + cover_hair[..., None] * (hair_colour - skin)

    half = light + jnp.asarray([0.0, 0.0, 1.0])
    half = half / jnp.linalg.norm(half)
    glance = jnp.tensordot(half, normal, 1)
    shine = (
        (0.75 * jnp.exp(-22.0 * (1 - glance)) + 0.25 * jnp.exp(-8.0 * (1 - glance)))
        * f["gloss"]
        * lit
        * sky
        * (1 - 0.9 * cover_hair)
    )
    return (albedo * light_in + 1.1 * _smooth(shine)[..., None]) * tint


def photograph(f: Factors, chance: Chance, scene: jax.Array, pixel: jax.Array | float) -> jax.Array:
    """Expose, blur and read out linear RGB [H, W, 3]; values in [0, 1], gamma 2.2."""
    rows, columns = (_lens(n, f["blur"] / pixel) for n in scene.shape[:2])
    scene = jnp.einsum("ih,hwc,jw->ijc", rows, scene, columns)
    exposed = jnp.maximum(scene * 2.0 ** f["exposure"], 1e-4)
    # Rolls off towards white as film does, where a hard clip would cut the highlights.
    picture = jnp.exp(jnp.log(1.0 - jnp.exp(-1.15 * exposed)) / 2.2)
    return jnp.clip(picture + f["noise"] * chance.sensor, 0.0, 1.0)


def _smooth(field: jax.Array) -> jax.Array:
    """Binomial [1, 2, 1] in both directions: crests as narrow as a pixel would sparkle."""
    padded = jnp.pad(field, 1, mode="edge")
    padded = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    return 0.25 * padded[:, :-2] + 0.5 * padded[:, 1:-1] + 0.25 * padded[:, 2:]


def _lens(n: int, sigma: jax.Array) -> jax.Array:
    """Gaussian blur of n samples as a matrix [n, n]; every row sums to 1."""
    distance = np.arange(n)[:, None] - np.arange(n)
    return jax.nn.softmax(-0.5 * (distance / sigma) ** 2)


def _powers(x: jax.Array, exponents: tuple[float, float, float]) -> jax.Array:
    """x [...] to one power for each colour, [..., 3]; much cheaper than `**`, x is positive."""
    return jnp.exp(jnp.log(x)[..., None] * jnp.asarray(exponents))
