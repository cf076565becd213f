"""Registration finds poses that are known, and what is straightened can be put back."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxear.config import TrainConfig
from jaxear.data.augment import warp
from jaxear.pixel_path import PixelPath, fit_pixel_path
from jaxear.pixel_path.registration import FURTHEST, POSE, Registration, fit_registration
from tests.training.tiny import optimized

SIZE = 32
N = 64


def scenes(n: int) -> np.ndarray:
    """An ellipse with a bar across, of various brightnesses: float [n, 2S, 2S, 3] in [0, 1]."""
    y, x = np.mgrid[-2 : 2 : 2 * SIZE * 1j, -2 : 2 : 2 * SIZE * 1j]
    rim = np.exp(-0.5 * ((np.hypot(x / 0.45, y / 0.65) - 0.9) / 0.15) ** 2)
    bar = np.exp(-0.5 * ((x - 0.1 - 0.3 * y) / 0.1) ** 2) * (np.hypot(x, y) < 0.5)
    amounts = np.random.default_rng(1).uniform(0.7, 1.0, (2, n, 1, 1))
    grey = 0.2 + 0.5 * amounts[0] * rim + 0.3 * amounts[1] * bar
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)


def placed(pictures: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """The middles of pictures [n, 2S, 2S, 3] in these poses [n, 4]: uint8 [n, S, S, 3]."""

    def place(picture: jax.Array, pose: jax.Array) -> jax.Array:
        right, down, zoom, turn = pose
        cos, sin = jnp.cos(turn) / jnp.exp(zoom), jnp.sin(turn) / jnp.exp(zoom)
        back = jnp.array([[cos, sin], [-sin, cos]])
        shift = -back @ jnp.array([right, down]) * SIZE
        return warp(picture, jnp.concatenate([back, shift[:, None]], axis=1), (SIZE, SIZE))

    return np.asarray(255 * jax.vmap(place)(pictures, poses)).round().astype(np.uint8)


def random_poses(n: int, seed: int) -> np.ndarray:
    spread = np.array([0.04, 0.04, 0.06, 0.1])
    return (np.random.default_rng(seed).normal(size=(n, POSE)) * spread).astype(np.float32)


@cache
def fitted() -> Registration:
    registration = Registration((SIZE, SIZE))
    with optimized():
        fit_registration(registration, placed(scenes(N), random_poses(N, seed=2)))
    return registration


def test_poses_of_new_pictures_are_found():
    true = random_poses(20, seed=3)
    images = placed(scenes(20), true).astype(np.float32) / 255
    found = np.asarray(nnx.jit(Registration.poses)(fitted(), images))
    difference = found - true
    # The mean pose is not known, so what all are off by alike is no error.
    assert np.all((difference - difference.mean(axis=0)).std(axis=0) < 0.2 * true.std(axis=0))


def test_straightened_pictures_lie_upon_each_other():
    images = placed(scenes(20), random_poses(20, seed=3)).astype(np.float32) / 255
    registration = fitted()

    @nnx.jit
    def straighten(registration: Registration, images: jax.Array) -> jax.Array:
        return registration.straighten(images, registration.poses(images))

    straight = np.asarray(straighten(registration, images))
    margin = (straight.shape[1] - SIZE) // 2
    assert margin == 3
    middle = straight[:, margin:-margin, margin:-margin]
    assert middle.var(axis=0).mean() < 0.2 * images.var(axis=0).mean()


@cache
def path(registered: bool) -> PixelPath:
    """Six numbers for a picture, of which four may be its pose."""
    path = PixelPath(8, 6, (SIZE, SIZE), registered=registered, width=16, rngs=nnx.Rngs(0))
    config = TrainConfig(pixel_steps=0)
    fit_pixel_path(path, placed(scenes(N), random_poses(N, seed=2)), config, progress=False)
    return path


encode = nnx.jit(PixelPath.encode)
decode = nnx.jit(PixelPath.decode)


def test_a_registered_path_needs_fewer_numbers_where_pictures_lie_anywhere():
    images = placed(scenes(20), random_poses(20, seed=3)).astype(np.float32) / 255

    def error(path: PixelPath) -> float:
        made = decode(path, encode(path, images) * path.spread)
        return float(np.mean((np.asarray(made) - images) ** 2))

    assert error(path(registered=True)) < 0.2 * error(path(registered=False))


def test_the_numbers_of_a_pose_have_variance_1_and_spread_as_the_pixels_do():
    registered = path(registered=True)
    images = placed(scenes(N), random_poses(N, seed=2)).astype(np.float32) / 255
    codes = np.asarray(encode(registered, images))
    np.testing.assert_allclose(codes[:, :POSE].std(axis=0), 1, rtol=0.01)
    for i in range(POSE):
        ends = decode(registered, np.eye(6)[[i, i]] * [[0.5], [-0.5]] * registered.spread)
        effect = np.linalg.norm(ends[0] - ends[1]) / registered.deviations[0]
        np.testing.assert_allclose(registered.spread[i], effect, rtol=0.15)


def test_what_is_put_back_is_what_was_straightened():
    poses = random_poses(8, seed=4)
    images = placed(scenes(8), poses).astype(np.float32) / 255
    registration = Registration((SIZE, SIZE))
    again = registration.put_back(registration.straighten(images, poses), poses)
    # Interpolated twice; at the border the margin ends.
    error = np.abs(np.asarray(again) - images)[:, 4:-4, 4:-4]
    assert error.mean() < 0.01


def test_a_picture_without_edges_has_some_pose_near_the_mean_one():
    flat = np.full((1, SIZE, SIZE, 3), 0.4, np.float32)
    poses = nnx.jit(Registration.poses)(fitted(), flat)
    assert np.all(np.abs(poses) <= FURTHEST)
    assert np.all(nnx.jit(Registration.poses)(Registration((SIZE, SIZE)), flat) == 0)


def test_an_image_that_is_not_square():
    registration = Registration((96, 48))
    assert registration.grid == (64, 32)
    assert registration.straight_size == (114, 56)
    straight = registration.straighten(jnp.ones((2, 96, 48, 3)), jnp.zeros((2, POSE)))
    assert registration.put_back(straight, jnp.zeros((2, POSE))).shape == (2, 96, 48, 3)
