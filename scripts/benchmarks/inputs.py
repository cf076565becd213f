"""Photographs on their way to the first step: decoding, batches, PCA, the start of the command."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxear.config import TrainConfig
from jaxear.data.pipeline import Batches, load_split
from scripts.bench_data import decode_all, jpeg, pattern
from scripts.benchmarks.networks import write_sam
from scripts.benchmarks.timing import OURS, Plan, Row, alternate
from scripts.benchmarks.torch_process import torch_process

ROOT = Path(__file__).resolve().parents[2]

# Runs the train command until its first step is done, and prints when that was.
FIRST_STEP = """
import os, sys, time
from jaxear.training.meters import TrainingBar

def stop(*arguments):
    print(time.time(), flush=True)
    os._exit(0)

TrainingBar.update = stop
from jaxear.cli import main
sys.exit(main())
"""


def photographs(folder: Path, n: int) -> list[Path]:
    """Write JPEGs of 320x400, of as many subjects."""
    paths = [folder / f"{i:04d}" / "ear.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        jpeg(pattern(i, 2), path)
    return paths


def data_rows(plan: Plan) -> Iterator[Row]:
    """An epoch's batches: from the store that jaxear prepares, and decoded anew as torch does."""
    n, batch = plan.size(512, 32), 16
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder, "ears"), n)
        config = TrainConfig(
            data=str(Path(folder, "ears")),
            cache_dir=str(Path(folder, "cache")),
            val_fraction=0.0,
            test_fraction=0.0,
        )
        ears = load_split(config, "train", progress=False)
        batches = Batches(ears, batch_size=batch, seed=0)
        contenders = {OURS: lambda: _consume(batches.iterate(0, batches.steps_per_epoch))}
        missing = {}
        try:
            contenders |= torch_process(plan).make("loader", plan, paths, batch)[0]
        except ImportError as error:
            missing["torch DataLoader"] = str(error)
        yield Row("batches of 128x128 JPEGs", alternate(plan, contenders), n, missing)
        decode = {
            f"Pillow, {name}": lambda o=options: decode_all(paths, plan.threads, **o)
            for name, options in (
                ("decode", {"draft": False, "resize": False}),
                ("decode and resize", {"draft": False, "resize": True}),
            )
        }
        prepared = iter(range(10**6))

        def prepare() -> None:
            cache = str(Path(folder, f"cache{next(prepared)}"))
            load_split(
                TrainConfig(data=config.data, cache_dir=cache, val_fraction=0, test_fraction=0),
                "train",
                progress=False,
            )

        yield Row("photographs prepared", alternate(plan, {OURS: prepare, **decode}), n)


def _consume(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def pca_rows(plan: Plan) -> Iterator[Row]:
    """PCA of 3,000 small pictures against scikit-learn's; `bench_pca.py` does larger ones."""
    from sklearn import decomposition

    from jaxear.pca import PCA
    from scripts.bench_pca import photograph_like

    n, d, k = plan.size(3000, 100), plan.size(12_288, 200), plan.size(64, 4)
    X = photograph_like(n, d)
    options = {"n_components": k, "svd_solver": "randomized", "random_state": 0}
    contenders = {
        OURS: lambda: PCA(**options).fit(X),
        "scikit-learn": lambda: decomposition.PCA(**options).fit(X),
    }
    yield Row(f"PCA of {n} x {d}, {k} components", alternate(plan, contenders))


def start_rows(plan: Plan) -> Iterator[Row]:
    """From the command to its first step, with nothing compiled before, and again."""
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder, "ears"), 64)
        write_sam(plan, folder, plan.size(1024, 128))
        # Python's own compiled files are made when packages are installed, and stay.
        importing = [sys.executable, "-c", "import jaxear.train"]
        subprocess.run(importing, env=_environment(folder), check=True)
        for name, times in (("cold", 1), ("warm", plan.size(3, 1))):
            seconds = [first_step(plan, folder) for _ in range(times)]
            yield Row(f"first step of `jaxear train`, {name}", {OURS: seconds})


def first_step(plan: Plan, folder: str) -> float:
    """Seconds from the command's start to its first step."""
    options = ["train", "--data", f"{folder}/ears", "--out", f"{folder}/run", "--batch-size", "8"]
    options += ["--cache-dir", f"{folder}/photographs"]
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, *options],
        env=_environment(folder),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return float(done.stdout.split()[-1]) - began


def _environment(folder: str) -> dict[str, str]:
    """This program's, but for where weights and compiled programs are."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAXEAR_WEIGHTS": folder,
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
