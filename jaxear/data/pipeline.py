"""From settings to arrays, and from arrays to batches in an order made from seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxear.config import DataConfig, TrainConfig
from jaxear.data.dataset import EarImages, load_images
from jaxear.data.records import Record
from jaxear.data.sources import load_records
from jaxear.data.splits import split_by_subject
from jaxear.data.synthetic import synthetic_ears
from jaxear.errors import UserError

SPLITS = ("train", "val", "test")


def load_split(config: DataConfig, split: str, *, progress: bool = True) -> EarImages:
    """Read and prepare one split of the data, exactly as training does.

    Args:
        config: where the data is and how it is prepared; without `data`, the synthetic ears.
        split: "train", "val", "test" or "all".
        progress: show a bar while reading, on a terminal.

    Raises:
        UserError: no such split, no data there, nothing in the split, too many unreadable files.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(f"There is no split {split!r}; choose from train, val, test, all.")
    records = demo_records(config) if config.data is None else load_records(
        config.data, layout=config.layout
    )  # fmt: skip
    if split != "all":
        splits = split_by_subject(
            records,
            val=config.val_fraction,
            test=config.test_fraction,
            seed=config.split_seed,
        )
        records = splits.require(split)
    if config.data is None:
        return draw_demo_ears(config, records)
    return load_images(
        records,
        image_size=config.image_size,
        fit=config.fit,
        margin=config.box_margin,
        mirror_left=config.mirror_left,
        max_bad=config.max_bad,
        progress=progress,
    )


def demo_records(config: DataConfig) -> list[Record]:
    """Records of the synthetic ears, each a subject of its own."""
    names = (f"synthetic-{i:06d}" for i in range(config.demo_ears))
    return [Record(path=Path(name), subject=name, side="right") for name in names]


def draw_demo_ears(config: DataConfig, records: list[Record]) -> EarImages:
    """The synthetic ears of these records."""
    images, _ = synthetic_ears(config.split_seed, config.demo_ears, config.image_size)
    numbers = [int(record.subject.rsplit("-", 1)[1]) for record in records]
    return EarImages(images=images[numbers], records=records, rejected=[])


@dataclass(frozen=True)
class Batches:
    """Training batches of a set of images in memory, in an order made from seed and epoch.

    The last, incomplete batch of an epoch is dropped, so that every step has one shape; which
    images that concerns changes with every epoch.
    """

    images: np.ndarray
    config: TrainConfig

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise UserError(
                f"The training split has {len(self.images)} images, fewer than one batch of "
                f"{self.config.batch_size}; give a smaller --batch-size."
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.config.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[np.ndarray]:
        """The batches [batch_size, h, w, 3] of one epoch, from step `start` of it on."""
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.images))
        size = self.config.batch_size
        for step in range(start, self.steps_per_epoch):
            yield self.images[order[step * size : (step + 1) * size]]


def padded_batches(images: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All images in order, in batches of one shape: the last is filled up by repeating its last
    image. Yields each batch with the number of images in it that count."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - n, axis=0)])
        yield batch, n
