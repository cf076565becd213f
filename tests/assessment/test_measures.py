from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxear.assessment.coders import Code
from jaxear.assessment.measures import (
    MEASURES,
    OVER_SUBJECTS,
    mean_estimates,
    measure_ears,
)
from jaxear.perceptual import Judge
from tests.test_metrics import plain_ms_ssim


class Halves:
    """An ear's code is its upper half; the lower half is decoded as grey."""

    name, numbers = "halves", 16 * 32 * 3

    def encode(self, images):
        return Code(jnp.asarray(images[:, :16].reshape(len(images), -1) / 255, jnp.float32))

    def decode(self, codes):
        upper = codes.reshape(-1, 16, 32, 3)
        return jnp.concatenate([upper, jnp.full_like(upper, 0.5)], axis=1)


@pytest.fixture(scope="module")
def ears() -> tuple[np.ndarray, np.ndarray]:
    """70 ears, more than a batch."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8), np.arange(70) // 2


@pytest.fixture(scope="module")
def measured(ears) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    class Colours(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]))

        def __call__(self, images):
            return (images @ self.kernel[...],)

    return measure_ears(Halves(), *ears, judge=Judge.of(Colours()))


def test_every_ear_is_measured_in_its_place(ears, measured):
    images, _ = ears
    codes, values = measured
    np.testing.assert_allclose(codes, images[:, :16].reshape(70, -1) / 255, atol=1e-6)
    assert {column.shape for column in values.values()} == {(70,)}
    for i in (0, 63, 64, 69):
        original = images[i] / 255
        made = original.copy()
        made[16:] = 0.5
        assert values["psnr"][i] == pytest.approx(-10 * np.log10(np.mean((made - original) ** 2)))
        assert values["ms_ssim"][i] == pytest.approx(plain_ms_ssim(made, original, 2), abs=1e-5)
        kernel = np.asarray([[1, 0], [0, 1], [0.5, 0.5]])
        unit = [x @ kernel for x in (made, original)]
        unit = [x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6) for x in unit]
        expected = np.square(unit[0] - unit[1]).sum(-1).mean()
        assert values["lpips_style"][i] == pytest.approx(expected, rel=1e-3)
    assert "kl" not in values


def test_moves_are_in_units_of_the_distance_between_subjects(ears, measured):
    images, subjects = ears
    _, values = measured
    pixels = images / 255
    brighter = np.minimum(pixels + 13 / 255, 1)
    moved = np.sqrt(np.square((brighter - pixels)[:, :16]).sum(axis=(1, 2, 3)))
    for name, part in (("code_brightness", pixels[:, :16]), ("image_brightness", pixels)):
        flat = part.reshape(70, -1)
        squares = np.square(flat[:, None] - flat).sum(-1)
        distance = np.sqrt(squares[subjects[:, None] != subjects].mean())
        np.testing.assert_allclose(values[name], moved / distance, rtol=1e-4)


def test_means_have_intervals_over_subjects():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 5)
    column = rng.normal(size=40)[subjects]  # the ears of a subject are alike
    estimate = mean_estimates({"psnr": column}, subjects)["psnr"]
    error = 1.96 * column.std() / np.sqrt(40)  # that of 40 independent numbers, not of 200
    assert estimate.value == pytest.approx(column.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * error, rel=0.15)
    assert (estimate.n, estimate.of, estimate.interval) == (200, "ears", OVER_SUBJECTS)


def test_one_subject_has_means_without_intervals():
    columns = {"psnr": np.asarray([1.0, 3.0]), "code_shift": np.full(2, np.nan)}
    estimates = mean_estimates(columns, np.asarray(["a", "a"]))
    assert estimates["psnr"][:3] == (2.0, None, None)
    assert estimates["psnr"].note == "one subject: no interval"
    assert estimates["code_shift"].value is None
    assert "no distance between subjects" in estimates["code_shift"].note


def test_what_is_not_a_number_is_not_given_as_one():
    columns = {"psnr": np.asarray([1.0, 3.0]), "code_shift": np.full(2, np.nan)}
    estimates = mean_estimates(columns, np.asarray(["a", "b"]))
    assert estimates["psnr"].value == 2
    assert estimates["code_shift"][:3] == (None, None, None)


def test_every_measure_is_defined():
    titles = [measure.title for measure in MEASURES.values()]
    assert len(set(titles)) == len(titles)
    assert all(measure.definition for measure in MEASURES.values())
