"""Augmentation: nothing where it is off, one key one image, geometry as SciPy has it."""

from __future__ import annotations

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxear.config import AugmentConfig
from jaxear.data.augment import augment, blur, random_affine, warp

ALL = AugmentConfig(
    aug_rotation=12, aug_scale=0.15, aug_shift=0.06, aug_crop=0.1, aug_mirror=0.5,
    aug_brightness=0.15, aug_contrast=0.15, aug_saturation=0.15, aug_hue=0.02, aug_gamma=0.15,
    aug_blur=1, aug_noise=0.03, aug_occlusion=0.5,
)  # fmt: skip
ALONE = {
    name: value
    for name, value in vars(ALL).items()
    if value and name not in ("aug_occlusion_size", "aug_mirror")
}
HIDING = ("aug_blur", "aug_noise", "aug_occlusion")


@pytest.fixture(scope="module")
def images():
    """Six smooth pictures, float [6, 32, 32, 3], whose mirror images are others."""
    colours = np.random.default_rng(0).integers(30, 226, (6, 5, 4, 3), np.uint8)
    smooth = [Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC) for c in colours]
    return jnp.asarray(np.stack(smooth), jnp.float32) / 255


def keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


@lru_cache
def compiled(config: AugmentConfig):
    # Most of what it costs is XLA optimising what runs once or twice.
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(partial(augment, config=config), compiler_options=quick)


def run(images, config, seed=0):
    return compiled(config)(images, keys(len(images), seed))


def test_off_is_the_identity_and_costs_nothing(images):
    result = run(images, AugmentConfig())
    np.testing.assert_array_equal(result.input, images)
    np.testing.assert_array_equal(result.target, images)
    assert (result.visible == 1).all()
    lowered = jax.jit(partial(augment, config=AugmentConfig())).lower(images, keys(6))
    assert lowered.compile().cost_analysis().get("flops", 0) == 0


@pytest.mark.parametrize("name", ALONE)
def test_each_setting_alone_changes_what_it_should(images, name):
    result = run(images, AugmentConfig(**{name: ALONE[name]}), seed=1)
    assert jnp.abs(result.input - images).mean() > 1e-3
    if name in HIDING:
        np.testing.assert_array_equal(result.target, images)
    else:
        np.testing.assert_array_equal(result.input, result.target)
    assert (result.visible.min() == 0) == (name == "aug_occlusion")


def test_values_stay_in_range_and_differ_from_image_to_image(images):
    same = jnp.repeat(images[:1], 6, axis=0)
    for seed in range(5):
        result = run(same, ALL, seed)
        for values in (result.input, result.target):
            assert values.min() >= 0
            assert values.max() <= 1
        assert len(np.unique(np.asarray(result.target).reshape(6, -1), axis=0)) == 6


