"""Nothing in the tests depends on the user's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_ported_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights that happen to lie in the user's folder must not change what a test sees."""
    monkeypatch.setenv("JAXEAR_WEIGHTS", str(tmp_path / "no-weights"))


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
