"""Measure a model against linear PCA with as many numbers, on people whom neither has seen.

    python scripts/against_pca.py --data ami/                        with 64, 256, 512 numbers
    python scripts/against_pca.py --data ami/ --numbers 64 --backbone mobilenet --weights none
    python scripts/against_pca.py --config configs/many_ears.yaml --numbers 64 --demo-ears 22222

For each size of code a run is trained by configs/against_pca.yaml or another --config (further
flags are those of `jaxear train`), or gone on with where it stopped, and what it makes of the
held-out ears is compared with what PCA makes of them: PCA of the training photographs, and PCA of
the same augmented pictures that the model begins from, if they are augmented. The last subjects by
name are held out, a fifth of all, and only ears known to be right ones are used; of synthetic ears,
which are drawn where no photographs are given, a tenth. No checkpoint is chosen by the held-out
ears: the last one is measured.
`plain` beside it is backbone, head and decoder without the pixel path.
"""

from __future__ import annotations

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # before the imports below, which take seconds

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Column, Table

from jaxear.assessment.coders import Code, Coder, LinearCoder, ModelCoder
from jaxear.assessment.measures import Estimate, compare, mean_estimates
from jaxear.command import run_command
from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split, padded_batches
from jaxear.data.sources import load_records
from jaxear.inference import BATCH_SIZE, as_float
from jaxear.model import load_model
from jaxear.options import parse_train_options
from jaxear.pixel_path import PixelPath, augments, views_for_pca
from jaxear.train import train
from jaxear.training.logging import read_json, write_json

RECIPE = Path(__file__).parents[1] / "configs" / "against_pca.yaml"
FEWEST_COMPONENTS = 512


class PathCoder:
    """The pixel path alone, without backbone and decoder."""

    name = "pixel path alone"

    def __init__(self, path: PixelPath):
        self.numbers = path.latent_dim
        graphdef, self._state = nnx.split(path)
        self._encode = jax.jit(lambda state, x: nnx.merge(graphdef, state).encode(as_float(x)))
        self._decode = jax.jit(lambda state, z: nnx.merge(graphdef, state).decode(z))
        self._spread = path.spread

    def encode(self, images: np.ndarray) -> Code:
        return Code(self._encode(self._state, images) * self._spread)

    def decode(self, codes: jax.Array) -> jax.Array:
        return self._decode(self._state, codes).clip(0, 1)


def held_out(config: TrainConfig) -> list[str]:
    """The last fifth of the subjects by name; none of synthetic ears."""
    if config.data is None:
        return []
    subjects = sorted({record.subject for record in load_records(config.data)})
    return subjects[len(subjects) - len(subjects) // 5 :]


def configs(base: TrainConfig, numbers: list[int], *, plain: bool) -> dict[str, TrainConfig]:
    """The runs to train, by name."""
    base = dataclasses.replace(
        base, sides="right", val_subjects=held_out(base), test_fraction=0.0, patience=0
    )
    runs = {}
    for n in numbers:
        named = {f"{n}": max(FEWEST_COMPONENTS, 3 * n // 2)}
        named |= {f"{n}-plain": 0} if plain else {}
        for name, components in named.items():
            runs[name] = dataclasses.replace(
                base, latent_dim=n, pixel_components=components, out=str(base.run_dir / name)
            )
    return runs


def coders(config: TrainConfig, training: np.ndarray) -> dict[str, Coder]:
    """What is compared at one size of code."""
    model = load_model(config.run_dir, checkpoint="latest")
    if model.pixels is None:
        return {"plain": ModelCoder(model, f"{config.backbone}, plain")}
    linear = {"pca": LinearCoder.fit(training, config.latent_dim)}
    if augments(config):
        augmented = LinearCoder.fit(views_for_pca(training, config), config.latent_dim)
        augmented.name = "linear PCA, augmented"
        linear["pca_augmented"] = augmented
    return linear | {
        "pixel_path": PathCoder(model.pixels),
        "model": ModelCoder(model, f"{config.backbone} with pixel path"),
    }


def values_of(coder: Coder, images: np.ndarray) -> dict[str, np.ndarray]:
    """PSNR and SSIM of the reconstructions of images, uint8 [n, H, W, 3]: each [n]."""
    parts = []
    for batch, n in padded_batches(images, min(BATCH_SIZE, len(images))):
        measured = compare(coder.decode(coder.encode(batch).mean), batch)
        parts.append({name: np.asarray(measured[name])[:n] for name in ("psnr", "ssim")})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def measure(config: TrainConfig) -> list[dict[str, Any]]:
    """A row for each coder of a run: its means with intervals, and how far above PCA it is."""
    training = load_split(config, "train", progress=False).images
    ears = load_split(config, "val", progress=False)
    subjects = np.asarray([record.subject for record in ears.records])
    rows = []
    reference = None
    for key, coder in coders(config, training).items():
        values = values_of(coder, ears.images)
        if key.startswith("pca"):
            reference = values
        row: dict[str, Any] = {
            "coder": key, "name": coder.name, "numbers": coder.numbers, "run": config.out,
            "n_images": len(ears), "n_subjects": len(np.unique(subjects)),
        }  # fmt: skip
        row |= {k: e._asdict() for k, e in mean_estimates(values, subjects).items()}
        if reference is not None and key in ("pixel_path", "model"):
            gains = {name: values[name] - reference[name] for name in values}
            row["gain"] = {k: e._asdict() for k, e in mean_estimates(gains, subjects).items()}
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Means over the held-out ears, with 95 % intervals over subjects. What is above PCA is above
    that of the augmented pictures, if there are any."""
    coder = Column("coder", overflow="fold")  # no name is cut on a narrow screen
    table = Table("numbers", coder, "PSNR (dB)", "SSIM", "above PCA (dB)")

    def cell(values: dict[str, Any], digits: int) -> str:
        e = Estimate(**values)
        text = f"{e.value:.{digits}f}"
        return text if e.low is None else f"{text} [{e.low:.{digits}f}, {e.high:.{digits}f}]"

    for row in rows:
        gain = cell(row["gain"]["psnr"], 2) if "gain" in row else ""
        table.add_row(
            str(row["numbers"]), row["name"], cell(row["psnr"], 2), cell(row["ssim"], 3), gain
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--plain", action="store_true", help="train without the pixel path, too")
    options, flags = parser.parse_known_args()

    def command() -> None:
        chosen = any(flag.split("=")[0] == "--config" for flag in flags)
        recipe = [] if chosen else ["--config", str(RECIPE)]
        base = parse_train_options([*recipe, *flags]).config
        rows = []
        for name, config in configs(base, options.numbers, plain=options.plain).items():
            done = read_json(config.run_dir / "summary.json")
            if "pc1" not in done:
                logging.info("Training %s", config.run_dir)
                begun = any((config.run_dir / "checkpoints").glob("[0-9]*"))
                train(config, resume=begun)
            logging.info("Measuring %s (%s)", config.run_dir, name)
            rows += measure(config)
            write_json(base.run_dir / "against_pca.json", {"rows": rows})
        Console().print(table_of(rows))
        logging.info("Written to %s", base.run_dir / "against_pca.json")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
