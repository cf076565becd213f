"""A data set prepared once, on disk: read by memory-mapping, never decoded again.

A store is a folder of
    images.u8       the prepared pictures, uint8 [M, S, S, 3], one after the other
    manifest.json   settings, and for each record its file and its row in images.u8, or why it
                    could not be used; written last, in one piece
    journal.jsonl   the same of what has been prepared since, a line of settings and then lines of
                    many records; there only while the store is made
Pictures are only ever added to images.u8, so that who has it open is not disturbed when files that
changed are prepared again. Paths in the manifest are relative to the data's folder and are there to
be shown: nothing outside the store is opened to read it.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxear.data.decoding import ImageError, read_file
from jaxear.data.entries import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    OF_PICTURE,
    Entry,
    append_line,
    damage_named,
    identity,
    is_unchanged,
    make_entries,
    mend_journal,
    read_head,
    read_manifest,
    record_of,
    to_disk,
    write_manifest,
)
from jaxear.data.images import Fit, prepare_image
from jaxear.data.records import Record
from jaxear.errors import UserError

logger = logging.getLogger(__name__)

PIXELS, LOCK = "images.u8", ".lock"
_OURS = {PIXELS, MANIFEST, JOURNAL, LOCK, f"{MANIFEST}.tmp"}

# After so many bytes of pictures, or seconds, they are entered in the journal. Eight times as many
# bytes may be decoded ahead, so that nobody waits for the disk.
_CHUNK_BYTES, _CHUNK_SECONDS = 2**23, 2.0

# So many pictures are one task of a thread: handing it over takes as long as a tenth of a picture.
_TASK = 16


@dataclass(frozen=True)
class Settings:
    """What a prepared picture depends on beside its record, as in `prepare_image`."""

    image_size: int
    fit: Fit = "pad"
    box_margin: float = 0.0
    mirror_left: bool = True
    normalize_colour: bool = False

    def prepare(
        self, record: Record, content: bytes | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The record's picture, as `prepare_image` makes it."""
        return prepare_image(
            record,
            image_size=self.image_size,
            fit=self.fit,
            margin=self.box_margin,
            mirror_left=self.mirror_left,
            colour_normalized=self.normalize_colour,
            content=content,
            out=out,
        )


@dataclass(frozen=True)
class Store:
    """A finished store: `records`, for each its row in `pixels` or the reason why it has none, and
    `pixels` uint8 [M, S, S, 3], memory-mapped.
    """

    folder: Path
    settings: Settings
    records: list[Record]
    found: list[int | str]
    pixels: np.ndarray


def is_store(path: str | Path) -> bool:
    """Whether this is a folder with a store, finished or not."""
    heads = (read_head(Path(path, name)) for name in (MANIFEST, JOURNAL))
    return any(str(head.get("format")).startswith("jaxear-images-") for head in heads)


