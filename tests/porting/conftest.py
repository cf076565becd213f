from collections.abc import Iterator

import pytest

from tests.training.tiny import optimized


@pytest.fixture(scope="package", autouse=True)
def _optimized() -> Iterator[None]:
    """What users run is compared with torch."""
    with optimized():
        yield
