"""Shared by the tests of the data layer: pictures written to disk, and the real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (24, 32), colour=(90, 120, 150)) -> Path:
    """A picture of one colour, of `size` (width, height), in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def save(array: np.ndarray, path: Path, **options) -> Path:
    """Write pixels to a file of the kind that its name says."""
    Image.fromarray(np.ascontiguousarray(array)).save(path, **options)
    return path


def corner_picture() -> np.ndarray:
    """[40, 60, 3]: red at the top left, green top right, blue bottom left, white bottom right."""
    picture = np.empty((40, 60, 3), np.uint8)
    picture[:20, :30], picture[:20, 30:] = (220, 30, 30), (30, 220, 30)
    picture[20:, :30], picture[20:, 30:] = (30, 30, 220), (240, 240, 240)
    return picture


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of real ear photographs beside the repository."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not (folder / "ami").is_dir():
        pytest.skip("the real ear photographs are not beside the repository")
    return folder
