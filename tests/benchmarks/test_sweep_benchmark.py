"""Test the benchmark of sweeps: it times each prune and their sweep, and compares their models."""

from __future__ import annotations

import pytest

from benchmarks.sweep import measure
from fxprune.recipes import Recipe
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer


@pytest.mark.slow
def test_prunes_are_timed_alone_and_together() -> None:
    recipe = Recipe(
        "short", "calibrate, find-groups, l2, select-by-ratio, least-squares, shrink, emit-model, make-report"
    )
    options = {"tokenizer": character_tokenizer(), "protect": (), "verify": False}
    alone, whole = measure(tiny("llama"), token_ids(4, 16), [0.1, 0.2], [recipe], **options)
    assert list(alone) == ["short-0.1", "short-0.2"] and min(whole, *alone.values()) > 0
