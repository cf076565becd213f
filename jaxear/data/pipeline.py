"""From settings to arrays, and from arrays to batches in an order made from seed and epoch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxear.config import DataConfig
from jaxear.data.dataset import EarImages, from_store, load_images
from jaxear.data.images import normalize_colour
from jaxear.data.progress import reading_bar
from jaxear.data.records import Record
from jaxear.data.sources import data_root, load_records
from jaxear.data.splits import split_by_name, split_by_subject
from jaxear.data.store import (
    FORMAT,
    Settings,
    Store,
    differences,
    is_store,
    open_store,
    prepare_store,
)
from jaxear.data.synthetic import synthetic_ears
from jaxear.errors import UserError

SPLITS = ("train", "val", "test")


def load_split(config: DataConfig, split: str, *, progress: bool = True) -> EarImages:
    """Read and prepare one split of the data, exactly as training does.

    Photographs are prepared once, into a store under `cache_dir`, and from then on only those that
    changed. `data` may be such a store itself, made by `jaxear data prepare`.

    Args:
        config: where the data is and how it is prepared; without `data`, the synthetic ears.
        split: "train", "val", "test" or "all".
        progress: show a bar while reading, on a terminal.

    Raises:
        UserError: no such split, no data there, nothing in the split, too many unreadable files, a
            store that was prepared otherwise.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(f"There is no split {split!r}; choose from train, val, test, all.")
    if config.data is None:
        return draw_demo_ears(config, choose(demo_records(config), config, split))
    settings = settings_of(config)
    if is_store(config.data):
        store = open_store(config.data)
        check_settings(store, settings)
    else:
        records = load_records(config.data, layout=config.layout)
        if config.cache_dir == "none":
            return load_images(
                choose(records, config, split),
                image_size=config.image_size,
                fit=config.fit,
                margin=config.box_margin,
                mirror_left=config.mirror_left,
                colour_normalized=config.normalize_colour,
                max_bad=config.max_bad,
                progress=progress,
            )
        with reading_bar(progress) as report:
            store = prepare_store(
                cache_folder(config), records, data_root(config.data), settings, report=report
            )
    return from_store(store, choose(store.records, config, split), max_bad=config.max_bad)


def choose(records: list[Record], config: DataConfig, split: str) -> list[Record]:
    """The records of a split, or all of them; of the sides that are used.

    Raises:
        UserError: the split is empty, or a subject that is named is not in the data.
    """
    if config.sides != "both":
        records = [record for record in records if record.side == config.sides]
        if not records:
            raise UserError(f"--sides {config.sides}: the data has no ear known to be one.")
    if split == "all":
        return records
    if config.test_subjects or config.val_subjects:
        named = {"test": config.test_subjects, "val": config.val_subjects}
        return split_by_name(records, **named).require(split)
    shares = {"val": config.val_fraction, "test": config.test_fraction}
    return split_by_subject(records, **shares, seed=config.split_seed).require(split)


def settings_of(config: DataConfig) -> Settings:
    """How the pictures of a configuration are prepared."""
    return Settings(
        image_size=config.image_size,
        fit=config.fit,
        box_margin=config.box_margin,
        mirror_left=config.mirror_left,
        normalize_colour=config.normalize_colour,
    )


def check_settings(store: Store, wanted: Settings) -> None:
    """Raises UserError if the store was prepared otherwise."""
    stored = dataclasses.asdict(store.settings)
    if different := differences(stored, dataclasses.asdict(wanted)):
        flags = " ".join(
            f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in stored.items()
        )
        raise UserError(
            f"The images in {store.folder} are prepared otherwise than is asked for: {different}. "
            f"Give the settings that they have: {flags}. Or prepare the photographs as you want "
            "them, into another folder: jaxear data prepare --help tells how."
        )


def cache_folder(config: DataConfig) -> Path:
    """Where the photographs of a configuration are kept prepared."""
    data = Path(str(config.data)).resolve()
    key = [FORMAT, str(data), config.layout, dataclasses.asdict(settings_of(config))]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(config.cache_dir).expanduser() / f"{data.stem}-{digest}"


