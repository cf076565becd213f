"""What is kept of a run: `measurement.json`, all the report needs but for `pictures.npz`."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxear.assessment.coders import LinearCoder
from jaxear.assessment.report import Evaluation, write_evaluation
from jaxear.assessment.timing import machine
from jaxear.comparison.plan import Row
from jaxear.comparison.statistics import DRAWS, subject_draws
from jaxear.config import TrainConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import load_split
from jaxear.eigenears import EigenEars
from jaxear.eigenears.meaning import describe_components
from jaxear.eigenears.significance import variance_shares
from jaxear.evaluate import evaluate
from jaxear.figures import to_uint8
from jaxear.files import replacing
from jaxear.inference import decode_codes, encode_images
from jaxear.model import load_model
from jaxear.pixels import PixelModel
from jaxear.training.logging import read_json, write_json
from jaxear.training.summary import versions
from jaxear.vae import EarVAE, feature_shapes

MEASUREMENT = "measurement.json"
PICTURES = "pictures.npz"
WEIGHTS_FILES = "weights.json"  # what a pretrained run started from
LINEAR_PCA = "linear_pca"
TIMED = 10  # repeats
SHOWN_EARS = 6
SHOWN_COMPONENTS = 4
ENDS = (-2.0, 0.0, 2.0)  # standard deviations
MOST_CODES = 2000  # ears whose codes are drawn from, for the uncertainty of explained variance
PER_EAR = ("psnr", "ssim", "edge")


class StudyMeasure(NamedTuple):
    """How a measure of the study is shown: multiplied by `times`, to so many digits.

    `sampled`: whether it is a sample's figure, with an interval; the others are facts of a machine.
    `most`: what it cannot exceed.
    """

    title: str
    unit: str
    digits: int
    times: float
    better: str
    sampled: bool
    definition: str
    most: float = math.inf


MEASURES: Mapping[str, StudyMeasure] = {
    "psnr": StudyMeasure("PSNR", "dB", 2, 1, "higher", True, "of held-out ears, mean"),
    "ssim": StudyMeasure("SSIM", "", 3, 1, "higher", True, "structural similarity, mean", 1),
    "edge": StudyMeasure(
        "Edges kept", "", 3, 1, "higher", True,
        "correlation of the Sobel gradients of the photograph and of its reconstruction, mean", 1,
    ),
    "pc1": StudyMeasure(
        "PC1", "%", 1, 100, "", True,
        "share of the variance of the training ears' codes that their first component explains", 1,
    ),
    "first5": StudyMeasure("First 5 PCs", "%", 1, 100, "", True, "the first five together", 1),
    "anatomy_pc1": StudyMeasure(
        "Anatomy in PC1", "%", 0, 100, "higher", True,
        "share of PC1's variance that the anatomical factors of synthetic ears explain", 1,
    ),
    "anatomy": StudyMeasure(
        "Anatomy share", "%", 0, 100, "higher", True,
        "the same of the first five components, each counted by the variance it explains", 1,
    ),
    "anatomy_at_most": StudyMeasure(
        "Anatomy at most", "%", 0, 100, "higher", False,
        "of photographs: what brightness, contrast, colour, shading and position leave of the "
        "first five components, each counted by the variance it explains; an upper bound",
    ),
    "eer": StudyMeasure(
        "Identity EER", "%", 1, 100, "lower", False,
        "equal error rate of telling held-out subjects apart by their codes",
    ),
    "parameters": StudyMeasure(
        "Backbone", "M", 1, 1e-6, "lower", False,
        "parameters of the backbone, without a classifier; of linear PCA mean and components",
    ),
    "parameters_total": StudyMeasure(
        "Whole model", "M", 1, 1e-6, "lower", False, "parameters with head and decoder"
    ),
    "peak_bytes": StudyMeasure(
        "Memory", "GB", 2, 1e-9, "lower", False,
        "that the compiled training step needs at the study's batch size, by XLA's account",
    ),
    "seconds_per_epoch": StudyMeasure(
        "Epoch", "s", 1, 1, "lower", False, "steps of an epoch times the median time of a step"
    ),
    "training_seconds": StudyMeasure(
        "Training", "s", 0, 1, "lower", False,
        "all steps times the median time of a step; of linear PCA, its fit",
    ),
    "encode_ms": StudyMeasure(
        "Latency", "ms", 1, 1, "lower", False, "from one image in memory to its code, median"
    ),
    "grid": StudyMeasure(
        "Grid", "cells", 0, 1, "", False, "cells along a side of the features that the head reads"
    ),
}  # fmt: skip


def measure_run(config: TrainConfig, row: Row, seed: int, *, progress: bool = True) -> None:
    """Measure a finished run on the held-out split, and write what the report needs of it.

    The last file written is `measurement.json`: where it is, the run is done. The first run of a
    study also measures linear PCA.

    Raises:
        UserError: the run or its data cannot be used.
    """
    folder = config.run_dir
    summary = read_json(folder / "summary.json")
    eigen = read_json(folder / "eigenears" / "eigenears.json")
    evaluation = evaluate(folder, repeats=TIMED, progress=progress)
    write_evaluation(evaluation, folder / "evaluation")
    model = load_model(folder)
    training = load_split(config, "train", progress=False)
    held_out = load_split(config, "test", progress=False)

    estimates = evaluation.estimates["model"]
    size = (config.image_size, config.image_size)
    steps_per_epoch = len(training) // config.batch_size
    seconds = 1e-3 * summary["step_ms_median"]
    measures: dict[str, float | None] = {
        **{name: estimates[name].value for name in PER_EAR},
        "pc1": eigen["pc1"],
        "first5": eigen["pc_first5"],
        "eer": estimates["eer"].value if "eer" in estimates else None,
        "parameters": _backbone_parameters(model),
        "parameters_total": summary["params_total"],
        "peak_bytes": summary["peak_bytes"],
        "seconds_per_epoch": steps_per_epoch * seconds,
        "training_seconds": summary["steps"] * seconds,
        "encode_ms": estimates["encode_ms"].value,
        "grid": max(h for h, _, _ in feature_shapes(model.backbone, size)),
    }
    anatomy, errors = _anatomy(eigen["meaning"], np.asarray(eigen["explained_variance_ratio"]))
    measures |= anatomy
    replicates = _of_ears(evaluation, "model") | _of_codes(model, training)
    replicates |= _of_shares(anatomy, errors, seed=sum(map(ord, row.key)) + seed)
    facts = {
        "backbone": row.backbone,
        "weights": row.weights,
        "mode": row.mode,
        "label": row.label,
        "seed": seed,
        "epochs": summary["epochs"],
        "steps": summary["steps"],
        "steps_per_epoch": steps_per_epoch,
        "params_trainable": summary["params_trainable"],
        "batch_size": config.batch_size,
        "weights_files": read_json(folder / WEIGHTS_FILES).get("files", []),
        "curve": _curve(folder / "metrics.csv"),
    }
    shown = np.linspace(0, len(held_out) - 1, min(SHOWN_EARS, len(held_out))).astype(int)
    ears = held_out.take(shown)
    eigenears = EigenEars.load(folder / "eigenears" / "eigenears.safetensors", model)
    _save_pictures(
        folder,
        ears=ears,
        reconstructions=to_uint8(decode_codes(model, encode_images(model, ears)[0])),
        psnr=evaluation.values["model"]["psnr"][shown],
        eigenears=to_uint8(eigenears.traverses(ENDS)[:SHOWN_COMPONENTS]),
        ratios=eigenears.explained_variance_ratio_[:SHOWN_COMPONENTS],
    )
    pca_folder = folder.parents[1] / LINEAR_PCA
    if not (pca_folder / MEASUREMENT).is_file():
        _measure_pca(evaluation, training, ears, shown, config, pca_folder)
    _save(folder, facts | _common(evaluation), measures, replicates)


def _measure_pca(
    evaluation: Evaluation,
    training: EarImages,
    ears: np.ndarray,
    shown: np.ndarray,
    config: TrainConfig,
    folder: Path,
) -> None:
    """The row of linear PCA with as many numbers per ear, fitted to the training ears' pixels."""
    began = time.perf_counter()
    coder = LinearCoder.fit(training.images, config.latent_dim)
    seconds = time.perf_counter() - began
    some = np.unique(np.linspace(0, len(training) - 1, MOST_CODES).astype(int))
    images = training.take(some)
    model = PixelModel(config.image_size)
    kept = min(16, len(images) - 1)
    eigenears = EigenEars.fit(model, images, kept)
    factors = training.factors and {name: of[some] for name, of in training.factors.items()}
    ratios = eigenears.explained_variance_ratio_
    anatomy, errors = _anatomy(
        describe_components(eigenears.project(images), images, factors), ratios
    )
    estimates = evaluation.estimates["pca"]
    size = config.image_size**2 * 3
    measures: dict[str, float | None] = {
        **{name: estimates[name].value for name in PER_EAR},
        "pc1": float(ratios[0]),
        "first5": float(ratios[:5].sum()),
        **anatomy,
        "eer": estimates["eer"].value if "eer" in estimates else None,
        "parameters": (coder.numbers + 1) * size,
        "training_seconds": seconds,
        "encode_ms": estimates["encode_ms"].value,
    }
    replicates = _of_ears(evaluation, "pca") | _of_shares(anatomy, errors, seed=0)
    _save_pictures(
        folder,
        ears=ears,
        reconstructions=to_uint8(np.asarray(coder.decode(coder.encode(ears).mean))),
        psnr=evaluation.values["pca"]["psnr"][shown],
        eigenears=to_uint8(eigenears.traverses(ENDS)[:SHOWN_COMPONENTS]),
        ratios=ratios[:SHOWN_COMPONENTS],
    )
    facts = {"label": "linear PCA", "seed": 0, "numbers": coder.numbers}
    _save(folder, facts | _common(evaluation), measures, replicates)


