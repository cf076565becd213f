from collections.abc import Iterator

import pytest

from tests.training.tiny import optimizations, optimized


@pytest.fixture(scope="package", autouse=True)
def _optimized() -> Iterator[None]:
    """What users run is compared with torch."""
    with optimized():
        yield


@pytest.fixture
def compiled_sooner() -> Iterator[None]:
    """For tests of what is computed and not of how: in other precisions, at other sizes, against
    planted faults."""
    with optimizations(False):
        yield