def open_store(folder: str | Path) -> Store:
    """A finished store.

    Raises:
        UserError: it is not finished, or damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is not finished. Give the command that began it once more: it goes on where "
            "it stopped."
        )
    manifest = read_manifest(folder)
    with damage_named(folder):
        root = Path(manifest["root"])
        return _mapped(folder, manifest, [record_of(entry, root) for entry in manifest["records"]])


def _mapped(folder: Path, manifest: dict[str, Any], records: list[Record]) -> Store:
    settings = Settings(**manifest["settings"])
    found: list[int | str] = [
        entry["reason"] if "reason" in entry else int(entry["row"]) for entry in manifest["records"]
    ]
    side = settings.image_size
    n_rows = (folder / PIXELS).stat().st_size // (side * side * 3)
    rows = [row for row in found if isinstance(row, int)]
    if rows and not (min(rows) >= 0 and max(rows) < n_rows):
        raise ValueError(f"{PIXELS} holds {n_rows} pictures, too few")
    shape = (n_rows, side, side, 3)
    # An ordinary array over the mapped file: parts of it are then ordinary arrays, too.
    pixels = (
        np.asarray(np.memmap(folder / PIXELS, np.uint8, "r", shape=shape))
        if n_rows
        else np.empty(shape, np.uint8)
    )
    return Store(folder, settings, records, found, pixels)


def prepare_store(
    folder: str | Path,
    records: Sequence[Record],
    root: Path,
    settings: Settings,
    *,
    workers: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Make a store of the records, or bring one up to date, and open it.

    Only what is new is decoded: files that have never been, whose size or time of change is
    another, and those that could not be used. One that can no longer be used (gone, damaged) keeps
    the picture that it had. Of several programs that prepare one store the first does it and the
    others wait; one that was killed is gone on with.

    Args:
        folder: where the store is.
        records: what it shall hold.
        root: the folder that their paths are noted relative to.
        settings: how they are prepared.
        workers: threads that decode; by default one per core.
        report: called with how many of how many files that have to be decoded are done.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    records = [
        r if r.path.is_absolute() else dataclasses.replace(r, path=Path(os.path.abspath(r.path)))
        for r in records
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if {child.name for child in folder.iterdir()} - _OURS:
            raise UserError(f"{folder} holds something else. Give a folder that is new or empty.")
        with _exclusive(folder):
            manifest = _update(
                folder, records, root, settings, workers or os.cpu_count() or 1, report
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = len(records) * settings.image_size**2 * 3 / 1e6
            what = f"there is no room; {need:.0f} MB in all are needed"
        else:
            what = error.strerror or str(error)
        raise UserError(f"Prepared images cannot be kept in {folder}: {what}.") from error
    with damage_named(folder):
        return _mapped(folder, manifest, records)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another program is preparing %s; waiting for it.", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _update(
    folder: Path,
    records: Sequence[Record],
    root: Path,
    settings: Settings,
    workers: int,
    report: Callable[[int, int], None],
) -> dict[str, Any]:
    """Prepare what is new; returns the manifest that has been written."""
    head = {
        "format": FORMAT,
        "settings": dataclasses.asdict(settings),
        "root": os.path.abspath(root),
    }
    former = _former_entries(folder, settings)
    entries = make_entries(records, root)
    old = [former.get(identity(entry)) for entry in entries]
    kept, todo = {}, []
    for i, (entry, before) in enumerate(zip(entries, old, strict=True)):
        if before and "row" in before and is_unchanged(before, records[i].path):
            kept[i] = entry | {key: before[key] for key in OF_PICTURE}
        else:
            todo.append(i)
    if todo:
        n_rows = 1 + max((entry["row"] for entry in former.values() if "row" in entry), default=-1)
        if (folder / MANIFEST).exists():  # then somebody may be reading even what is not used
            n_rows = -((folder / PIXELS).stat().st_size // -(settings.image_size**2 * 3))
        done = _prepare_rows(folder, head, settings, [records[i] for i in todo],
                             [entries[i] for i in todo], n_rows, workers, report)  # fmt: skip
        for i, entry in zip(todo, done, strict=True):
            before = old[i]
            if "reason" in entry and before and "row" in before:
                logger.warning(
                    "%s: %s; the picture that was prepared of it before is used",
                    records[i].path, entry["reason"],
                )  # fmt: skip
                entry = entries[i] | {key: before[key] for key in OF_PICTURE}
            kept[i] = entry
    manifest = head | {"records": [kept[i] for i in range(len(records))]}
    if not (folder / MANIFEST).exists() or read_manifest(folder) != manifest:
        write_manifest(folder, manifest)
    (folder / JOURNAL).unlink(missing_ok=True)
    return manifest


def _prepare_rows(
    folder: Path,
    head: dict[str, Any],
    settings: Settings,
    records: list[Record],
    entries: list[Entry],
    n_rows: int,
    workers: int,
    report: Callable[[int, int], None],
) -> list[Entry]:
    """The entries with row and sha256, or reason, added; pictures go to rows from `n_rows` on."""
    n_bytes = settings.image_size**2 * 3
    # Small enough for all threads to have some, where there are few photographs.
    task = max(1, min(_TASK, _CHUNK_BYTES // n_bytes // 2, len(records) // (4 * workers)))
    ahead = max(2 * workers, 8 * _CHUNK_BYTES // (task * n_bytes))
    done: list[Entry] = []
    mend_journal(folder / JOURNAL)
    pool = ThreadPoolExecutor(workers)
    with (folder / PIXELS).open("ab") as pixels, (folder / JOURNAL).open("ab") as journal:
        # What a program that was killed had written but not entered.
        pixels.truncate(n_rows * n_bytes)
        if not (folder / JOURNAL).stat().st_size:
            append_line(journal, head)
        n_entered, last = 0, time.monotonic()
        try:
            report(0, len(records))
            tasks = (records[i : i + task] for i in range(0, len(records), task))
            results = _in_order(pool, partial(_prepare_some, settings), tasks, ahead)
            for pictures, found in results:
                pixels.write(pictures.data)
                for found_of_one in found:
                    entry = entries[len(done)] | found_of_one
                    if "reason" not in entry:
                        entry["row"] = n_rows
                        n_rows += 1
                    done.append(entry)
                report(len(done), len(records))
                n_new = len(done) - n_entered
                if n_new * n_bytes >= _CHUNK_BYTES or time.monotonic() - last > _CHUNK_SECONDS:
                    to_disk(pixels)  # before the journal says that they are there
                    append_line(journal, done[n_entered:])
                    n_entered, last = len(done), time.monotonic()
            to_disk(pixels)  # before the manifest does
        finally:
            pool.shutdown(cancel_futures=True)
    return done


def _in_order(
    pool: ThreadPoolExecutor, do: Callable[[Any], Any], tasks: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """The results of `do` in the order of `tasks`, of which at most `ahead` are begun early."""
    begun = deque()
    for task in tasks:
        begun.append(pool.submit(do, task))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _prepare_some(settings: Settings, records: list[Record]) -> tuple[np.ndarray, list[Entry]]:
    """The pictures that there are, and what each record's entry gets, less "row"."""
    side = settings.image_size
    pictures = np.empty((len(records), side, side, 3), np.uint8)
    n, found = 0, []
    for record in records:
        try:
            content, status = read_file(record.path)
            settings.prepare(record, content, out=pictures[n])
        except ImageError as error:
            found.append({"reason": error.reason})
        else:
            found.append(
                {
                    "size": status.st_size,
                    "mtime_ns": status.st_mtime_ns,
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
            n += 1
    return pictures[:n], found


def _former_entries(folder: Path, settings: Settings) -> dict[tuple, Entry]:
    """What a finished store and a journal hold, by identity."""
    entries: list[Entry] = []
    with damage_named(folder):
        for name in (MANIFEST, JOURNAL):
            head = read_head(folder / name)
            if not head:
                continue
            if head.get("format") != FORMAT:
                raise UserError(f"{folder} holds no images of this version of jaxear; delete it.")
            stored = dataclasses.asdict(Settings(**head["settings"]))
            if different := differences(stored, dataclasses.asdict(settings)):
                raise UserError(
                    f"{folder} holds images prepared otherwise ({different}). Delete it, or give "
                    "another folder."
                )
            entries += head["records"]
        return {identity(entry): entry for entry in entries}


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The settings that differ, as text: "image_size is 64, not 128"."""
    return "; ".join(
        f"{name} is {stored.get(name)}, not {value}"
        for name, value in wanted.items()
        if stored.get(name) != value
    )
