"""Pictures brought to one brightness, contrast and tint."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxear.config import TrainConfig
from jaxear.data.entries import MANIFEST
from jaxear.data.images import COLOUR_SPREAD, PAD_COLOUR, normalize_colour, prepare_image
from jaxear.data.pipeline import load_split
from jaxear.data.records import Record
from jaxear.data.sources import load_records
from jaxear.data.store import Settings, prepare_store
from jaxear.errors import UserError


def picture(contrast=1.0, tint=(0, 0, 0)):
    """Smooth, within the range at these contrasts and tints."""
    y, x = np.mgrid[0:48, 0:32]
    waves = 40 * np.sin(x / 5) + 25 * np.cos(y / 7)
    return np.uint8(np.rint(110 + contrast * waves[..., None] + np.array(tint)))


def test_mean_and_spread_of_each_colour_are_the_same_afterwards():
    found = normalize_colour(picture(0.6, (40, 0, -30)))
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.mean((0, 1)), PAD_COLOUR, atol=0.5)
    np.testing.assert_allclose(found.std((0, 1)), COLOUR_SPREAD, rtol=0.02)


def test_brightness_contrast_and_tint_make_no_difference():
    one, other = normalize_colour(picture()), normalize_colour(picture(0.7, (35, 5, -20)))
    assert np.abs(one.astype(int) - other).max() <= 3  # rounding before it, stretched


def test_a_picture_of_one_colour_stays_one():
    found = normalize_colour(np.full((8, 8, 3), 30, np.uint8))
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8(PAD_COLOUR), (8, 8, 3)))


def test_the_padding_is_left_out(tmp_path):
    path = tmp_path / "ear.png"
    Image.fromarray(picture(0.5)).save(path)
    found = prepare_image(Record(path, "s"), image_size=48, colour_normalized=True)
    inside = found[:, 8:40]
    np.testing.assert_array_equal(inside, normalize_colour(picture(0.5)))
    np.testing.assert_array_equal(found[:, :8], np.broadcast_to(np.uint8(PAD_COLOUR), (48, 8, 3)))


@pytest.fixture
def ears(tmp_path):
    """A folder of three pictures, each of another brightness."""
    for i, tint in enumerate((-30, 0, 40)):
        (tmp_path / "ears" / f"{i}").mkdir(parents=True)
        Image.fromarray(picture(0.7, (tint,) * 3)).save(tmp_path / "ears" / f"{i}" / "ear.png")
    return tmp_path / "ears"


@pytest.mark.slow
def test_photographs_come_normalized_from_store_and_memory_and_synthetic_ears_do(ears):
    for source in (
        {"data": str(ears), "cache_dir": "none"},
        {"data": str(ears)},
        {"demo_ears": 4},
    ):
        config = TrainConfig(image_size=32, val_fraction=0.0, test_fraction=0.0, **source)
        plain = load_split(config, "train", progress=False).images
        config = dataclasses.replace(config, normalize_colour=True)
        found = load_split(config, "train", progress=False).images
        assert np.ptp(plain.mean((1, 2)), axis=0).min() > 8
        assert np.ptp(found.mean((1, 2)), axis=0).max() < 8, source  # clipping moves it a little


def test_a_store_from_before_this_setting_is_one_without_it(ears, tmp_path):
    def prepare(settings):
        return prepare_store(tmp_path / "store", load_records(ears), ears, settings)

    before = np.array(prepare(Settings(16)).pixels)
    path = tmp_path / "store" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["settings"]["normalize_colour"]
    path.write_text(json.dumps(manifest))
    store = prepare(Settings(16))
    assert store.settings == Settings(16)
    np.testing.assert_array_equal(store.pixels, before)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="normalize_colour is False, not True"):
        prepare(Settings(16, normalize_colour=True))
