"""Upright pictures -> boxes, squares, and ears as models see them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jaxear.data import images
from jaxear.data.decoding import ImageError, decode, grey_to_rgb
from jaxear.data.images import PAD_COLOUR, crop_box, mirror, prepare_image, to_square
from jaxear.data.records import Record
from jaxear.data.sources import load_records
from jaxear.errors import UserError
from tests.data.conftest import corner_picture, save, write_image

# Boxes


def test_crop_box():
    picture = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3)
    np.testing.assert_array_equal(crop_box(picture, (10, 20, 30, 40)), picture[20:60, 10:40])
    np.testing.assert_array_equal(crop_box(picture, (9.6, 20.4, 30, 40)), picture[20:60, 10:40])


def test_margin_widens_each_side():
    picture = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3)
    cropped = crop_box(picture, (50, 40, 20, 30), margin=0.1)
    np.testing.assert_array_equal(cropped, picture[37:73, 48:72])


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((-10, -20, 30, 40), slice(0, 20), slice(0, 20)),
        ((190, 90, 30, 40), slice(90, 100), slice(190, 200)),
        ((-1e9, -1e9, 2e9, 2e9), slice(0, 100), slice(0, 200)),
    ],
)
def test_box_partly_outside_is_cut(box, rows, columns):
    picture = np.arange(100 * 200 * 3, dtype=np.uint32).reshape(100, 200, 3)
    np.testing.assert_array_equal(crop_box(picture, box), picture[rows, columns])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((200, 0, 10, 10), "outside the picture of 200x100"),
        ((0, 100, 10, 10), "outside"),
        ((-10, 0, 10, 10), "outside"),
        ((0, -11, 10, 10), "outside"),
        ((0, 0, 0, 10), "empty"),
        ((0, 0, 10, -1), "empty"),
        ((float("nan"), 0, 10, 10), "not finite"),
        ((0, 0, float("inf"), 10), "not finite"),
        ((0.1, 0.2, 0.3, 0.3), "smaller than a pixel; boxes are in pixels"),
    ],
)
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_box_of_no_use(box, message, margin):
    with pytest.raises(ImageError, match=message):
        crop_box(np.zeros((100, 200, 3), np.uint8), box, margin)


# Squares


def test_pad_keeps_the_aspect_and_the_centre():
    square = to_square(np.full((200, 100, 3), 250, np.uint8), 64, "pad")
    assert square.shape == (64, 64, 3)
    assert (square[:, 16:48] == 250).all()
    assert (square[:, :16] == PAD_COLOUR).all()
    assert (square[:, 48:] == PAD_COLOUR).all()
    wide = to_square(np.full((100, 200, 3), 250, np.uint8), 64, "pad")
    assert (wide == square.transpose(1, 0, 2)).all()


def test_stretch_shows_everything_and_crop_the_centre():
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[:, 30:60] = 200
    stretched, cropped = to_square(picture, 30, "stretch"), to_square(picture, 30, "crop")
    assert stretched.shape == cropped.shape == (30, 30, 3)
    assert (stretched[:, [2, 27]] == 0).all()
    assert (stretched[:, 13:17] == 200).all()
    assert (cropped == 200).all()


@pytest.mark.parametrize("mode", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [16, 128])
def test_extreme_shapes(mode, size):
    for shape in ((1, 1), (1, 500), (500, 1), (8, 9)):
        square = to_square(np.full((*shape, 3), 77, np.uint8), size, mode)
        assert square.shape == (size, size, 3)
        assert (square == 77).all(-1).any()


def test_a_square_of_the_right_size_is_left_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for mode in ("pad", "stretch", "crop"):
        np.testing.assert_array_equal(to_square(noise, 32, mode), noise)


@pytest.mark.parametrize("side", [96, 1024])
def test_resizing_does_not_alias(side):
    # Stripes finer than the result's pixels must come out as their mean, not as coarser stripes.
    stripes = np.zeros((side, side, 3), np.uint8)
    stripes[:, ::2] = 200
    small = to_square(stripes, 30, "stretch")
    assert np.abs(small[2:-2, 2:-2].astype(int) - 100).max() <= 8


def test_unknown_fit():
    with pytest.raises(UserError, match="unknown fit 'fill'; known are pad, stretch, crop"):
        to_square(np.zeros((9, 9, 3), np.uint8), 8, "fill")


def test_mirror():
    np.testing.assert_array_equal(mirror(corner_picture()), corner_picture()[:, ::-1])


@pytest.mark.parametrize("mode", ["pad", "stretch", "crop"])
def test_a_square_is_mirrored_and_written_where_it_is_wanted(mode):
    noise = np.random.default_rng(0).integers(0, 256, (61, 40, 3), np.uint8)
    for image in (noise, grey_to_rgb(noise[..., :1])):
        square = to_square(image, 32, mode)
        mirrored = to_square(image, 32, mode, mirrored=True)
        grid = np.zeros((3, 32, 32, 3), np.uint8)
        np.testing.assert_array_equal(mirrored, mirror(square))
        assert np.shares_memory(to_square(image, 32, mode, mirrored=True, out=grid[1]), grid)
        np.testing.assert_array_equal(grid[1], mirrored)
        assert not grid[[0, 2]].any()


@pytest.mark.skipif(images.vectorised is None, reason="it has no wheels for this machine")
@pytest.mark.parametrize("shape", [(200, 160), (97, 300), (40, 30), (300, 128)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pillows(shape, channels, monkeypatch):
    # Not up to the limits of uint8, as there the order of rows and columns tells.
    noise = np.random.default_rng(0).integers(60, 196, (*shape, channels), np.uint8)
    image = grey_to_rgb(noise) if channels == 1 else noise
    fast = {mode: to_square(image, 128, mode) for mode in ("pad", "stretch", "crop")}
    monkeypatch.setattr(images, "vectorised", None)
    for mode, found in fast.items():
        expected = to_square(np.ascontiguousarray(image), 128, mode)
        assert found.shape == expected.shape == (128, 128, 3)
        assert np.abs(found.astype(int) - expected).max() <= 2
        assert np.abs(found.astype(int) - expected).mean() < 0.3
        np.testing.assert_array_equal(to_square(image, 128, mode), expected)


def exact_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pillow's in float32, which does not round."""
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    small = [plane.resize((width, height), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack([np.asarray(plane) for plane in small], axis=-1)


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("shape", [(200, 160), (97, 300), (40, 30), (300, 128)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_bicubic_convolution(shape, channels, vectorised, monkeypatch):
    if not vectorised:
        monkeypatch.setattr(images, "vectorised", None)
    elif images.vectorised is None:
        pytest.skip("it has no wheels for this machine")
    # Not up to the limits of uint8, where a first result outside them is cut off.
    noise = np.random.default_rng(0).integers(60, 196, (*shape, channels), np.uint8)
    image = grey_to_rgb(noise) if channels == 1 else noise
    error = to_square(image, 128, "stretch") - exact_resize(image, 128, 128)
    assert np.abs(error).max() < 2
    assert np.sqrt((error**2).mean()) < 0.45  # with the two roundings 0.29 each, at most


# The lot


def test_prepare_crops_in_the_upright_picture_and_mirrors_left_ears_only(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(corner_picture().transpose(1, 0, 2)[::-1], tmp_path / "x.png", exif=exif)
    box = (20, 0, 20, 20)  # red on the left, green on the right
    upright = corner_picture()[:20, 20:40]
    for side, mirror_left, expected in (
        ("left", True, upright[:, ::-1]),
        ("left", False, upright),
        ("right", True, upright),
        ("unknown", True, upright),
    ):
        record = Record(path, "s", side, box)
        picture = prepare_image(record, image_size=20, mirror_left=mirror_left)
        np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    ("size", "orientation", "decoded"),
    [
        ((400, 600), 1, (100, 150)),  # a quarter: at least three times 32 pixels
        ((400, 600), 6, (100, 150)),
        ((191, 600), 1, (191, 600)),
        ((800, 800), 1, (100, 100)),
    ],
)
def test_a_much_larger_jpeg_is_decoded_smaller_and_looks_the_same(
    tmp_path, size, orientation, decoded, monkeypatch
):
    smooth = np.random.default_rng(0).integers(0, 256, (12, 8, 3), np.uint8)
    stored = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(np.asarray(stored), tmp_path / "x.jpg", exif=exif, quality=95)
    whole = to_square(decode(path), 32)
    squared = []

    def noting(image, *rest, **options):
        squared.append(image)
        return to_square(image, *rest, **options)

    monkeypatch.setattr(images, "to_square", noting)
    found = prepare_image(Record(path, "s"), image_size=32)
    assert sorted(squared[0].shape[:2]) == sorted(decoded)
    error = np.mean((found.astype(float) - whole) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 45
    # A box is in pixels of the whole picture.
    prepare_image(Record(path, "s", box=(0, 0, 190, 190)), image_size=32)
    assert squared[1].shape == (190, 190, 3)
    with pytest.raises(ImageError, match="megapixels"):  # in the whole picture, too
        prepare_image(Record(path, "s"), image_size=32, max_pixels=100_000)


def test_prepare_names_the_file(tmp_path):
    path = write_image(tmp_path / "x.png", (40, 40))
    for box in ((50, 50, 9, 9), (0, 0, 7, 20)):
        with pytest.raises(ImageError, match=r"x\.png: ") as caught:
            prepare_image(Record(path, "s", box=box), image_size=16)
        assert caught.value.path == path


def test_prepare_refuses_what_is_too_small_to_show_an_ear(tmp_path):
    path = write_image(tmp_path / "x.png", (1, 1))
    with pytest.raises(ImageError, match="1x1 pixels, too small"):
        prepare_image(Record(path, "s"), image_size=16)


def test_real_photographs(photographs):
    records = load_records(photographs / "ami")[::150] + load_records(photographs / "iitd")[::100]
    for record in records:
        picture = prepare_image(record, image_size=128)
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.uint8
        assert picture[:, 32:96].std() > 5
        tall = record.path.suffix == ".jpg"  # AMI's are upright, IIT Delhi's lie
        bars = picture[:, :19] if tall else picture[:16]
        assert (bars == PAD_COLOUR).all()
