import pytest

from tests.training.tiny import without_eigenears


@pytest.fixture
def no_eigenears():
    """Leaves out what takes longest after training, where a test is about training alone."""
    with without_eigenears():
        yield
