"""Time jaxear's PCA side by side with scikit-learn's, or measure the memory of a stream from disk.

    python scripts/bench_pca.py --out bench.json             10,000 x 12,288, 128 components
    python scripts/bench_pca.py --memory --out memory.json   28,000 x 49,152 uint8, 512 components

The methods take turns, so that whatever else the machine does falls on all of them, and medians are
compared. jaxear's iterations run to their default accuracy of 1e-6, and once more to 0.1 % of each
explained variance, which is nearer to what scikit-learn's reach. The rows are float32 with
variances that fall off as those of photographs do (component i has i^-1.5 of the first), noise and
a mean. Explained variance is that of each method's own account; the most that k directions can
explain is the highest, so a larger one is the more accurate.
"""

from __future__ import annotations

from jaxear.process_memory import keep_memory_of_jax, restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # for all that are compared, before the imports that take seconds

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn import decomposition

from jaxear.pca import PCA


def photograph_like(n: int, d: int, seed: int = 0, rank: int = 600) -> np.ndarray:
    """Rows [n, d], float32, with a falling spectrum and a mean."""
    rng = np.random.default_rng(seed)
    scales = np.arange(1, rank + 1, dtype=np.float32) ** -0.75
    rows = (rng.standard_normal((n, rank), np.float32) * scales) @ rng.standard_normal(
        (rank, d), np.float32
    )
    rows += 0.01 * rng.standard_normal((n, d), np.float32)
    return rows + 5 * rng.standard_normal(d, np.float32)


def compare(n: int, d: int, k: int, turns: int, stream_turns: int) -> dict[str, Any]:
    """Seconds and explained variance of each method on rows [n, d] with k components."""
    X = photograph_like(n, d)
    # Its default, 5 d rows in a batch, would be one SVD of everything; 256 rows are slower.
    incremental = decomposition.IncrementalPCA(k, batch_size=1000)

    def ours(solver: str, tol: float) -> Callable[[], Any]:
        return lambda: PCA(k, svd_solver=solver, tol=tol, random_state=0).fit(X)

    methods: dict[str, Callable[[], Any]] = {
        "jaxear randomized": ours("randomized", 0),
        "jaxear randomized 0.1 %": ours("randomized", 1e-3),
        "sklearn randomized": lambda: decomposition.PCA(
            k, svd_solver="randomized", random_state=0
        ).fit(X),
        "jaxear stream": ours("stream", 0),
        "jaxear stream 0.1 %": ours("stream", 1e-3),
        "sklearn IncrementalPCA": lambda: incremental.fit(X),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    fitted: dict[str, Any] = {}
    first = {}
    for name in (name for name in methods if name.startswith("jaxear")):
        start = time.perf_counter()
        methods[name]()
        first[name] = time.perf_counter() - start
    for turn in range(turns):
        for name, fit in methods.items():
            if "randomized" not in name and turn >= stream_turns:
                continue
            start = time.perf_counter()
            fitted[name] = fit()
            seconds[name].append(time.perf_counter() - start)
            print(f"turn {turn + 1}/{turns}  {name:24s} {seconds[name][-1]:8.2f} s", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    beside = {"randomized": "sklearn randomized", "stream": "sklearn IncrementalPCA"}
    reference = fitted["jaxear randomized"].explained_variance_
    return {
        "shape": [n, d],
        "components": k,
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "seconds": seconds,
        "seconds_median": medians,
        "seconds_first_call": first,
        "explained_variance_total": {
            m: float(p.explained_variance_.sum()) for m, p in fitted.items()
        },
        "largest_deviation_of_a_component": {
            m: float(np.max(np.abs(p.explained_variance_ / reference - 1)))
            for m, p in fitted.items()
        },
        "times_as_fast": {
            name: {other: medians[other] / medians[name]}
            for solver, other in beside.items()
            for name in (f"jaxear {solver}", f"jaxear {solver} 0.1 %")
        },
    }


def print_table(result: dict[str, Any]) -> None:
    n, d = result["shape"]
    k, device = result["components"], result["device"]
    print(f"\n{n:,} x {d:,}, {k} components, {device}, jax {result['jax']}")
    print(f"{'method':24s} {'median s':>9s} {'runs':>5s} {'variance':>12s} {'relative':>13s} worst")
    total = result["explained_variance_total"]
    for name, median in result["seconds_median"].items():
        print(
            f"{name:24s} {median:9.2f} {len(result['seconds'][name]):5d} {total[name]:12.6g} "
            f"{total[name] / total['jaxear randomized']:13.6f}  "
            f"{result['largest_deviation_of_a_component'][name]:.1e}"
        )
    for name, ratios in result["times_as_fast"].items():
        for other, ratio in ratios.items():
            print(f"{name}: {ratio:.2f} times as fast as {other}")


def write_photographs(path: Path, n: int, d: int, block: int = 500) -> None:
    """A file of uint8 rows [n, d] in the manner of photograph_like, written block by block."""
    rng = np.random.default_rng(0)
    rank = 600
    scales = 60 * np.arange(1, rank + 1, dtype=np.float32) ** -0.75
    directions = rng.standard_normal((rank, d), np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.uint8, (n, d))
    for start in range(0, n, block):
        stop = min(start + block, n)
        x = (rng.standard_normal((stop - start, rank), np.float32) * scales) @ directions / 2 + 128
        rows[start:stop] = np.clip(x, 0, 255)
    rows.flush()


def measure_memory(path: Path, k: int) -> dict[str, Any]:
    """Peak resident memory, in GiB, of a fresh process that fits k components to the file."""
    code = (
        "import json, resource, sys, time, numpy as np\n"
        "from jaxear.pca import PCA\n"
        "X = np.load(sys.argv[1], mmap_mode='r')\n"
        "start = time.perf_counter()\n"
        "pca = PCA(int(sys.argv[2]), svd_solver='stream', random_state=0).fit(X)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "share = float(pca.explained_variance_ratio_.sum())\n"
        "print(json.dumps({'shape': X.shape, 'components': pca.n_components_, 'peak_gib': peak,\n"
        "                  'seconds': time.perf_counter() - start, 'explained': share}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path), str(k)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory of a stream from disk"
    )
    parser.add_argument("--samples", type=int)
    parser.add_argument("--features", type=int)
    parser.add_argument("--components", type=int)
    parser.add_argument(
        "--turns", type=int, default=5, help="times that each method runs (default 5)"
    )
    parser.add_argument(
        "--stream-turns", type=int, help="turns of the slow stream and IncrementalPCA"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    keep_memory_of_jax()
    if args.memory:
        n, d, k = args.samples or 28_000, args.features or 49_152, args.components or 512
        with tempfile.TemporaryDirectory(dir=args.out.parent if args.out else None) as folder:
            path = Path(folder) / "rows.npy"
            write_photographs(path, n, d)
            result = measure_memory(path, k)
        peak, seconds = result["peak_gib"], result["seconds"]
        print(f"{n:,} x {d:,} uint8, {k} components: peak {peak:.2f} GiB, {seconds:.0f} s")
    else:
        n, d, k = args.samples or 10_000, args.features or 12_288, args.components or 128
        result = compare(n, d, k, args.turns, args.stream_turns or args.turns)
        print_table(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
