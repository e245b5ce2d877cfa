"""The tests of tracing export anew, whatever a session remembers."""

import pytest

from tests.exports import remember_exports


@pytest.fixture(autouse=True)
def exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program is made in the test that asks for it."""
    monkeypatch.setattr(remember_exports(), "fresh", True)
