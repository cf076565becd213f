"""What can be said of a picture without knowing an ear: its light, its colours, its framing.

All are means over the pixels inside the padding that `fit: pad` adds (`jaxear.data.images`), and
need no segmentation. Colours are CIE 1976 L*a*b* of sRGB under D65, in which hue is no angle, which
would have no mean and none for grey, but two axes.

Size and place are those of the first-order registration of a picture to the mean of all
(Lucas & Kanade, "An iterative image registration technique", 1981, for shift, zoom and turn
at once, one step). What is registered is not the lightness but its gradients, smoothed, as vectors
of doubled angle and the square root of their length (as in the structure tensor; Bigun & Granlund,
1987): an edge stays what it is whichever of its sides is lit. On 1,500 synthetic ears of 64 pixels,
cubic fits to these statistics find 57 % of the variance of log(scale x ear_length), 74 % of the
shifts' and 74 % of the rotation's. The spread of the gradients' energy about its centroid,
which needs no mean picture, found 9 % of the size's: hair outweighs the ear.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxear.data.images import PAD_COLOUR
from jaxear.data.pipeline import padded_batches
from jaxear.inference import as_float

BATCH = 64
GRID = 64  # rows that are registered, at most
SMOOTHING = 0.023  # standard deviation of the registered gradients' smoothing, of the height
WINDOW = 0.45  # standard deviation of the registration's Gaussian window, of half a side


class Statistic(NamedTuple):
    """One number of a picture, and the group that it is reported in."""

    name: str
    group: str
    description: str


STATISTICS = (
    Statistic("lightness", "brightness", "mean of L*, 0 to 100"),
    Statistic("lightness_sd", "contrast", "standard deviation of L* over the picture"),
    Statistic("red_green", "colour", "mean of a*, from green (-) to red (+)"),
    Statistic("yellow_blue", "colour", "mean of b*, from blue (-) to yellow (+)"),
    Statistic("slope_right", "shading", "rise of L* from the left to the right, least squares"),
    Statistic("slope_down", "shading", "rise of L* from top to bottom, least squares"),
    Statistic("right", "position", "shift to the right from the mean picture, in half widths"),
    Statistic("down", "position", "its shift downwards, in half heights"),
    Statistic("zoom", "scale", "size of what is seen, relative to the mean picture, less 1"),
    Statistic("turn", "position", "its turn clockwise, in radians"),
    Statistic("padded_width", "padding", "share of the picture's columns that are padding"),
    Statistic("padded_height", "padding", "share of its rows"),
)


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Every statistic of every image: {name: float32 [n]}, the names being those of `STATISTICS`.

    Padding is known by its colour: rows and columns that are `PAD_COLOUR` from end to end.

    Args:
        images: [n, H, W, 3], uint8 or floats in [0, 1].
    """
    batches = list(padded_batches(images, BATCH))
    sums = [_sum_of_edges(as_float(batch), n) for batch, n in batches]
    total, count = map(sum, zip(*sums, strict=True))
    templates = _templates(total / jnp.maximum(count, 1.0))
    measured = [
        [part[:n] for part in jax.device_get(_measure(as_float(batch), templates))]
        for batch, n in batches
    ]
    light, gram, moment, padded = (np.concatenate(part) for part in zip(*measured, strict=True))
    # A picture without edges has none to register: it is where the mean is. The ridge is no more
    # than what the sums are rounded by, as it takes part of what a constant explains for a zoom.
    gram, moment = gram.astype(np.float64), moment.astype(np.float64)
    ridge = 1e-7 * np.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-9
    moves = np.linalg.solve(gram + ridge * np.eye(gram.shape[1]), moment[..., None])[:, :4, 0]
    columns = np.concatenate([light, moves.astype(np.float32), padded], axis=1)
    return {s.name: v for s, v in zip(STATISTICS, columns.T, strict=True)}


class _Picture(NamedTuple):
    """Lightness [b, h, w] and colour [b, h, w, 2], and which rows [b, h], columns [b, w] count."""

    lightness: jax.Array
    colour: jax.Array
    rows: jax.Array
    columns: jax.Array

    @property
    def inside(self) -> jax.Array:
        return self.rows[:, :, None] * self.columns[:, None, :]


