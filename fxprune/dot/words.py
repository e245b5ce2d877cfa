"""The words of a picture: names of units, axes, ops and couplings, short for labels and full for tooltips."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence

from fxprune.axes import Factor, render
from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.view import Coupling
from fxprune.rules.registry import moves_values
from fxprune.rules.statements import Axis

__all__ = ["Words", "exactness", "plural"]

_WIDTH = 26
"""Characters of a line in a box: two boxes then fit side by side where a layer has parallel branches."""
_LONG_OP = 16
"""Longer names of ops are told by their initials, or one of them would set the width of the picture."""
_OPS_SHOWN = 6
"""Of a longer chain the first and last ops are shown; the tooltip has them all."""


class Words:
    """Says in words what an atlas holds."""

    def __init__(self, atlas: Atlas) -> None:
        self._atlas = atlas
        inner = {g.outer for g in atlas.groups if g.kind == "head" and g.outer is not None}
        self._shared_heads = frozenset(inner)

    def unit(self, factor: Factor) -> str:
        """What a unit of ``factor`` is: the kind of its group, ``fixed`` if frozen, ``free`` if in no group."""
        group = self._atlas.by_factor.get(factor)
        if group is not None:
            return self.kind(group)
        return "fixed" if factor in self._atlas.axes.frozen else "free"

    def kind(self, group: Group) -> str:
        """The kind of ``group``; of heads in heads, the outer are KV heads and the inner query heads."""
        if group.kind == "head" and group.factor in self._shared_heads:
            return "kv_head"
        return "query_head" if group.kind == "head" and group.outer in self._shared_heads else group.kind

    def expression(self, axis: Axis) -> str:
        """What ``axis`` is made of, as in ``(kv_head:2 * query_head:2 * [head_dim:8 | head_dim:8])``."""
        return render(self._atlas.graph.nodes[axis]["expr"], self.unit)

    def label(self, axis: Axis) -> str:
        """``axis`` in two or three short lines."""
        tensor = axis.tensor
        if tensor in self._atlas.weights:
            tensor = ".".join(tensor.split(".")[-2:])
        lines = textwrap.wrap(self.expression(axis), _WIDTH, break_long_words=False, break_on_hyphens=False)
        return "\n".join((f"{tensor}[{axis.dim}]", *lines))

    def about(self, axis: Axis) -> str:
        """Everything about ``axis``."""
        data = self._atlas.graph.nodes[axis]
        lines = [
            f"{data['role']} {axis.tensor}, axis {axis.dim}, {plural(data['size'], 'position')}",
            self.expression(axis),
        ]
        for factor in self._atlas.factors(axis):
            group, freeze = self._atlas.by_factor.get(factor), self._atlas.axes.frozen.get(factor)
            if group is not None:
                lines.append(f"group {group.name}: {plural(factor.size, 'unit')}, {exactness(group)}")
            elif freeze is not None:
                lines.append(f"frozen, {plural(factor.size, 'unit')}: {freeze}")
        return "\n".join(lines)

    def op(self, name: str) -> str:
        """The op ``name`` in short: ``linear`` for ``aten.linear.default``, initials for long names."""
        if name in self._atlas.weights:
            return "tied"
        parts = name.strip("<>").rpartition(" ")[2].split(".")
        short = parts[1] if len(parts) > 1 else parts[0]
        return "".join(word[0] for word in short.split("_") if word) if len(short) > _LONG_OP else short

    def ops(self, coupling: Coupling) -> str:
        """The ops on the shortest way of ``coupling``; repeats, moves of data and the middle of long ones left out."""
        way = min(coupling.ways.values(), key=len)
        ops = [op for op, _ in self._steps(way)]
        names = [self.op(op) for op in ops if not moves_values(op)] or [self.op(op) for op in ops]
        names = [name for name, _ in itertools.groupby(names)]
        if len(names) > _OPS_SHOWN:
            names = [*names[: _OPS_SHOWN // 2], "...", *names[-_OPS_SHOWN // 2 :]]
        return textwrap.fill(" · ".join(names), _WIDTH)

    def way(self, coupling: Coupling) -> str:
        """Every op and tensor on the ways of ``coupling``, and what is coupled over each."""
        units: dict[tuple[Axis, ...], list[str]] = {}
        for factor, way in coupling.ways.items():
            units.setdefault(way, []).append(self.unit(factor))
        return "\n".join(line for way, names in units.items() for line in self._told(way, names))

    def _told(self, way: tuple[Axis, ...], names: list[str]) -> list[str]:
        lines = [f"{', '.join(dict.fromkeys(names))}: from {way[0].tensor}[{way[0].dim}]"]
        for (op, node), axis in zip(self._steps(way), way[1:], strict=True):
            lines.append(f"  {op} (at {node}) to {axis.tensor}[{axis.dim}]")
            if node in self._atlas.axes.rules:
                # another arrow than that of the language, so that lines of a file can be told from tooltips
                lines.append(f"    {self._atlas.axes.rules[node].replace('->', '→')}")
        return lines

    def _steps(self, way: Sequence[Axis]) -> list[tuple[str, str]]:
        edges = (self._atlas.graph.edges[pair] for pair in itertools.pairwise(way))
        return [(edge["op"], edge["node"]) for edge in edges]


def exactness(group: Group) -> str:
    """Whether removal equals masking."""
    return "renormalised" if group.renormalised else "exact"


def plural(count: int, word: str, words: str = "") -> str:
    """``count`` and ``word``, or ``words`` where there are several (by default with an s)."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {words or word + 's'}"
