"""Pictures speak of units, axes and ops in short words, and say in full what they mean."""

from __future__ import annotations

import networkx as nx

from fxprune.draw.atlas import Atlas
from fxprune.draw.view import Words, plural


def test_an_axis_has_a_short_label_and_a_full_description(small: nx.Graph) -> None:
    atlas = Atlas(small)
    words = Words(atlas)
    units = next(group for group in atlas.groups if group.size == 4)
    assert units.factor is not None and units.trigger is not None
    assert words.unit(units.factor) == words.kind(units)
    assert words.label(units.trigger).splitlines()[0] == f"{units.trigger.tensor}[{units.trigger.dim}]"
    assert f"group {units.name}: 4 units, {words.removal(units)}" in words.about(units.trigger)
    frozen = next(axis for axis in small.nodes if axis.tensor == "b.weight" and axis.dim == 0)
    assert "frozen, 2 units: " in words.about(frozen)


def test_counts_have_their_plural() -> None:
    assert (plural(1, "axis", "axes"), plural(2, "axis", "axes"), plural(1200, "unit")) == (
        "1 axis",
        "2 axes",
        "1,200 units",
    )
