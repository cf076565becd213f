import dataclasses
import json

import pytest

from jaxear.config import AUTO_BATCH_SIZE
from jaxear.data.pipeline import load_split
from jaxear.errors import UserError
from jaxear.model import load_config
from jaxear.train import main, train
from jaxear.training import forecast as forecast_module
from jaxear.training.forecast import forecast, largest_batch_size, step_bytes
from jaxear.training.sharding import JitParallel
from tests.training.tiny import tiny


@pytest.fixture
def ears(photographs, tmp_path):
    return load_split(tiny(photographs, tmp_path), "train", progress=False)


def test_a_forecast_says_what_the_run_then_finds(
    finished, photographs, ears, tmp_path, monkeypatch
):
    steps = []
    lower_train = JitParallel.lower_train

    def keeping(*arguments):
        steps.append(lower_train(*arguments))
        return steps[-1]

    monkeypatch.setattr(JitParallel, "lower_train", keeping)
    config = tiny(photographs, tmp_path / "run")
    facts = forecast(config, steps=2)
    assert not (tmp_path / "run").exists()
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("params_total", "params_trainable", "peak_bytes", "n_devices"):
        assert facts[name] == summary[name], name
    assert facts["steps_per_epoch"] * facts["epochs"] == summary["steps"]
    flops = steps[0].compile().cost_analysis()["flops"]
    assert facts["flops_per_image"] * config.batch_size == flops > 0
    assert step_bytes(config, ears) == facts["peak_bytes"]
    run_images = facts["images_per_second"] * facts["run_seconds"]
    assert run_images == pytest.approx(summary["steps"] * config.batch_size, rel=1e-3)


def test_a_dry_run_leaves_nothing_behind(photographs, tmp_path, capsys):
    config = tiny(photographs, tmp_path / "run")
    config.save(tmp_path / "settings.yaml")
    assert main(["--config", str(tmp_path / "settings.yaml"), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    for word in ("parameters", "GFLOP", "peak memory", "images/s", "compilation"):
        assert word in printed


@pytest.mark.parametrize("limit", [100, 101, 130, 260, 411, 412, 10**6])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_largest_batch_that_fits_is_found(ears, tmp_path, monkeypatch, limit, accumulate):
    asked = []

    def needs(config, ears):  # not quite a straight line
        asked.append(config.batch_size)
        return 90 + 10 * config.batch_size + (config.batch_size > 20) * 2

    monkeypatch.setattr(forecast_module, "step_bytes", needs)
    config = dataclasses.replace(tiny("", tmp_path), accumulate=accumulate)
    sizes = [accumulate * 2**k for k in range(12) if accumulate * 2**k <= len(ears)]
    fitting = [n for n in sizes if needs(dataclasses.replace(config, batch_size=n), ears) <= limit]
    asked.clear()
    if fitting:
        assert largest_batch_size(config, ears, limit) == max(fitting)
        assert len(asked) <= 5
    else:
        with pytest.raises(UserError, match=f"Not even a batch of {accumulate} fits"):
            largest_batch_size(config, ears, limit)


@pytest.mark.slow
@pytest.mark.usefixtures("no_eigenears")
def test_the_batch_that_was_chosen_is_written_down_and_kept(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast_module, "largest_batch_size", lambda config, ears: 8)
    config = tiny(photographs, tmp_path / "run", batch_size=AUTO_BATCH_SIZE)
    summary = train(config, progress=False)
    assert load_config(tmp_path / "run").batch_size == 8
    monkeypatch.delattr(forecast_module, "largest_batch_size")
    assert train(config, resume=True, progress=False)["steps"] == summary["steps"]
