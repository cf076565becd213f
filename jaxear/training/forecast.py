"""What a run will cost, before it begins: memory, operations, time; the largest batch that fits.

Memory is XLA's own account of the compiled step, so that nothing has to run out of it to find out.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from jaxear.config import AUTO_BATCH_SIZE, TrainConfig
from jaxear.data.dataset import EarImages
from jaxear.data.pipeline import load_split
from jaxear.data.records import subject_numbers
from jaxear.errors import UserError
from jaxear.training.distributed import is_main
from jaxear.training.feed import Feed, create_batches, stays_on_device
from jaxear.training.meters import StepClock, peak_bytes
from jaxear.training.program import (
    blank_batch,
    check,
    create_leaves,
    create_program,
    lower_step,
    resident_arrays,
)
from jaxear.training.sharding import create_parallel
from jaxear.training.state import create_state
from jaxear.training.summary import run_facts

logger = logging.getLogger(__name__)

# What of an accelerator's memory a step may take; the rest is for fragmentation and validation.
DEVICE_SHARE = 0.9
# What of a computer's available memory its step may take; the rest is for what the process keeps
# (`process_memory`), the data, checkpoints in the making and whatever else runs.
HOST_SHARE = 0.4
# A larger batch than this gains no speed and learns no better.
LARGEST_BATCH = 4096
# Steps that are timed, after one that is not.
TIMED_STEPS = 5


def memory_limit() -> int:
    """Bytes that a training step may take on each device."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(DEVICE_SHARE * limit)
    return int(HOST_SHARE * available_memory()) // jax.local_device_count()


