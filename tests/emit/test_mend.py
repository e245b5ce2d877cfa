"""Attributes that only one kernel reads are divided, one at a time, and widths are left alone."""

from __future__ import annotations

from fxprune.emit.assemble import Candidate, mended
from fxprune.emit.recipe import Recipe


def test_small_attributes_around_widths_are_divided() -> None:
    attributes = {
        "layers.1.attention": {"groups": 4, "index": 1, "width": 48},
        "layers.1.attention.query": {"out": 16},
    }
    candidate = Candidate(Recipe(attributes=attributes), frozenset(), ())
    found = list(mended(candidate, ["layers.1.attention.query.weight"]))
    assert [one.recipe.attributes["layers.1.attention"]["groups"] for one in found] == [1, 2]
    assert all(one.recipe.attributes["layers.1.attention.query"] == {"out": 16} for one in found)
    assert candidate.recipe.attributes == attributes
