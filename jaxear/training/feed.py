"""Batches on their way to the devices: copied ahead of the steps that need them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

import jax
import numpy as np

from jaxear.config import RunConfig, TrainConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import Batches
from jaxear.training.batch import TrainBatch
from jaxear.training.features import FeatureCache
from jaxear.training.sharding import Parallel

# Steps whose batches are under way to the devices while one is computed.
AHEAD = 2
# What of a device's memory the training images may take.
RESIDENT_SHARE = 0.1
# The same where a device does not tell its memory (bytes).
RESIDENT_BYTES = 2 * 2**30


def stays_on_device(config: RunConfig, n_bytes: int) -> bool:
    """Whether training images of so many bytes are kept on every device."""
    if config.cache_features or jax.process_count() > 1:
        return False
    if config.data_on_device != "auto":
        return config.data_on_device == "yes"
    memory = jax.local_devices()[0].memory_stats() or {}
    return n_bytes <= memory.get("bytes_limit", RESIDENT_BYTES / RESIDENT_SHARE) * RESIDENT_SHARE


def create_batches(config: TrainConfig, ears: EarImages) -> Batches:
    """The batches of a run: this process's share of each."""
    return Batches(
        ears,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


class Feed:
    """The training batches from a step on, on the devices."""

    def __init__(
        self,
        batches: Batches,
        subjects: np.ndarray,
        parallel: Parallel,
        *,
        resident: bool = False,
        features: FeatureCache | None = None,
    ):
        self._batches = batches
        self._subjects = subjects
        self._parallel = parallel
        self._resident = resident
        self._features = features
        self._waited = 0.0

    def iterate(self, step: int, stop: int) -> Iterator[TrainBatch]:
        """The batches of the steps from `step` to before `stop`."""
        source = self._host_batches(step, stop)
        ahead = deque(map(self._parallel.put_batch, islice(source, AHEAD)))
        while ahead:
            yield ahead.popleft()
            began = time.perf_counter()
            ahead.extend(map(self._parallel.put_batch, islice(source, 1)))
            self._waited += time.perf_counter() - began

    def take_waited(self) -> float:
        """Seconds that went into getting batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _host_batches(self, step: int, stop: int) -> Iterator[TrainBatch]:
        if self._resident or self._features is not None:
            size = self._batches.batch_size
            share = size // jax.process_count()
            mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
            for number in range(step, stop):
                rows = self._batches.rows(number)[mine].astype(np.int32)
                positions = np.arange(size, dtype=np.int32)[mine]
                batch = TrainBatch(rows, positions, self._subjects[rows])
                if self._features is not None:
                    epoch = number // self._batches.steps_per_epoch
                    batch = self._features.fill(batch, view=epoch)
                yield batch
        else:
            for images, rows, positions in self._batches.iterate(step, stop):
                yield TrainBatch(rows, positions, self._subjects[rows], images)
