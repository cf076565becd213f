import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import jaxear
from jaxear.data.pipeline import load_split, padded_batches
from jaxear.eigenears import write_eigenears
from jaxear.eigenears.__main__ import main as eigenears_main
from jaxear.errors import UserError
from jaxear.metrics import psnr
from jaxear.model import load_config
from jaxear.options import parse_train_options
from jaxear.train import main, train
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.feed import Feed
from jaxear.training.forecast import forecast
from tests.training.tiny import TINY_SAM, tiny


def leaves(run_dir, which="latest"):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find(which))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_run_leaves_what_it_promises(finished):
    for name in (
        "config.yaml",
        "samples/epoch_0003.png",
        "eigenears/traversals.png",
        "eigenears/traversals.pdf",
        "eigenears/atlas.png",
        "eigenears/neighbours.pdf",
        "eigenears/scree.png",
        "eigenears/scores.csv",
        "eigenears/components/pc08.gif",
        "eigenears/eigenears.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").iterdir())
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    summary = json.loads((finished / "summary.json").read_text())
    promised = {
        "backbone", "latent_dim", "params_total", "params_trainable", "epochs", "steps",
        "images_per_second", "step_ms_median", "compile_seconds", "peak_bytes", "val_psnr",
        "val_ssim", "val_edge", "val_kl", "pc1", "pc_first5", "seed", "versions",
    }  # fmt: skip
    assert promised <= summary.keys()
    assert summary["backbone"] == "sam_vit_b"
    assert summary["val_psnr"] == pytest.approx(float(rows[-1]["val_psnr"]))


def test_eigenears_are_loaded_and_those_of_pixels_lie_beside_them(finished, monkeypatch):
    path = finished / "eigenears" / "eigenears.safetensors"
    ears = jaxear.EigenEars.load(path)
    report = json.loads(path.with_suffix(".json").read_text())
    images = load_split(load_config(finished), "train", progress=False).images
    np.testing.assert_allclose(ears.project(images).std(axis=0, ddof=1), 1, atol=1e-3)
    assert report["model"] == "sam"
    assert len(report["explained_variance_ratio_ci95"]) == ears.n_components == 8

    monkeypatch.setattr("jaxear.eigenears.report.save_figure", lambda *args: None)
    monkeypatch.setattr("jaxear.eigenears.report.save_animation", lambda *args: None)
    arguments = ["--pixels", "--n-components", "2", "--bootstrap", "0", "--permutations", "0"]
    assert eigenears_main(["--run", str(finished), *arguments]) == 0
    classic = jaxear.EigenEars.load(finished / "eigenears_pixels" / "eigenears.safetensors")
    assert isinstance(classic.model, jaxear.PixelModel)
    assert classic.components_.shape == (2, 32 * 32 * 3)
    assert json.loads(path.with_suffix(".json").read_text()) == report
    with pytest.raises(UserError, match="--out DIR"):
        write_eigenears(finished, data="others")


def test_a_finished_run_is_not_overwritten(finished):
    config = parse_train_options(["--config", str(finished / "config.yaml")]).config
    with pytest.raises(UserError, match="already holds a run"):
        train(config, progress=False)


def test_loaded_model_reconstructs_as_in_training(finished, photographs):
    model = jaxear.load_model(finished)
    config = load_config(finished)
    images = load_split(config, "val", progress=False).images
    values = psnr(model.reconstruct(images / np.float32(255)), images / 255.0)
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    assert float(values.mean()) == pytest.approx(max(float(r["val_psnr"]) for r in rows), abs=1e-3)


def test_load_model_tells_what_is_wrong(finished, tmp_path):
    with pytest.raises(UserError, match="not a run"):
        jaxear.load_model(tmp_path)
    with pytest.raises(UserError, match="no checkpoint '99'"):
        jaxear.load_model(finished, checkpoint="99")


