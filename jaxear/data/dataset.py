"""Prepared pictures: decoded into memory, or read from a store."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from jaxear.data.decoding import MAX_PIXELS, ImageError
from jaxear.data.images import Fit, prepare_image
from jaxear.data.progress import reading_bar
from jaxear.data.records import Record
from jaxear.data.store import Store
from jaxear.errors import UserError

logger = logging.getLogger(__name__)

_LISTED = 10


class EarImages:
    """Prepared pictures of `records`, and what was `rejected`, with the reason.

    Args:
        pixels: uint8 [M, S, S, 3], in memory or memory-mapped.
        records: what the pictures show, one record each.
        rejected: records that could not be used.
        rows: [N] which of `pixels` belong to the N records, in their order; all by default.
        factors: what each picture was made from, {name: [N]}, where that is known: of synthetic
            ears (`jaxear.data.synthetic.FACTORS`).
    """

    def __init__(
        self,
        pixels: np.ndarray,
        records: list[Record],
        rejected: list[tuple[Record, str]],
        rows: np.ndarray | None = None,
        factors: dict[str, np.ndarray] | None = None,
    ):
        self.records = records
        self.rejected = rejected
        self.factors = factors
        self._pixels = pixels
        self._rows = rows

    def __len__(self) -> int:
        return len(self.records)

    @property
    def images(self) -> np.ndarray:
        """All pictures, uint8 [N, S, S, 3]. Where they are memory-mapped this reads them all into
        memory, anew each time; `take` reads some.
        """
        return self._pixels if self._rows is None else self._pixels[self._rows]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The pictures of `records` number `rows` [n], uint8 [n, S, S, 3]; no others are read."""
        return self._pixels[rows if self._rows is None else self._rows[rows]]


def load_images(
    records: Sequence[Record],
    *,
    image_size: int,
    fit: Fit = "pad",
    margin: float = 0.0,
    mirror_left: bool = False,
    colour_normalized: bool = False,
    max_bad: float = 0.05,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: bool = True,
) -> EarImages:
    """Decodes and prepares every record (`prepare_image`) in `workers` threads (default: one per
    core), in order.

    Pictures that cannot be read are left out and named in the log with their reasons. More than the
    fraction `max_bad` of them, in [0, 1], or nothing readable at all is a `UserError` that lists
    them. The progress bar shows on a terminal only.
    """
    if not records:
        raise UserError("no images to load: the list of records is empty")
    prepare = partial(
        _prepare_or_reason,
        image_size=image_size,
        fit=fit,
        margin=margin,
        mirror_left=mirror_left,
        colour_normalized=colour_normalized,
        max_pixels=max_pixels,
    )
    images = np.empty((len(records), image_size, image_size, 3), np.uint8)
    kept: list[Record] = []
    rejected: list[tuple[Record, str]] = []
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        with reading_bar(progress) as report:
            results = pool.map(prepare, records)
            for done, (record, result) in enumerate(zip(records, results, strict=True), start=1):
                report(done, len(records))
                if isinstance(result, str):
                    rejected.append((record, result))
                else:
                    images[len(kept)] = result
                    kept.append(record)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest of the data set
    check_rejected(rejected, len(records), max_bad)
    return EarImages(images[: len(kept)], kept, rejected)


def from_store(store: Store, records: Sequence[Record], *, max_bad: float = 0.05) -> EarImages:
    """The pictures of some `records` of a store, read as they are needed; raises `UserError` as
    `load_images` does.
    """
    found = dict(zip(store.records, store.found, strict=True))
    kept: list[Record] = []
    rows: list[int] = []
    rejected: list[tuple[Record, str]] = []
    for record in records:
        where = found[record]
        if isinstance(where, str):
            rejected.append((record, where))
        else:
            kept.append(record)
            rows.append(where)
    check_rejected(rejected, len(records), max_bad)
    return EarImages(store.pixels, kept, rejected, np.array(rows))


def check_rejected(rejected: list[tuple[Record, str]], total: int, max_bad: float) -> None:
    """Name what was `rejected` of `total` records in the log.

    Raises:
        UserError: it is everything, or more than the fraction `max_bad`, in [0, 1].
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad={max_bad}: expected a fraction between 0 and 1")
    if not rejected:
        return
    report = _report(rejected, total)
    if len(rejected) == total or len(rejected) > max_bad * total:
        raise UserError(
            f"{report}\nAt most max_bad={max_bad:g} of the images may be unreadable: mend or "
            "remove these files, or raise max_bad"
        )
    logger.warning("%s", report)


def _prepare_or_reason(record: Record, **settings) -> np.ndarray | str:
    try:
        return prepare_image(record, **settings)
    except ImageError as error:
        return error.reason


def _report(rejected: list[tuple[Record, str]], total: int) -> str:
    lines = [f"{len(rejected)} of {total} images cannot be used and are left out:"]
    lines += [f"  {record.path}: {reason}" for record, reason in rejected[:_LISTED]]
    if more := len(rejected) - _LISTED:
        lines += [f"  and {more} more"] if more > 0 else []
    return "\n".join(lines)
