"""Kill a short run with SIGKILL at random moments, resume it each time, and compare where it ends.

    python scripts/kill_resume.py --kills 50

Trains a small model on pictures of noise: once undisturbed, and then killed at random moments and
resumed after each, again and again until it was killed as often as asked. The parameters at the end
of every run must be equal bit for bit; exits with 1 if not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from PIL import Image

import jaxear.train
from jaxear.training.checkpoints import Checkpoints

# Forks of a server that has imported the command already, and what it imports later: what is killed
# is training, not imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["jaxear.train", "jaxear.eigenears", "tensorboardX"])

SETTINGS = """
image_size: 32
weights: none
backbone_options:
  {depth: 2, embed_dim: 32, num_heads: 2, global_attn_indexes: [1], mlp_dim: 64, out_channels: 32}
latent_dim: 8
head_width: 256
decoder_channels: [32, 16, 8]
batch_size: 8
ema_decay: 0.9
aug_rotation: 10.0
kl_warmup_epochs: 0.5
"""


def start(run_dir: Path, *options: str, log: Path) -> BaseProcess:
    """`jaxear train` in a process of its own, which writes to the log."""
    process = FORKS.Process(target=_train, args=(["--out", str(run_dir), *options], log))
    process.start()
    return process


def _train(argv: list[str], log: Path) -> None:
    with mock.patch("jaxear.eigenears.write_eigenears"):  # after the last epoch
        train_in_fork(argv, log)


def train_in_fork(argv: list[str], log: Path) -> None:
    """Run the command, its output in the log, and leave with its exit code.

    XLA optimises little here, so that a start soon trains.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(jaxear.train.main(argv))


def draw_pictures(folder: Path) -> Path:
    """96 of noise: files are read sooner than synthetic ears are drawn, so that kills fall upon
    training."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(96):
        picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


def leaves(run_dir: Path) -> dict[str, np.ndarray]:
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find("latest"))


class Outcome(NamedTuple):
    """How often runs were killed and started, how many came to their end, and which leaves of
    theirs differ from those of the undisturbed one."""

    kills: int
    starts: int
    runs: int
    differ: list[str]


def kill_and_resume(
    kills: int, folder: Path, *, epochs: int, seconds: tuple[float, float], seed: int
) -> Outcome:
    """Kill a run and resume it; if it ends before it was killed often enough, the next of the same
    settings, until one was left alone to its end."""
    config, log = folder / "config.yaml", folder / "log.txt"
    pictures = draw_pictures(folder / "pictures")
    data = f"data: {pictures}\ncache_dir: {folder / 'prepared'}\n"
    config.write_text(SETTINGS + data + f"epochs: {epochs}\n")
    begin = ("--config", str(config))
    often = ("--checkpoint-minutes", "0.02")
    undisturbed = folder / "undisturbed"
    _finish(start(undisturbed, *begin, log=log), log)
    expected = leaves(undisturbed)

    rng = random.Random(seed)
    done = starts = runs = 0
    differ: set[str] = set()
    while runs == 0 or done < kills:
        run = folder / f"killed{runs}"
        while True:
            options = ("--resume",) if (run / "config.yaml").is_file() else (*begin, *often)
            process = start(run, *options, log=log)
            starts += 1
            process.join(rng.uniform(*seconds) if done < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            done += 1
            print(f"\rkilled {done} times", end="", flush=True)
        _finish(process, log)
        runs += 1
        found = leaves(run)
        names = expected.keys() | found.keys()
        differ |= {name for name in names if not _equal(expected.get(name), found.get(name))}
    print()
    return Outcome(done, starts, runs, sorted(differ))


def _finish(process: BaseProcess, log: Path) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"\nThe run did not come to its end:\n{log.read_text()[-2000:]}")


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default: 10)")
    parser.add_argument("--epochs", type=int, default=30, help="of the run (default: 30)")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(1.0, 30.0), metavar=("MIN", "MAX"),
        help="after how long a start is killed, drawn evenly from this range (default: 1 30)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_and_resume(
            arguments.kills,
            Path(folder),
            epochs=arguments.epochs,
            seconds=tuple(arguments.seconds),
            seed=arguments.seed,
        )
    kills, starts, runs, differ = outcome
    verdict = f"differ in {len(differ)} leaves: {differ[:3]}" if differ else "equal, bit for bit"
    print(f"{kills} kills of {runs} runs, {starts} starts; parameters at their ends: {verdict}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
