"""Which rows of a table run in the first tier of the tests, and which are left to `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["SLOW", "tiers"]

SLOW = pytest.mark.slow


def tiers(rows: Iterable[Any], *first: Any) -> list[Any]:
    """Parameters of a test: those of ``first`` run always, all other rows are marked slow.

    Raises:
        AssertionError: there is no such row.
    """
    rows = list(rows)
    assert all(row in rows for row in first), first
    return [row if row in first else pytest.param(row, marks=SLOW) for row in rows]
