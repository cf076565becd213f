"""A file -> the picture in it, upright RGB, or the reason why there is none."""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from jaxear.errors import UserError

# Pillow's names. Formats left out are those that start other programs (EPS) or that nobody
# photographs ears in.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")

MAX_PIXELS = 64_000_000

# Files are read as a whole; none of MAX_PIXELS pixels need be larger.
MAX_BYTES = 4 * MAX_PIXELS

_GREY = 128

# EXIF 2.32, tag 0x0112: what undoes each orientation.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture cannot be used; `reason` in one line, `path` where it is known."""

    def __init__(self, reason: str, path: str | Path | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = None if path is None else Path(path)


def read_file(path: str | Path) -> tuple[bytes, os.stat_result]:
    """What a file of at most `MAX_BYTES` holds, and what it was like before it was read.

    Raises `ImageError` where it cannot be read.
    """
    try:
        # Not to wait for a writer, where it is a pipe.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("there is no such file", path)
            if status.st_size == 0:
                raise ImageError("the file is empty", path)
            if status.st_size > MAX_BYTES:
                raise ImageError(
                    f"{status.st_size / 1e6:.0f} megabytes, over the limit of {MAX_BYTES / 1e6:g}",
                    path,
                )
            content = os.read(file, status.st_size)
        finally:
            os.close(file)
        if len(content) < status.st_size:
            raise ImageError("the file became shorter while it was read", path)
        return content, status
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("there is no such file", path) from None
    except OSError as error:
        raise ImageError(error.strerror or _first_line(error), path) from None


def decode(
    path: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
    content: bytes | None = None,
) -> np.ndarray:
    """The picture in a file, upright, as uint8 RGB [H, W, 3]; not to be written to.

    Reads JPEG, PNG, BMP, GIF, TIFF, WebP, PPM and JPEG 2000; of an animation or several pages, the
    first. EXIF orientation is applied; colour profiles are not. 16-bit grey is scaled to 8 bits;
    transparent pixels are laid over mid-grey, which makes no edge against light or dark skin as
    strong as white or black would.

    With `enough` pixels a side, a JPEG that is larger is decoded at 1/2, 1/4 or 1/8 of its size if
    both of its sides then still are at least that long: several times as fast. `content` is what
    `read_file` found, where the file has been read already.

    Raises `ImageError` for anything that is no whole picture of at most `max_pixels` pixels; the
    size is known from the header, before anything is decoded.
    """
    if content is None:
        content, _ = read_file(path)
    picture = _decode_plain_jpeg(content, max_pixels, enough)
    if picture is None:
        picture = _decode_grey_bmp(content, max_pixels)
    if picture is not None:
        return picture
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{width}x{height} is {width * height / 1e6:.0f} megapixels, "
                    f"over the limit of {max_pixels / 1e6:g}"
                )
            if enough is not None:
                image.draft(None, (enough, enough))  # does nothing to other formats
            image.load()
            return _to_rgb(_upright(image))
    except ImageError as error:
        raise ImageError(error.reason, path) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(_first_line(error), path) from None
    except Image.UnidentifiedImageError:
        raise ImageError("not an image in a format that can be read", path) from None
    except OSError as error:
        raise ImageError(error.strerror or _first_line(error), path) from None
    except _DECODER_ERRORS as error:
        raise ImageError(f"damaged ({_first_line(error)})", path) from None


def _decode_plain_jpeg(content: bytes, max_pixels: int, enough: int | None) -> np.ndarray | None:
    """The pixels that Pillow gives, in half the time; None where there is more to it than that.

    Pillow has to turn the picture, convert its colours, decode it smaller, or say what is wrong.
    """
    if not content.startswith(b"\xff\xd8") or _may_tell_orientation(content):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        height, width = int(height), int(width)
        smaller = enough is not None and min(height, width) // enough >= 2
        if colours not in ("YCbCr", "Gray") or height * width > max_pixels or smaller:
            return None
        if colours == "YCbCr":
            return simplejpeg.decode_jpeg(content, "RGB")
        return grey_to_rgb(simplejpeg.decode_jpeg(content, "GRAY"))
    except ValueError:
        return None


def _may_tell_orientation(content: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP (APP1, 0xFFE1) before its pixels (0xFFDA), or is damaged.

    Python's search for two bytes in the whole file takes four times as long.
    """
    at = 2
    try:
        while content[at] == 0xFF and content[at + 1] not in (0xE1, 0xFF):
            if content[at + 1] == 0xDA:
                return False
            at += 2 + 256 * content[at + 2] + content[at + 3]
    except IndexError:
        pass
    return True


# File header and BITMAPINFOHEADER: "BM", where the pixels start, the second header's size, width,
# height, bits per pixel, compression, colours in the palette (0 for all).
_BMP_HEADER = struct.Struct("<2s8xIIii2xHI12xI4x")

# A palette of greys: blue, green, red and a byte that is not used, of each.
_GREYS = bytes(value for grey in range(256) for value in (grey, grey, grey, 0))


def _decode_grey_bmp(content: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of a BMP with 256 greys, as those of IIT Delhi are; None for anything else.

    Pillow looks at each colour of the palette in Python, which takes as long as all else that is
    done with such a picture and keeps other threads from their work.
    """
    if not content.startswith(b"BM") or len(content) < _BMP_HEADER.size:
        return None
    _, start, header, width, height, bits, compression, colours = _BMP_HEADER.unpack_from(content)
    palette = content[_BMP_HEADER.size : start]
    if (header, bits, compression) != (40, 8, 0) or colours not in (0, 256) or palette != _GREYS:
        return None
    row = -(width // -4) * 4  # bytes of one
    whole = width > 0 and height > 0 and len(content) >= start + row * height
    if not whole or width * height > max_pixels:
        return None
    rows = np.frombuffer(content, np.uint8, row * height, start).reshape(height, row)
    return grey_to_rgb(rows[::-1, :width, None])  # the lowest row comes first


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """[H, W, 1] as [H, W, 3], still one plane in memory: its last stride is 0."""
    return np.broadcast_to(grey, (*grey.shape[:2], 3))


# What Pillow's decoders raise, beside OSError, on files that are not as their format says.
_DECODER_ERRORS = (
    ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError, TypeError,
    AttributeError, OverflowError, ZeroDivisionError, MemoryError, RuntimeError,
)  # fmt: skip


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except (*_DECODER_ERRORS, OSError):
        return image  # damaged EXIF says nothing about the picture itself
    transpose = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("32-bit pixels of unknown range; convert it to 8 or 16 bits")
        return grey_to_rgb(((grey + 128) // 257).astype(np.uint8)[..., None])
    if image.mode == "F":
        raise ImageError("floating-point pixels of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (_GREY, _GREY, _GREY, 255))
        image = Image.alpha_composite(ground, image)
    if image.mode == "L":
        return grey_to_rgb(np.asarray(image)[..., None])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
