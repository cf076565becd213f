"""Lists of images with boxes: CSV, COCO JSON, and the pickled `.npy` of the first system.

Paths in a list are relative to its data root, the folder that the list lies in unless another is
given, and must stay inside it: a list that came with somebody's data must not make this program
open files elsewhere.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from jaxear.data.pickled import read_pickled_npy
from jaxear.data.records import Box, Record, Side, folder_subjects, parse_side
from jaxear.errors import UserError

logger = logging.getLogger(__name__)

CSV_COLUMNS = ("path", "subject", "side", "x", "y", "w", "h", "view")


def read_csv(manifest: Path, root: Path) -> list[Record]:
    """Records of a CSV with a header: path[,subject,side,x,y,w,h,view] in any order.

    Without a subject the folder of the image counts (`folder_subjects`). A box is given whole or
    not at all; side is left, right, l, r or empty. Other columns are named in the log.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if "path" not in columns:
                raise UserError(
                    f"{manifest} has the columns {', '.join(columns) or '(none)'}, expected a "
                    f"header with path and, where known, {', '.join(CSV_COLUMNS[1:])}"
                )
            if ignored := [name for name in columns if name not in CSV_COLUMNS]:
                logger.warning("%s: columns not used: %s", manifest, ", ".join(map(str, ignored)))
            if "subject" not in columns:
                logger.warning(
                    "%s has no column subject: the folder of an image counts as one", manifest
                )
            records = [
                _csv_record(row, root, f"{manifest}, line {reader.line_num}") for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest} cannot be read as CSV in UTF-8 ({error})") from None
    return _with_folder_subjects(records)


def _csv_record(row: Mapping[str, str | None], root: Path, where: str) -> Record:
    def cell(name: str) -> str:
        return (row.get(name) or "").strip()

    corners = [cell(name) for name in ("x", "y", "w", "h")]
    box = None
    if any(corners):
        box = _box([_number(text) for text in corners], where)
    side_text = cell("side").lower()
    if side_text not in ("", "unknown") and parse_side(side_text) == "unknown":
        raise UserError(f"{where}: side is {side_text!r}, expected left, right, l, r or nothing")
    path = _inside(root, cell("path"), where)
    return Record(path, cell("subject"), parse_side(side_text), box, cell("view") or None)


def read_coco(manifest: Path, root: Path) -> list[Record]:
    """Records of a COCO JSON file, one for each annotation; images without any are left out.

    The subject and the side are taken from the annotation's or the image's `subject` and `side` or
    its `attributes`, the side otherwise from a category such as "left_ear", the subject otherwise
    from the image's folder.
    """
    try:
        content = json.loads(manifest.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{manifest} cannot be read as JSON ({error})") from None
    try:
        images = {image["id"]: image for image in content["images"]}
        categories = content.get("categories", ())
        sides: dict[object, Side] = {entry["id"]: _side_in(entry["name"]) for entry in categories}
        annotations = list(enumerate(content["annotations"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{manifest} is not COCO: expected a dict with images (id, file_name) and annotations "
            f"(image_id, bbox); failed at {error}"
        ) from None
    records = []
    for index, annotation in annotations:
        where = f"{manifest}, annotation {index}"
        try:
            image = images[annotation["image_id"]]
            facts = {**image, **image.get("attributes", {})}
            facts |= {**annotation, **annotation.get("attributes", {})}
            side = parse_side(facts.get("side"))
            if side == "unknown":
                side = sides.get(annotation.get("category_id"), "unknown")
            box = _box(annotation["bbox"], where)
            path = _inside(root, image["file_name"], where)
            subject = facts.get("subject")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: missing or of the wrong kind: {error}") from None
        records.append(Record(path, "" if subject is None else str(subject).strip(), side, box))
    if left_out := len(images) - len({annotation["image_id"] for _, annotation in annotations}):
        logger.warning("%s: %d images have no annotation and are left out", manifest, left_out)
    return _with_folder_subjects(records)


def _side_in(name: str) -> Side:
    for word in name.lower().replace("-", " ").replace("_", " ").split():
        if word in ("left", "right"):
            return parse_side(word)
    return "unknown"


def read_npy(manifest: Path, root: Path) -> list[Record]:
    """Records of a `.npy` with a pickled dict of `image_paths` and `bboxes`, nothing of it run.

    A box is [x, y, w, h] or None. The subject is the folder of the image (`folder_subjects`).
    """
    content = read_pickled_npy(manifest)
    facts = content if isinstance(content, dict) else {}
    paths, boxes = facts.get("image_paths"), facts.get("bboxes")
    if not isinstance(paths, list) or not isinstance(boxes, list) or len(paths) != len(boxes):
        raise UserError(
            f"{manifest} does not hold what is expected: a dict with image_paths and bboxes "
            "([x, y, w, h]), equally long"
        )
    records = []
    for index, (name, corners) in enumerate(zip(paths, boxes, strict=True)):
        where = f"{manifest}, entry {index}"
        box = None if corners is None else _box(corners, where)
        records.append(Record(_inside(root, name, where), "", box=box))
    return _with_folder_subjects(records)


def _with_folder_subjects(records: list[Record]) -> list[Record]:
    """The same records, subject and side taken from the folder where the list did not give them."""
    found = folder_subjects([record.path for record in records])
    return [
        dataclasses.replace(
            record,
            subject=record.subject or subject,
            side=side if record.side == "unknown" else record.side,
        )
        for record, (subject, side) in zip(records, found, strict=True)
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _box(corners: object, where: str) -> Box:
    numbers = list(corners) if isinstance(corners, list | tuple) else []
    if len(numbers) != 4 or not all(type(number) in (int, float) for number in numbers):
        raise UserError(f"{where}: the box is not four numbers x, y, w, h (in pixels)")
    try:
        x, y, w, h = map(float, numbers)
    except OverflowError:
        raise UserError(f"{where}: the box has a number beyond all pixels") from None
    return x, y, w, h


def _inside(root: Path, name: object, where: str) -> Path:
    """The path `name` under `root`, symbolic links followed; a `UserError` if it leaves `root`."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: the path of an image is missing or not a text")
    resolved_root = root.resolve()
    try:
        path = (resolved_root / name.strip()).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL
        raise UserError(f"{where}: {name!r} is no usable path ({error})") from None
    if not path.is_relative_to(resolved_root):
        raise UserError(
            f"{where}: {name!r} leads to {path}, outside the data root {resolved_root}; move the "
            "images into it or name the folder that holds them all as root"
        )
    return path
