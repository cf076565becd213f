"""The synthetic ears: every factor is returned and seen, and nothing else changes a picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxear.data.synthetic import (
    ANATOMY,
    FACTORS,
    mean_factors,
    render,
    sample_factors,
    synthetic_ears,
)
from jaxear.errors import UserError

SIZE = 48
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def ears():
    return synthetic_ears(3, 40, SIZE)


@pytest.fixture(scope="module")
def swings():
    """The mean ear with each factor two standard deviations down and up, [F, 2, H, W, 3]."""
    images = []
    for factor in FACTORS:
        for sign in (-2, 2):
            factors = mean_factors()
            value = np.clip(factor.mean + sign * factor.std, factor.low, factor.high)
            factors[factor.name] = jnp.full((1,), value, jnp.float32)
            images.append(render(factors, image_size=SIZE, key=KEY)[0])
    return np.stack(images).reshape(len(FACTORS), 2, SIZE, SIZE, 3)


def test_images_and_factors_have_the_promised_form(ears):
    images, factors = ears
    assert images.shape == (40, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert list(factors) == [factor.name for factor in FACTORS]
    for factor in FACTORS:
        values = factors[factor.name]
        assert values.shape == (40,)
        assert values.dtype == np.float32
        assert np.all(values >= np.float32(factor.low))
        assert np.all(values <= np.float32(factor.high))
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


def test_images_are_exposed_like_photographs(ears):
    images, _ = ears
    assert 60 < images.mean() < 180
    assert np.mean(images == 255) < 0.01
    assert np.all(images.reshape(40, -1).std(1) > 20)
    skin = images[:, -SIZE // 3 :, -SIZE // 3 :].mean((0, 1, 2))
    assert skin[0] > skin[1] > skin[2]


def test_an_image_depends_on_seed_and_number_alone(ears):
    images, factors = ears
    fewer, values = synthetic_ears(3, 35, SIZE)
    np.testing.assert_array_equal(fewer, images[:35])
    np.testing.assert_array_equal(values["ear_length"], factors["ear_length"][:35])
    other, _ = synthetic_ears(4, 1, SIZE)
    assert np.abs(other[0].astype(int) - images[0]).mean() > 3


@pytest.mark.slow
def test_batches_do_not_change_a_rendered_image():
    factors = sample_factors(jax.random.key(1), 3)
    whole = render(factors, image_size=SIZE, key=KEY)
    part = render({name: values[:1] for name, values in factors.items()}, image_size=SIZE, key=KEY)
    np.testing.assert_allclose(part, whole[:1], atol=2e-3)
    for name, values in sample_factors(jax.random.key(1), 1).items():
        np.testing.assert_allclose(values, factors[name][:1], rtol=1e-6)


def test_factors_follow_their_distributions():
    n = 4000
    factors = sample_factors(jax.random.key(0), n)
    scores = np.stack([(factors[f.name] - f.mean) / f.std for f in FACTORS])
    assert np.all(np.abs(scores.mean(1)) < 0.08)
    # A normal cut off at 2.5 standard deviations has 0.954 of them left.
    left = np.array([1.0 if f.distribution == "uniform" else 0.954 for f in FACTORS])
    np.testing.assert_allclose(scores.std(1), left, atol=0.04)
    correlation = np.corrcoef(scores) - np.eye(len(FACTORS))
    assert np.abs(correlation).max() < 0.08


def test_subjects_share_anatomy_and_nothing_else():
    images, factors = synthetic_ears(0, 6, SIZE, images_per_subject=3)
    anatomy = {factor.name for factor in ANATOMY}
    for name, values in factors.items():
        per_subject = [len(np.unique(group)) for group in values.reshape(2, 3)]
        assert per_subject == ([1, 1] if name in anatomy else [3, 3]), name
        assert values[0] != values[3]
    assert np.abs(images[0].astype(int) - images[1]).mean() > 3


@pytest.mark.parametrize("index", range(len(FACTORS)), ids=[f.name for f in FACTORS])
def test_every_factor_is_seen(swings, index):
    change = np.abs(swings[index, 1] - swings[index, 0])
    # A part of the ear changes its own few pixels by a few grey levels at the least.
    assert np.sort(change.max(-1).ravel())[-30:].mean() > 8 / 255
    assert change.mean() > 0.15 / 255


@pytest.mark.parametrize("index", range(len(ANATOMY)), ids=[f.name for f in ANATOMY])
def test_anatomy_leaves_the_background_alone(swings, index):
    edge = SIZE // 8
    for rows in (slice(0, edge), slice(-edge, None)):
        corner = swings[index][:, rows, -edge:]
        np.testing.assert_allclose(corner[0], corner[1], atol=0.5 / 255)


def test_the_helix_is_where_the_size_puts_it(swings):
    """Longer ears reach higher and lower in the picture; wider ones further to the sides."""
    names = [factor.name for factor in FACTORS]
    mean = swings[-1, 0]
    rows, columns = [], []
    for name in ("ear_length", "ear_aspect", "lobule_length"):
        moved = np.abs(swings[names.index(name), 1] - mean).max(-1) > 0.05
        rows.append(np.flatnonzero(moved.any(1)))
        columns.append(np.flatnonzero(moved.any(0)))
    assert rows[0][0] < SIZE * 0.15
    assert rows[0][-1] > SIZE * 0.8
    assert columns[1][0] < SIZE * 0.3
    assert rows[2][0] > SIZE * 0.5


@pytest.mark.slow
def test_gradients_are_finite_and_no_factor_is_cut_off():
    def brightness(factors):
        images = render(factors, image_size=16, key=KEY)
        return (images * jnp.linspace(0, 1, 16)[:, None, None]).mean()

    # The gradient runs once: most of what it costs is XLA optimising it.
    quick = {"xla_backend_optimization_level": 0}
    gradients = jax.jit(jax.grad(brightness), compiler_options=quick)(
        sample_factors(jax.random.key(2), 1)
    )
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name
        assert np.any(gradient != 0), name


@pytest.mark.slow
def test_other_sizes_show_the_same_ear():
    factors = sample_factors(jax.random.key(5), 1)
    factors["noise"] = jnp.zeros(1)
    small = render(factors, image_size=SIZE, key=KEY)
    tall = render(factors, image_size=(2 * SIZE, SIZE), key=KEY)
    assert small.shape == (1, SIZE, SIZE, 3)
    assert tall.shape == (1, 2 * SIZE, SIZE, 3)
    middle = small[:, :, SIZE // 4 : -SIZE // 4]
    halved = jax.image.resize(tall, (1, SIZE, SIZE // 2, 3), "linear")
    correlation = np.corrcoef(np.ravel(middle), np.ravel(halved))[0, 1]
    assert correlation > 0.9


def test_mistakes_are_named():
    with pytest.raises(UserError, match="images_per_subject 0"):
        synthetic_ears(0, 3, SIZE, images_per_subject=0)
    with pytest.raises(UserError, match="8x8"):
        synthetic_ears(0, 3, 8)
    factors = mean_factors()
    factors["ear_lenght"] = factors.pop("ear_length")
    with pytest.raises(UserError, match=r"missing \['ear_length'\], unknown \['ear_lenght'\]"):
        render(factors, key=KEY)
