"""One step, many devices: the strategies agree with one device and with each other."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxear.errors import UserError
from jaxear.train import train
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.sharding import create_parallel
from scripts.kill_resume import FORKS, train_in_fork
from tests.training.tiny import tiny, without_eigenears

ROOT = Path(__file__).parents[2]


def environment(devices):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "NPROC": "32",  # fewer threads than devices let XLA's collectives wait for each other
    }


# With every term whose value on a device's share is not its part of the whole (free bits and the
# contrastive term look at the batch), and with random numbers for each image.
SETTINGS = {
    "free_bits": 0.5,
    "kl_weight": 1.0,
    "contrastive_weight": 0.1,
    "aug_rotation": 10.0,
    "aug_occlusion": 0.5,
    "aug_noise": 0.05,
    "remat": True,  # whose branches all devices must take alike
}


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.training.steps_on_devices", json.dumps(SETTINGS)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(8), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["jit", "fsdp", "pmap"])
def test_eight_devices_give_the_losses_of_one(report, strategy):
    one, eight = report["one"], report[strategy]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(eight["psnr"], one["psnr"], rtol=1e-4)
    assert np.ptp(one["losses"]) > 1e-3 * np.mean(one["losses"])


@pytest.mark.slow
def test_fsdp_cuts_what_the_others_hold_whole(report):
    whole = report["one"]["piece"]
    assert report["jit"]["piece"] == whole
    assert report["pmap"]["piece"] == [1, *whole]
    assert np.prod(report["fsdp"]["piece"]) * 8 == np.prod(whole)
    assert len({tuple(run["whole"]) for run in report.values()}) == 1


@pytest.mark.parametrize(("batch_size", "accumulate"), [(7, 2), (2, 4)])
def test_a_batch_that_cannot_be_cut_is_refused(batch_size, accumulate):
    with pytest.raises(UserError, match="multiple of"):
        create_parallel("jit", batch_size, accumulate)


def leaves(run_dir):
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find("latest"))


def start(run_dir, *options, devices=2, eigenears=True):
    arguments = ["--out", str(run_dir), *options]
    process = FORKS.Process(target=train_on, args=(devices, arguments, run_dir.parent, eigenears))
    process.start()
    return process


def train_on(devices, arguments, logs, eigenears):
    """In a fork that has not used JAX yet."""
    os.environ |= environment(devices)
    jax.config.update("jax_platforms", "cpu")
    with nullcontext() if eigenears else without_eigenears():
        train_in_fork(arguments, logs / f"{os.getpid()}.log")


def start_two(run_dir, *options):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    together = ("--coordinator", address, "--num-processes", "2", "--process-id")
    return [start(run_dir, *options, *together, str(i)) for i in (0, 1)]


def finish(processes, code, logs):
    try:
        for process in processes:
            process.join(300)
        ends = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(logs / f"{process.pid}.log").read_text()[-2000:] for process in processes]
    assert ends == [code] * len(processes), "\n".join(said)


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on(photographs, tmp_path):
    """Two processes of two devices are stopped, go on, and end where one device alone ends.

    Then one process of two devices trains another epoch from what the four devices saved.
    """
    # Where norms' groups are single channels, the true gradients of biases before them are 0, and
    # Adam makes steps of their rounding.
    channels = (16, 16)
    config = tiny(
        photographs,
        tmp_path / "one",
        parallel="fsdp",
        batch_size=12,
        epochs=6,
        decoder_channels=channels,
    )
    with without_eigenears():
        train(config, progress=False)
    run = tmp_path / "two"
    options = ("--config", str(tmp_path / "one" / "config.yaml"), "--checkpoint-minutes", "0")
    processes = start_two(run, *options)
    until(lambda: steps_of(run) or any(p.exitcode is not None for p in processes))
    processes[1].terminate()
    finish(processes, 130, tmp_path)
    finish(start_two(run, "--resume"), 0, tmp_path)
    assert (run / "eigenears" / "eigenears.json").is_file()
    expected = leaves(tmp_path / "one")
    for name, leaf in leaves(run).items():
        np.testing.assert_allclose(leaf, expected[name], atol=2e-4, err_msg=name)
    finish([start(run, "--resume", "--epochs", "7", eigenears=False)], 0, tmp_path)
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("7,")


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run_dir):
    return [f.name for f in (run_dir / "checkpoints").glob("*") if f.name.isdigit()]
