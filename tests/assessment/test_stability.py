from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from jaxear.assessment.stability import PERTURBATIONS, distance_between_subjects


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 16, 12, 3), dtype=np.uint8)


def changed(name: str, images: np.ndarray, first: int = 0) -> np.ndarray:
    result = PERTURBATIONS[name](images, np.arange(first, first + len(images)))
    assert (result.dtype, result.shape) == (np.uint8, images.shape)
    return result


def test_shift_moves_by_a_pixel(images):
    moved = changed("shift", images)
    np.testing.assert_array_equal(moved[:, :, 1:], images[:, :, :-1])
    np.testing.assert_array_equal(moved[:, :, 0], images[:, :, 0])


def test_brightness_raises_all_alike_up_to_white(images):
    expected = np.minimum(images.astype(int) + 13, 255)
    np.testing.assert_array_equal(changed("brightness", images), expected)


def test_noise_is_gaussian_and_the_same_for_an_ear_in_any_batch():
    grey = np.full((3, 64, 64, 3), 128, np.uint8)
    noisy = changed("noise", grey)
    assert (noisy.astype(float) - 128).std() == pytest.approx(5, rel=0.05)
    assert (noisy.astype(float) - 128).mean() == pytest.approx(0, abs=0.2)
    np.testing.assert_array_equal(changed("noise", grey[2:], first=2), noisy[2:])
    assert not np.array_equal(noisy[0], noisy[1])


def test_jpeg_is_pillows(images):
    file = io.BytesIO()
    Image.fromarray(images[1]).save(file, format="JPEG", quality=75)
    result = changed("jpeg", images)
    np.testing.assert_array_equal(result[1], np.asarray(Image.open(file)))
    assert not np.array_equal(result[1], images[1])


def test_distance_is_over_pairs_of_different_subjects(images):
    subjects = np.asarray(["b", "a", "b", "c", "a"])
    pairs = [(i, j) for i, j in combinations(range(5), 2) if subjects[i] != subjects[j]]
    pixels = images / 255
    squares = [np.square(pixels[i] - pixels[j]).sum() for i, j in pairs]
    expected = np.sqrt(np.mean(squares))
    assert distance_between_subjects(images, subjects) == pytest.approx(expected, rel=1e-9)
    codes = 1e4 + np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    squares = [np.square(codes[i].astype(float) - codes[j]).sum() for i, j in pairs]
    assert distance_between_subjects(codes, subjects) == pytest.approx(np.sqrt(np.mean(squares)))


def test_there_is_no_distance_within_one_subject_or_of_equal_ears(images):
    assert np.isnan(distance_between_subjects(images, np.zeros(5)))
    assert np.isnan(distance_between_subjects(np.ones((3, 2)), np.arange(3)))
