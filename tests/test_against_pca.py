"""The script that measures a model against linear PCA, on a run that takes seconds."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split
from jaxear.metrics import psnr
from jaxear.model import load_config
from scripts import against_pca
from tests.training.tiny import tiny, without_eigenears

NUMBERS = 6


def run(folder: Path) -> dict[str, dict[str, Any]]:
    """What the script measures by the recipe in a folder: its rows, by the coder."""
    arguments = ["--config", str(folder / "recipe.yaml"), "--numbers", str(NUMBERS), "--plain"]
    with pytest.MonkeyPatch.context() as patch, without_eigenears():
        patch.setattr(sys, "argv", ["against_pca.py", *arguments])
        patch.setattr(against_pca, "FEWEST_COMPONENTS", 12)
        assert against_pca.main() == 0
    rows = json.loads((folder / "runs" / "against_pca.json").read_text())["rows"]
    return {row["coder"]: row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a recipe for synthetic ears."""
    folder = tmp_path_factory.mktemp("against_pca")
    config = tiny(Path(), folder / "runs", epochs=1, demo_ears=60, pixel_steps=50, aug_shift=0.1)
    dataclasses.replace(config, data=None).save(folder / "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return run(folder)


@pytest.mark.slow
def test_pca_is_that_of_the_training_ears_on_ears_held_out(folder, rows):
    config = load_config(folder / "runs" / str(NUMBERS))
    training, ears = (load_split(config, name, progress=False).images for name in ("train", "val"))
    assert rows["pca"]["n_images"] == len(ears) == 60 - len(training)
    flat = ears.reshape(len(ears), -1) / 255.0
    pca = PCA(NUMBERS, svd_solver="full").fit(training.reshape(len(training), -1) / 255.0)
    decoded = pca.inverse_transform(pca.transform(flat)).clip(0, 1).reshape(ears.shape)
    expected = np.mean(psnr(decoded.astype(np.float32), (ears / 255.0).astype(np.float32)))
    assert rows["pca"]["psnr"]["value"] == pytest.approx(float(expected), abs=0.02)


@pytest.mark.slow
def test_gains_are_over_pca_of_the_augmented_ears(rows):
    assert set(rows) == {"pca", "pca_augmented", "pixel_path", "model", "plain"}
    for name in ("pixel_path", "model"):
        for measure in ("psnr", "ssim"):
            gain = rows[name][measure]["value"] - rows["pca_augmented"][measure]["value"]
            assert rows[name]["gain"][measure]["value"] == pytest.approx(gain, abs=1e-5)
    assert all(row["numbers"] == NUMBERS for row in rows.values())


@pytest.mark.slow
def test_what_was_trained_is_measured_again_and_not_trained(folder, rows, monkeypatch):
    monkeypatch.setattr(against_pca, "train", None)
    again = run(folder)
    assert again.keys() == rows.keys()
    for name, row in again.items():  # sums differ in their last digits from fit to fit
        assert row["psnr"]["value"] == pytest.approx(rows[name]["psnr"]["value"], abs=1e-2)


def test_the_last_fifth_of_the_people_is_held_out(photographs):
    assert against_pca.held_out(TrainConfig(data=str(photographs))) == ["016", "017", "018", "019"]
