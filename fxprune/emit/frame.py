"""Widths that the whole model shares: residual channels, vocabulary, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxprune.emit.patch import Patches, leaf_patches
from fxprune.emit.sites import Site
from fxprune.emit.snapshot import MISSING_AXIS, Shape, mismatches
from fxprune.emit.solve import Search, explicit_fields, minimal

__all__ = ["Frame", "frames_for"]

_MOST_FRAMES = 3


@dataclass(frozen=True)
class Frame:
    """One way to give everything around the blocks its wanted shapes.

    Attributes:
        fields: Config fields that the whole model is built with.
        noted: Config fields that can only be written down afterwards.
    """

    fields: Mapping[str, int]
    noted: Mapping[str, int] = field(default_factory=dict)

    def patches(self, site: Site, wanted: Mapping[str, Shape], extra: Mapping[str, int]) -> Patches:
        """Attributes to set outside the blocks, given further fields that the whole model is built with."""
        module = site.build({**self.fields, **extra})
        return {} if module is None else leaf_patches(module, wanted, site.skip)


def frames_for(site: Site, wanted: Mapping[str, Shape]) -> list[Frame]:
    """Ways to reach the wanted shapes outside the blocks, the likeliest first.

    Args:
        site: The model around its blocks.
        wanted: Shapes by name outside the blocks.
    """
    dense = site.observe({})
    if dense is None:
        return []
    wrong = mismatches(dense.shapes, wanted)
    if not wrong:
        return [Frame({})]
    optional = explicit_fields(site, dense)
    search = Search(site, optional, wanted)
    solutions = [minimal(site, {}, fields, optional) for fields in search.solutions()]
    solutions.sort(key=len)
    found = [Frame(fields) for fields in solutions[:_MOST_FRAMES]]
    partial = Frame(minimal(site, {}, search.best, optional)) if search.best else None
    noted = {} if found else _foreseen(search)
    return [*found, *([partial] if partial else []), Frame({}, noted)]


def _foreseen(search: Search) -> dict[str, int]:
    """The one field that would mend every wrong axis, were its value not refused by a constructor."""
    wrong = search.wrong({}) or frozenset()
    axes = [axis for axis in wrong if axis[1] != MISSING_AXIS]
    for name in search.site.known(search.base):
        values = [search.steps({}, name, frozenset({axis})) for axis in axes]
        if not axes or not all(value and value == values[0] for value in values):
            continue
        if search.site.observe({**search.base, name: values[0][0]}) is None:
            return {name: values[0][0]}
    return {}
