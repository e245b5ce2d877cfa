"""Pictures as Graphviz text: clusters, boxes, lines and a legend, made from a view."""

from __future__ import annotations

import colorsys
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pydot

from fxprune.axes import Factor
from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.view import Coupling, View
from fxprune.dot.words import Words, exactness, plural
from fxprune.rules.statements import Axis

__all__ = ["draw"]

_GREY, _WHITE, _LINE = "#d0d0d0", "#ffffff", "#8a8a8a"
_FONT = "Helvetica"
_LEGEND_ROWS = 24
"""Rows that fit beside a picture of one block; a model of many blocks has hundreds of groups."""
_NOTES = (
    "box: an axis, as tensor[axis], and what it is made of; hover for more",
    "line: these ops couple two axes; what one loses, the other loses too",
    "dotted line: two axes of one tensor",
)
_HUES = (0.58, 0.09, 0.36, 0.93, 0.15, 0.76, 0.49, 0.02)
"""Hues of the first groups, far apart; more follow by the golden angle."""


def draw(atlas: Atlas, view: View) -> pydot.Dot:
    """Return the picture of ``view``."""
    return _Picture(atlas, view).make()


@dataclass
class _Box:
    """A module path with what is directly in it."""

    path: str
    axes: list[Axis] = field(default_factory=list)
    inner: dict[str, _Box] = field(default_factory=dict)