def test_an_image_depends_on_its_own_key_alone(images):
    whole = run(images, ALL)
    for i in (0, 4):
        part = compiled(ALL)(images[i : i + 2], keys(6)[i : i + 2])
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_allclose(a[i : i + 2], b, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_warp_is_what_scipy_makes_of_it(shape):
    image = np.random.default_rng(0).random((*shape, 3), np.float32)
    config = AugmentConfig(
        aug_rotation=30, aug_scale=0.3, aug_shift=0.2, aug_crop=0.3, aug_mirror=0.5
    )
    for seed in range(8):
        affine = np.asarray(random_affine(jax.random.key(seed), shape, config), np.float64)
        found = jax.jit(warp)(jnp.asarray(image), jnp.asarray(affine, jnp.float32))
        swap = affine[::-1, [1, 0, 2]]  # SciPy counts rows first
        centre = (np.array(shape) - 1) / 2
        offset = swap[:, 2] + centre - swap[:, :2] @ centre
        for channel in range(3):
            expected = ndimage.affine_transform(
                image[..., channel].astype(float), swap[:, :2], offset, order=1, mode="nearest"
            )
            np.testing.assert_allclose(found[..., channel], expected, atol=2e-4)


def test_geometry_stays_within_its_limits():
    shape = (100, 200)
    config = AugmentConfig(aug_rotation=10, aug_scale=0.2, aug_shift=0.1)
    draw = jax.jit(jax.vmap(random_affine, (0, None, None)), static_argnums=(1, 2))
    affine = np.asarray(draw(keys(300), shape, config))
    linear = affine[:, :, :2]
    zoom = np.sqrt(np.linalg.det(linear))
    angle = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    shift = np.linalg.solve(linear, affine[:, :, 2:])[..., 0]
    assert -10 <= angle.min() < -9 < 9 < angle.max() <= 10
    assert 1 / 1.201 <= zoom.min() < 0.86 < 1.17 < zoom.max() <= 1.201
    np.testing.assert_allclose(np.abs(shift).max(0), [20, 10], rtol=0.05)
    crops = np.asarray(draw(keys(300), shape, AugmentConfig(aug_crop=0.3)))
    assert 0.7 <= crops[:, 0, 0].min() < 0.72
    # Nothing beyond the border is ever seen.
    reach = crops[:, 0, 0] * 100 + np.abs(crops[:, 0, 2])
    assert 95 < reach.max() <= 100.001


def test_mirroring_happens_as_often_as_said(images):
    same = jnp.repeat(images[:1], 200, axis=0)
    result = run(same, AugmentConfig(aug_mirror=0.25)).target
    mirrored = (jnp.abs(result - images[0, :, ::-1]) < 1e-6).all((1, 2, 3))
    plain = (jnp.abs(result - images[0]) < 1e-6).all((1, 2, 3))
    assert (mirrored ^ plain).all()
    assert 0.15 < mirrored.mean() < 0.35


def test_ears_are_not_mirrored_by_default(images):
    # The mean over many draws looks more like the picture than like its mirror image.
    config = AugmentConfig(**{**vars(ALL), "aug_mirror": 0.0})
    mean = run(jnp.repeat(images[:1], 64, axis=0), config).target.mean(0)
    assert jnp.abs(mean - images[0]).mean() < 0.6 * jnp.abs(mean - images[0, :, ::-1]).mean()


def test_colours_change_as_said():
    grey = jnp.full((50, 8, 8, 3), 0.5)
    for name in ("aug_hue", "aug_saturation"):
        result = run(grey, AugmentConfig(**{name: 0.4})).target
        np.testing.assert_allclose(result, grey, atol=2e-4)
    np.testing.assert_allclose(run(grey, AugmentConfig(aug_contrast=0.4)).target, grey, atol=1e-4)
    bright = run(grey, AugmentConfig(aug_brightness=0.2)).target[:, 0, 0, 0]
    assert 0.3 <= bright.min() < 0.32 < 0.68 < bright.max() <= 0.7
    gamma = jnp.log(run(grey, AugmentConfig(aug_gamma=0.5)).target[:, 0, 0, 0]) / jnp.log(0.5)
    assert 1 / 1.501 <= gamma.min() < 0.72 < 1.4 < gamma.max() <= 1.501
    ramp = jnp.broadcast_to(jnp.linspace(0.35, 0.65, 64)[:, None], (50, 8, 64, 3))
    contrast = run(ramp, AugmentConfig(aug_contrast=0.2)).target
    np.testing.assert_allclose(contrast.mean((1, 2, 3)), 0.5, atol=1e-3)
    spread = (contrast[:, 0, -1, 0] - contrast[:, 0, 0, 0]) / 0.3
    assert 1 / 1.201 <= spread.min() < 0.87 < 1.15 < spread.max() <= 1.201


def test_blur_is_a_gaussian():
    image = np.random.default_rng(0).random((30, 20, 3), np.float32)
    found = blur(jnp.asarray(image), jnp.float32(1.3), radius=6)
    expected = ndimage.gaussian_filter(image, (1.3, 1.3, 0), mode="nearest", radius=6)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(blur(jnp.asarray(image), jnp.float32(0), radius=6), image, atol=1e-6)


def test_patches_hide_the_target_and_lie_inside(images):
    same = jnp.repeat(images[:1], 100, axis=0)
    result = run(same, AugmentConfig(aug_occlusion=0.5, aug_occlusion_size=0.4))
    hidden = np.asarray(result.visible == 0)
    assert 35 < hidden.any((1, 2)).sum() < 65
    assert set(np.unique(result.visible)) == {0.0, 1.0}
    seen = ~hidden
    np.testing.assert_array_equal(np.asarray(result.input)[seen], np.asarray(same)[seen])
    for patch in hidden[hidden.any((1, 2))]:
        height, width = patch.any(1).sum(), patch.any(0).sum()
        assert patch.sum() == height * width  # a whole rectangle
        assert min(height, width) >= 32 * 0.4 / 3 - 1
        assert max(height, width) <= 32 * 0.4 + 1
