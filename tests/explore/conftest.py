"""Runs that nobody trained: random values in the places of trained ones."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxear.config import TrainConfig
from jaxear.data.pipeline import load_split
from jaxear.eigenears import EigenEars
from jaxear.explore.session import Explorer
from jaxear.model import create_vae
from jaxear.training.checkpoints import Checkpoints
from jaxear.training.state import Partition, Skeleton, create_state, split_model
from tests.training.tiny import tiny


@pytest.fixture(scope="module", autouse=True)
def _loops_left_open() -> Iterator[None]:
    """Gradio makes event loops that it never closes. They go now, or a later test would be blamed:
    the test that happens to run when they are collected."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def random_leaves(config: TrainConfig) -> tuple[Skeleton, Partition]:
    """A model's skeleton, and random arrays for it; nothing has to be compiled for that."""
    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(0, np.sqrt(2 / fan_in), leaf.shape), leaf.dtype)

    model = create_vae(config, config.image_size, rngs=nnx.Rngs(0), abstract=True)
    skeleton, abstract = split_model(model)
    groups = ({name: random(leaf) for name, leaf in group.items()} for group in abstract)
    return skeleton, Partition(*groups)


def write_run(config: TrainConfig) -> Path:
    """The directory of a run with a random model; only what the explorer reads of it."""
    _, leaves = random_leaves(config)
    config.run_dir.mkdir(parents=True)
    config.save(config.run_dir / "config.yaml")
    with Checkpoints(config.run_dir / "checkpoints") as checkpoints:
        checkpoints.save(create_state(leaves, optax.sgd(0.0)))
        checkpoints.wait()
    return config.run_dir


@pytest.fixture(scope="session")
def run_config(photographs, tmp_path_factory) -> TrainConfig:
    """The settings of `run`: 60 photographs of 20 people."""
    out = tmp_path_factory.mktemp("explore") / "run"
    return tiny(photographs, out, mirror_left=True, cache_dir="none")


@pytest.fixture(scope="session")
def run(run_config) -> Path:
    """A run on photographs, without eigenears."""
    return write_run(run_config)


@pytest.fixture(scope="session")
def explorer(run) -> Explorer:
    """The explorer of `run`, over all its ears; it has as many numbers in a code as the run."""
    return Explorer.open(run, progress=False)


@pytest.fixture(scope="session")
def few(explorer, run_config) -> Explorer:
    """The same with three components: most of an ear's code is then outside of them."""
    images = load_split(run_config, "train", progress=False).images
    eigenears = EigenEars.fit(explorer.eigenears.model, images, 3)
    return Explorer(eigenears, run_config, load_split(run_config, "all", progress=False))
