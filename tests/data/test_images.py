"""Pictures of every kind and state -> upright RGB; boxes; squares."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxear.data import images
from jaxear.data.images import (
    PAD_COLOUR,
    ImageError,
    crop_box,
    decode,
    mirror,
    prepare_image,
    to_square,
)
from jaxear.data.records import Record
from jaxear.data.sources import load_records
from jaxear.errors import UserError
from tests.data.conftest import corner_picture, write_image

# How a camera stores the upright picture under each EXIF orientation (EXIF 2.32, 4.6.4 A): which
# edges of the picture the 0th row and the 0th column of the stored array are.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def save(array: np.ndarray, path: Path, **options) -> Path:
    Image.fromarray(np.ascontiguousarray(array)).save(path, **options)
    return path


def reason(path: Path, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode(path, **options)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in caught.value.reason
    return caught.value.reason


# Kinds of picture


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(STORED[orientation](corner_picture()), tmp_path / f"x.{suffix}", exif=exif)
    picture = decode(path)
    assert picture.shape == (40, 60, 3)
    assert np.abs(picture[10::20, 15::30].astype(int) - corner_picture()[10::20, 15::30]).max() < 30


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_impossible_orientation_is_passed_over(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(corner_picture(), tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(decode(path), corner_picture())


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0\xff\xff\xff\xff"])
def test_damaged_exif_does_not_cost_the_picture(tmp_path, exif):
    path = save(corner_picture(), tmp_path / "x.png", exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says that it is damaged
        np.testing.assert_array_equal(decode(path), corner_picture())


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "gif", "webp", "jp2"])
def test_formats(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(corner_picture(), tmp_path / f"x.{suffix}", **options)
    picture = decode(path)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, corner_picture())


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(tmp_path, mode):
    path = tmp_path / "x.png"
    Image.fromarray(np.full((10, 12), 255, np.uint8)).convert(mode).save(path)
    assert (decode(path) == 255).all()
    assert decode(path).shape == (10, 12, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 129 * 257, 65535, 1000, 40000]], np.uint16)
    picture = decode(save(values, tmp_path / f"x.{suffix}"))
    np.testing.assert_array_equal(picture[0, :, 0], [0, 1, 129, 255, 4, 156])
    assert (picture == picture[..., :1]).all()


def test_pixels_of_unknown_range_are_refused(tmp_path):
    assert "32-bit" in reason(save(np.array([[0, 70_000]], np.int32), tmp_path / "i.tif"))
    assert "32-bit" in reason(save(np.array([[-1, 5]], np.int32), tmp_path / "n.tif"))
    assert "floating" in reason(save(np.array([[0, 0.5]], np.float32), tmp_path / "f.tif"))


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    picture = decode(path)
    assert picture.shape == (16, 16, 3)
    assert np.abs(picture[8, 8].astype(int) - (255, 0, 0)).max() < 10


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_transparency_is_laid_over_mid_grey(tmp_path, suffix):
    pixels = np.zeros((10, 10, 4), np.uint8)
    pixels[:, :5] = (200, 100, 50, 255)
    pixels[:, 5:8] = (255, 255, 255, 128)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    picture = decode(save(pixels, tmp_path / f"x.{suffix}", **options))
    np.testing.assert_array_equal(picture[0, 0], [200, 100, 50])
    np.testing.assert_array_equal(picture[0, 6], [192] * 3)  # half white, half grey
    np.testing.assert_array_equal(picture[0, 9], [128] * 3)


def test_grey_with_alpha(tmp_path):
    pixels = np.zeros((4, 4, 2), np.uint8)
    pixels[:2] = (30, 255)
    picture = decode(save(pixels, tmp_path / "x.png"))
    np.testing.assert_array_equal(picture[:, 0, 0], [30, 30, 128, 128])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["index", "table"])
def test_palette_with_transparency(tmp_path, transparency):
    picture = Image.new("P", (4, 4))
    picture.putpalette([250, 0, 0, 0, 250, 0])
    picture.paste(1, (2, 0, 4, 4))
    picture.save(tmp_path / "x.png", transparency=transparency)
    row = decode(tmp_path / "x.png")[0]
    np.testing.assert_array_equal(row, [[250, 0, 0]] * 2 + [[128] * 3] * 2)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for name in ("x.gif", "x.webp", "x.png", "x.tif"):
        options = {"lossless": True} if name == "x.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        picture = decode(tmp_path / name)
        assert picture.shape == (7, 9, 3)
        assert (picture == (250, 0, 0)).all()


def test_one_pixel_is_a_picture(tmp_path):
    path = write_image(tmp_path / "x.png", (1, 1), (1, 2, 3))
    np.testing.assert_array_equal(decode(path), [[[1, 2, 3]]])


# The shorter ways


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_a_plain_jpeg_is_decoded_without_pillow_to_the_same_pixels(
    tmp_path, mode, options, monkeypatch
):
    noise = np.random.default_rng(0).integers(0, 256, (67, 45, 3), np.uint8)
    path = tmp_path / "x.jpg"
    Image.fromarray(noise).convert(mode).save(path, quality=80, **options)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    monkeypatch.setattr(images.Image, "open", None)
    np.testing.assert_array_equal(decode(path, enough=30), expected)


def test_xmp_orientation_is_applied_to_jpeg(tmp_path):
    xmp = b'<rdf:Description tiff:Orientation="3"/>'
    path = tmp_path / "x.jpg"
    Image.fromarray(corner_picture()[::-1, ::-1]).save(path, xmp=xmp, quality=95, subsampling=0)
    assert (
        np.abs(decode(path)[10::20, 15::30].astype(int) - corner_picture()[10::20, 15::30]).max()
        < 9
    )


@pytest.mark.skipif(images.vectorised is None, reason="it has no wheels for this machine")
@pytest.mark.parametrize("shape", [(200, 160), (97, 300), (40, 30), (300, 128)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_pillows(shape, channels, monkeypatch):
    # Not up to the limits of uint8, as there the order of rows and columns tells.
    noise = np.random.default_rng(0).integers(60, 196, (*shape, channels), np.uint8)
    image = images._three(noise) if channels == 1 else noise
    fast = {mode: to_square(image, 128, mode) for mode in ("pad", "stretch", "crop")}
    monkeypatch.setattr(images, "vectorised", None)
    for mode, found in fast.items():
        expected = to_square(np.ascontiguousarray(image), 128, mode)
        assert found.shape == expected.shape == (128, 128, 3)
        assert np.abs(found.astype(int) - expected).max() <= 2
        assert np.abs(found.astype(int) - expected).mean() < 0.3
        np.testing.assert_array_equal(to_square(image, 128, mode), expected)


# Files that are no picture, or not a whole one


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.bmp"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert reason(path) == "256 megabytes, over the limit of 256"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert reason(tmp_path / "x.jpg") == "there is no such file"


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "gif", "webp", "ppm", "jp2"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(noise, tmp_path / f"x.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert reason(path)


def test_text_named_jpg(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_text("<html>404 Not Found</html>")
    assert reason(path) == "not an image in a format that can be read"


def test_empty_missing_folder(tmp_path):
    (tmp_path / "x.jpg").touch()
    assert reason(tmp_path / "x.jpg") == "the file is empty"
    assert reason(tmp_path / "y.jpg") == "there is no such file"
    assert reason(tmp_path) == "there is no such file"
    assert "too long" in reason(tmp_path / ("x" * 5000))


def test_eps_is_not_handed_to_another_program(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert reason(path) == "not an image in a format that can be read"


def test_random_damage_is_an_image_error_or_a_picture(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    path = tmp_path / "x"
    for format in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, format)
        for _ in range(60):
            content = np.frombuffer(stream.getvalue(), np.uint8).copy()
            where = rng.integers(0, min(len(content), 200), 4)
            content[where] = rng.integers(0, 256, 4)
            path.write_bytes(content.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Anything but an ImageError fails the test.
                with contextlib.suppress(ImageError):
                    assert decode(path, max_pixels=100_000).shape[2] == 3


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 20_000])
def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "x.png"
    path.write_bytes(png_header(side, side))  # decoding it would fail in another way
    assert "limit" in reason(path) or "exceeds" in reason(path)


def test_max_pixels(tmp_path):
    path = write_image(tmp_path / "x.png", (30, 20))
    assert decode(path, max_pixels=600).shape == (20, 30, 3)
    assert "30x20" in reason(path, max_pixels=599)


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


# The lot


def test_prepare_crops_in_the_upright_picture_and_mirrors_left_ears_only(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(STORED[6](corner_picture()), tmp_path / "x.png", exif=exif)
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
    monkeypatch.setattr(
        images, "to_square", lambda image, *rest: squared.append(image) or to_square(image, *rest)
    )
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
