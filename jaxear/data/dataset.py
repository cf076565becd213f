"""A whole data set in memory, prepared."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track

from jaxear.data.images import MAX_PIXELS, Fit, ImageError, prepare_image
from jaxear.data.records import Record
from jaxear.errors import UserError

logger = logging.getLogger(__name__)

_LISTED = 10


@dataclass(frozen=True)
class EarImages:
    """Prepared pictures `images` uint8 [N, S, S, 3] of the N `records`, and what was `rejected`,
    with the reason.
    """

    images: np.ndarray
    records: list[Record]
    rejected: list[tuple[Record, str]]

    def __len__(self) -> int:
        return len(self.records)


def load_images(
    records: Sequence[Record],
    *,
    image_size: int,
    fit: Fit = "pad",
    margin: float = 0.0,
    mirror_left: bool = False,
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
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad={max_bad}: expected a fraction between 0 and 1")
    if not records:
        raise UserError("no images to load: the list of records is empty")
    prepare = partial(
        _prepare_or_reason,
        image_size=image_size,
        fit=fit,
        margin=margin,
        mirror_left=mirror_left,
        max_pixels=max_pixels,
    )
    images = np.empty((len(records), image_size, image_size, 3), np.uint8)
    kept: list[Record] = []
    rejected: list[tuple[Record, str]] = []
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        results = track(
            pool.map(prepare, records),
            description="Reading images",
            total=len(records),
            console=console,
            disable=not (progress and console.is_terminal),
        )
        for record, result in zip(records, results, strict=True):
            if isinstance(result, str):
                rejected.append((record, result))
            else:
                images[len(kept)] = result
                kept.append(record)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest of the data set
    if rejected:
        report = _report(rejected, len(records))
        if not kept or len(rejected) > max_bad * len(records):
            raise UserError(
                f"{report}\nAt most max_bad={max_bad:g} of the images may be unreadable: mend or "
                "remove these files, or raise max_bad"
            )
        logger.warning("%s", report)
    return EarImages(images[: len(kept)], kept, rejected)


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
