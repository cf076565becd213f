"""Nothing in the tests depends on the user's environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxear.train
from tests.training.tiny import quick_compilation, tiny

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one test has compiled, no other compiles again, nor a program that one starts; nothing
    outlives the session."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("jax-cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in settings.items():
            jax.config.update(name, value)
            monkeypatch.setenv(name.upper(), str(value))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_compilation() -> Iterator[None]:
    """Here, and in the programs that tests start, XLA optimises little; `optimized` undoes it."""
    with quick_compilation():
        yield


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared photographs are kept in a home of the session's own, not in the user's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _no_ported_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights that happen to lie in the user's folder must not change what a test sees."""
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path / "no-weights"))


@pytest.fixture
def trace_anew() -> Iterator[Callable[[], None]]:
    """To be called after a part of a network has been replaced: JAX would take blocks as it traced
    them before, and after the test those of the test."""
    yield jax.clear_caches
    jax.clear_caches()


@pytest.fixture(scope="session")
def ami() -> Path:
    """The AMI photographs, which are not part of the repository; without them tests skip."""
    folder = SHARED_DATA / "ami"
    if not folder.is_dir():
        pytest.skip("the AMI photographs are not at ../shared/data/ami")
    return folder


@pytest.fixture(scope="session")
def iitd() -> Path:
    """The IIT Delhi photographs, likewise."""
    folder = SHARED_DATA / "iitd"
    if not folder.is_dir():
        pytest.skip("the IIT Delhi photographs are not at ../shared/data/iitd")
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 subjects with 3 small pictures each, smooth and all different."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:40] / 40
    for subject in range(20):
        (folder / f"{subject:03d}").mkdir()
        colour, centre = rng.uniform(0.3, 0.9, 3), rng.uniform(0.35, 0.65, 2)
        for i in range(3):
            width = rng.uniform(0.1, 0.25)
            blob = np.exp(-(((x - centre[0]) / width) ** 2) - ((y - centre[1]) / (2 * width)) ** 2)
            image = np.uint8(255 * np.clip(0.2 + blob[..., None] * colour * 0.8, 0, 1))
            Image.fromarray(image).save(folder / f"{subject:03d}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The directory of a finished run of three epochs, three steps each."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    jaxear.train.train(tiny(photographs, out), progress=False)
    return out