def demo_records(config: DataConfig) -> list[Record]:
    """Records of the synthetic ears, each a subject of its own."""
    names = (f"synthetic-{i:06d}" for i in range(config.demo_ears))
    return [Record(path=Path(name), subject=name, side="right") for name in names]


def draw_demo_ears(config: DataConfig, records: list[Record]) -> EarImages:
    """The synthetic ears of these records, with their factors."""
    images, factors = _drawn(config.split_seed, config.demo_ears, config.image_size)
    numbers = [int(record.subject.rsplit("-", 1)[1]) for record in records]
    chosen = {name: values[numbers] for name, values in factors.items()}
    images = images[numbers]
    if config.normalize_colour:
        images = np.stack([normalize_colour(image) for image in images])
    return EarImages(images, records, [], factors=chosen)


@lru_cache(maxsize=1)  # one program reads several splits of them, several times
def _drawn(seed: int, n: int, image_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The synthetic ears, to be read only."""
    return synthetic_ears(seed, n, image_size)


class Batch(NamedTuple):
    """One process's share of a batch.

    `images` uint8 [b, S, S, 3]; `rows` int32 [b], which images of the split they are; `positions`
    int32 [b], their places in the global batch, from 0 to batch_size - 1.
    """

    images: np.ndarray
    rows: np.ndarray
    positions: np.ndarray


class Batches:
    """Training batches of a set of images, in an order made from the seed and the epoch alone.

    Every image comes once at most in an epoch. The last, incomplete batch of an epoch is dropped,
    so that every step has one shape; which images that concerns changes with every epoch. A step's
    global batch does not depend on how many processes share it, so a run may go on with others.

    Args:
        ears: the images.
        batch_size: images of a global batch, a multiple of `process_count`.
        seed: of the order.
        process_index, process_count: which contiguous share of each batch is read here.

    Raises:
        UserError: there are fewer images than one batch needs, or it cannot be shared evenly.
    """

    def __init__(
        self,
        ears: EarImages,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.batch_size = batch_size
        self.steps_per_epoch = len(ears) // batch_size
        self._ears = ears
        self._seed = seed
        if self.steps_per_epoch == 0:
            raise UserError(
                f"The training split has {len(ears)} images, fewer than one batch of "
                f"{batch_size}; give a smaller --batch-size."
            )
        if batch_size % process_count:
            raise UserError(
                f"A batch of {batch_size} cannot be shared evenly by {process_count} processes; "
                "give a --batch-size that is a multiple of them."
            )
        share = batch_size // process_count
        self._positions = np.arange(process_index * share, (process_index + 1) * share, dtype="i4")

    def rows(self, step: int) -> np.ndarray:
        """Which images, int32 [batch_size], make the global batch of a step, counted from 0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self._seed, epoch, len(self._ears))
        return order[step * self.batch_size : (step + 1) * self.batch_size]

    def iterate(self, step: int, stop: int | None = None) -> Iterator[Batch]:
        """This process's batches from global step `step` on, to before `stop` or without end.

        Threads of Grain read some batches ahead; they end with the iterator (`close`).
        """
        import grain  # here, as runs whose images stay on the device do without

        end = sys.maxsize if stop is None else stop
        read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        batches = iter(
            grain.MapDataset.range(step, end).map(self._read).to_iter_dataset(read_ahead)
        )
        try:
            yield from batches
        finally:
            batches.close()

    def _read(self, step: int) -> Batch:
        rows = self.rows(step)[self._positions]
        return Batch(self._ears.take(rows), rows, self._positions)


@lru_cache(maxsize=4)  # the steps of an epoch share it, and reading ahead touches the next epoch
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)


def padded_batches(images: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All images in order, in batches of one shape: the last is filled up by repeating its last
    image. Yields each batch with the number of images in it that count."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - n, axis=0)])
        yield batch, n
