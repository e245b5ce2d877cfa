"""Slim models, and one of them saved."""

from pathlib import Path
from typing import Any

import pytest

import fxprune
from tests.checkpoint.small import narrow
from tests.remembered import pruned

UNEVEN = {"ratio": 0.15, "importance": "l2", "kinds": ("mlp",), "ranking": "global", "protect": (1, 0)}


@pytest.fixture(scope="module")
def slim() -> Any:
    return narrow()


@pytest.fixture(scope="module")
def uneven() -> fxprune.Result:
    """A prune whose layers differ."""
    result: fxprune.Result = pruned("llama", **UNEVEN)
    assert result.model.fxprune_overrides.block_fields
    return result


@pytest.fixture
def folder(uneven: fxprune.Result, tmp_path: Path) -> Path:
    uneven.save_pretrained(tmp_path / "slim")
    return tmp_path / "slim"
