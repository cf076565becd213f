"""Kill a short run with SIGKILL at random moments, resume it each time, and compare where it ends.

    python scripts/kill_resume.py --kills 50

Trains a small model on synthetic ears twice: once undisturbed, once killed as often as asked and
resumed after each. The parameters at the end must be equal bit for bit; exits with 1 if not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxear.training.checkpoints import Checkpoints

SETTINGS = """
demo_ears: 96
image_size: 32
weights: none
backbone_options: {depth: 2, embed_dim: 32, num_heads: 2, global_attn_indexes: [1]}
latent_dim: 8
head_width: 256
decoder_channels: [32, 16, 8]
batch_size: 8
ema_decay: 0.9
aug_rotation: 10.0
kl_warmup_epochs: 0.5
"""


def command(run_dir: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "jaxear.train", "--out", str(run_dir), *options]


def leaves(run_dir: Path) -> dict[str, np.ndarray]:
    with Checkpoints(run_dir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.load_leaves(checkpoints.find("latest"))


def kill_and_resume(
    kills: int, folder: Path, *, epochs: int, seconds: tuple[float, float], seed: int
) -> tuple[int, int, list[str]]:
    """Returns how often the run was killed, how often it had to be started, and which leaves of
    the end differ from those of an undisturbed run."""
    config = folder / "config.yaml"
    config.write_text(SETTINGS + f"epochs: {epochs}\n")
    begin = ("--config", str(config), "--checkpoint-minutes", "0.01")
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    subprocess.run(command(undisturbed, *begin), check=True, capture_output=True)

    rng = random.Random(seed)
    done = starts = 0
    while True:
        options = ("--resume",) if (killed / "config.yaml").is_file() else begin
        process = subprocess.Popen(
            command(killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        starts += 1
        try:
            _, errors = process.communicate(timeout=rng.uniform(*seconds) if done < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            done += 1
            print(f"\rkilled {done} times", end="", flush=True)
            continue
        if process.returncode:
            raise SystemExit(f"\nAfter {done} kills the run did not go on:\n{errors[-2000:]}")
        if done >= kills:
            break
        # It came to its end between two kills: the rest fall upon a run that is finished.
        time.sleep(0.1)
    print()
    a, b = leaves(undisturbed), leaves(killed)
    differ = sorted(name for name in a.keys() | b.keys() if not _equal(a.get(name), b.get(name)))
    return done, starts, differ


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default: 10)")
    parser.add_argument("--epochs", type=int, default=30, help="of the run (default: 30)")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(1.0, 20.0), metavar=("MIN", "MAX"),
        help="after how long a start is killed, drawn evenly from this range (default: 1 20)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, starts, differ = kill_and_resume(
            arguments.kills,
            Path(folder),
            epochs=arguments.epochs,
            seconds=tuple(arguments.seconds),
            seed=arguments.seed,
        )
    verdict = f"differ in {len(differ)} leaves: {differ[:3]}" if differ else "equal, bit for bit"
    print(f"{done} kills, {starts} starts; parameters at the end: {verdict}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
