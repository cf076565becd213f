"""Measure a trained model on ears that it has never seen: `jaxear evaluate --run runs/NAME`."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxear.command import run_command
from jaxear.data.pipeline import load_split
from jaxear.inference import BATCH_SIZE, as_float, decode_codes, encode_images
from jaxear.metrics import active_units, edge_preservation, kl_per_dimension, psnr, ssim
from jaxear.model import load_config, load_model
from jaxear.options import Parser
from jaxear.pca import PCA
from jaxear.training.logging import write_json

logger = logging.getLogger(__name__)

MEASURES = {"psnr": psnr, "ssim": ssim, "edge": edge_preservation}
COLUMNS = {"psnr": ("PSNR (dB)", 1), "ssim": ("SSIM", 3), "edge": ("edges kept", 3)}


def compare_images(reconstructions: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """PSNR, SSIM and edge preservation of reconstructions, each [n].

    Both [n, H, W, 3], uint8 or floats in [0, 1].
    """
    measure = jax.jit(
        lambda x, y: {name: f(as_float(x), as_float(y)) for name, f in MEASURES.items()}
    )
    parts = [
        jax.device_get(measure(reconstructions[i : i + BATCH_SIZE], images[i : i + BATCH_SIZE]))
        for i in range(0, len(images), BATCH_SIZE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in MEASURES}


def subject_interval(values: np.ndarray, subjects: Sequence[str], *, seed: int = 0) -> list[float]:
    """95 % confidence interval of a mean by a bootstrap over subjects (1,000 resamples).

    Images of one person are not independent, so people are drawn, not images.
    """
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    totals = np.bincount(index, weights=values)
    counts = np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(names), size=(1000, len(names)))
    means = totals[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return [float(np.quantile(means, q)) for q in (0.025, 0.975)]


def evaluate(
    run_dir: str | Path,
    *,
    data: str | None = None,
    split: str = "test",
    checkpoint: str | int = "best",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a run on a split, beside linear PCA with as many numbers per ear.

    Args:
        run_dir: the run.
        data: other data than the run's own; all of it is used, whatever its subjects.
        split: of the run's own data: test, val, train or all.
        checkpoint: "best", "latest" or a step.
        progress: show a bar while reading.

    Returns:
        The model's and PCA's mean PSNR, SSIM and edge preservation with confidence intervals over
        subjects, the model's KL (nats per image) and active units.

    Raises:
        UserError: the run or the data cannot be used.
    """
    config = load_config(run_dir)
    model = load_model(run_dir, checkpoint=checkpoint)
    if data is not None:
        ears = load_split(dataclasses.replace(config, data=data), "all", progress=progress)
    else:
        ears = load_split(config, split, progress=progress)
    subjects = [record.subject for record in ears.records]
    mu, logvar = encode_images(model, ears.images)

    train_images = load_split(config, "train", progress=progress).images
    pixels = train_images.reshape(len(train_images), -1).astype(np.float32) / 255
    k = min(model.latent_dim, len(pixels) - 1)
    pca = PCA(n_components=k).fit(pixels)
    flat = ears.images.reshape(len(ears.images), -1).astype(np.float32) / 255
    linear = np.clip(pca.inverse_transform(pca.transform(flat)), 0, 1).reshape(ears.images.shape)

    def row(name: str, numbers: int, reconstructions: np.ndarray) -> dict[str, Any]:
        values = compare_images(reconstructions, ears.images)
        return {
            "name": name,
            "numbers_per_ear": numbers,
            **{key: float(value.mean()) for key, value in values.items()},
            **{f"{key}_ci95": subject_interval(value, subjects) for key, value in values.items()},
        }

    return {
        "run": str(run_dir),
        "checkpoint": model.checkpoint,
        "data": data or config.data or "synthetic ears",
        "split": "all" if data is not None else split,
        "n_images": len(ears),
        "n_subjects": len(set(subjects)),
        "kl": float(kl_per_dimension(jnp.asarray(mu), jnp.asarray(logvar)).sum(axis=1).mean()),
        "active_units": int(active_units(jnp.asarray(mu))),
        "rows": [
            row(config.backbone, model.latent_dim, decode_codes(model, mu)),
            row("linear PCA", k, linear),
        ],
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    table = Table(
        title=f"{report['n_images']} ears of {report['n_subjects']} subjects "
        f"({report['data']}, split {report['split']})",
        caption="numbers of an ear's code; means with 95 % confidence intervals over subjects",
    )
    table.add_column("model")
    table.add_column("numbers", justify="right")
    for title, _ in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in report["rows"]:
        cells = [
            "{:.{d}f}\n[{:.{d}f}, {:.{d}f}]".format(row[key], *row[f"{key}_ci95"], d=digits)
            for key, (_, digits) in COLUMNS.items()
        ]
        table.add_row(row["name"], str(row["numbers_per_ear"]), *cells)
    console.print(table)
    console.print(
        f"KL {report['kl']:.1f} nats per ear; {report['active_units']} active latent dimensions"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="jaxear evaluate",
        description="Measure a trained model on ears it has never seen, beside linear PCA with as "
        "many numbers per ear. Writes RUN/evaluation.json.",
    )
    parser.add_argument("--run", type=str, required=True, help="the run's directory.")
    parser.add_argument("--data", type=str, default=None, help="other data than the run's own.")
    parser.add_argument("--split", type=str, default="test", help="train, val, test or all.")
    parser.add_argument("--checkpoint", type=str, default="best", help="best, latest or a step.")

    def command() -> None:
        options = parser.parse(argv)
        report = evaluate(
            options.run, data=options.data, split=options.split, checkpoint=options.checkpoint
        )
        write_json(Path(options.run) / "evaluation.json", report)
        print_report(report, Console())

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