def available_memory() -> int:
    """Bytes of the computer's memory that programs can still have; all of it where not known."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def n_image_bytes(ears: EarImages, config: TrainConfig) -> int:
    """Bytes of all training images."""
    return 3 * len(ears) * config.image_size**2


def step_bytes(config: TrainConfig, ears: EarImages) -> int:
    """Peak memory of the training step on each device, by XLA's account, without a step taken."""
    parallel = create_parallel(config.parallel, config.batch_size, config.accumulate)
    program = create_program(config, parallel, len(ears) // config.batch_size)
    resident = stays_on_device(config, n_image_bytes(ears, config))
    constants = resident_arrays(program, ears.images if resident else None)
    compiled = lower_step(program, config, parallel, constants).compile()
    return peak_bytes(compiled)


def largest_batch_size(config: TrainConfig, ears: EarImages, limit: int | None = None) -> int:
    """The largest batch whose training step fits: a power of two times what batches are cut into.

    Two small batches tell how memory grows; what that leads to is compiled, and so are the next
    ones, until one fits and its double does not.

    Args:
        config: the settings; its own batch size is ignored.
        ears: the training split; a batch holds each image once at most.
        limit: bytes on each device; `memory_limit()` by default.

    Raises:
        UserError: not even the smallest batch fits, or there are fewer images than it has.
    """
    if limit is None:  # the processes of a run must agree
        limit = int(np.min(multihost_utils.process_allgather(np.float64(memory_limit()))))
    unit = jax.device_count() * config.accumulate
    if len(ears) < unit:
        raise UserError(
            f"The training split has {len(ears)} images, fewer than one for each of {unit} parts "
            "of a batch."
        )
    most = 1
    while 2 * most * unit <= min(len(ears), max(LARGEST_BATCH, unit)):
        most *= 2
    known: dict[int, int] = {}

    def needs(factor: int) -> int:
        if factor not in known:
            sized = dataclasses.replace(config, batch_size=factor * unit)
            known[factor] = step_bytes(sized, ears)
        return known[factor]

    if needs(1) > limit:
        raise UserError(
            f"Not even a batch of {unit} fits: its step needs {_gigabytes(needs(1))} of memory, "
            f"and {_gigabytes(limit)} may be used. Take a smaller backbone or image size, --remat "
            "true, or --freeze all."
        )
    # From the first guess on, up or down until the boundary is found.
    probe = min(8, most)
    growth = max(1, (needs(probe) - needs(1)) // max(1, probe - 1))
    factor = 1
    while factor < most and needs(1) + (2 * factor - 1) * growth <= limit:
        factor *= 2
    while factor > 1 and needs(factor) > limit:
        factor //= 2
    while factor < most and needs(2 * factor) <= limit:
        factor *= 2
    logger.info(
        "Batches of %d: the step needs %s of the %s that may be used",
        factor * unit,
        _gigabytes(needs(factor)),
        _gigabytes(limit),
    )
    return factor * unit


def with_batch_size(config: TrainConfig, ears: EarImages) -> TrainConfig:
    """The settings with a batch size, chosen here if they leave it open."""
    if config.batch_size != AUTO_BATCH_SIZE:
        return config
    return dataclasses.replace(config, batch_size=largest_batch_size(config, ears))


def forecast(config: TrainConfig, *, steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Measure what a run would cost: everything up to a few steps of it. Nothing is kept.

    Args:
        config: all settings.
        steps: how many are timed; their batches are read as the run would read them.

    Returns:
        The facts of `summary.json` that are known before training (params_total, peak_bytes,
        compile_seconds, ...), and batch_size, steps_per_epoch, flops_per_image (XLA's count for the
        compiled step), step_ms_median, images_per_second, run_seconds (of all steps; validation and
        figures come on top).

    Raises:
        UserError: as the run itself would.
    """
    check(config)
    ears = load_split(config, "train", progress=is_main())
    config = with_batch_size(config, ears)
    parallel = create_parallel(config.parallel, config.batch_size, config.accumulate)
    batches = create_batches(config, ears)
    program = create_program(config, parallel, batches.steps_per_epoch)
    leaves = create_leaves(program, config)
    state = create_state(leaves, program.optimizer, average=config.ema_decay > 0)
    facts = run_facts(config, state)
    resident = stays_on_device(config, n_image_bytes(ears, config))
    constants = resident_arrays(program, ears.images if resident else None)
    feed = Feed(batches, subject_numbers(ears.records), parallel, resident=resident)

    clock = StepClock(config.batch_size)
    with clock.compilation():
        compiled = lower_step(program, config, parallel, constants).compile()
    facts |= clock.compiled(compiled)
    state, constants = parallel.put_state(state), parallel.put_resident(constants)
    blank = parallel.put_batch(blank_batch(program, config, resident=resident))
    # Features that would be computed once and kept are not computed for this.
    source = (blank for _ in range(steps + 1))
    if not config.cache_features:
        source = feed.iterate(0, steps + 1)
    for batch in source:
        with clock.step():
            state, metrics = compiled(state, constants, batch)
            parallel.scalars(metrics)
        clock.wait(feed.take_waited())
    facts |= clock.result()
    run_steps = config.epochs * batches.steps_per_epoch
    cost: Any = compiled.cost_analysis()
    flops = cost["flops"] if isinstance(cost, dict) else cost[0]["flops"]
    return facts | {
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "steps_per_epoch": batches.steps_per_epoch,
        # XLA counts those of one device.
        "flops_per_image": flops * jax.device_count() / config.batch_size,
        "run_seconds": run_steps * config.batch_size / clock.images_per_second,
    }


def print_forecast(facts: dict[str, Any], console: Console) -> None:
    """Show what `forecast` returned."""
    table = Table(show_header=False, title="What this run costs", title_justify="left")
    devices = f"{facts['n_devices']} x {facts['device']}"
    rows = {
        "parameters": f"{facts['params_total']:,}",
        "of them trained": f"{facts['params_trainable']:,}",
        "batch": f"{facts['batch_size']} images on {devices}",
        "steps": f"{facts['epochs']} epochs of {facts['steps_per_epoch']}",
        "operations per image": f"{facts['flops_per_image'] / 1e9:.1f} GFLOP, forward and backward",
        "peak memory per device": f"{_gigabytes(facts['peak_bytes'])} by XLA's account",
        "compilation": f"{facts['compile_seconds']:.1f} s",
        "speed": f"{facts['images_per_second']:.1f} images/s",
        "waiting for data": f"{100 * facts['data_wait_share']:.1f} % of the time",
        "all steps of the run": _duration(facts["run_seconds"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print("Nothing was written. Validation and figures come on top.", highlight=False)


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