class _Picture:
    def __init__(self, atlas: Atlas, view: View) -> None:
        self.atlas, self.view, self.words = atlas, view, Words(atlas)
        shown = {factor: None for axis in view.axes for factor in atlas.factors(axis)}
        self.groups = [g for g in atlas.groups if g.factor in shown]
        self.paint: Mapping[Factor, int] = {g.factor: i for i, g in enumerate(self.groups) if g.factor is not None}
        self.has_frozen = any(factor in atlas.axes.frozen for factor in shown)

    def make(self) -> pydot.Dot:
        """Return everything in one graph."""
        dot = pydot.Dot(
            "fxprune",
            graph_type="digraph",
            label=_quoted(self.view.title),
            labelloc="t",
            fontname=_FONT,
            fontsize=16,
            tooltip=_quoted(self.view.title),
            rankdir="TB",
            nodesep=0.25,
            ranksep=0.45,
            forcelabels="false",
        )
        dot.set_node_defaults(shape="box", fontname=_FONT, fontsize=11, margin=_quoted("0.12,0.06"))
        dot.set_edge_defaults(fontname=_FONT, fontsize=9, fontcolor=_quoted("#555555"), arrowsize=0.6)
        self._fill(dot, self._boxes())
        for coupling in self.view.couplings:
            dot.add_edge(self._line(coupling))
        for edge in self._inside_tensors():
            dot.add_edge(edge)
        dot.add_subgraph(self._legend())
        return dot

    def _boxes(self) -> _Box:
        """Return the axes shown as a tree of module paths."""
        root = _Box("")
        for axis in self.view.axes:
            box, path = root, self.atlas.module(axis)
            for part in path.split(".") if path else ():
                box = box.inner.setdefault(part, _Box(f"{box.path}.{part}" if box.path else part))
            box.axes.append(axis)
        return root

    def _fill(self, into: pydot.Graph, box: _Box, above: str = "", depth: int = 0) -> None:
        """Draw what is in ``box``; leave out paths with nothing of their own and a single box in them."""
        for axis in box.axes:
            into.add_node(self._node(axis))
        for inner in box.inner.values():
            while not inner.axes and len(inner.inner) == 1:
                inner = next(iter(inner.inner.values()))
            label = inner.path[len(above) + 1 :] if above else inner.path
            cluster = pydot.Subgraph(
                _quoted(f"cluster_{inner.path}"),
                label=_quoted(label),
                tooltip=_quoted(f"module {inner.path}"),
                style=_quoted("rounded,filled"),
                color=_quoted("#b8b8b8"),
                fillcolor=_quoted("#f7f7f7" if depth % 2 == 0 else "#eeeeee"),
                fontname=_FONT,
                fontsize=12,
                labeljust="l",
            )
            self._fill(cluster, inner, inner.path, depth + 1)
            into.add_subgraph(cluster)

    def _node(self, axis: Axis) -> pydot.Node:
        """Return a box in the colours of its groups; activations are rounded, the trigger has a thick double frame."""
        colours = [self._colour(factor) for factor in self.atlas.factors(axis)]
        distinct = list(dict.fromkeys(colours)) or [_WHITE]
        style = "filled" if len(distinct) == 1 else "striped"
        if axis.tensor not in self.atlas.weights:
            style = f"{style},rounded" if style == "filled" else style
        first = axis == self.view.trigger
        mark = "trigger: " if first else ""
        return pydot.Node(
            _name(axis),
            label=_quoted(mark + self.words.label(axis)),
            tooltip=_quoted(mark + self.words.about(axis)),
            style=_quoted(style),
            fillcolor=_quoted(":".join(distinct)),
            color=_quoted("#000000" if first else _LINE),
            penwidth="2.5" if first else "1",
            peripheries="2" if first else "1",
        )

    def _line(self, coupling: Coupling) -> pydot.Edge:
        """Return one line with a strand for each group that is coupled over it.

        Only lines that follow the execution say what stands above what. The others get an ``xlabel``, which shows where
        there is room: on a ``label`` of a line inside one row of nested clusters, Graphviz 2 fails with "trouble in
        init_rank".
        """
        text = _quoted(self.words.ops(coupling))
        colours = list(dict.fromkeys(self._colour(factor, strong=True) for factor in coupling.ways))
        return pydot.Edge(
            _name(coupling.source),
            _name(coupling.target),
            tooltip=_quoted(self.words.way(coupling)),
            labeltooltip=_quoted(self.words.way(coupling)),
            color=_quoted(":".join(colours)),
            style="solid" if coupling.settled else "dashed",
            penwidth="1.6",
            constraint="true" if coupling.ranks else "false",
            **{"label" if coupling.ranks else "xlabel": text},  # type: ignore[arg-type]
        )

    def _inside_tensors(self) -> Iterable[pydot.Edge]:
        """Yield thin lines from the axis of a parameter that is used first to the next: the way the data goes."""
        last: dict[str, Axis] = {}
        for axis in self.view.axes:
            before = last.get(axis.tensor)
            if before is not None and axis.tensor in self.atlas.weights:
                yield pydot.Edge(
                    _name(before),
                    _name(axis),
                    tooltip=_quoted(f"two axes of {axis.tensor}"),
                    color=_quoted("#bbbbbb"),
                    style="dotted",
                    arrowhead="none",
                )
            last[axis.tensor] = axis

    def _colour(self, factor: Factor, strong: bool = False) -> str:
        number = self.paint.get(factor)
        if number is None:
            return _LINE if strong else _GREY if factor in self.atlas.axes.frozen else _WHITE
        # the golden angle keeps away from the hues it gave before; lines are dark to show, boxes light to be read
        hue = _HUES[number] if number < len(_HUES) else number * 0.6180339887 % 1
        lightness = 0.45 if strong else 0.82 - 0.06 * (number // len(_HUES) % 2)
        red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.65))
        return f"#{red:02x}{green:02x}{blue:02x}"

    def _legend(self) -> pydot.Subgraph:
        """Return a table of groups: colour, name, units, whether removal is exact, and how many axes hold them."""
        rows = [self._legend_row(group) for group in self.groups[:_LEGEND_ROWS]]
        if len(self.groups) > _LEGEND_ROWS:
            rest = f"and {plural(len(self.groups) - _LEGEND_ROWS, 'more group')}: their names are in the tooltips"
            rows.append(_row(_WHITE, (rest, "", "", "")))
        if self.has_frozen:
            rows.append(_row(_GREY, ("frozen: cannot be removed", "fixed", "", "reason in the tooltip")))
        notes = (*_NOTES, "dashed line: not needed to get here") if self.view.trigger else _NOTES
        rows += [f'<TR><TD></TD><TD ALIGN="LEFT" COLSPAN="4"><I>{text}</I></TD></TR>' for text in notes]
        head = "".join(f"<TD><B>{text}</B></TD>" for text in ("group", "a unit is", "units", "removal"))
        table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4"><TR><TD></TD>{head}</TR>{"".join(rows)}</TABLE>'
        legend = pydot.Subgraph("cluster_legend", label="legend", fontname=_FONT, fontsize=12, color=_quoted("#b8b8b8"))
        legend.add_node(pydot.Node("legend", label=f"<{table}>", shape="plain", tooltip="legend", fontsize=11))
        return legend

    def _legend_row(self, group: Group) -> str:
        assert group.factor is not None
        total = len(group.members)
        here = len({(m.name, m.axis) for m in group.members}.intersection(self.view.axes))
        held = f"{here} of {total} axes shown" if here < total else plural(total, "axis", "axes")
        return _row(
            self._colour(group.factor),
            (group.name, self.words.kind(group), f"{group.size:,}", f"{exactness(group)}, {held}"),
        )


def _row(colour: str, cells: Iterable[str]) -> str:
    written = "".join(f'<TD ALIGN="LEFT">{html.escape(cell)}</TD>' for cell in cells)
    return f'<TR><TD BGCOLOR="{colour}" BORDER="1" WIDTH="24"></TD>{written}</TR>'


def _name(axis: Axis) -> str:
    return _quoted(f"{axis.tensor}[{axis.dim}]")


def _quoted(text: str) -> str:
    """Return ``text`` as a DOT string: quotes escaped, backslashes kept, line breaks as DOT writes them."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
