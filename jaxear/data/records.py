"""What a data set is to everything that follows: a list of records, one per ear."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

Side = Literal["left", "right", "unknown"]
Box = tuple[float, float, float, float]

_SIDES: dict[str, Side] = {"l": "left", "left": "left", "r": "right", "right": "right"}


@dataclass(frozen=True, slots=True)
class Record:
    """One ear in one picture.

    `box` is (x, y, w, h) in pixels of the upright picture (EXIF orientation applied), None for the
    whole picture. `view` is the data set's own name of the pose, where it has one (AMI: "front",
    "zoom", ...).
    """

    path: Path
    subject: str
    side: Side = "unknown"
    box: Box | None = None
    view: str | None = None


def parse_side(text: object) -> Side:
    """The side that "l", "Left", "R", ... stands for; "unknown" for anything else."""
    return _SIDES.get(str(text).strip().lower(), "unknown")


def folder_subjects(paths: Sequence[Path]) -> list[tuple[str, Side]]:
    """Subject and side of each file as its place in the folder tree tells them.

    The subject is the folder that a file lies in. A folder called left or right (or l, r) gives the
    side, and the subject is the folder around it. Files that share one folder with everything else
    are a subject each, as then nothing says which of them show the same person.
    """
    folders = [os.path.dirname(path) for path in paths]
    common = Path(os.path.commonpath(set(folders))) if paths else Path()

    @cache
    def of_folder(folder: str) -> tuple[str | None, Side]:
        names = list(Path(folder).relative_to(common).parts)
        side = parse_side(os.path.basename(folder))
        if names and side != "unknown":
            names.pop()
        return names[-1] if names else None, side

    found = []
    for path, folder in zip(paths, folders, strict=True):
        subject, side = of_folder(folder)
        found.append((path.name if subject is None else subject, side))
    return found


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Records in the one order that depends on nothing but their contents."""
    return sorted(records, key=lambda record: (str(record.path), record.box or (), record.subject))


def subject_numbers(records: Sequence[Record]) -> np.ndarray:
    """The records' subjects as numbers from 0, int32 [n]; equal numbers are equal subjects."""
    _, numbers = np.unique([record.subject for record in records], return_inverse=True)
    return numbers.astype(np.int32)
