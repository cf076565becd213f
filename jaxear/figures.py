"""What all pictures have in common: for the screen as PNG, for print as PDF; grids; animations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from jaxear.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200

FRAME_MS = 60
HOLD_MS = 480
TRACK = 12  # height of the strip below an animation that shows the score, in pixels


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8, black where they are not finite; uint8 passes."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    return np.round(255 * np.clip(np.nan_to_num(images, posinf=1), 0, 1)).astype(np.uint8)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write a uint8 picture [h, w, 3] as PNG; makes the folder."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as `stem`.png and `stem`.pdf; makes the folder.

    The PDF holds the figure's pictures in their own pixels, for the printer to resample.
    """
    with replacing(stem.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    for axes in figure.axes:
        for image in axes.images:
            image.set_interpolation("none")
    with replacing(stem.with_suffix(".pdf")) as temporary:
        figure.savefig(temporary, dpi=DPI, format="pdf")


def reconstruction_grid(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Ears above their reconstructions: two [n, h, w, 3] -> one picture, uint8, thin white gaps."""
    rows = [to_uint8(images), to_uint8(reconstructions)]
    padded = [np.pad(row, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in padded], axis=0)


class Sheet:
    """A figure of pictures and words, placed in inches from its upper left corner.

    One axes holds them all, as an axes for each picture takes many times as long to draw.
    """

    def __init__(self, width: float, height: float):
        # Imported here, as training needs the pictures but none of this, and it takes a second.
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.set_axis_off()

    def picture(self, image: np.ndarray, x: float, y: float, size: float, **options) -> None:
        """A square picture whose upper left corner is at (x, y); options are those of imshow."""
        extent = (x, x + size, y + size, y)
        self.axes.imshow(image, extent=extent, aspect="auto", interpolation="lanczos", **options)

    def text(self, words: str, x: float, y: float, **options) -> None:
        """Words at (x, y), centred there unless options, which are those of Text, say otherwise."""
        centred = {"ha": "center", "va": "center", "fontsize": 7}
        self.axes.text(x, y, words, **(centred | options))

    def line(self, x0: float, x1: float, y: float) -> None:
        """A thin rule from (x0, y) to (x1, y)."""
        self.axes.plot([x0, x1], [y, y], color="0.3", lw=0.6, solid_capstyle="butt")


def save_animation(path: Path, frames: np.ndarray, scores: np.ndarray, *, side: int = 192) -> None:
    """Write an endless GIF that goes through the frames and back, a little slower at both ends.

    A strip below the picture has a mark at the place of the frame's score.

    Args:
        path: of the file; its folder is made.
        frames: [m, H, W, 3], two at least, from one end to the other.
        scores: of the frames, rising, [m].
        side: width of the animation in pixels.
    """
    framed = [
        _with_track(
            Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS),
            (score - scores[0]) / (scores[-1] - scores[0]),
        )
        for frame, score in zip(to_uint8(frames), scores, strict=True)
    ]
    # One palette for all frames: where each has its own, what stands still flickers.
    small = [f.resize((f.width // 2, f.height // 2), Image.Resampling.NEAREST) for f in framed]
    together = Image.fromarray(np.concatenate([np.asarray(f) for f in small]))
    palette = together.quantize(256, method=Image.Quantize.MEDIANCUT)
    drawn = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in framed]
    there_and_back = [*drawn, *drawn[-2:0:-1]]
    durations = [FRAME_MS] * len(there_and_back)
    durations[0] = durations[len(drawn) - 1] = HOLD_MS
    with replacing(path) as temporary:
        there_and_back[0].save(
            temporary,
            "GIF",
            save_all=True,
            append_images=there_and_back[1:],
            duration=durations,
            loop=0,
        )


def _with_track(picture: Image.Image, share: float) -> Image.Image:
    """The picture above a track with a mark at a share of its length."""
    side = picture.width
    framed = Image.new("RGB", (side, side + TRACK), "white")
    framed.paste(picture)
    draw = ImageDraw.Draw(framed)
    left, right, middle = 8, side - 9, side + TRACK // 2
    draw.line((left, middle, right, middle), fill="#999999")
    for tick in np.linspace(left, right, 7):
        draw.line((tick, middle - 2, tick, middle + 2), fill="#999999")
    x = left + share * (right - left)
    draw.ellipse((x - 4, middle - 4, x + 4, middle + 4), fill="#000000")
    return framed
