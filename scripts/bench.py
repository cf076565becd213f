"""Time jaxear beside what else there is for each of its parts, on this machine, in one table.

    python scripts/bench.py                            everything, on the CPU, two threads each
    python scripts/bench.py --rows sam,vae --out speed.json
    python scripts/bench.py --device gpu --out gpu.json

What is compared takes turns, so that whatever else the machine does meets all alike: three turns at
least, fifteen where they are quick. Figures are medians with the lowest and the highest; ratios say
how many times as fast jaxear is, turn by turn. Weights are random, which costs the same; outputs
are compared where both sides have the same weights. Rows whose libraries are missing say so.

torch runs in a process of its own, with memory as any Python program has it; jaxear with memory
kept, as its commands do. --torch-keeps-memory gives torch the same, and GLIBC_TUNABLES= in front of
the command takes it from jaxear.

    sam      SAM ViT-B's encoder against Meta's code: eager, torch.compile, bfloat16
    timm     ResNet-50, ConvNeXt, EfficientNet-B3, MobileNetV3 against timm
    vae      the training step against its re-statement in torch; the first system's 1024x1024
    memory   SAM fine-tuned in bfloat16 with and without remat, by XLA's account
    pca      principal components against scikit-learn
    data     batches against torch's DataLoader with Pillow; preparation against decoding alone
    start    from the command to its first step, with a cold and a warm compilation cache
    parity   SAM's numbers on this device, in float32 with and without TF32, and bfloat16
    epoch    an epoch of `jaxear train` on synthetic ears, and what --dry-run said of it before
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxear.compilation_cache import keep_compiled_programs
from jaxear.process_memory import keep_memory_of_jax, restart_to_keep_memory

# In this order, so that what comes last suffers where time runs out: on a slow machine some of many
# networks, not whole groups. On a GPU FIRST_ON_GPU come first.
GROUPS = {
    "sam": "networks.sam_rows",
    "vae": "training.vae_rows",
    "memory": "training.memory_rows",
    "start": "inputs.start_rows",
    "parity": "networks.parity_rows",
    "pca": "inputs.pca_rows",
    "data": "inputs.data_rows",
    "epoch": "training.epoch_rows",
    "timm": "networks.timm_rows",
}
FIRST_ON_GPU = ("sam", "vae", "parity", "epoch")
# The last row that is begun may take a minute and a half.
MINUTES = {"cpu": 13.5, "gpu": 6.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rows", default=",".join(GROUPS), help="which, by commas (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each (default: 2)")
    parser.add_argument("--turns", type=int, default=3, help="at least (default: 3)")
    parser.add_argument(
        "--minutes", type=float, help="begin no row after this (default: 13.5; on a GPU 6.5)"
    )
    parser.add_argument(
        "--torch-keeps-memory",
        action="store_true",
        help="give torch, too, the settings of malloc that jaxear's commands start with",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that rows run")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"there are no rows {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    if arguments.device == "cpu":
        # XLA takes as many threads as there are cores that it may use when it starts.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch is on the same card

    from rich.console import Console

    keep_memory_of_jax()
    with tempfile.TemporaryDirectory() as compiled:
        keep_compiled_programs(compiled)  # what a dry run has compiled, a run need not again
        report = run(arguments, names, arguments.minutes or MINUTES[arguments.device])
    Console(width=None if sys.stdout.isatty() else 130).print(as_table(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def run(arguments: argparse.Namespace, names: list[str], minutes: float) -> dict[str, Any]:
    """All figures."""
    import jax
    import jax.numpy as jnp

    from jaxear.training.summary import versions
    from scripts.benchmarks.timing import Plan, Row, matmul_peak

    plan = Plan(
        arguments.device,
        arguments.threads,
        arguments.turns,
        torch_keeps_memory=arguments.torch_keeps_memory,
        smoke=arguments.smoke,
    )
    order = sorted(GROUPS, key=lambda name: plan.device == "gpu" and name not in FIRST_ON_GPU)
    began = time.perf_counter()
    dtypes = (jnp.float32, jnp.bfloat16) if arguments.device == "gpu" else (jnp.float32,)
    peaks = {jnp.dtype(dtype).name: matmul_peak(plan, dtype) for dtype in dtypes}
    rows: dict[str, list[Any]] = {}
    for name in (name for name in order if name in names):
        rows[name] = []
        module, function = GROUPS[name].split(".")
        for row in _until(
            began + 60 * minutes,
            lambda m=module, f=function: getattr(import_module(f"scripts.benchmarks.{m}"), f)(plan),
            lambda why, n=name: Row(n, missing=why),
        ):
            print(f"{time.perf_counter() - began:6.0f} s  {row.name}", file=sys.stderr, flush=True)
            if "flops" in row.facts:
                row.facts["share_of_matmul_peak"] = {
                    ours: row.facts["flops"] / row.median(ours) / peaks[dtype]
                    for ours, dtype in (("jaxear", "float32"), ("jaxear bf16", "bfloat16"))
                    if ours in row.seconds and dtype in peaks
                }
            rows[name].append(row.as_json())
    return {
        "device": jax.devices()[0].device_kind,
        "threads": arguments.threads,
        "matmul_peak_flops_per_second": peaks,
        "versions": {**versions(), **_version_of("torch"), **_version_of("timm")},
        "minutes": (time.perf_counter() - began) / 60,
        "rows": rows,
    }


def _until(
    end: float, make: Callable[[], Iterator[Any]], missing: Callable[[str], Any]
) -> Iterator[Any]:
    """The rows of a group, as long as there is time and nothing is missing; else why not."""
    from jaxear.errors import UserError

    try:
        rows = make()
        while time.perf_counter() < end:
            row = next(rows, None)
            if row is None:
                return
            yield row
        yield missing("no row is begun so late; see --minutes")
    except (ImportError, UserError) as error:
        yield missing(str(error))
    except (MemoryError, RuntimeError) as error:  # what XLA and torch raise, too, without memory
        yield missing(f"failed: {error}"[:300])


def _version_of(package: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def as_table(report: dict[str, Any]) -> Any:
    """The figures for people."""
    from rich.table import Table

    peaks = report["matmul_peak_flops_per_second"].items()
    title = f"{report['device']}; matrix products at " + ", ".join(
        f"{peak / 1e12:.2f} TFLOP/s in {dtype}" for dtype, peak in peaks
    )
    table = Table("what", "jaxear", "beside it", "times as fast", "", title=title)
    for rows in report["rows"].values():
        for row in rows:
            table.add_row(*_cells(row))
        table.add_section()
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [row["name"], "", "", "", row["missing"]]
    times = row.get("median_seconds", {})
    others = [name for name in times if name != "jaxear"]
    ratios = row.get("times_as_fast_as", {})
    notes = {
        "share_of_matmul_peak": lambda v: "\n".join(
            f"{name} at {100 * share:.0f} % of the peak" for name, share in v.items()
        ),
        "peak_bytes": lambda v: f"{v / 1e9:.2f} GB",
        "largest_difference": lambda v: f"differ by {v:.0e}",
        "images_per_second_of_ours_times_as_many": lambda v: f"ours: {v:.0f} times the images/s",
        "images_per_second": lambda v: "" if isinstance(v, dict) else f"{v:.0f} images/s",
        "foretold_images_per_second": lambda v: f"{v:.2f} times as many foretold",
        "foretold_peak_bytes": lambda v: f"{v:.2f} times as much memory foretold",
        "data_wait_share": lambda v: f"{100 * v:.1f} % waiting for data",
        "seconds_for_15029_ears": lambda v: f"{v:.1f} s for 15,029 ears",
    }
    for name in ("torch.compile", "torch bf16", "torch DataLoader"):
        notes[name] = lambda why, name=name: f"{name}: {why}"
    return [
        row["name"],
        _milliseconds(row["seconds"]["jaxear"]) if "jaxear" in times else "",
        "\n".join(f"{name} {_milliseconds(row['seconds'][name])}" for name in others),
        "\n".join(
            f"{ratios[name][0]:.2f} ({ratios[name][1]:.2f} to {ratios[name][2]:.2f})"
            for name in others
            if name in ratios
        ),
        "\n".join(filter(None, (show(row[key]) for key, show in notes.items() if key in row))),
    ]


def _milliseconds(seconds: list[float]) -> str:
    import statistics

    median = 1e3 * statistics.median(seconds)
    return f"{median:.0f} ms ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"


if __name__ == "__main__":
    restart_to_keep_memory()
    main()
