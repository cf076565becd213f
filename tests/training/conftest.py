import jax
import pytest

import jaxear.train as train_module
from tests.training.tiny import tiny, without_eigenears


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
    """Most of the time of these tests is XLA's, and what they say does not depend on its speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package")
def finished(tmp_path_factory, photographs):
    """The directory of a finished run of three epochs, three steps each."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_module.train(tiny(photographs, out), progress=False)
    return out


@pytest.fixture
def no_eigenears():
    """Leaves out what takes longest after training, where a test is about training alone."""
    with without_eigenears():
        yield
