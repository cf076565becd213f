"""Training steps: the VAE against its re-statement in torch, memory, an epoch of the command."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from jaxear.config import TrainConfig
from jaxear.data.dataset import EarImages
from jaxear.data.records import Record
from jaxear.training.forecast import forecast, step_bytes
from scripts.bench_training import Variant
from scripts.benchmarks.networks import SMOKE_SAM, write_sam
from scripts.benchmarks.timing import OURS, Plan, Row, alternate, cost_of
from scripts.benchmarks.torch_process import torch_process


def settings(plan: Plan, **changes: Any) -> TrainConfig:
    """SAM fine-tuned at 128x128 on synthetic ears."""
    config = TrainConfig(demo_ears=64, weights="none", dtype="float32", val_fraction=0.0)
    if plan.smoke:
        options = dataclasses.asdict(SMOKE_SAM)
        tiny = {"image_size": 32, "latent_dim": 8, "head_width": 64, "decoder_channels": (16, 8)}
        config = dataclasses.replace(config, backbone_options=options, **tiny)
    return dataclasses.replace(config, **changes)


def sam_file(plan: Plan, folder: str) -> str:
    """A file of weights for `settings`: to read it takes a second, to draw them a dozen."""
    return write_sam(plan, folder, settings(plan).image_size)


def noise_ears(config: TrainConfig) -> EarImages:
    """Pictures of noise, which cost the same."""
    n, side = config.demo_ears, config.image_size
    records = [Record(path=Path(f"{i}"), subject=f"{i}") for i in range(n)]
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    return EarImages(images, records, [])


def vae_rows(plan: Plan) -> Iterator[Row]:
    """The whole step, batch 16; and the first system's recipe, images of 1024x1024 one by one."""
    batch = plan.size(16, 4)
    with tempfile.TemporaryDirectory() as folder:
        config = settings(plan, batch_size=batch, weights=sam_file(plan, folder))
        variant = Variant(config, noise_ears(config))
        contenders: dict[str, Callable[[], Any]] = {OURS: variant.step}
        if plan.device == "gpu":
            half = dataclasses.replace(config, dtype="bfloat16")
            contenders["jaxear bf16"] = Variant(half, noise_ears(half)).step
    contenders |= torch_process(plan).make("training_step", plan, config)[0]
    facts = cost_of(variant.compiled)
    row = Row("VAE step, SAM fine-tuned, b16", alternate(plan, contenders), batch, facts)
    yield row

    size = plan.size(1024, 128)
    theirs, _ = torch_process(plan).make("sam", plan, size, 1, True)
    # Once: a minute on a CPU, and what it is set against a hundredth of that.
    once = dataclasses.replace(plan, most_turns=1)
    seconds = alternate(once, theirs, warm_up=plan.device == "gpu")
    first = Row("the first system's encoder at 1024, forward and backward, b1", seconds, 1)
    first.facts["images_per_second_of_ours_times_as_many"] = (batch / row.median(OURS)) / (
        1 / first.median("torch")
    )
    yield first


def memory_rows(plan: Plan) -> Iterator[Row]:
    """Peak memory of fine-tuning SAM in bfloat16, batch 32, by XLA's account; nothing is run."""
    for remat in (False, True):
        config = settings(plan, batch_size=plan.size(32, 4), dtype="bfloat16", remat=remat)
        name = f"SAM fine-tuned in bfloat16, b32, {'with' if remat else 'without'} remat"
        yield Row(name, facts={"peak_bytes": step_bytes(config, noise_ears(config))})


def epoch_rows(plan: Plan) -> Iterator[Row]:
    """A later epoch of a run on synthetic ears, its validation and checkpoint included, beside what
    a dry run has foretold: about 15,029 ears in bfloat16 on a GPU, few in float32 on a CPU."""
    from jaxear.train import train

    gpu = plan.device == "gpu" and not plan.smoke
    with tempfile.TemporaryDirectory() as folder:
        config = settings(
            plan,
            demo_ears=17_000 if gpu else 64,
            batch_size=256 if gpu else 8,
            dtype="auto",
            weights=sam_file(plan, folder),
            val_fraction=0.02 if gpu else 0.1,
            epochs=2,
            out=str(Path(folder, "run")),
        )
        foretold = forecast(config)
        with mock.patch("jaxear.eigenears.write_eigenears"):  # after the last epoch
            summary = train(config, progress=False)
        ends = [file.stat().st_mtime for file in sorted(Path(folder, "run", "samples").iterdir())]
    wanted = ("images_per_second", "peak_bytes", "data_wait_share", "compile_seconds")
    facts: dict[str, Any] = {name: summary[name] for name in wanted}
    for name in ("images_per_second", "peak_bytes"):
        facts[f"foretold_{name}"] = foretold[name] / summary[name]
    images = config.batch_size * summary["steps"] // 2
    facts["seconds_for_15029_ears"] = (ends[1] - ends[0]) * 15_029 / images
    yield Row(f"epoch of `jaxear train`, SAM fine-tuned, {images} ears", facts=facts)
