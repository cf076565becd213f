"""Data sets as they lie on disk -> records.

Each layout is one entry of `LAYOUTS`; a new one needs a recogniser of file names and a reader, and
nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jaxear.data.manifests import read_coco, read_csv, read_npy
from jaxear.data.records import Record, Side, folder_subjects, parse_side, sort_records
from jaxear.errors import UserError

logger = logging.getLogger(__name__)

# The formats that `images.decode` reads.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"}
)

_AMI = re.compile(r"(\d{3})_(front|left|right|up|down|back|zoom)_ear\.jpe?g", re.IGNORECASE)
_IITD = re.compile(r"(\d{3})_\d+\.bmp", re.IGNORECASE)
_AWE = re.compile(r"\d{3,4}/\d{2,3}\.png", re.IGNORECASE)
_EARVN = re.compile(r"(\d{3})\.[^/]+/[^/]+\.jpe?g", re.IGNORECASE)


class Layout(NamedTuple):
    """How one kind of data set is recognised and read.

    `recognise` is given the last two parts of an image's path ("folder/name") for a layout of
    folders, or the list's path for a list. `read` is given the files that were recognised (the list
    itself, for a list) and the data root.
    """

    example: str
    is_list: bool
    recognise: Callable[[str], bool]
    read: Callable[[list[Path], Path], list[Record]]


def load_records(
    path: str | Path, layout: str = "auto", *, root: str | Path | None = None
) -> list[Record]:
    """The ears of a data set: a folder, or a list of images (CSV, COCO JSON, .npy).

    With layout "auto" a folder is read as the layout that most of its image files are named after,
    or as plain "folder" if none covers more than half of them; a list by its suffix. Otherwise one
    of `LAYOUTS`. Folders are searched recursively for images; other files, hidden ones and linked
    folders are passed over. `root` is the folder that the paths of a list are relative to and must
    stay in (default: the folder that the list lies in).

    Records come sorted, the same every time. Raises `UserError` where there is nothing to read, or
    a list is damaged or leads outside its root; unreadable images are found only when they are
    decoded.
    """
    source = Path(path)
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known are auto, {', '.join(LAYOUTS)}")
    if source.is_dir():
        records = _load_folder(source, layout, root)
    elif source.is_file():
        records = _load_list(source, layout, root)
    else:
        raise UserError(f"there is no file or folder {source}")
    if not records:
        raise UserError(f"{source} lists no images")
    return sort_records(records)


def data_root(data: str | Path) -> Path:
    """The folder that the paths of a data set are noted relative to."""
    path = Path(data)
    return Path(os.path.abspath(path)) if path.is_dir() else path.resolve().parent


def _load_folder(folder: Path, layout: str, root: str | Path | None) -> list[Record]:
    if root is not None:
        raise UserError(f"root goes with a list of images, and {folder} is a folder")
    images = list(_find_images(folder))
    if not images:
        raise UserError(
            f"no images in {folder}; looked in it and its sub-folders for {_formats()}, "
            f"named as in\n{_known_layouts(lists=False)}"
        )
    tails = _tails(images)
    if layout == "auto":
        layout = _recognise_folder(folder, tails)
    if LAYOUTS[layout].is_list:
        raise UserError(
            f"{folder} is a folder; layout {layout!r} needs the path of the file itself"
        )
    recognised = map(LAYOUTS[layout].recognise, tails)
    files = [image for image, known in zip(images, recognised, strict=True) if known]
    if not files:
        raise UserError(
            f"none of the {len(images)} images in {folder} is named like layout {layout!r} "
            f"({LAYOUTS[layout].example})"
        )
    if len(files) < len(images):
        left_out = sorted(set(images).difference(files))
        logger.warning(
            "%s: read as %s; %d of %d images are not named so and are left out (for example %s)",
            folder, layout, len(left_out), len(images), left_out[0],
        )  # fmt: skip
    return LAYOUTS[layout].read(files, folder)


def _load_list(file: Path, layout: str, root: str | Path | None) -> list[Record]:
    names = [
        name for name, entry in LAYOUTS.items() if entry.is_list and entry.recognise(str(file))
    ]
    if layout == "auto":
        if not names:
            raise UserError(
                f"{file} is not a list of images that can be read:\n{_known_layouts(lists=True)}"
            )
        layout = names[0]
    if not LAYOUTS[layout].is_list:
        raise UserError(f"{file} is a file; layout {layout!r} needs a folder")
    folder = file.parent if root is None else Path(root)
    if not folder.is_dir():
        raise UserError(f"the data root {folder} is not a folder")
    return LAYOUTS[layout].read([file], folder)


def _recognise_folder(folder: Path, tails: list[str]) -> str:
    counts = {
        name: sum(map(entry.recognise, tails))
        for name, entry in LAYOUTS.items()
        if not entry.is_list and name != "folder"
    }
    best = max(counts, key=lambda name: counts[name])
    if counts[best] * 2 > len(tails):
        return best
    if counts[best]:
        logger.warning(
            "%s: only %d of %d images are named like %s, so it is read as a plain folder; "
            "layout=%r reads those alone",
            folder, counts[best], len(tails), best, best,
        )  # fmt: skip
    return "folder"


def _find_images(folder: Path) -> Iterator[Path]:
    def warn(error: OSError) -> None:
        logger.warning("cannot look into %s: %s", error.filename, error.strerror)

    for directory, subfolders, names in os.walk(folder, onerror=warn):
        inside = Path(directory)
        # __MACOSX and ._* are what macOS adds to archives: not pictures, whatever their suffix.
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield inside / name


def _tails(images: list[Path]) -> list[str]:
    """Each image's name after that of the folder that it lies in."""

    @cache
    def name_of(folder: str) -> str:
        return os.path.basename(os.path.abspath(folder))

    return [f"{name_of(folder)}/{name}" for folder, name in map(os.path.split, images)]