def test_interrupted_and_resumed_run_ends_bit_for_bit_the_same(
    finished, photographs, tmp_path, monkeypatch
):
    config = tiny(photographs, tmp_path / "run")
    interrupt_after(monkeypatch, steps=7)
    with pytest.raises(KeyboardInterrupt, match="saved at step 7"):
        train(config, progress=False)
    monkeypatch.undo()
    train(config, resume=True, progress=False)
    assert_same(leaves(finished), leaves(tmp_path / "run"))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def interrupt_after(monkeypatch, steps):
    """Send this process SIGINT when the training loop has taken so many steps."""
    iterate = Feed.iterate
    taken = 0

    def interrupting(self, *args):
        nonlocal taken
        for batch in iterate(self, *args):
            taken += 1
            if taken == steps:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(Feed, "iterate", interrupting)


def test_resume_without_a_checkpoint_says_so(photographs, tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        train(tiny(photographs, tmp_path / "run"), resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "auto"}, r"port_sam\.py"),
        ({"weights": "none.safetensors"}, "No ported weights of sam_vit_b at none.safetensors"),
        ({"backbone": "sma"}, "no backbone 'sma'"),
        ({"image_size": 40}, "multiples of 16"),
        ({"backbone_options": {"depths": 2}}, "no option depths"),
        ({"backbone": "hybrid", "backbone_options": {"sam": TINY_SAM}, "weights": "auto"}, "port_"),
        ({"perceptual_weight": 1.0, "perceptual": "vgg16"}, "--model vgg16"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_an_image_is_read(
    changes, message, photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path))
    for module in ("train", "training.forecast"):
        monkeypatch.setattr(f"jaxear.{module}.load_split", None)
    config = tiny(photographs, tmp_path / "run", **changes)
    for command in (train, forecast):
        with pytest.raises(UserError, match=message):
            command(config)
    assert not (tmp_path / "run").exists()


def changed(before, after, part):
    return {n for n in before if part in n and not np.array_equal(before[n], after[n])}


@pytest.mark.slow
@pytest.mark.usefixtures("no_eigenears")
@pytest.mark.parametrize("freeze", ["all", 1])
def test_frozen_parameters_stay_and_the_others_move(photographs, tmp_path, freeze):
    config = tiny(photographs, tmp_path / "run", freeze=freeze, epochs=2)
    train(config, progress=False)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        first, last = sorted(checkpoints.steps())[:2]
        before, after = checkpoints.load_leaves(first), checkpoints.load_leaves(last)
    assert changed(before, after, "decoder.")
    assert changed(before, after, "encoder.head.")
    moved = changed(before, after, "backbone.")
    if freeze == "all":
        assert not moved
    else:
        assert moved
        assert all(".blocks.1." in name for name in moved)


def test_the_neck_is_left_alone_when_the_features_do_not_need_it(finished):
    summary = json.loads((finished / "summary.json").read_text())
    neck = sum(v.size for n, v in leaves(finished).items() if ".neck." in n)
    assert neck > 0
    assert summary["params_total"] - summary["params_trainable"] == neck


def test_settings_that_cannot_work_end_with_exit_code_2(photographs, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["--data", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert main(["--data", str(photographs), "--epochs", "0", "--out", str(out)]) == 2
    assert main(["--data", str(photographs), "--backbone", "alexnet", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 3
    assert "Traceback" not in error
    assert not out.exists()


def test_missing_weights_say_how_to_get_them(photographs, tmp_path, capsys):
    assert main(["--data", str(photographs), "--out", str(tmp_path / "run")]) == 2
    assert "scripts/port_sam.py" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_padded_batches_have_one_shape_and_lose_nothing():
    batches = list(padded_batches(np.arange(7), 3))
    assert [len(batch) for batch, _ in batches] == [3, 3, 3]
    assert [n for _, n in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b[:n] for b, n in batches]), np.arange(7))


def test_the_first_step_does_not_wait_for_what_comes_after_the_last():
    later = {"sklearn", "scipy.stats", "pandas", "matplotlib", "torch", "orbax.checkpoint", "grain"}
    code = f"import sys, jaxear.train; sys.exit({later!r} & {{*sys.modules}} or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
