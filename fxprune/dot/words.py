"""The words of a picture: names of units, axes, ops and couplings, short for labels and full for tooltips."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence

from fxprune.axes import Factor, kept_size, render
from fxprune.discovery.explain import exactness
from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.fold import Fold, numbered
from fxprune.dot.view import Coupling
from fxprune.graph.blocks import owner_block
from fxprune.rules.registry import moves_values
from fxprune.rules.statements import Axis

__all__ = ["REMOVAL", "Words", "plural"]

_WIDTH = 26
"""Characters of a line in a box: two boxes then fit side by side where a layer has parallel branches."""
_LONG_OP = 16
"""Longer names of ops are told by their initials, or one of them would set the width of the picture."""
_OPS_SHOWN = 6
"""Of a longer chain the first and last ops are shown; the tooltip has them all."""

REMOVAL = {"exact": "exact", "masked": "exact, norms as masked", "renormalised": "renormalised"}
"""What a picture says of a removal, by :func:`fxprune.discovery.explain.exactness`."""


class Words:
    """Says in words what an atlas holds.

    Args:
        atlas: the graph.
        folds: sets of blocks of which one is shown.
    """

    def __init__(self, atlas: Atlas, folds: Sequence[Fold] = ()) -> None:
        self._atlas, self._folds = atlas, folds
        self._shared_heads = frozenset(g.outer for g in atlas.groups if g.kind == "head" and g.outer is not None)
        self._hidden = tuple(block for fold in folds for block in fold.hidden)
        self._axes = {axis: alike for fold in folds for axis, alike in fold.axes.items()}
        self._factors = {factor: alike for fold in folds for factor, alike in fold.factors.items()}

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
        """What ``axis`` is made of, as in ``(kv_head:2 * query_head:2 * [head_dim:8 | head_dim:8])``.

        Of blocks drawn as one it has the least and the largest size, as in ``mlp:1024..1480``; with a plan what was and
        what stays, as in ``mlp:1536→1184``.
        """
        return render(self._atlas.graph.nodes[axis]["expr"], self.unit, self.amount)

    def amount(self, factor: Factor) -> str:
        """How many units ``factor`` has, and how many stay."""
        keep, alike = self._atlas.keep, self._factors.get(factor, (factor,))
        before = _span(f.size for f in alike)
        left = [f for f in alike if not self._goes(f)]
        after = before if keep is None else _span(map(keep.count, left)) if left else "0"
        return before if before == after else f"{before}→{after}"

    def share(self, axis: Axis) -> float:
        """Return how much of ``axis`` a plan leaves, from 0 to 1; of blocks drawn as one, on average of those left."""
        keep, nodes = self._atlas.keep, self._atlas.graph.nodes
        if keep is None:
            return 1.0
        left = [nodes[a] for a in self._axes.get(axis, (axis,)) if not self._is_removed(a)]
        return sum(kept_size(node["expr"], keep) / node["size"] for node in left) / len(left) if left else 0.0

    def label(self, axis: Axis) -> str:
        """``axis`` in two or three short lines."""
        tensor = axis.tensor
        if tensor in self._atlas.weights:
            tensor = ".".join(tensor.split(".")[-2:])
        lines = textwrap.wrap(self.expression(axis), _WIDTH, break_long_words=False, break_on_hyphens=False)
        share = self.share(axis)
        stays = [f"{share:.0%} stays"] if share < 1 else []
        return "\n".join((f"{tensor}[{axis.dim}]", *lines, *stays))

    def about(self, axis: Axis) -> str:
        """Everything about ``axis``."""
        data, atlas = self._atlas.graph.nodes[axis], self._atlas
        lines = [
            f"{data['role']} {axis.tensor}, axis {axis.dim}, {plural(data['size'], 'position')}",
            self.expression(axis),
        ]
        if atlas.is_sum(axis):
            lines.append("residual add: the stream and what a branch computed from it")
        for factor in atlas.factors(axis):
            group, freeze = atlas.by_factor.get(factor), atlas.axes.frozen.get(factor)
            if group is not None:
                lines.append(f"group {group.name}: {plural(factor.size, 'unit')}, {self.removal(group)}")
            elif freeze is not None:
                lines.append(f"frozen, {plural(factor.size, 'unit')}: {freeze}")
        fold = next((fold for fold in self._folds if axis in fold.axes and fold.hidden), None)
        if fold is not None:
            lines.append(f"the same in {numbered(fold.blocks, atlas.axes.blocks)}")
        if atlas.keep is not None:
            lines.append(f"the plan leaves {self.share(axis):.1%} of it{' on average' if fold else ''}")
        return "\n".join(lines)

    def removal(self, group: Group) -> str:
        """Whether removal of units of ``group`` equals masking them."""
        return REMOVAL[exactness(self._atlas.axes, group)]

    def op(self, name: str) -> str:
        """The op ``name`` in short: ``linear`` for ``aten.linear.default``, initials for long names."""
        if name in self._atlas.weights:
            return "tied"
        parts = name.strip("<>").rpartition(" ")[2].split(".")
        short = parts[1] if len(parts) > 1 else parts[0]
        return "".join(word[0] for word in short.split("_") if word) if len(short) > _LONG_OP else short

    def ops(self, coupling: Coupling) -> str:
        """The ops on the shortest way of ``coupling``; repeats, moves of data and the middle of long ones left out.

        The add that makes a residual sum is left out too, as its sign says it.
        """
        way = min(coupling.ways.values(), key=len)
        steps = self._steps(way)
        if self._atlas.is_sum(coupling.target) and steps[-1][1] == coupling.target.tensor:
            steps = steps[:-1]
        ops = [op for op, _ in steps]
        names = [self.op(op) for op in ops if not moves_values(op)] or [self.op(op) for op in ops]
        names = [name for name, _ in itertools.groupby(names)]
        inner = {owner_block(self._atlas.module(axis), self._hidden) for axis in way[1:]} - {None}
        if inner and self._atlas.is_activation(coupling.source):
            return textwrap.fill(f"through {plural(len(inner), 'more block')}", _WIDTH)
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

    def _goes(self, factor: Factor) -> bool:
        """Whether a block goes that all units of ``factor`` are in."""
        group = self._atlas.by_factor.get(factor)
        return group is not None and group.block in self._atlas.removed

    def _is_removed(self, axis: Axis) -> bool:
        return owner_block(self._atlas.module(axis), self._atlas.removed) is not None


def plural(count: int, word: str, words: str = "") -> str:
    """``count`` and ``word``, or ``words`` where there are several (by default with an s)."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {words or word + 's'}"


def _span(sizes: Iterable[int]) -> str:
    """One size, or the least and the largest."""
    found = set(sizes)
    return f"{min(found)}" if len(found) == 1 else f"{min(found)}..{max(found)}"
