"""One file -> one upright, cropped, square picture, the same way wherever one is needed."""

from __future__ import annotations

import importlib
import io
import math
import os
import stat
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from jaxear.data.records import Box, Record
from jaxear.errors import UserError

try:
    # Pillow's kernels with vector instructions. It has no wheels for Linux on ARM.
    vectorised: Any = importlib.import_module("cykooz_resizer")
except ImportError:
    vectorised = None

Fit = Literal["pad", "stretch", "crop"]

# Pillow's names. Formats left out are those that start other programs (EPS) or that nobody
# photographs ears in.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")

# Below this many pixels a side there is no ear to see.
MIN_SIDE = 8

MAX_PIXELS = 64_000_000

# Files are read as a whole; none of MAX_PIXELS pixels need be larger.
MAX_BYTES = 4 * MAX_PIXELS

# JPEGs are decoded at no less than so many times the size that is wanted.
DRAFT_GAP = 3

_GREY = 128

# ImageNet's mean colour, which most backbones normalise to 0: what SAM pads with, too
# (Sam.preprocess). It is the same in every picture so that the padding adds nothing to the variance
# that eigenears divide up. On AMI ears (PCA on pixels, 32 components), padding with each picture's
# own border raised the first component's share from 0.32 to 0.37 by repeating its brightness, and
# repeating the border's pixels raised the error inside the picture by 7 %.
PAD_COLOUR = (124, 116, 104)

