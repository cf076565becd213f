import pytest

from tests.training.tiny import quick_compilation, without_eigenears


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
    with quick_compilation():
        yield


@pytest.fixture
def no_eigenears():
    """Leaves out what takes longest after training, where a test is about training alone."""
    with without_eigenears():
        yield
