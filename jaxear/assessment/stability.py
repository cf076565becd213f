"""How much a small change of the photograph, which leaves the ear the same, moves its code.

The kinds of change are among those of Hendrycks & Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations" (2019); they are milder here, such as two
photographs of one ear differ by.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

SHIFT_PIXELS = 1
JPEG_QUALITY = 75  # Pillow's default
NOISE_SD = 5  # of 255
BRIGHTER_BY = 13  # of 255: 5 %


def shift(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Moved to the right by a pixel; the left column is repeated."""
    padding = ((0, 0), (0, 0), (SHIFT_PIXELS, 0), (0, 0))
    return np.pad(images, padding, mode="edge")[:, :, :-SHIFT_PIXELS]


def jpeg(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Compressed and decoded again."""
    return np.stack([_through_jpeg(image) for image in images])


def noise(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """With Gaussian noise, independent for each number, always the same for an image's row."""
    drawn = [np.random.default_rng([0, row]).normal(0, NOISE_SD, images.shape[1:]) for row in rows]
    return np.clip(np.rint(images + np.stack(drawn)), 0, 255).astype(np.uint8)


def brightness(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All numbers raised by the same amount."""
    return np.minimum(images.astype(np.int16) + BRIGHTER_BY, 255).astype(np.uint8)


# name -> uint8 [b, H, W, 3], their rows [b] in the data -> the same images, changed
PERTURBATIONS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "shift": shift,
    "jpeg": jpeg,
    "noise": noise,
    "brightness": brightness,
}


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file))


def distance_between_subjects(vectors: np.ndarray, subjects: np.ndarray) -> float:
    """Root mean square distance of two images of different subjects, over all such pairs.

    Args:
        vectors: [n, ...], uint8 is taken as [0, 1].
        subjects: whose each is, [n].

    Returns:
        The distance; nan where there is one subject only, or all are equal.
    """
    _, numbers = np.unique(np.asarray(subjects), return_inverse=True)
    # The squared distances of all pairs of m vectors sum to m sum |x|^2 - |sum x|^2. Those within
    # a subject are taken off; a subject at a time, so that no second copy of the images is held.
    total, squares, within, pairs_within = 0.0, 0.0, 0.0, 0
    origin = _flat(vectors[:1])[0]
    for rows in np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1]):
        block = _flat(vectors[rows]) - origin
        block_sum, block_squares = block.sum(axis=0), np.square(block).sum()
        within += len(rows) * block_squares - np.square(block_sum).sum()
        pairs_within += len(rows) * (len(rows) - 1) // 2
        total, squares = total + block_sum, squares + block_squares
    n = len(vectors)
    pairs = n * (n - 1) // 2 - pairs_within
    between = n * squares - np.square(total).sum() - within
    return float(np.sqrt(between / pairs)) if pairs and between > 0 else float("nan")


def _flat(vectors: np.ndarray) -> np.ndarray:
    scale = 255 if vectors.dtype == np.uint8 else 1
    return vectors.reshape(len(vectors), -1).astype(np.float64) / scale