# ImageNet's standard deviations, of 255.
COLOUR_SPREAD = (58.4, 57.1, 57.4)

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

    def __init__(self, reason: str, path: Path | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = path


def read_file(path: str | Path) -> bytes:
    """What a file of at most `MAX_BYTES` holds; raises `ImageError` where that cannot be read."""
    path = Path(path)
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
        return content
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
    `read_file` gave, where the file has been read already.

    Raises `ImageError` for anything that is no whole picture of at most `max_pixels` pixels; the
    size is known from the header, before anything is decoded.
    """
    path = Path(path)
    if content is None:
        content = read_file(path)
    picture = _decode_plain_jpeg(content, max_pixels, enough)
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
        return _three(simplejpeg.decode_jpeg(content, "GRAY"))
    except ValueError:
        return None


def _may_tell_orientation(content: bytes) -> bool:
    """Whether a JPEG has EXIF or XMP (APP1, 0xFFE1) before its pixels (0xFFDA), or is damaged.

    Python's search for two bytes in the whole file takes four times as long.
    """
    at = 2
    while content[at : at + 2] != b"\xff\xda":
        if content[at : at + 1] != b"\xff" or content[at + 1 : at + 2] in (b"", b"\xe1", b"\xff"):
            return True
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


def _three(grey: np.ndarray) -> np.ndarray:
    """[H, W, 1] as [H, W, 3], with one plane in memory that `_resize` knows by its strides."""
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
        return _three(((grey + 128) // 257).astype(np.uint8)[..., None])
    if image.mode == "F":
        raise ImageError("floating-point pixels of unknown range; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (_GREY, _GREY, _GREY, 255))
        image = Image.alpha_composite(ground, image)
    if image.mode == "L":
        return _three(np.asarray(image)[..., None])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def crop_box(image: np.ndarray, box: Box, margin: float = 0.0) -> np.ndarray:
    """The part of `image` [H, W, 3] in `box` (x, y, w, h in pixels).

    The box is first widened on each side by `margin` times its size. What of it lies outside the
    picture is cut off. Raises `ImageError` for a box that has no area, is not finite, or lies
    wholly outside.
    """
    x, y, w, h = box
    if not all(map(math.isfinite, box)):
        raise ImageError(f"the box {_show(box)} is not finite")
    if w <= 0 or h <= 0:
        raise ImageError(f"the box {_show(box)} (x, y, w, h) is empty")
    height, width = image.shape[:2]
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ImageError(f"the box {_show(box)} lies outside the picture of {width}x{height}")
    left, right = _clip(x - margin * w, width), _clip(x + w + margin * w, width)
    top, bottom = _clip(y - margin * h, height), _clip(y + h + margin * h, height)
    if right == left or bottom == top:
        raise ImageError(f"the box {_show(box)} is smaller than a pixel; boxes are in pixels")
    return image[top:bottom, left:right]


def _clip(value: float, size: int) -> int:
    return round(min(max(value, 0), size))


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def to_square(image: np.ndarray, size: int, mode: Fit = "pad") -> np.ndarray:
    """`image` uint8 [H, W, 3] as [size, size, 3]: padded, stretched, or its central square.

    Resized with Pillow's bicubic kernel, which averages over all pixels that a smaller one covers
    (no aliasing) and, unlike Lanczos, hardly rings at the edges of hair and helix: a model would
    have to reproduce the rings. Padding is `PAD_COLOUR`, equally wide on both sides.
    """
    height, width = image.shape[:2]
    if mode == "stretch":
        return np.array(_resize(image, size, size))
    if mode == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return np.array(_resize(image[top : top + side, left : left + side], size, size))
    if mode == "pad":
        scale = size / max(height, width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (size - new_height) // 2, (size - new_width) // 2
        square = _padding(size).copy()
        inside = square[top : top + new_height, left : left + new_width]
        resized = _resize(image, new_width, new_height)
        if resized.strides[2]:
            inside[:] = resized
        else:  # grey: several times as fast than all at once
            for channel in range(3):
                inside[..., channel] = resized[..., 0]
        return square
    raise UserError(f"unknown fit {mode!r}; known are pad, stretch, crop")


def normalize_colour(image: np.ndarray) -> np.ndarray:
    """`image` uint8 [H, W, 3] with the mean `PAD_COLOUR` and `COLOUR_SPREAD` in each channel.

    What light and camera do to the whole picture is then gone: its brightness, contrast and tint,
    and with them the lightness of the skin. Values beyond 0 and 255 are clipped.
    """
    values = np.arange(256.0)
    table = np.empty((256, 3), np.uint8)
    for channel in range(3):
        pixels = image[..., channel]
        spread = max(float(pixels.std()), 1.0)  # of a picture of one colour noise would be left
        new = (values - pixels.mean()) / spread * COLOUR_SPREAD[channel] + PAD_COLOUR[channel]
        table[:, channel] = np.clip(np.rint(new), 0, 255)
    return table[image, np.arange(3)]


@lru_cache(maxsize=1)
def _padding(size: int) -> np.ndarray:
    return np.full((size, size, 3), PAD_COLOUR, np.uint8)


# What is shrunk more than this is first halved, or thirded, ..., by box averages.
_REDUCING_GAP = 3.0


@lru_cache(maxsize=1)
def _bicubic() -> Any:
    kernel = vectorised.ResizeAlg.convolution(vectorised.FilterType.catmull_rom)
    return vectorised.ResizeOptions(resize_alg=kernel)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """`image` [H, W, 3] as [height, width, 3], with Pillow's BICUBIC; on photographs within 1 of it
    where it is done by `vectorised`, in a sixth of the time.
    """
    grey = image.strides[2] == 0
    pixels = np.ascontiguousarray(image[..., 0] if grey else image)
    old_height, old_width = image.shape[:2]
    much_smaller = max(old_height / height, old_width / width) >= 2 * _REDUCING_GAP
    if vectorised is None or much_smaller:
        old = Image.fromarray(pixels)
        new = old.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
        resized = np.asarray(new)
    else:
        pixel = vectorised.PixelType.U8 if grey else vectorised.PixelType.U8x3
        old = vectorised.ImageData(old_width, old_height, pixel, pixels.tobytes())
        narrow = vectorised.ImageData(width, old_height, pixel)
        new = vectorised.ImageData(width, height, pixel)
        # In two steps, as it would take the columns first, and both it and Pillow round in between.
        resizer = vectorised.Resizer()
        resizer.resize(old, narrow, _bicubic())
        resizer.resize(narrow, new, _bicubic())
        resized = np.frombuffer(new.get_buffer(), np.uint8)
    return _three(resized.reshape(height, width, 1)) if grey else resized.reshape(height, width, 3)


def mirror(image: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3] with left and right exchanged."""
    mirrored = np.empty(image.shape, image.dtype)
    for channel in range(image.shape[2]):  # five times as fast as all at once
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def prepare_image(
    record: Record,
    *,
    image_size: int,
    fit: Fit = "pad",
    margin: float = 0.0,
    mirror_left: bool = False,
    colour_normalized: bool = False,
    max_pixels: int = MAX_PIXELS,
    content: bytes | None = None,
) -> np.ndarray:
    """The ear of one record as the models see it, uint8 RGB [image_size, image_size, 3].

    Decoded (`decode`), cut to its box with `margin` (`crop_box`), its colours normalised if asked
    for (`normalize_colour`), made square (`to_square`) and, where `mirror_left` and the record is a
    left ear, mirrored into a right one. `content` is what the record's file holds, where it has
    been read already. Raises `ImageError` with the path and the reason.
    """
    # A box is in the pixels of the whole picture.
    enough = DRAFT_GAP * image_size if record.box is None else None
    image = decode(record.path, max_pixels=max_pixels, enough=enough, content=content)
    try:
        if record.box is not None:
            image = crop_box(image, record.box, margin)
        height, width = image.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ImageError(f"{width}x{height} pixels, too small for an ear (at least {MIN_SIDE})")
        if colour_normalized:
            image = normalize_colour(image)
        image = to_square(image, image_size, fit)
    except ImageError as error:
        raise ImageError(error.reason, record.path) from None
    return mirror(image) if mirror_left and record.side == "left" else image
