"""Kinds of units, and how they are spelled."""

from __future__ import annotations

import pytest

from fxprune.discovery.groups import DEFAULT_KINDS, as_kinds, bare_kind
from fxprune.errors import FxpruneError, UnknownNameError


def test_kinds_are_checked_and_one_may_stand_alone() -> None:
    assert as_kinds("mlp") == ("mlp",) and as_kinds(["head", "layer"]) == ("head", "layer")
    assert as_kinds(DEFAULT_KINDS) == DEFAULT_KINDS
    assert as_kinds(["exact-mlp", "exact-layer"]) == ("exact-mlp", "layer")
    with pytest.raises(UnknownNameError, match="Did you mean 'mlp'"):
        as_kinds("exact-mpl")
    with pytest.raises(UnknownNameError, match="Did you mean 'head'"):
        as_kinds(("heads",))
    with pytest.raises(FxpruneError, match="kinds is empty"):
        as_kinds(())
    assert bare_kind("exact-mlp") == bare_kind("mlp") == "mlp" and bare_kind(None) is None
