"""Settings of runs that take seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jaxear.eigenears
import jaxear.training.program
from jaxear.config import TrainConfig
from jaxear.training.sharding import JitParallel

# XLA's older way from HLO to LLVM, in one thread: half the time, where LLVM optimises nothing.
# Where it does, this one is the slower. The newest XLA knows the newer way only.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_get_compile_options = jax._src.compiler.get_compile_options

TINY_SAM = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "out_channels": 32,
}


def tiny(photographs: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of three epochs on small pictures with a small encoder."""
    config = TrainConfig(
        data=str(photographs),
        image_size=32,
        val_fraction=0.2,
        weights="none",
        backbone_options=TINY_SAM,
        latent_dim=8,
        head_width=256,
        decoder_channels=(16, 8),
        epochs=3,
        batch_size=8,
        out=str(out),
    )
    return dataclasses.replace(config, **changes)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Here runs that differ in nothing that is compiled are traced and compiled once, without XLA's
    optimisations: these take most of the time of such tests, and do not change what they say."""
    make, lower_train = jaxear.training.program.make_train_step, JitParallel.lower_train

    def make_train_step(config: TrainConfig, *arguments: Any, **options: Any) -> Any:
        step = make(config, *arguments, **options)
        step.made_from = repr((dataclasses.replace(config, out=None), arguments[-1]))
        return step

    def lowered_once(self: JitParallel, step: Any, *arguments: Any) -> Any:
        key = (
            self,
            getattr(step, "made_from", step),
            str(jax.tree.map(lambda x: (x.shape, x.dtype), arguments)),
        )
        if key not in _programs:
            lowered = lower_train(self, step, *arguments)
            _programs[key] = SimpleNamespace(compile=cache(lowered.compile))
        return _programs[key]

    with pytest.MonkeyPatch.context() as patch, optimizations(False):
        patch.setattr(jaxear.training.program, "make_train_step", make_train_step)
        patch.setattr(JitParallel, "lower_train", lowered_once)
        # For programs that are started: XLA reads its flags when it first compiles, as `quick` did.
        flags = " ".join(f"--{name}={value}" for name, value in quick().items())
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("XLA_FLAGS", flags)
        yield


@contextmanager
def optimized() -> Iterator[None]:
    """Here, and in programs that are started, XLA optimises as it does for users."""
    with pytest.MonkeyPatch.context() as patch, optimizations(True):
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        patch.delenv("XLA_FLAGS")
        jax.clear_caches()  # may hold programs for the same shapes, made without
        yield


@cache
def quick() -> dict[str, Any]:
    """Those of the options above that this XLA knows."""

    def known(name: str, value: Any) -> bool:
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    with optimizations(True):  # without them, compiling would ask this function
        return {name: value for name, value in QUICK.items() if known(name, value)}


@contextmanager
def optimizations(wanted: bool) -> Iterator[None]:
    """Whether XLA optimises here; programs that are started do as before."""
    before = jax.config.read("jax_disable_most_optimizations")

    def get_compile_options(*arguments: Any, **named: Any) -> Any:
        options = _get_compile_options(*arguments, **named)
        options.env_option_overrides = [*options.env_option_overrides, *quick().items()]
        return options

    chosen = _get_compile_options if wanted else get_compile_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.compiler, "get_compile_options", chosen)
        jax.config.update("jax_disable_most_optimizations", not wanted)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)


_programs: dict[Any, Any] = {}


@contextmanager
def without_eigenears() -> Iterator[None]:
    """In this context a run ends with its last epoch."""
    nothing = SimpleNamespace(explained_variance_ratio_=np.zeros(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxear.eigenears, "write_eigenears", lambda *args, **kwargs: nothing)
        yield
