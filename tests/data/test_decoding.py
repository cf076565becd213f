"""Files of pictures of every kind, whole and damaged -> upright RGB, or the reason why not."""

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

from jaxear.data import decoding
from jaxear.data.decoding import ImageError, decode
from tests.data.conftest import corner_picture, save, write_image

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
    monkeypatch.setattr(decoding.Image, "open", None)
    np.testing.assert_array_equal(decode(path, enough=30), expected)


def test_xmp_orientation_is_applied_to_jpeg(tmp_path):
    xmp = b'<rdf:Description tiff:Orientation="3"/>'
    path = tmp_path / "x.jpg"
    Image.fromarray(corner_picture()[::-1, ::-1]).save(path, xmp=xmp, quality=95, subsampling=0)
    assert (
        np.abs(decode(path)[10::20, 15::30].astype(int) - corner_picture()[10::20, 15::30]).max()
        < 9
    )


def test_exif_behind_another_segment_is_found(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = save(STORED[3](corner_picture()), tmp_path / "x.jpg", exif=exif)
    content = path.read_bytes()
    thumbnail = b"\xff\xd8\xff\xda as if the pixels began"
    segment = b"\xff\xe2" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    path.write_bytes(content[:2] + segment + content[2:])
    assert (
        np.abs(decode(path)[10::20, 15::30].astype(int) - corner_picture()[10::20, 15::30]).max()
        < 30
    )


def grey_bmp(path: Path, shape: tuple[int, int]) -> np.ndarray:
    grey = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(grey).save(path)
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize("width", [44, 45, 46, 47])  # rows are filled up to four bytes
def test_a_bmp_of_greys_is_decoded_without_pillow_to_the_same_pixels(tmp_path, width, monkeypatch):
    expected = grey_bmp(tmp_path / "x.bmp", (67, width))
    monkeypatch.setattr(decoding.Image, "open", None)
    np.testing.assert_array_equal(decode(tmp_path / "x.bmp"), expected)


@pytest.mark.parametrize(
    ("at", "value", "like"),
    [
        (22, struct.pack("<i", -67), lambda a: a[::-1]),  # the highest row comes first
        (
            54,
            bytes(x for grey in range(255, -1, -1) for x in (grey, grey, grey, 0)),
            lambda a: 255 - a,
        ),
    ],
)
def test_another_kind_of_bmp_is_left_to_pillow(tmp_path, at, value, like):
    path = tmp_path / "x.bmp"
    expected = like(grey_bmp(path, (67, 45)))
    content = path.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])
    np.testing.assert_array_equal(decode(path), expected)


def test_a_bmp_of_greys_that_is_cut_off_or_too_large_is_refused(tmp_path):
    path = tmp_path / "x.bmp"
    grey_bmp(path, (67, 45))
    assert "megapixels" in reason(path, max_pixels=67 * 45 - 1)
    os.truncate(path, path.stat().st_size - 48)  # a row
    assert "truncated" in reason(path)


# Files that are no picture, or not a whole one


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = save(corner_picture(), tmp_path / "x.jpg")
    read = os.read
    monkeypatch.setattr(decoding.os, "read", lambda file, size: read(file, size - 1))
    assert reason(path) == "the file became shorter while it was read"


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.bmp"
    with path.open("wb") as file:
        file.truncate(decoding.MAX_BYTES + 1)
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
