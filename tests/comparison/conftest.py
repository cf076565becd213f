"""A study that was never trained: its runs do what real ones do to their folders, in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxear.comparison import runner
from jaxear.comparison.measurement import LINEAR_PCA, MEASUREMENT, PICTURES, WEIGHTS_FILES
from jaxear.comparison.plan import Row, Study, make_study
from jaxear.comparison.statistics import DRAWS
from jaxear.comparison.writing import write_reports
from jaxear.config import TrainConfig
from porting.checkpoints import write_weights
from tests.training.tiny import TINY_SAM

SHA256 = "ec2df627" * 8
QUALITY = {"psnr": 22.0, "ssim": 0.6, "edge": 0.7, "pc1": 0.2, "first5": 0.5}
COST = {"parameters": 9e7, "parameters_total": 1e8, "peak_bytes": 3e9, "seconds_per_epoch": 12.0,
        "training_seconds": 36.0, "encode_ms": 40.0, "grid": 2.0}  # fmt: skip


class Killed(BaseException):
    """What nothing catches, as nothing would a SIGKILL."""


def write_pretrained(folder: Path, leaves: dict[str, np.ndarray], **facts: Any) -> Path:
    """A ported file of a tiny SAM, as a porting script would have written it."""
    metadata = {
        "backbone": "sam_vit_b",
        "architecture": TINY_SAM,
        "source_file": "sam_vit_b.pth",
        "source_sha256": SHA256,
        "licence": "Apache-2.0",
    }
    path = folder / "sam_vit_b.safetensors"
    write_weights(path, leaves, metadata | facts)
    return path


def tiny_settings() -> dict[str, Any]:
    return {
        "image_size": 32,
        "latent_dim": 8,
        "head_width": 256,
        "decoder_channels": [16, 8],
        "batch_size": 8,
        "val_fraction": 0.2,
        "test_fraction": 0.3,
        "cache_dir": "none",
        "backbone_options": {"sam": TINY_SAM},
    }


def two_backbones(photographs: Path) -> Study:
    return make_study(
        backbones=("sam", "sam_large"),
        modes=("fine-tuned",),
        seeds=2,
        budget_steps=10,  # of three or four an epoch: three epochs
        data=str(photographs),
        settings=tiny_settings(),
    )


def plant(folder: Path, facts: dict[str, Any], shift: float) -> None:
    """A measurement: figures as drawn, `shift` dB and hundredths better than the average."""
    rng = np.random.default_rng(sum(map(ord, str(facts))))
    common = np.random.default_rng(0).standard_normal(DRAWS)  # the subjects, the same in all runs
    units = {"psnr": 1.0} | dict.fromkeys(("ssim", "edge", "pc1", "first5"), 0.01)
    quality = {k: v + units[k] * (shift + 0.1 * rng.normal()) for k, v in QUALITY.items()}
    cost = {k: v * rng.uniform(0.9, 1.1) * (2 if "sam_vit_l" in str(facts) else 1)
            for k, v in COST.items() if facts["label"] != "linear PCA"}  # fmt: skip
    draws = {
        k: (v + units[k] * (0.8 * common + 0.1 * rng.standard_normal(DRAWS))).round(6).tolist()
        for k, v in quality.items()
        if not (facts["label"] == "linear PCA" and k in ("pc1", "first5"))
    }
    pixels = {"ears": (5, 32, 32, 3), "reconstructions": (5, 32, 32, 3)}
    pixels |= {"eigenears": (4, 3, 32, 32, 3)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / PICTURES,
        psnr=np.full(5, quality["psnr"]),
        ratios=np.array([0.2, 0.1, 0.05, 0.02]),
        **{k: rng.integers(0, 256, shape, dtype=np.uint8) for k, shape in pixels.items()},
    )
    common_facts = {
        "split": "test", "n_images": 18, "n_subjects": 6, "n_training_images": 30,
        "n_subjects_trained_on": 0, "numbers_per_ear": 8, "notes": ["a note"],
        "machine": {"device": "cpu", "cpu_count": 2}, "versions": {"jaxear": "0"},
    }  # fmt: skip
    measures = quality | cost | {"eer": rng.uniform(0.2, 0.4), "anatomy_at_most": 0.4}
    write = {**facts, **common_facts, "measures": measures, "replicates": draws}
    (folder / MEASUREMENT).write_text(json.dumps(write))


def planted_measure(config: TrainConfig, row: Row, seed: int, *, progress: bool = True) -> None:
    """In the place of `measure_run`."""
    folder = config.run_dir
    weights = folder / WEIGHTS_FILES
    facts = {
        "backbone": row.backbone, "weights": row.weights, "mode": row.mode, "label": row.label,
        "seed": seed, "epochs": config.epochs, "steps": 3 * config.epochs, "steps_per_epoch": 3,
        "weights_files": json.loads(weights.read_text())["files"] if weights.is_file() else [],
        "curve": [[3, 19.0], [6, 21.0], [9, 22.0]],
    }  # fmt: skip
    plant(folder, facts, shift=1.5 if row.weights == "pretrained" else 0.0)
    plant(folder.parents[1] / LINEAR_PCA, {"label": "linear PCA", "seed": 0, "numbers": 8}, 3.0)


class Happening:
    """The study's folder, and what `train` was called for in each of its starts."""

    def __init__(self, out: Path):
        self.out = out
        self.trained: list[list[tuple[str, int, bool]]] = []
        self.report: dict[str, Any] = {}


@pytest.fixture(scope="session")
def study(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Happening:
    """Killed while the first run trained, and again before that was measured; started a third time,
    while one run fails; and a fourth time, when it fails once more."""
    happening = Happening(tmp_path_factory.mktemp("study"))
    weights = tmp_path_factory.mktemp("weights")

    def train(config: TrainConfig, *, resume: bool, progress: bool) -> None:
        happening.trained[-1].append((config.backbone, config.seed, resume))
        if (config.backbone, config.seed) == ("sam_vit_l", 1):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")
        if len(happening.trained) == 1:
            (config.run_dir / "checkpoints" / "3").mkdir(parents=True)
            raise Killed
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "summary.json").write_text('{"pc1": 0.2}')

    def measure(*args: Any, **kwargs: Any) -> None:
        if len(happening.trained) == 2:
            raise Killed
        planted_measure(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXEAR_WEIGHTS", str(weights))
        write_pretrained(weights, {})
        patch.setattr(runner, "_release", lambda: None)  # other tests' programs
        patch.setattr(runner, "train", train)
        patch.setattr(runner, "measure_run", measure)
        for _ in range(4):
            happening.trained.append([])
            try:
                runner.run_study(two_backbones(photographs), happening.out, progress=False)
            except Killed:
                continue
        happening.report = write_reports(happening.out, command="jaxear compare ...")
    return happening
