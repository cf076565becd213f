"""One record -> one cropped, square picture, the same way wherever one is needed."""

from __future__ import annotations

import importlib
import math
import threading
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from jaxear.data.decoding import MAX_PIXELS, ImageError, decode, grey_to_rgb
from jaxear.data.records import Box, Record
from jaxear.errors import UserError

try:
    # Pillow's kernels with vector instructions. It has no wheels for Linux on ARM.
    vectorised: Any = importlib.import_module("cykooz_resizer")
except ImportError:
    vectorised = None

Fit = Literal["pad", "stretch", "crop"]

# Below this many pixels a side there is no ear to see.
MIN_SIDE = 8

# JPEGs are decoded at no less than so many times the size that is wanted.
DRAFT_GAP = 3

# ImageNet's mean colour, which most backbones normalise to 0: what SAM pads with, too
# (Sam.preprocess). It is the same in every picture so that the padding adds nothing to the variance
# that eigenears divide up. On AMI ears (PCA on pixels, 32 components), padding with each picture's
# own border raised the first component's share from 0.32 to 0.37 by repeating its brightness, and
# repeating the border's pixels raised the error inside the picture by 7 %.
PAD_COLOUR = (124, 116, 104)

# ImageNet's standard deviations, of 255.
COLOUR_SPREAD = (58.4, 57.1, 57.4)


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


def to_square(
    image: np.ndarray,
    size: int,
    mode: Fit = "pad",
    *,
    mirrored: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """`image` uint8 [H, W, 3] as [size, size, 3]: padded, stretched, or its central square.

    Resized with Pillow's bicubic kernel, which averages over all pixels that a smaller one covers
    (no aliasing) and, unlike Lanczos, hardly rings at the edges of hair and helix: a model would
    have to reproduce the rings. Padding is `PAD_COLOUR`, equally wide on both sides. With
    `mirrored`, left and right are then exchanged. Written to `out`, where that is given.
    """
    height, width = image.shape[:2]
    square = np.empty((size, size, 3), np.uint8) if out is None else out
    inside = square[:, ::-1] if mirrored else square
    new_height = new_width = size
    if mode == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    elif mode == "pad":
        scale = size / max(height, width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (size - new_height) // 2, (size - new_width) // 2
        square[:] = _padding(size)
        inside = inside[top : top + new_height, left : left + new_width]
    elif mode != "stretch":
        raise UserError(f"unknown fit {mode!r}; known are pad, stretch, crop")
    _copy(_resize(image, new_width, new_height), inside)
    return square


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


class _Local(threading.local):
    """What each thread has for itself."""

    @cached_property
    def resizer(self) -> Any:  # it keeps the memory between the two directions
        return vectorised.Resizer()


_local = _Local()


@lru_cache(maxsize=1)
def _bicubic() -> Any:
    kernel = vectorised.ResizeAlg.convolution(vectorised.FilterType.catmull_rom)
    return vectorised.ResizeOptions(resize_alg=kernel)


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """`image` [H, W, 3] as [height, width, 3], by bicubic convolution as in Pillow.

    What `vectorised` gives in a sixth of the time differs from Pillow's by 1 in a fifth of the
    values: it takes the columns first, Pillow the rows, and both round in between. Both are as far
    from the exact values (0.34 root mean square on AMI and IIT Delhi, of which 0.29 is the last
    rounding).
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
        new = vectorised.ImageData(width, height, pixel)
        _local.resizer.resize(old, new, _bicubic())
        resized = np.frombuffer(new.get_buffer(), np.uint8)
    resized = resized.reshape(height, width, -1)
    return grey_to_rgb(resized) if grey else resized


def mirror(image: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3] with left and right exchanged."""
    mirrored = np.empty(image.shape, image.dtype)
    _copy(image, mirrored[:, ::-1])
    return mirrored


def _copy(image: np.ndarray, to: np.ndarray) -> None:
    if image.strides[2] and to.strides[1] > 0:
        to[:] = image
    else:  # grey or mirrored: five times as fast as all at once
        for channel in range(3):
            to[..., channel] = image[..., channel]


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
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The ear of one record as the models see it, uint8 RGB [image_size, image_size, 3].

    Decoded (`decode`), cut to its box with `margin` (`crop_box`), its colours normalised if asked
    for (`normalize_colour`), made square (`to_square`) and, where `mirror_left` and the record is a
    left ear, mirrored into a right one. `content` is what the record's file holds, where it has
    been read already; the picture is written to `out`, where that is given. Raises `ImageError`
    with the path and the reason.
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
        mirrored = mirror_left and record.side == "left"
        return to_square(image, image_size, fit, mirrored=mirrored, out=out)
    except ImageError as error:
        raise ImageError(error.reason, record.path) from None
