"""Progress that shows nothing."""

from __future__ import annotations

from fxprune.pipeline.contract import no_progress


def test_items_pass_as_they_are() -> None:
    items = iter([1, 2])
    assert no_progress(items, "work", 2) is items
