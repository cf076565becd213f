"""Registration of ears to a subspace of ears: where an ear lies, how large it is, how turned.

Two ears whose edges do not lie upon each other have a mean with two edges, and components of pixels
spend themselves on that. A pose is four numbers; ears brought to one pose differ by less, and their
components are those of ears.

Images are registered to no single template but to what a few principal components make of them
themselves: by Gauss-Newton steps of the pose, of which everything that the components could explain
is projected out (Baker, Gross & Matthews, "Lucas-Kanade 20 years on", part 3, 2003). The components
are found by congealing (Miller, Matsakis & Viola, 2000): those of all images in their poses so far,
then a step of every pose, and so on with more and more components, as in transformed component
analysis (Frey & Jojic, 1999). The images are grey ones of 64 rows: in colour the poses of synthetic
ears were no better and took twice as long.

A *pose* is [right, down, zoom, turn]: the shift of the ear from the mean place in heights of the
picture, the logarithm of its size relative to the mean one, its turn clockwise in radians.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from jaxear.data.augment import warp

POSE = 4  # numbers
MARGIN = 3 / 32  # that a straightened picture has beyond the original, of each side
GRID = 64  # rows of the pictures that are registered, at most
COMPONENTS = 64
# Components that take part, and steps with as many. None at first: they might explain the poses.
STEPS = ((0, 2), (8, 2), (32, 2), (64, 4))
STEPS_OF_FIT = ((0, 4), (4, 3), (8, 3), (16, 4), (32, 4), (64, 6))
LONGEST_STEP = 0.04  # heights
RIDGE = 0.0125  # of the normal equations' trace
FURTHEST = (0.25, 0.25, 0.4, 0.6)  # of a pose, either way
BATCH = 128
MOST_IMAGES = 4096  # to find the components

_EXACT = jax.lax.Precision.HIGHEST


class Registration(nnx.Module):
    """Finds poses, straightens pictures by them and puts them back. Made empty;
    `fit_registration` fills it.

    Args:
        image_size: (height, width) of the images.

    Attributes:
        straight_size: (height, width) of straightened pictures, which have a margin.
        deviations: standard deviations of a pose's numbers over the images [4].
        effects: how far one of each moves an image, as a distance of its pixels [4].
    """

    def __init__(self, image_size: tuple[int, int]):
        h, w = image_size
        self.image_size = image_size
        self.straight_size = (h + 2 * round(h * MARGIN), w + 2 * round(w * MARGIN))
        rows = min(h, GRID)
        self.grid = (rows, max(round(w * rows / h), 2))
        self.mean = nnx.Param(jnp.zeros(self.grid[0] * self.grid[1]))
        self.components = nnx.Param(jnp.zeros((COMPONENTS, len(self.mean))))
        self.deviations = nnx.Param(jnp.ones(POSE))
        self.effects = nnx.Param(jnp.ones(POSE))

    def poses(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] in [0, 1] -> their poses [b, 4]."""
        counts = np.repeat(*np.transpose(STEPS))
        small = self.reduced(images)

        def step(poses: jax.Array, n_components: jax.Array) -> tuple[jax.Array, None]:
            return self.step(small, poses, n_components), None

        return jax.lax.scan(step, jnp.zeros((len(images), POSE)), jnp.asarray(counts))[0]

    def straighten(self, images: jax.Array, poses: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] -> the same in the mean pose, [b, *straight_size, 3]."""
        h = self.image_size[0]
        return jax.vmap(lambda x, p: warp(x, _affine(p, h), self.straight_size))(images, poses)

    def put_back(self, straight: jax.Array, poses: jax.Array) -> jax.Array:
        """Straightened pictures [b, *straight_size, 3] -> images [b, H, W, 3] of these poses."""
        h = self.image_size[0]
        return jax.vmap(lambda x, p: warp(x, _inverse(_affine(p, h)), self.image_size))(
            straight, poses
        )

    def measure(self, straight: jax.Array, poses: jax.Array, deviations: np.ndarray) -> None:
        """Set the poses' deviations [4], and their effects by some straightened pictures
        [b, *straight_size, 3] and their poses [b, 4]."""

        @jax.jit
        def effect(move: np.ndarray) -> jax.Array:
            ends = [self.put_back(straight, poses + sign * move / 2) for sign in (1, -1)]
            return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(ends[0] - ends[1]), axis=(1, 2, 3))))

        deviations = np.maximum(deviations, 1e-4)  # of images that are all alike it is 0
        self.deviations[...] = jnp.asarray(deviations)
        self.effects[...] = jnp.stack([effect(move) for move in np.diag(deviations)])

    def reduced(self, images: jax.Array) -> jax.Array:
        """Images [b, H, W, 3] -> the smaller grey ones that are registered, [b, *grid, 1], whose
        middles have mean 0 and standard deviation 1."""
        grey = jnp.mean(images, axis=-1, keepdims=True)
        grey = jax.image.resize(grey, (len(images), *self.grid, 1), "linear")
        weights = _window(self.grid).reshape(1, *self.grid, 1)
        mean = partial(jnp.average, axis=(1, 2, 3), keepdims=True)
        grey -= mean(grey, weights=jnp.broadcast_to(weights, grey.shape))
        variance = mean(grey**2, weights=jnp.broadcast_to(weights, grey.shape))
        return grey / jnp.sqrt(variance + 1e-6)

    def seen(self, reduced: jax.Array, poses: jax.Array) -> jax.Array:
        """Reduced images -> the middle of each in the mean pose, faded out: [b, pixels]."""
        look = jax.vmap(lambda x, p: warp(x, _affine(p, self.grid[0])))
        return look(reduced, poses).reshape(len(reduced), -1) * _window(self.grid)

    def step(self, reduced: jax.Array, poses: jax.Array, n_components: jax.Array) -> jax.Array:
        """Poses [b, 4] one step nearer to where `n_components` explain the images best."""
        chosen = jnp.arange(COMPONENTS) < n_components
        components = jnp.where(chosen[:, None], self.components[...], 0.0)
        project = partial(jnp.einsum, "...p,kp->...k", precision=_EXACT)
        inner = partial(jnp.einsum, "bip,bjp->bij", precision=_EXACT)
        rest = self.seen(reduced, poses) - self.mean[...]
        scores = project(rest, components)
        explained = self.mean[...] + jnp.matmul(scores, components, precision=_EXACT)
        moves = jax.vmap(self._moves)(explained)
        # Only what no component explains counts, of the moves and so of the rest.
        of_moves = project(moves, components)
        gram = inner(moves, moves) - inner(of_moves, of_moves)
        moment = inner(moves, rest[:, None]) - inner(of_moves, scores[:, None])
        # Of a picture without edges there would be no solution.
        ridge = RIDGE * jnp.trace(gram, axis1=1, axis2=2) + 1e-6
        steps = jnp.linalg.solve(gram + ridge[:, None, None] * jnp.eye(POSE), moment)
        steps = steps[..., 0] * np.array(_UNITS)
        length = jnp.linalg.norm(steps / np.array(_UNITS), axis=1, keepdims=True)
        steps *= jnp.minimum(1.0, LONGEST_STEP / jnp.maximum(length, 1e-9))
        return jnp.clip(jax.vmap(_less)(poses, steps), -np.array(FURTHEST), np.array(FURTHEST))

    def _moves(self, seen: jax.Array) -> jax.Array:
        """How a picture [pixels], faded out, changes as it moves by one unit: [4, pixels]."""
        window = _window(self.grid)
        picture = (seen / jnp.maximum(window, 0.02)).reshape(self.grid)
        down, right = jnp.gradient(picture, axis=(0, 1))
        h = self.grid[0]
        y, x = (jnp.asarray(_centred(n)) for n in self.grid)
        y, x = y[:, None], x[None, :]
        moves = jnp.stack([h * right, h * down, x * right + y * down, x * down - y * right])
        return moves.reshape(POSE, -1) * window * np.array(_UNITS)[:, None]


# Of a pose's numbers, such that the edge of an ear moves by about as much by one as by another.
_UNITS = (1.0, 1.0, 3.2, 3.2)


def fit_registration(
    registration: Registration, images: np.ndarray, *, progress: Progress | None = None
) -> None:
    """Find the mean picture and the components that images are registered to, in place.

    Args:
        registration: an empty one.
        images: uint8 [n, H, W, 3]; a few thousand are enough, and of more some are chosen.
        progress: where to show how far it is.
    """
    from jaxear.pca import PCA  # scikit-learn takes seconds, which other runs need not wait for

    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).astype(int))
    # More components than the images support would explain every pose.
    most = max(1, min(COMPONENTS, len(chosen) // 8))
    counts = np.repeat(*np.transpose(STEPS_OF_FIT))
    graphdef, _ = nnx.split(registration)
    reduce = jax.jit(lambda x: registration.reduced(x.astype(jnp.float32) / 255))
    see = jax.jit(registration.seen)
    step = jax.jit(lambda state, *args: nnx.merge(graphdef, state).step(*args))
    batches = [slice(i, i + BATCH) for i in range(0, len(chosen), BATCH)]
    reduced = np.concatenate([np.asarray(reduce(images[chosen[rows]])) for rows in batches])
    poses = np.zeros((len(chosen), POSE), np.float32)
    task = None if progress is None else progress.add_task("registration", total=len(counts))

    def find_components() -> None:
        seen = np.concatenate([np.asarray(see(reduced[rows], poses[rows])) for rows in batches])
        pca = PCA(most, svd_solver="randomized", random_state=0).fit(seen)
        registration.mean[...] = jnp.asarray(pca.mean_, jnp.float32)
        found = jnp.asarray(pca.components_, jnp.float32)
        registration.components[...] = jnp.pad(found, ((0, COMPONENTS - most), (0, 0)))

    for n in counts:
        find_components()
        _, state = nnx.split(registration)
        moved = [np.asarray(step(state, reduced[rows], poses[rows], n)) for rows in batches]
        poses = np.concatenate(moved)
        poses -= poses.mean(axis=0)  # the mean pose is nobody's choice
        if progress is not None and task is not None:
            progress.advance(task)
    find_components()


def _centred(n: int) -> np.ndarray:
    return (np.arange(n) - (n - 1) / 2).astype(np.float32)


def _window(grid: tuple[int, int]) -> np.ndarray:
    """1 in the middle, falling to 0 at the ends of both axes: [pixels]."""
    y, x = (_centred(n) / (n / 2) for n in grid)
    t = np.clip((1 - np.hypot(y[:, None], x)) / 0.3, 0, 1)
    return (t * t * (3 - 2 * t)).ravel().astype(np.float32)


def _affine(pose: jax.Array, height: int) -> jax.Array:
    """The map [2, 3] of `warp` from pixels of the mean pose to those of an image this high."""
    cos, sin = jnp.exp(pose[2]) * jnp.cos(pose[3]), jnp.exp(pose[2]) * jnp.sin(pose[3])
    return jnp.array([[cos, -sin, height * pose[0]], [sin, cos, height * pose[1]]])


def _inverse(affine: jax.Array) -> jax.Array:
    a, b, c, d = affine[0, 0], affine[0, 1], affine[1, 0], affine[1, 1]
    linear = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    return jnp.concatenate([linear, -jnp.matmul(linear, affine[:, 2:], precision=_EXACT)], axis=1)


def _less(pose: jax.Array, step: jax.Array) -> jax.Array:
    """The pose [4] of which what is seen would be moved by `step` [4] less."""
    zoom, turn = pose[2] - step[2], pose[3] - step[3]
    cos, sin = jnp.exp(zoom) * jnp.cos(turn), jnp.exp(zoom) * jnp.sin(turn)
    right, down = (
        pose[0] - (cos * step[0] - sin * step[1]),
        pose[1] - (sin * step[0] + cos * step[1]),
    )
    return jnp.stack([right, down, zoom, turn])
