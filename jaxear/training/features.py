"""A frozen backbone's features, computed once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxear.config import TrainConfig
from jaxear.data.augment import augment
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import padded_batches
from jaxear.errors import UserError
from jaxear.training.batch import TrainBatch
from jaxear.training.logging import read_json, write_json
from jaxear.training.state import Partition, Skeleton
from jaxear.training.step import to_float

# Streams of random numbers: `train` draws its own from the seed alone.
_VIEWS = 1


class FeatureCache:
    """Features of K views of each training image, and the views themselves, in memory-mapped files.

    View k of an image is augmented with a key made from the seed, the image and k; without
    augmentation one view is all there is. The files lie in `features/` of the run's directory, are
    made again where they do not belong to these settings and weights, and may be deleted.
    """

    def __init__(self, folder: Path, n_views: int):
        self.n_views = n_views
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        files = sorted(folder.glob("features-*.npy"))
        self._maps = [np.load(file, mmap_mode="r") for file in files]

    def fill(self, batch: TrainBatch, *, view: int) -> TrainBatch:
        """The batch with features and images of a view; views are counted modulo their number."""
        index = np.asarray(batch.rows) * self.n_views + view % self.n_views
        maps = tuple(map_[index] for map_ in self._maps)
        return dataclasses.replace(
            batch,
            images=self._images[index],
            features=maps[0] if len(maps) == 1 else maps,
        )


def check_cacheable(config: TrainConfig) -> None:
    """Raises UserError where features cannot be computed once and for all."""
    problems = []
    if config.freeze != "all":
        problems.append("only a frozen backbone's features stay what they are: add --freeze all")
    if config.perceptual_weight > 0 and config.perceptual == "backbone":
        problems.append("the perceptual term needs the backbone: use --perceptual vgg16")
    if config.aug_occlusion > 0:
        problems.append("occlusion cannot be cached: set --aug-occlusion 0")
    if jax.process_count() > 1:
        problems.append("it is for one process")
    if config.backbone_options.get("batch_norm") == "train":
        problems.append("batch_norm=train changes the backbone's statistics with every step")
    if problems:
        raise UserError("--cache-features cannot be used:\n  " + "\n  ".join(problems))


def prepare_features(
    config: TrainConfig, skeleton: Skeleton, leaves: Partition, ears: EarImages, *, progress: bool
) -> FeatureCache:
    """Compute the features of all training images, or take those that a former start has left.

    Args:
        config: settings; `cache_features` views of each image.
        skeleton, leaves: the model as training starts.
        ears: the training split.
        progress: show a bar, on a terminal.
    """
    check_cacheable(config)
    folder = config.run_dir / "features"
    digest = _digest(config, leaves, ears)
    if read_json(folder / "complete.json").get("digest") != digest:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "complete.json").unlink(missing_ok=True)
        _compute(config, skeleton, leaves, ears, folder, progress=progress)
        write_json(folder / "complete.json", {"digest": digest})
    return FeatureCache(folder, config.cache_features)


def _digest(config: TrainConfig, leaves: Partition, ears: EarImages) -> str:
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name.startswith("aug_") or name in ("seed", "features", "cache_features", "image_size")
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update("\n".join(str(record.path) for record in ears.records).encode())
    for name, leaf in sorted({**leaves.frozen, **leaves.buffers}.items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _compute(
    config: TrainConfig,
    skeleton: Skeleton,
    leaves: Partition,
    ears: EarImages,
    folder: Path,
    *,
    progress: bool,
) -> None:
    k, size = config.cache_features, config.batch_size

    @jax.jit
    def run(arrays: Partition, images: jax.Array, numbers: jax.Array) -> tuple[jax.Array, Any]:
        key = jax.random.fold_in(jax.random.key(config.seed), _VIEWS)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        view = augment(to_float(images), keys, config)
        target = jnp.round(255 * jnp.clip(view.target, 0, 1)).astype(jnp.uint8)
        return target, jax.tree.leaves(skeleton.model(*arrays).backbone(view.input))

    numbers = np.arange(len(ears) * k, dtype=np.int32)
    arrays: list[np.memmap] = []
    console = Console(stderr=True)
    batches = track(
        padded_batches(numbers, size),
        description="Computing features",
        total=-(-len(numbers) // size),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    done = 0
    for batch, n in batches:
        target, maps = run(leaves, jnp.asarray(ears.take(batch // k)), batch)
        values = [np.asarray(target), *(np.asarray(map_, np.float32) for map_ in maps)]
        if not arrays:
            names = ["images", *(f"features-{i}" for i in range(len(maps)))]
            arrays = [
                np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", value.dtype, (len(numbers), *value.shape[1:])
                )
                for name, value in zip(names, values, strict=True)
            ]
        for array, value in zip(arrays, values, strict=True):
            array[done : done + n] = value[:n]
        done += n
    for array in arrays:
        array.flush()
