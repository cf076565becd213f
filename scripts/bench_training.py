"""Time the training step as the recipe varies: fine-tuned, augmented, accumulated, cached features.

    python scripts/bench_training.py                      SAM ViT-B, 128x128, batch 8, 5 turns
    python scripts/bench_training.py --backbone resnet50 --batch 16 --out bench.json
    GLIBC_TUNABLES= python scripts/bench_training.py      without the memory kept

All variants take turns, one step each, and their medians are compared with that of plain
fine-tuning. Weights are random, which costs the same. Then some steps of training, fed as the
command feeds them, tell what share of the time went into waiting for data. Runs on whatever device
JAX finds.
"""

from __future__ import annotations

from jaxear.process_memory import keep_memory_of_jax, restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # before the imports below, which take seconds

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxear.config import TrainConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import Batches, load_split
from jaxear.data.records import subject_numbers
from jaxear.training.batch import Resident, TrainBatch
from jaxear.training.features import prepare_features
from jaxear.training.feed import Feed
from jaxear.training.program import create_leaves, create_program, lower_step
from jaxear.training.sharding import create_parallel
from jaxear.training.state import create_state

AUGMENTED = {
    "aug_rotation": 12.0,
    "aug_scale": 0.15,
    "aug_shift": 0.06,
    "aug_brightness": 0.15,
    "aug_contrast": 0.15,
    "aug_saturation": 0.15,
    "aug_hue": 0.02,
    "aug_gamma": 0.15,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tuned": {},
    "augmented": AUGMENTED,
    "in two parts": {"accumulate": 2},
    "frozen": {"freeze": "all"},
    "frozen, cached features": {"freeze": "all", "cache_features": 1},
}


class Variant:
    """One way of training, ready to step."""

    def __init__(self, config: TrainConfig, ears: EarImages):
        self.parallel = create_parallel(config.parallel, config.batch_size, config.accumulate)
        program = create_program(config, self.parallel, 1000)
        leaves = create_leaves(program, config)
        features = None
        if config.cache_features:
            features = prepare_features(config, program.eval_skeleton, leaves, ears, progress=False)
        self.compiled = lower_step(program, config, self.parallel, Resident()).compile()
        state = create_state(leaves, program.optimizer, average=config.ema_decay > 0)
        self.state = self.parallel.put_state(state)
        batches = Batches(ears, batch_size=config.batch_size, seed=0)
        self.feed = Feed(batches, subject_numbers(ears.records), self.parallel, features=features)
        self.resident = self.parallel.put_resident(Resident())
        self.batch: TrainBatch = next(self.feed.iterate(0, 1))

    def step(self, batch: TrainBatch | None = None) -> float:
        """Seconds for one step."""
        began = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.resident, batch or self.batch)
        self.parallel.scalars(metrics)
        return time.perf_counter() - began

    def waiting_share(self, steps: int) -> float:
        """Share of the time between steps for which there was no batch yet."""
        busy = sum(self.step(batch) for batch in self.feed.iterate(0, steps))
        waited = self.feed.take_waited()
        return waited / (waited + busy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="sam", help="default: sam")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
    parser.add_argument("--turns", type=int, default=5, help="steps of each variant (default: 5)")
    parser.add_argument("--data", help="photographs; synthetic ears without")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    keep_memory_of_jax()

    with tempfile.TemporaryDirectory() as folder:
        base = TrainConfig(
            data=arguments.data,
            demo_ears=max(64, 10 * arguments.batch),
            backbone=arguments.backbone,
            weights="none",
            batch_size=arguments.batch,
            out=folder,
        )
        ears = load_split(base, "train")
        report: dict[str, Any] = {
            "backbone": arguments.backbone,
            "batch": arguments.batch,
            "device": jax.devices()[0].device_kind,
        }
        seconds: dict[str, list[float]] = {}
        variants = {
            name: Variant(dataclasses.replace(base, **changes), ears)
            for name, changes in VARIANTS.items()
        }
        for turn in range(arguments.turns + 1):
            for name, variant in variants.items():
                taken = variant.step()
                if turn:  # the first one warms up
                    seconds.setdefault(name, []).append(taken)
        waiting = variants["augmented"].waiting_share(min(10, len(ears) // arguments.batch))

    plain = statistics.median(seconds["fine-tuned"])
    table = Table("variant", "ms per step", "images/s", "times as fast")
    for name, values in seconds.items():
        median = statistics.median(values)
        report[name] = {
            "ms": [round(1e3 * value, 1) for value in values],
            "images_per_second": round(arguments.batch / median, 3),
            "speed": round(plain / median, 3),
        }
        table.add_row(
            name,
            f"{1e3 * median:.0f} ({1e3 * min(values):.0f} to {1e3 * max(values):.0f})",
            f"{arguments.batch / median:.2f}",
            f"{plain / median:.2f}",
        )
    report["augmentation_share"] = round(1 - plain / statistics.median(seconds["augmented"]), 4)
    report["data_wait_share"] = round(waiting, 5)
    Console().print(table)
    print(
        f"augmentation takes {100 * report['augmentation_share']:.1f} % of its step; "
        f"waiting for data takes {100 * waiting:.2f} % of training"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
