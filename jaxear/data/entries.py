"""What a store notes of its records, and the files that it notes it in (`jaxear.data.store`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from jaxear.data.records import Record
from jaxear.errors import UserError

FORMAT = "jaxear-images-1"
MANIFEST, JOURNAL = "manifest.json", "journal.jsonl"

Entry = dict[str, Any]  # a line of the manifest

# What an entry has beside its record. That of a file that cannot be used has a "reason" instead.
OF_PICTURE = ("size", "mtime_ns", "sha256", "row")


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """What goes wrong inside is a `UserError`: the store in `folder` is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder} is damaged ({error}). Delete it and prepare the images again."
        ) from None


def make_entries(records: Sequence[Record], root: Path) -> list[Entry]:
    """What is noted of each record before its picture is made; paths are relative to `root`."""

    @cache  # it takes longer than all else of an entry
    def prefix(folder: str) -> str:
        return os.path.relpath(os.path.join(folder, "x"), root)[:-1]

    entries = []
    for record in records:
        folder, name = os.path.split(record.path)
        entries.append(
            {
                "path": prefix(folder) + name,
                "subject": record.subject,
                "side": record.side,
                "box": None if record.box is None else list(record.box),
                "view": record.view,
            }
        )
    return entries


def record_of(entry: Entry, root: Path) -> Record:
    """The record that an entry was made from."""
    box = entry["box"]
    return Record(
        path=root / entry["path"],
        subject=str(entry["subject"]),
        side=entry["side"],
        box=None if box is None else (*map(float, box),),  # pyright: ignore
        view=entry["view"],
    )


def identity(entry: Entry) -> tuple:
    """What makes two entries the same picture, if the file is the same."""
    return entry["path"], tuple(entry["box"] or ()), entry["side"]


def is_unchanged(entry: Entry, path: Path) -> bool:
    """Whether a file is the one that the entry's picture was made from."""
    try:
        status = path.stat()
    except OSError:
        return False  # what is wrong, reading it will tell
    return (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store; raises `UserError` where it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
        problem = f"its format is {manifest['format']!r}, not {FORMAT!r}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = str(error)
    raise UserError(
        f"{folder / MANIFEST} cannot be read ({problem}). Delete the folder and prepare the images "
        "again."
    )


def read_head(path: Path) -> dict[str, Any]:
    """A manifest, or a journal in the same form; {} where there is none or it is not ours."""
    try:
        lines = path.read_bytes().split(b"\n")
        if path.name == MANIFEST:
            head = json.loads(b"\n".join(lines))
        else:
            # What follows the last line break was being written when the program was killed.
            head, *chunks = (json.loads(line) for line in lines[:-1])
            head["records"] = [entry for chunk in chunks for entry in chunk]
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def mend_journal(path: Path) -> None:
    """Cut off what was being written when a program was killed."""
    if read_head(path):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    else:
        path.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or keep the one before."""
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("wb") as file:
        file.write(json.dumps(manifest).encode())
        to_disk(file)
    temporary.replace(folder / MANIFEST)


def append_line(journal: BinaryIO, line: dict[str, Any] | list[Entry]) -> None:
    """Add a line, the settings or many entries: one by one they take twice as long."""
    journal.write(json.dumps(line).encode() + b"\n")
    to_disk(journal)


def to_disk(file: BinaryIO) -> None:
    """Return when all that was written would outlast a power cut."""
    file.flush()
    os.fsync(file.fileno())
