"""Timing side by side, and what a row of the table is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OURS = "jaxear"


@dataclass(frozen=True)
class Plan:
    """How the benchmark is to run.

    Attributes:
        device: "cpu" or "gpu", for both frameworks.
        threads: of each framework, on a CPU.
        turns: of each row at least.
        most_turns: of each row, as long as there is time.
        seconds: after how long a row ends that has had its least turns.
        torch_keeps_memory: as jaxear does (`jaxear.process_memory`).
        smoke: tiny sizes, to see that every row runs; its figures mean nothing.
    """

    device: str = "cpu"
    threads: int = 2
    turns: int = 3
    most_turns: int = 15
    seconds: float = 4.0
    torch_keeps_memory: bool = False
    smoke: bool = False

    def size(self, wanted: int, tiny: int) -> int:
        """A size of the problem, or the tiny one of a smoke test."""
        return tiny if self.smoke else wanted


@dataclass
class Row:
    """A line of the table.

    Attributes:
        name: what was done.
        seconds: contender -> seconds of each turn; ours first.
        images: images of one turn, for images per second; 0 where there are none.
        facts: other figures: flops, peak_bytes, notes, ...
        missing: why there are no figures.
    """

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    images: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None

    def median(self, contender: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[contender])

    def ratio(self, contender: str) -> tuple[float, float, float]:
        """How many times as fast as a contender we are: median, lowest and highest of the turns."""
        pairs = zip(self.seconds[contender], self.seconds[OURS], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        result: dict[str, Any] = {"name": self.name, **self.facts}
        if self.missing:
            return result | {"missing": self.missing}
        if not self.seconds:
            return result
        result["seconds"] = self.seconds
        result["median_seconds"] = {name: self.median(name) for name in self.seconds}
        if self.images:
            result["images_per_second"] = {n: self.images / self.median(n) for n in self.seconds}
        if OURS in self.seconds:
            result["times_as_fast_as"] = {n: self.ratio(n) for n in self.seconds if n != OURS}
        return result


def alternate(
    plan: Plan, contenders: Mapping[str, Callable[[], Any]], *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every contender, one turn each in turn, so that what else happens meets all alike.

    Each must wait for its own result. Each is called once before, to compile and to warm up; not so
    without `warm_up`, for what is compiled already and takes so long that warmth is no matter.
    """
    if warm_up:
        for contender in contenders.values():
            contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for turn in range(1 if plan.smoke else plan.most_turns):
        if turn >= plan.turns and time.perf_counter() - began > plan.seconds:
            break
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def matmul_peak(plan: Plan, dtype: Any) -> float:
    """FLOP/s of the largest matrix product that is quick to time: what the others are shares of."""
    n = plan.size(8192 if plan.device == "gpu" else 2048, 256)
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((n, n), dtype)
    seconds = alternate(plan, {OURS: lambda: jax.block_until_ready(product(a, a))})
    return 2 * n**3 / min(seconds[OURS])


def cost_of(compiled: Any) -> dict[str, float]:
    """XLA's own account of a compiled function: flops, and peak_bytes."""
    from jaxear.training.meters import peak_bytes

    cost = compiled.cost_analysis()
    cost = cost if isinstance(cost, dict) else cost[0]
    return {"flops": float(cost["flops"]), "peak_bytes": peak_bytes(compiled)}


def random_images(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """Normalised images [b, h, w, 3], float32."""
    return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def largest_difference(ours: Any, theirs: Any) -> float:
    """max |ours - theirs| / max |theirs|, both arrays of one shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