def _folder_names(images: list[Path]) -> list[str]:
    return [tail.partition("/")[0] for tail in _tails(images)]


def _formats() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


def _known_layouts(*, lists: bool) -> str:
    return "\n".join(
        f"  {name}: {entry.example}" for name, entry in LAYOUTS.items() if entry.is_list is lists
    )


# Readers of folders


def _read_ami(files: list[Path], root: Path) -> list[Record]:
    records = []
    for file in files:
        if match := _AMI.fullmatch(file.name):
            subject, view = match[1], match[2].lower()
            # All views are of the right ear but "back", which is the left one.
            side: Side = "left" if view == "back" else "right"
            records.append(Record(file, subject, side, view=view))
    return records


def _read_iitd(files: list[Path], root: Path) -> list[Record]:
    return [Record(file, file.name[:3]) for file in files]


def _read_awe(files: list[Path], root: Path) -> list[Record]:
    sides = {folder: _awe_sides(folder) for folder in {file.parent for file in files}}
    return [
        Record(file, subject, sides[file.parent].get(file.name, "unknown"))
        for file, subject in zip(files, _folder_names(files), strict=True)
    ]


def _awe_sides(folder: Path) -> dict[str, Side]:
    """File name -> side, of one subject's annotations.json.

    It reads {"data": {"01": {"file": "01.png", "d": "l", ...}, ...}}; "d" is l or r. Without the
    file (the test half of UERC has none), or if it is written otherwise, the sides are unknown.
    """
    annotations = folder / "annotations.json"
    if not annotations.is_file():
        return {}
    try:
        entries = json.loads(annotations.read_text(encoding="utf-8-sig"))["data"]
        return {
            entry.get("file", f"{key}.png"): parse_side(entry["d"])
            for key, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning(
            "%s: sides unknown, as it is not a dict `data` of dicts with `file` and `d` (%r)",
            annotations,
            error,
        )
        return {}


def _read_earvn(files: list[Path], root: Path) -> list[Record]:
    # The folder's whole name (001.ALI_HD) is the subject; the data set does not say which ear.
    return list(map(Record, files, _folder_names(files)))


def _read_folder(files: list[Path], root: Path) -> list[Record]:
    return [Record(file, *found) for file, found in zip(files, folder_subjects(files), strict=True)]


def _of_list(
    read: Callable[[Path, Path], list[Record]],
) -> Callable[[list[Path], Path], list[Record]]:
    return lambda files, root: read(files[0], root)


LAYOUTS: dict[str, Layout] = {
    "ami": Layout(
        "SSS_VIEW_ear.jpg, such as 000_front_ear.jpg (AMI Ear Database)",
        False, lambda tail: _AMI.fullmatch(os.path.basename(tail)) is not None, _read_ami,
    ),
    "iitd": Layout(
        "SSS_N.bmp, such as 001_2.bmp (IIT Delhi Ear Database)",
        False, lambda tail: _IITD.fullmatch(os.path.basename(tail)) is not None, _read_iitd,
    ),
    "awe": Layout(
        "NNN/MM.png with annotations.json, such as 001/01.png (AWE, UERC)",
        False, lambda tail: _AWE.fullmatch(tail) is not None, _read_awe,
    ),
    "earvn": Layout(
        "NNN.Name/x.jpg, such as Images/001.ALI_HD/001 (1).jpg (EarVN1.0)",
        False, lambda tail: _EARVN.fullmatch(tail) is not None, _read_earvn,
    ),
    "folder": Layout(
        "any images; those in one sub-folder are one subject, in a single folder a subject each",
        False, lambda tail: True, _read_folder,
    ),
    "csv": Layout(
        "a .csv with the header path[,subject,side,x,y,w,h]",
        True, lambda name: name.lower().endswith(".csv"), _of_list(read_csv),
    ),
    "coco": Layout(
        "a .json in COCO's format: images, annotations with bbox",
        True, lambda name: name.lower().endswith(".json"), _of_list(read_coco),
    ),
    "npy": Layout(
        "a .npy with a pickled dict of image_paths and bboxes",
        True, lambda name: name.lower().endswith(".npy"), _of_list(read_npy),
    ),
}  # fmt: skip
