import pytest

from tests.training.tiny import quick_compilation


@pytest.fixture(scope="package", autouse=True)
def _quick_compilation():
    with quick_compilation():
        yield