def cielab(images: jax.Array) -> jax.Array:
    """CIE 1976 L*a*b* of sRGB images in [0, 1], [..., 3]: IEC 61966-2-1, white point D65."""
    linear = jnp.where(
        images <= 0.04045, images / 12.92, ((jnp.maximum(images, 0.0) + 0.055) / 1.055) ** 2.4
    )
    t = jnp.matmul(linear, jnp.asarray(_XYZ.T), precision=jax.lax.Precision.HIGHEST)
    f = jnp.where(t > (6 / 29) ** 3, jnp.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


# sRGB -> XYZ, as shares of those of white.
_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_XYZ = (_XYZ / _XYZ.sum(axis=1, keepdims=True)).astype(np.float32)


def _look(images: jax.Array) -> _Picture:
    padding = jnp.all(jnp.round(255 * images) == jnp.asarray(PAD_COLOUR), axis=-1)
    lab = cielab(images)
    return _Picture(
        lab[..., 0],
        lab[..., 1:],
        1.0 - jnp.all(padding, axis=2),
        1.0 - jnp.all(padding, axis=1),
    )


def _edges(picture: _Picture) -> tuple[jax.Array, jax.Array]:
    """The gradients to register [b, 3, m, n], and where they are known [b, m, n]."""
    h, w = picture.lightness.shape[1:]
    m = min(h, GRID)
    n = max(round(w * m / h), 2)
    lightness = _smooth(picture.lightness, picture.inside, SMOOTHING * h / 2, (m, n))
    down, right = jnp.gradient(lightness, axis=(1, 2))
    rows, columns = (
        _eroded(mask[:, (np.arange(size) * 2 + 1) * mask.shape[1] // (2 * size)])
        for mask, size in ((picture.rows, m), (picture.columns, n))
    )
    known = rows[:, :, None] * columns[:, None, :]
    length = jnp.sqrt(down**2 + right**2 + 1e-6)
    edges = jnp.stack([right**2 - down**2, 2 * right * down, length**2], axis=1)
    edges = _smooth(edges * length[:, None] ** -1.5, known[:, None], SMOOTHING * m, (m, n))
    window = _window((m, n)) * known
    strength = jnp.sum(edges[:, 2] * window, axis=(1, 2)) / jnp.maximum(window.sum((1, 2)), 1e-6)
    return edges / jnp.maximum(strength, 1e-6)[:, None, None, None], known


@jax.jit
def _sum_of_edges(images: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Over the first n images: the sum of their edges, and of how many they are known."""
    edges, known = _edges(_look(images))
    known *= (jnp.arange(len(images)) < n)[:, None, None]
    return jnp.sum(edges * known[:, None], axis=0), jnp.sum(known, axis=0)


def _templates(mean: jax.Array) -> jax.Array:
    """How the mean edges [3, m, n] change as the picture moves right, down, grows, turns, and as
    each of the three is raised or gains [10, 3, m, n]."""
    h, w = mean.shape[1:]
    y, x = _coordinates((h, w))
    down, right = jnp.gradient(mean, axis=(1, 2))
    down, right = down * h / 2, right * w / 2
    moves = -jnp.stack([right, down, x * right + y * down, x * down - y * right])
    channels = jnp.eye(3)[:, :, None, None]
    return jnp.concatenate([moves, channels * jnp.ones_like(mean), channels * mean])


@jax.jit
def _measure(images: jax.Array, templates: jax.Array) -> tuple[jax.Array, ...]:
    """Images [b, h, w, 3] -> statistics of light and colour [b, 6], those of padding [b, 2] last,
    and between them the normal equations [b, 10, 10], [b, 10] of the registration."""
    picture = _look(images)
    inside = picture.inside
    inside /= jnp.maximum(jnp.sum(inside, axis=(1, 2), keepdims=True), 1.0)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(values * inside, axis=(1, 2))

    lightness = mean(picture.lightness)
    deviation = picture.lightness - lightness[:, None, None]
    slopes = []
    for axis in _coordinates(inside.shape[1:])[::-1]:
        centred = axis - mean(jnp.broadcast_to(axis, inside.shape))[:, None, None]
        slopes.append(mean(centred * deviation) / jnp.maximum(mean(centred**2), 1e-6))
    edges, known = _edges(picture)
    weighted = templates * (_window(known.shape[1:]) * known)[:, None, None]
    gram = jnp.einsum("bpchw,qchw->bpq", weighted, templates, precision="highest")
    moment = jnp.einsum("bpchw,bchw->bp", weighted, edges, precision="highest")
    light = [
        lightness,
        jnp.sqrt(mean(deviation**2)),
        mean(picture.colour[..., 0]),
        mean(picture.colour[..., 1]),
        *slopes,
    ]
    padded = [jnp.mean(1.0 - picture.columns, axis=1), jnp.mean(1.0 - picture.rows, axis=1)]
    return jnp.column_stack(light), gram, moment, jnp.column_stack(padded)


def _coordinates(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """y [h, 1] and x [1, w] from -1 to 1 over the picture."""
    y, x = ((np.arange(n) + 0.5) * 2 / n - 1 for n in shape)
    return jnp.asarray(y[:, None], jnp.float32), jnp.asarray(x[None, :], jnp.float32)


def _window(shape: tuple[int, ...]) -> jax.Array:
    y, x = _coordinates(shape)
    return jnp.exp(-0.5 * (x**2 + y**2) / WINDOW**2)


def _eroded(mask: jax.Array) -> jax.Array:
    """Without those [b, n] that border on what is masked; the picture's end is no border."""
    wider = jnp.pad(mask, ((0, 0), (1, 1)), constant_values=1.0)
    return mask * wider[:, :-2] * wider[:, 2:]


def _smooth(values: jax.Array, known: jax.Array, sigma: float, shape: tuple[int, int]) -> jax.Array:
    """Gaussian mean of the values [..., h, w] that are known, `sigma` in their pixels, on a grid of
    the same extent: [..., *shape]."""
    rows, columns = (_kernel(m, n, sigma) for m, n in zip(shape, values.shape[-2:], strict=True))

    def spread(x: jax.Array) -> jax.Array:
        return jnp.einsum("ih,...hw,jw->...ij", rows, x, columns, precision="highest")

    return spread(values * known) / jnp.maximum(spread(known), 1e-6)


def _kernel(m: int, n: int, sigma: float) -> np.ndarray:
    """Gaussian weights [m, n] of n pixels at m places spread evenly over them."""
    distance = (np.arange(m)[:, None] + 0.5) * n / m - 0.5 - np.arange(n)
    return np.exp(-0.5 * (distance / sigma) ** 2).astype(np.float32)
