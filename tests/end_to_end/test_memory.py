"""Many prunes in one process: what is over is gone."""

from __future__ import annotations

import collections
import gc
import os
import resource
import weakref
from typing import Any

import pytest

import fxprune
from tests.models import tiny

PRUNES = int(os.environ.get("FXPRUNE_PRUNES", "3"))
"""``FXPRUNE_PRUNES=50 pytest -s --timeout=0`` also shows what the process takes by then."""
WATCHED = ("GraphModule", "Graph", "ShapeEnv", "FakeTensorMode", "_DispatchCacheKey", "SymNode", "Facts", "Result")


def prune_once() -> list[weakref.ref[Any]]:
    """Weak references to what a prune works with and gives."""
    model = tiny("llama", num_hidden_layers=1, hidden_size=24)
    result = fxprune.prune(model, None, importance="l1", ratio=0.1, protect=())
    return [weakref.ref(found) for found in (model, result.graph_module, result.model, model.config)]


def census() -> dict[str, int]:
    """How many objects there are of each class that grew."""
    gc.collect()
    counted = collections.Counter(type(found).__name__ for found in gc.get_objects())
    return {name: counted[name] for name in WATCHED}


@pytest.mark.slow
def test_prunes_leave_nothing_behind() -> None:
    """Every prune left two megabytes: torch remembers results by symbols, and these hold the trace that they are of."""
    refs = prune_once()
    before = census()
    for turn in range(PRUNES - 1):
        refs += prune_once()
        if PRUNES > 3:
            print(turn + 2, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MB")
    after = census()
    assert not [ref for ref in refs if ref() is not None]
    assert all(after[name] <= before[name] + 2 for name in WATCHED), (before, after)