def _common(evaluation: Evaluation) -> dict[str, Any]:
    about = evaluation.about
    kept = ("split", "n_images", "n_subjects", "n_training_images", "n_subjects_trained_on")
    return {
        **{name: about[name] for name in kept},
        "numbers_per_ear": evaluation.numbers["model"],
        "notes": evaluation.notes,
        "machine": machine(),
        "versions": versions(),
    }


def _save(
    folder: Path,
    facts: Mapping[str, Any],
    measures: Mapping[str, float | None],
    replicates: Mapping[str, np.ndarray],
) -> None:
    write_json(
        folder / MEASUREMENT,
        {
            **facts,
            "measures": {k: None if v is None else float(v) for k, v in measures.items()},
            "replicates": {k: [float(f"{x:.6g}") for x in v] for k, v in replicates.items()},
        },
    )


def _save_pictures(folder: Path, **arrays: np.ndarray) -> None:
    with replacing(folder / PICTURES) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _of_ears(evaluation: Evaluation, coder: str) -> dict[str, np.ndarray]:
    """Means of what every ear has one of, for drawn subjects; none of one subject."""
    subjects = [record.subject for record in evaluation.records]
    if len(set(subjects)) < 2:
        return {}
    weights = subject_draws(subjects)
    values = np.stack([evaluation.values[coder][name] for name in PER_EAR], axis=1)
    means = weights @ values / weights.sum(axis=1, keepdims=True)
    return dict(zip(PER_EAR, means.T, strict=True))


