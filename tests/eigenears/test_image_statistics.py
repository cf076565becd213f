"""Statistics of images find what was done to a picture, and nothing that was not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from jaxear.data.augment import warp
from jaxear.data.images import PAD_COLOUR, to_square
from jaxear.eigenears.image_statistics import STATISTICS, cielab, image_statistics
from tests.training.tiny import optimized

SIZE = 48
N = 24


@pytest.fixture(scope="module", autouse=True)
def _optimized() -> Iterator[None]:
    """A picture without anything in it is found not to move but by rounding, which differs."""
    with optimized():
        yield


def scene() -> np.ndarray:
    """Rings and bars, roughly as an ear has them, float [S, S, 3]."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    radius = np.hypot(x / 0.5, y / 0.75)
    rim = np.exp(-0.5 * ((radius - 0.9) / 0.12) ** 2)
    fold = np.exp(-0.5 * ((x - 0.1 - 0.3 * y) / 0.07) ** 2) * (radius < 0.8)
    grey = 0.35 + 0.3 * rim + 0.2 * fold - 0.15 * np.exp(-8 * ((x + 0.1) ** 2 + (y - 0.2) ** 2))
    return np.float32(grey[..., None] * np.array([1.0, 0.8, 0.7]))


def moved(right=0.0, down=0.0, zoom=0.0, turn=0.0) -> np.ndarray:
    """The scene moved (in halves of a side), grown and turned (radians, clockwise)."""
    cos, sin = np.cos(turn), np.sin(turn)
    back = np.array([[cos, sin], [-sin, cos]]) / (1 + zoom)
    shift = -back @ np.array([right, down]) * SIZE / 2
    return np.asarray(warp(scene(), np.column_stack([back, shift]).astype(np.float32)))


@pytest.fixture(scope="module")
def movements():
    rng = np.random.default_rng(0)
    amounts = {"right": 0.03, "down": 0.03, "zoom": 0.04, "turn": 0.04}
    return {name: sd * rng.normal(size=N) for name, sd in amounts.items()}


@pytest.fixture(scope="module")
def moving(movements):
    return np.stack([moved(**{k: v[i] for k, v in movements.items()}) for i in range(N)])


def test_place_size_and_turn_are_found(movements, moving):
    found = image_statistics(moving)
    assert list(found) == [statistic.name for statistic in STATISTICS]
    for name, true in movements.items():
        assert np.corrcoef(found[name], true)[0, 1] > 0.95, name
        slope = np.polyfit(true, found[name], 1)[0]
        assert 0.5 < slope < 1.3, name  # first order: large moves come out small


def test_light_does_not_move_the_ear(moving):
    plain = image_statistics(moving)
    gains = np.linspace(0.6, 1.4, N)[:, None, None, None]
    lit = image_statistics(np.float32(moving * gains + 0.05))
    for name in ("right", "down", "zoom", "turn"):
        assert np.corrcoef(plain[name], lit[name])[0, 1] > 0.98, name
    assert np.corrcoef(lit["lightness"], gains.ravel())[0, 1] > 0.95
    assert np.corrcoef(lit["lightness_sd"], gains.ravel())[0, 1] > 0.95


def test_lab_is_that_of_scikit_image():
    color = pytest.importorskip("skimage.color")
    colours = np.float32(np.random.default_rng(0).uniform(size=(4, 9, 3)))
    colours[0, :2] = [[0, 0, 0], [1, 1, 1]]
    np.testing.assert_allclose(cielab(colours), color.rgb2lab(colours), atol=0.02)


def test_light_and_colour_are_measured_as_defined():
    ramp = np.broadcast_to(np.linspace(60, 180, SIZE), (SIZE, SIZE))
    images = np.stack([ramp, ramp.T, np.full((SIZE, SIZE), 120.0)])
    images = np.repeat(images[..., None], 3, axis=-1)
    images = np.concatenate([images, images[2:] + np.array([60, 0, -60.0])]).astype(np.uint8)
    found = image_statistics(images)
    lab = np.asarray(cielab(images.astype(np.float32) / 255))
    np.testing.assert_allclose(found["lightness"], lab[..., 0].mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["lightness_sd"], lab[..., 0].std((1, 2)), atol=1e-2)
    np.testing.assert_allclose(found["red_green"], lab[..., 1].mean((1, 2)), atol=1e-2)
    np.testing.assert_allclose(found["yellow_blue"], lab[..., 2].mean((1, 2)), atol=1e-2)
    assert found["slope_right"][0] > 20
    np.testing.assert_allclose(found["slope_right"][1:], 0, atol=0.01)
    np.testing.assert_allclose(found["slope_down"][1], found["slope_right"][0], rtol=1e-3)
    assert found["red_green"][3] > 10
    assert all(np.isfinite(values).all() for values in found.values())
    np.testing.assert_allclose([found[name][2] for name in ("zoom", "right", "turn")], 0, atol=1e-3)


def test_padding_counts_for_nothing_but_itself(moving):
    inner = np.uint8(np.round(255 * moving[:, :, SIZE // 6 : -SIZE // 6]))
    padded = np.stack([to_square(image, SIZE) for image in inner])
    assert (padded[:, 0, 0] == PAD_COLOUR).all()
    found = image_statistics(padded)
    lab = np.asarray(cielab(inner.astype(np.float32) / 255))
    np.testing.assert_allclose(found["lightness"], lab[..., 0].mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["lightness_sd"], lab[..., 0].std((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(found["yellow_blue"], lab[..., 2].mean((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(found["padded_width"], 1 / 3, atol=0.01)
    assert not found["padded_height"].any()
    assert not image_statistics(moving)["padded_width"].any()


def test_the_edge_of_the_padding_is_not_registered(movements, moving):
    # However wide the padding is: to a dark picture it would be the strongest edge there is.
    widths = np.random.default_rng(1).integers(2, 11, N)
    as_bytes = np.uint8(np.round(100 * moving))
    padded = [to_square(i[:, w:-w], SIZE) for i, w in zip(as_bytes, widths, strict=True)]
    found = image_statistics(np.stack(padded))
    for name, true in movements.items():
        assert np.corrcoef(found[name], true)[0, 1] > 0.97, name


def test_bytes_and_floats_are_the_same_picture(moving):
    as_bytes = np.uint8(np.round(255 * np.clip(moving, 0, 1)))
    a, b = image_statistics(as_bytes), image_statistics(np.float32(as_bytes / 255))
    for name, values in a.items():
        np.testing.assert_allclose(values, b[name], rtol=1e-3, atol=1e-3)
