"""The ear's shape: smooth ridges and hollows along anatomical curves, as a height over the head.

A right ear seen from the side, face to the right. Millimetres: x to the face, y down, z outwards.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .factors import Factors

# Control points of a mean ear, upright: x, y, height, width to the left and to the right of the
# direction of travel. Widths are where a ridge has fallen (or a hollow's wall has risen).
# The outline: over the top and down the back along the helix, round the lobule, and back in front
# of the tragus and the helix's root, where it has no height and only closes the curve.
RIM = (
    (16.0, -10.0, 0.0, 4.0, 8.0),
    (14.0, -16.5, 0.0, 3.0, 7.0),
    (10.8, -21.6, 1.6, 2.6, 5.0),
    (7.2, -25.2, 4.0, 2.4, 4.0),
    (2.6, -27.4, 4.6, 2.4, 3.0),
    (-2.5, -28.0, 4.6, 2.4, 2.8),
    (-7.0, -26.6, 4.6, 2.4, 2.6),
    (-11.0, -24.0, 4.4, 2.4, 2.2),
    (-14.2, -20.0, 4.2, 2.3, 2.0),
    (-16.2, -15.0, 4.0, 2.2, 1.9),
    (-16.8, -9.0, 3.8, 2.2, 1.9),
    (-16.2, -3.0, 3.6, 2.2, 1.9),
    (-14.8, 3.0, 3.4, 2.3, 1.9),
    (-12.7, 8.6, 3.0, 2.5, 2.0),
    (-10.0, 14.2, 2.4, 2.8, 2.2),
    (-7.0, 19.4, 1.6, 3.4, 2.8),
    (-3.6, 23.8, 0.8, 4.0, 3.0),
    (0.2, 27.0, 0.3, 4.0, 3.0),
    (4.4, 27.8, 0.1, 4.0, 3.0),
    (8.4, 26.4, 0.0, 4.0, 2.8),
    (11.4, 23.6, 0.0, 4.0, 2.6),
    (13.8, 20.2, 0.0, 4.0, 3.2),
    (16.2, 16.0, 0.0, 4.0, 4.6),
    (18.0, 9.0, 0.0, 4.0, 6.5),
    (18.0, 2.0, 0.0, 4.0, 8.0),
    (17.2, -4.0, 0.0, 4.0, 8.0),
)
# The helix's beginning: from the crus in the concha up the front until the rim takes over.
HELIX_ROOT = (
    (-1.8, 4.4, 0.0, 2.4, 2.6),
    (1.4, 3.2, 0.9, 2.4, 2.6),
    (4.4, 1.4, 1.3, 2.4, 2.8),
    (7.2, -1.2, 1.25, 2.3, 3.4),
    (9.0, -5.0, 1.0, 2.2, 5.5),
    (10.0, -9.5, 1.0, 2.1, 6.0),
    (10.4, -14.0, 1.0, 2.1, 6.0),
    (9.8, -18.4, 1.0, 2.1, 5.0),
    (7.6, -22.2, 1.0, 2.1, 4.2),
    (4.4, -25.2, 0.8, 2.2, 3.4),
    (0.6, -27.2, 0.2, 2.4, 3.0),
)
# The hollow of the concha, counter-clockwise as the rim: under the lower crus, down along the
# antihelix to the antitragus, through the intertragal notch, up behind the tragus.
CONCHA = (
    (7.6, -11.0, 1.0, 1.6, 1.0),
    (2.4, -8.6, 1.0, 2.2, 1.0),
    (-2.8, -6.8, 1.0, 3.0, 1.0),
    (-6.2, -3.6, 1.0, 3.6, 1.0),
    (-6.9, 0.4, 1.0, 3.6, 1.0),
    (-5.6, 4.6, 1.0, 3.2, 1.0),
    (-3.0, 8.2, 1.0, 2.8, 1.0),
    (0.4, 10.8, 1.0, 2.4, 1.0),
    (4.2, 13.0, 1.0, 2.2, 1.0),
    (7.2, 15.4, 1.0, 2.2, 1.0),
    (9.3, 17.4, 1.0, 2.8, 1.0),
    (11.3, 16.6, 1.0, 2.8, 1.0),
    (12.1, 13.0, 1.0, 2.0, 1.0),
    (10.9, 9.4, 1.0, 1.4, 1.0),
    (11.0, 5.6, 1.0, 1.4, 1.0),
    (11.8, 2.4, 1.0, 2.0, 1.0),
    (9.0, -0.4, 1.0, 3.5, 1.0),
    (8.0, -4.0, 1.0, 2.4, 1.0),
    (8.2, -8.0, 1.0, 1.8, 1.0),
)
# From the antitragus up to where the crura part, and on as the upper crus.
ANTIHELIX = (
    (1.5, 13.8, 0.4, 3.0, 2.4),
    (-2.0, 11.4, 0.7, 3.8, 2.8),
    (-5.6, 7.6, 0.9, 4.6, 3.2),
    (-8.2, 2.8, 1.0, 5.0, 3.6),
    (-9.2, -2.4, 1.0, 5.0, 3.8),
    (-8.4, -8.0, 1.0, 4.8, 4.0),
    (-6.8, -13.0, 0.95, 4.8, 4.4),
    (-4.6, -17.6, 0.9, 4.8, 4.4),
    (-2.4, -21.6, 0.75, 4.6, 4.2),
    (-0.6, -24.6, 0.4, 4.0, 3.6),
)
LOWER_CRUS = (
    (-8.4, -8.6, 0.9, 2.8, 3.0),
    (-4.2, -10.2, 0.9, 2.8, 2.8),
    (0.2, -11.2, 0.9, 2.8, 2.6),
    (4.4, -12.8, 0.8, 2.7, 2.4),
    (8.4, -15.0, 0.7, 2.6, 2.2),
)
TRAGUS = (
    (14.2, -0.2, 0.1, 2.0, 5.0),
    (12.6, 3.0, 0.7, 1.8, 7.0),
    (10.7, 6.0, 1.0, 1.6, 8.0),
    (10.4, 8.8, 1.0, 1.6, 8.0),
    (11.8, 12.0, 0.75, 1.7, 7.0),
    (14.0, 15.4, 0.2, 2.0, 5.0),
)
ANTITRAGUS = (
    (1.4, 13.2, 0.3, 3.0, 1.6),
    (4.2, 14.7, 0.9, 4.2, 1.6),
    (6.4, 16.4, 1.0, 4.2, 1.6),
    (7.8, 18.8, 0.4, 3.0, 1.6),
)
CANAL = (9.8, 7.0)
LOBULE = (3.4, 23.2)


class Field(NamedTuple):
    """What `trace` finds at every point: the nearest place of a curve, and its attributes there."""

    distance: jax.Array  # mm, negative to the left of the direction of travel
    height: jax.Array
    left: jax.Array
    right: jax.Array

    def ridge(self, power: float) -> jax.Array:
        """Height of a ridge: full on the curve, 1/e of it at its width to that side."""
        width = jnp.where(self.distance < 0, self.left, self.right)
        return self.height * jnp.exp(-((jnp.abs(self.distance) / width) ** power))


@cache
def _spline(n: int, closed: bool) -> np.ndarray:
    """Matrix [samples, n] from control points to a Catmull-Rom spline through them."""
    spans, per_span = n if closed else n - 1, 2
    u = np.arange(spans * per_span + 1) / per_span
    i = np.minimum(u.astype(int), spans - 1)
    t = (u - i)[:, None]
    weights = 0.5 * np.concatenate(
        [
            -t + 2 * t**2 - t**3,
            2 - 5 * t**2 + 3 * t**3,
            t + 4 * t**2 - 3 * t**3,
            -(t**2) + t**3,
        ],
        axis=1,
    )
    matrix = np.zeros((len(u), n), np.float32)
    for k in range(4):
        j = i + k - 1
        j = j % n if closed else np.clip(j, 0, n - 1)
        np.add.at(matrix, (np.arange(len(u)), j), weights[:, k])
    return matrix


def trace(curves: list[jax.Array], x: jax.Array, y: jax.Array, *, closed: bool) -> list[Field]:
    """Find, on the spline through each curve's points [n, 5], the place nearest to every x, y.

    All curves go through one loop, short ones repeating their end: XLA compiles its body once.
    """
    nodes = [jnp.asarray(_spline(len(points), closed)) @ points for points in curves]
    longest = max(map(len, nodes))
    table = jnp.stack([jnp.pad(n, ((0, longest - len(n)), (0, 0)), mode="edge") for n in nodes])
    columns = table.transpose(1, 2, 0)[..., None, None]  # [node, column, curve, 1, 1]

    def nearer(best, segment):
        (ax, ay, *attributes), (bx, by, *ends) = segment
        dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
        length = dx * dx + dy * dy
        t = jnp.clip((px * dx + py * dy) / jnp.maximum(length, 1e-9), 0.0, 1.0)
        ex, ey = px - t * dx, py - t * dy
        square = ex * ex + ey * ey
        between = (a + t * (b - a) for a, b in zip(attributes, ends, strict=True))
        found = (square, dx * py - dy * px, *between)
        closer = (square < best[0]) & (length > 0)
        return tuple(jnp.where(closer, f, b) for f, b in zip(found, best, strict=True)), None

    shape = (len(curves), *x.shape)
    start = (jnp.full(shape, 1e6),) + (jnp.zeros(shape),) * 4
    segments = (tuple(columns[:-1].swapaxes(0, 1)), tuple(columns[1:].swapaxes(0, 1)))
    (square, side, *attributes), _ = jax.lax.scan(nearer, start, segments, unroll=4)
    # The small constant keeps the square root's gradient finite on the curve itself.
    distance = jnp.sign(side) * jnp.sqrt(square + 1e-6)
    return [Field(*each) for each in zip(distance, *attributes, strict=True)]


def smoothstep(x: jax.Array, low: float, high: float) -> jax.Array:
    t = jnp.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def smooth_max(a: jax.Array, b: jax.Array, softness: float) -> jax.Array:
    return 0.5 * (a + b + jnp.sqrt((a - b) ** 2 + softness**2))


def _bump(x: jax.Array, y: jax.Array, centre: jax.Array, radii: tuple[float, float]) -> jax.Array:
    return jnp.exp(-(((x - centre[0]) / radii[0]) ** 2) - ((y - centre[1]) / radii[1]) ** 2)


def _turn(points: jax.Array, pivot: int, degrees: jax.Array, weight: np.ndarray) -> jax.Array:
    """Turn x, y about the point `pivot`, clockwise on the screen, by degrees * weight [n]."""
    angle = jnp.deg2rad(degrees) * weight
    centre = points[pivot, :2]
    dx, dy = (points[:, :2] - centre).T
    turned = jnp.stack(
        [dx * jnp.cos(angle) - dy * jnp.sin(angle), dx * jnp.sin(angle) + dy * jnp.cos(angle)], 1
    )
    return points.at[:, :2].set(centre + turned)


def _place(points: jax.Array, f: Factors, level: jax.Array | float) -> jax.Array:
    """Carry control points of the mean ear to where size, width, lobule and head pose put them.

    `level` is the part's typical height off the head in mm, by which the pose shifts it.
    """
    x, y = points[:, 0], points[:, 1]
    y = y + (f["lobule_length"] - 17.0) * smoothstep(y, 15.0, 28.0)
    size = f["ear_length"] / 62.0
    x, y = size * x * f["ear_aspect"] / 0.58, size * y
    yaw, pitch = jnp.deg2rad(f["yaw"]), jnp.deg2rad(f["pitch"])
    x = x * jnp.cos(yaw) - level * jnp.sin(yaw)
    y = y * jnp.cos(pitch) - level * jnp.sin(pitch)
    return jnp.concatenate([jnp.stack([x, y], 1), points[:, 2:]], 1)


def _place_one(point: tuple[float, float], f: Factors, level: jax.Array | float) -> jax.Array:
    return _place(jnp.asarray([point]), f, level)[0]


class Ear(NamedTuple):
    """The ear at every point of a picture; all [H, W]."""

    height: jax.Array  # mm off the head's plane
    cover: jax.Array  # 1 where the ear hides the head behind it, 0 beside it
    canal: jax.Array  # 1 in the dark of the ear canal
    flush: jax.Array  # 1 where thin skin shows more blood: rim and lobule


def _outline(f: Factors) -> jax.Array:
    points = jnp.asarray(RIM, jnp.float32)
    index = np.arange(len(RIM))
    helix = np.interp(index, (1, 3, 13, 17), (0, 1, 1, 0.2))[:, None]
    points = points.at[:, 2].multiply(f["helix_curl"] / 4.0)
    points = points.at[:, 3:].multiply(1 + helix * (f["helix_width"] / 5.0 - 1))
    knob = np.exp(-(((index - 8.5) / 0.9) ** 2))
    points = points.at[:, 2].add(0.6 * knob * f["darwin_tubercle"])
    points = points.at[:, 3].add(1.5 * knob * f["darwin_tubercle"])
    # A lobule that has grown to the cheek runs on into it; a free one turns up before it.
    grown = f["lobule_attachment"] * 2 - 1
    shift = np.zeros((len(RIM), 5), np.float32)
    shift[18:23] = (
        (0.2, 0.1, 0, 0, 0),
        (0.7, 0.4, 0, 0, 0.3),
        (1.3, 1.6, 0, 0, 1.2),
        (1.2, 3.0, 0, 0, 1.6),
        (0.6, 2.0, 0, 0, 1.0),
    )
    return points + grown * shift


def _helix_root(f: Factors) -> jax.Array:
    points = jnp.asarray(HELIX_ROOT, jnp.float32)
    end = points[4, :2]  # the crus is what comes before
    crus = end + (points[:4, :2] - end) * f["crus_helix_length"] / 10.0
    points = points.at[:4, :2].set(crus)
    helix = np.interp(np.arange(len(HELIX_ROOT)), (3, 5), (0, 1))[:, None]
    points = points.at[:, 3:].multiply(1 + helix * (f["helix_width"] / 5.0 - 1))
    return points.at[:, 2].multiply(f["helix_curl"] + 0.5)


def _concha(f: Factors) -> jax.Array:
    points = jnp.asarray(CONCHA, jnp.float32)
    index = np.arange(len(CONCHA))
    back = np.interp(index, (1, 3, 6, 8), (0, 1, 1, 0))
    points = points.at[:, 0].add(back * f["antihelix_position"])
    apart = np.zeros((len(CONCHA), 2), np.float32)
    apart[9:13] = ((-1.4, 0.3), (-0.9, 1.2), (0.5, 1.2), (0.6, 0.3))
    return points.at[:, :2].add((f["notch_width"] - 4.5) / 2 * apart)


def _antihelix(f: Factors) -> jax.Array:
    points = jnp.asarray(ANTIHELIX, jnp.float32)
    index = np.arange(len(ANTIHELIX))
    stem = np.interp(index, (0, 2, 5, 8), (0, 1, 1, 0))
    points = points.at[:, 0].add(stem * f["antihelix_position"])
    points = points.at[:, 2].multiply(f["antihelix_height"])
    return _turn(points, 5, f["upper_crus_angle"], np.interp(index, (5, 6), (0, 1)))


def _lower_crus(f: Factors) -> jax.Array:
    points = jnp.asarray(LOWER_CRUS, jnp.float32).at[:, 2].multiply(f["antihelix_height"])
    return _turn(points, 0, -f["lower_crus_angle"], np.ones(len(LOWER_CRUS)))


def _tragus(f: Factors) -> jax.Array:
    points = jnp.asarray(TRAGUS, jnp.float32)
    points = points.at[:, 0].add(-0.8 * (f["tragus_size"] - 5.5) * points[:, 2])
    return points.at[:, 2].multiply(f["tragus_size"])


def _antitragus(f: Factors) -> jax.Array:
    points = jnp.asarray(ANTITRAGUS, jnp.float32)
    points = points.at[:, :2].add((f["notch_width"] - 4.5) * jnp.asarray([-0.7, -0.25]))
    return points.at[:, 2].multiply(f["antitragus_size"])


def raise_ear(f: Factors, x: jax.Array, y: jax.Array) -> Ear:
    """Raise an ear over the plane of the head.

    Args:
        f: the anatomical factors, and yaw and pitch; scalars in the units of `ANATOMY`.
        x, y: where to look, mm from the ear's middle along the ear's own axes, [H, W].
    """
    size, yaw = f["ear_length"] / 62.0, jnp.deg2rad(f["yaw"])

    # The plate that everything stands on rises from the cheek to the back of the head.
    slope = (f["protrusion"] - 4.0) / (30.0 * size)
    hinge = 13.0 * size
    upright = (x + slope * jnp.sin(yaw) * hinge) / (jnp.cos(yaw) + slope * jnp.sin(yaw))
    floor = slope * 2.5 * jax.nn.softplus((hinge - upright) / 2.5)

    outline = _outline(f)
    rim_level = slope * jnp.maximum(hinge - outline[:, 0], 0) + outline[:, 2]
    rim, concha = trace(
        [_place(outline, f, rim_level), _place(_concha(f), f, 2.0)], x, y, closed=True
    )
    antihelix, lower_crus, root, tragus, antitragus = trace(
        [
            _place(_antihelix(f), f, slope * 20.0 + f["antihelix_height"]),
            _place(_lower_crus(f), f, slope * 14.0 + f["antihelix_height"]),
            _place(_helix_root(f), f, 5.0),
            _place(_tragus(f), f, 5.0),
            _place(_antitragus(f), f, 7.0),
        ],
        x,
        y,
        closed=False,
    )
    swell = 2.5 * _bump(x, y, _place_one(LOBULE, f, slope * 8.0), (8.0, 6.5))
    folds = smooth_max(antihelix.ridge(2.3), lower_crus.ridge(2.2), 1.5)

    # The concha's floor does not follow the plate: it lies below the level of the head.
    hollow = smoothstep(-concha.distance / concha.left, -0.35, 1.0)
    surface = (floor + folds + swell) * (1 - hollow) + (5.0 - f["concha_depth"]) * hollow
    canal = hollow * _bump(x, y, _place_one(CANAL, f, -8.0), (1.6, 3.6))
    surface = surface + root.ridge(2.2) + tragus.ridge(2.2) + antitragus.ridge(2.0) - 5.0 * canal

    crest = smooth_max(surface, floor + swell + rim.height, 0.1)
    inside = surface + (crest - surface) * jnp.exp(-((jnp.abs(rim.distance) / rim.left) ** 4))
    fall = rim.distance / rim.right
    outside = crest * jnp.exp(-((jnp.abs(fall) / 0.85) ** 3))
    height = jnp.where(rim.distance < 0, inside, outside)
    thin = jnp.exp(-((rim.distance / 4.0) ** 2)) * rim.height
    return Ear(height, 1 - smoothstep(fall, 0.85, 1.15), canal, jnp.maximum(thin, swell) / 4)