def _of_codes(model: EarVAE, training: EarImages) -> dict[str, np.ndarray]:
    """Explained variance for drawn subjects.

    Shares of a bootstrap's draws are too large twice over; on the scale of log(p / (1 - p)) they
    are moved so that their middle is the share as measured (see
    `jaxear.eigenears.significance.confidence_intervals`).
    """
    some = np.unique(np.linspace(0, len(training) - 1, MOST_CODES).astype(int))
    subjects = [training.records[i].subject for i in some]
    if len(set(subjects)) < 3:
        return {}
    codes, _ = encode_images(model, training.take(some))
    k = min(5, *codes.shape)

    def cumulated(weights: np.ndarray | None = None) -> np.ndarray:
        return np.cumsum(variance_shares(codes, k, weights))[[0, -1]]

    measured = _logit(cumulated())
    draws = _logit(np.stack([cumulated(w) for w in subject_draws(subjects)]))
    moved = 1 / (1 + np.exp(-(draws - np.median(draws, axis=0) + measured)))
    return {"pc1": moved[:, 0], "first5": moved[:, 1]}


def _logit(shares: np.ndarray) -> np.ndarray:
    shares = np.clip(shares, 1e-6, 1 - 1e-6)
    return np.log(shares / (1 - shares))


def _anatomy(
    meaning: Mapping[str, Any], ratios: np.ndarray
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Anatomy's share of PC1 and of the first five components, or its bound; standard errors.

    That of the five is at most what it would be if their errors were all one.
    """
    components = meaning["components"][:5]
    weights = np.asarray(ratios[: len(components)]) / np.sum(ratios[: len(components)])
    if "anatomy_share" in components[0]:
        shares = [c["anatomy_share"] for c in components]
        errors = [c["anatomy_share_se"] for c in components]
        return (
            {"anatomy_pc1": shares[0], "anatomy": float(weights @ shares)},
            {"anatomy_pc1": errors[0], "anatomy": float(weights @ errors)},
        )
    if "anatomy_at_most" in components[0]:
        bounds = [c["anatomy_at_most"] for c in components]
        return {"anatomy_at_most": float(min(weights @ bounds, 1.0))}, {}
    return {}, {}


def _of_shares(
    shares: Mapping[str, float | None], errors: Mapping[str, float], *, seed: int
) -> dict[str, np.ndarray]:
    """Normal draws with the standard errors. Rows' are independent, as if they had been measured on
    other ears, so that a difference's interval comes out too wide rather than too narrow."""
    rng = np.random.default_rng([7, seed])
    return {
        name: float(shares[name] or 0.0) + error * rng.standard_normal(DRAWS)
        for name, error in errors.items()
    }


def _backbone_parameters(model: EarVAE) -> int:
    return sum(
        leaf.size
        for backbone in model.backbones.values()
        for leaf in jax.tree.leaves(nnx.state(backbone.encoder, nnx.Param))
    )


def _curve(path: Path) -> list[list[float]]:
    """Step and validation PSNR of every epoch."""
    with path.open(newline="") as file:
        return [[int(row["step"]), float(row["val_psnr"])] for row in csv.DictReader(file)]
