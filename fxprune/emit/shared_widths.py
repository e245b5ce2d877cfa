"""Widths that the whole model shares: residual channels, vocabulary, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxprune.emit.patch import Patches, leaf_patches
from fxprune.emit.rebuilders import Rebuilder
from fxprune.emit.snapshot import MISSING_AXIS, Shape, mismatches
from fxprune.emit.solve import Search, explicit_fields, minimal

__all__ = ["SharedWidths", "shared_widths_for"]

_MOST_SOLUTIONS = 3
"""Bounds the time: each is combined with every choice for the blocks. Those with the fewest fields come first."""


@dataclass(frozen=True)
class SharedWidths:
    """One way to give everything around the blocks its wanted shapes.

    Args:
        fields: config fields that the whole model is built with.
        written_afterwards: config fields that no class accepts while it is built, and their values afterwards.
    """

    fields: Mapping[str, int]
    written_afterwards: Mapping[str, int] = field(default_factory=dict)

    def patches(self, rebuilder: Rebuilder, wanted: Mapping[str, Shape], extra: Mapping[str, int]) -> Patches:
        """Return attributes to set outside the blocks, given further fields that the whole model is built with."""
        module = rebuilder.build({**self.fields, **extra})
        return {} if module is None else leaf_patches(module, wanted, rebuilder.skip)


def shared_widths_for(rebuilder: Rebuilder, wanted: Mapping[str, Shape]) -> list[SharedWidths]:
    """Return ways to reach the wanted shapes outside the blocks, the likeliest first.

    Args:
        rebuilder: the model around its blocks.
        wanted: shapes by name outside the blocks.
    """
    dense = rebuilder.observe({})
    if dense is None:
        return []
    wrong = mismatches(dense.shapes, wanted)
    if not wrong:
        return [SharedWidths({})]
    optional = explicit_fields(rebuilder, dense)
    search = Search(rebuilder, optional, wanted)
    solutions = [minimal(rebuilder, {}, fields, optional) for fields in search.solutions()]
    solutions.sort(key=len)
    found = [SharedWidths(fields) for fields in solutions[:_MOST_SOLUTIONS]]
    partial = SharedWidths(minimal(rebuilder, {}, search.best, optional)) if search.best else None
    written_afterwards = {} if found else _foreseen(search)
    return [*found, *([partial] if partial else []), SharedWidths({}, written_afterwards)]


def _foreseen(search: Search) -> dict[str, int]:
    """Return the one field that would mend every wrong axis, were its value not refused by a constructor."""
    wrong = search.wrong({}) or frozenset()
    axes = [axis for axis in wrong if axis[1] != MISSING_AXIS]
    for name in search.rebuilder.known(search.base):
        values = [search.steps({}, name, frozenset({axis})) for axis in axes]
        if not axes or not all(value and value == values[0] for value in values):
            continue
        if search.rebuilder.observe({**search.base, name: values[0][0]}) is None:
            return {name: values[0][0]}
    return {}
