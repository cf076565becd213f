"""One run, trained and measured in earnest: what is kept of it are its own files' figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxear.assessment import report as evaluation_report
from jaxear.comparison import runner
from jaxear.comparison.measurement import LINEAR_PCA, _anatomy
from jaxear.comparison.plan import SCRATCH, Row, make_study, run_folder
from jaxear.eigenears import report as eigenear_report
from tests.comparison.conftest import tiny_settings

ROW = Row("sam_vit_b", SCRATCH)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder."""
    study = make_study(
        backbones=("sam",),
        weights=(SCRATCH,),
        seeds=1,
        budget_steps=13,
        data=str(photographs),
        settings=tiny_settings() | {"test_fraction": 0.1},
    )
    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        # The pictures are not the matter here, and take most of the time.
        for module, names in (
            (eigenear_report, ("_draw_figures", "save_animation", "save_figure")),
            (evaluation_report, ("save_figure",)),
        ):
            for name in names:
                patch.setattr(module, name, lambda *args, **kwargs: None)
        patch.setattr(runner, "_release", lambda: None)  # other tests' programs
        runner.run_study(study, out, progress=False)
    return run_folder(out, ROW, 0)


def measurement(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "measurement.json").read_text())


def test_quality_is_the_mean_over_the_evaluations_ears_and_over_drawn_subjects(folder: Path):
    with (folder / "evaluation" / "images.csv").open() as file:
        ears = list(csv.DictReader(file))
    pca = folder.parents[1] / LINEAR_PCA
    for model, of in ((ears[0]["model"], folder), ("linear PCA", pca)):
        run = measurement(of)
        own = [ear for ear in ears if ear["model"] == model]
        subjects = [ear["subject"] for ear in own]
        names = sorted(set(subjects))
        counts = np.random.default_rng(0).multinomial(
            len(names), [1 / len(names)] * len(names), size=2000
        )
        for measure in ("psnr", "ssim", "edge"):
            values = [float(ear[measure]) for ear in own]
            assert run["measures"][measure] == pytest.approx(np.mean(values))
            for draw in (0, 7, 1999):
                times = dict(zip(names, counts[draw], strict=True))
                weighted = [times[s] * v for s, v in zip(subjects, values, strict=True)]
                mean = sum(weighted) / sum(times[s] for s in subjects)
                assert run["replicates"][measure][draw] == pytest.approx(mean, rel=1e-5)
    estimates = json.loads((folder / "evaluation" / "evaluation.json").read_text())["measures"]
    assert measurement(folder)["measures"]["eer"] == pytest.approx(
        estimates["model"]["eer"]["value"]
    )


def test_components_and_costs_are_those_of_the_runs_files(folder: Path):
    run = measurement(folder)
    measures = run["measures"]
    eigen = json.loads((folder / "eigenears" / "eigenears.json").read_text())
    ratios = eigen["explained_variance_ratio"]
    assert measures["pc1"] == pytest.approx(ratios[0])
    assert measures["first5"] == pytest.approx(sum(ratios[:5]))
    assert np.median(run["replicates"]["pc1"]) == pytest.approx(ratios[0], rel=1e-3)
    summary = json.loads((folder / "summary.json").read_text())
    step = summary["step_ms_median"] / 1000
    assert measures["peak_bytes"] == summary["peak_bytes"]
    assert measures["seconds_per_epoch"] == pytest.approx(run["steps_per_epoch"] * step)
    assert measures["training_seconds"] == pytest.approx(run["steps"] * step)
    assert run["epochs"] == round(13 / run["steps_per_epoch"])
    assert measures["grid"] == 2  # of 32 pixels, 16 a cell
    assert measures["parameters"] < measures["parameters_total"] == summary["params_total"]


def test_the_anatomy_of_synthetic_ears_is_weighed_by_what_components_explain():
    components = [
        {"anatomy_share": share, "anatomy_share_se": 0.01} for share in (0.8, 0.2, 0.0, 0.0, 0.0, 1)
    ]
    shares, errors = _anatomy({"components": components}, np.array([0.3, 0.1, 0.1, 0, 0, 0.5]))
    assert shares == {"anatomy_pc1": 0.8, "anatomy": pytest.approx(0.8 * 0.6 + 0.2 * 0.2)}
    assert errors == {"anatomy_pc1": 0.01, "anatomy": pytest.approx(0.01)}


def test_the_bound_of_anatomy_on_photographs_is_weighed_likewise():
    components = [{"anatomy_at_most": bound} for bound in (0.9, 0.5, 1.0, 1.0, 1.0, 0.1)]
    shares, errors = _anatomy({"components": components}, np.array([0.3, 0.1, 0.1, 0, 0, 0.5]))
    assert shares == {"anatomy_at_most": pytest.approx(0.9 * 0.6 + 0.5 * 0.2 + 1.0 * 0.2)}
    assert errors == {}
