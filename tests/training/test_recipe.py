"""What a recipe can switch on: it does what it says and nothing else."""

import csv
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxear.errors import UserError
from jaxear.model import load_model
from jaxear.train import train
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.sharding import AXIS, JitParallel
from tests.training.steps_on_devices import config_of, losses
from tests.training.tiny import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_eigenears")]


@pytest.fixture(scope="module")
def one_device():
    mesh = jax.make_mesh((1,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return JitParallel(mesh)


@pytest.fixture(scope="module")
def plain(one_device):
    return losses(one_device, config_of())


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"remat": True}], ids=str)
def test_saving_memory_changes_no_loss(one_device, plain, changes):
    found = losses(one_device, config_of(**changes))
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["psnr"], plain["psnr"], rtol=1e-4)


def test_the_average_of_the_parameters_is_what_is_evaluated_and_loaded(photographs, tmp_path):
    config = tiny(photographs, tmp_path / "run", ema_decay=0.99, epochs=2)
    train(config, progress=False)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.find("latest")
        averaged = checkpoints.load_leaves(step)
        raw = checkpoints._manager.restore(step)["state"]
    name = "decoder.stem.kernel"
    np.testing.assert_array_equal(averaged[name], raw["average"][name])
    assert np.abs(raw["trainable"][name] - raw["average"][name]).max() > 1e-4
    model = load_model(tmp_path / "run", checkpoint="latest")
    np.testing.assert_array_equal(model.decoder.stem.kernel[...], averaged[name])


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_training_stops_when_nothing_is_gained(photographs, tmp_path):
    config = tiny(photographs, tmp_path / "run", learning_rate=0.0, patience=2, epochs=9)
    train(config, progress=False)
    assert len(rows(tmp_path / "run")) == 3
    train(config, resume=True, progress=False)
    assert len(rows(tmp_path / "run")) == 3


def test_the_best_checkpoints_are_kept(photographs, tmp_path):
    run = tmp_path / "run"
    train(tiny(photographs, run, keep_best=3, epochs=6, ssim_weight=0.0), progress=False)
    values = {int(row["step"]): float(row["val_psnr"]) for row in rows(run)}
    best = sorted(values, key=lambda step: values[step])[-3:]
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == sorted({*best, *sorted(values)[-2:]})


def test_cached_features_train_as_frozen_ones(photographs, tmp_path):
    found = []
    for name, views in (("plain", 0), ("cached", 1)):
        run = tmp_path / name
        train(tiny(photographs, run, freeze="all", cache_features=views), progress=False)
        found.append([(float(r["train_loss"]), float(r["val_psnr"])) for r in rows(run)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert np.ptp([loss for loss, _ in found[0]]) > 1e-3


def test_each_epoch_of_cached_features_sees_another_view(photographs, tmp_path):
    run = tmp_path / "run"
    views = {"freeze": "all", "cache_features": 2, "aug_rotation": 20.0, "aug_brightness": 0.2}
    train(tiny(photographs, run, **views, epochs=2), progress=False)
    images = np.load(run / "features" / "images.npy")
    features = np.load(run / "features" / "features-0.npy")
    n = len(images) // 2
    assert features.shape == (2 * n, 2, 2, 32)
    for array in (images.astype(float), features):
        first, second = array.reshape(n, 2, -1).swapaxes(0, 1)
        assert np.abs(first - second).mean() > 1e-3
    complete = (run / "features" / "complete.json").stat().st_mtime_ns
    train(tiny(photographs, run, **views, epochs=3), resume=True, progress=False)
    assert (run / "features" / "complete.json").stat().st_mtime_ns == complete
    assert len(rows(run)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": "none"}, "--freeze all"),
        ({"aug_occlusion": 0.5}, "occlusion"),
        ({"perceptual_weight": 1.0}, "--perceptual vgg16"),
    ],
    ids=str,
)
def test_features_that_do_not_stay_cannot_be_cached(photographs, tmp_path, changes, message):
    config = tiny(
        photographs, tmp_path / "run", **{"freeze": "all", "cache_features": 1, **changes}
    )
    with pytest.raises(UserError, match=message):
        train(config, progress=False)


def test_the_wait_for_data_is_on_record(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 <= summary["data_wait_share"] < 1
    assert summary["parallel"] == "jit"
