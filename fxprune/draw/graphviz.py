"""A view as Graphviz text: clusters, boxes, lines and legend."""

from __future__ import annotations

import colorsys
import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pydot

from fxprune.axes import Factor
from fxprune.discovery.groups import Group
from fxprune.draw.atlas import Atlas, Fold, block_ranges
from fxprune.draw.view import Edge, Labels, View, plural
from fxprune.graph.facts import owner_block
from fxprune.rules.statements import Axis

FROZEN = "#d0d0d0"
WHITE = "#ffffff"
LINE = "#8a8a8a"

_HUES = {
    "channel": 0.58,
    "conv": 0.66,
    "mlp": 0.08,
    "head": 0.36,
    "query_head": 0.36,
    "kv_head": 0.92,
    "head_dim": 0.75,
    "expert": 0.15,
    "layer": 0.48,
}
_SHADES = 3
"""Shades of a hue, for groups of one kind in one block."""


def hue_of(kind: str, shade: int = 0, strong: bool = False) -> str:
    """The colour of units of ``kind``, as ``#rrggbb``.

    Args:
        shade: number of the group among those of this kind in one block.
        strong: dark, for lines; else light, for boxes with text.
    """
    step = shade % _SHADES
    lightness = 0.45 - 0.08 * step if strong else 0.85 - 0.09 * step
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(_HUES[kind], lightness, 0.65))
    return f"#{red:02x}{green:02x}{blue:02x}"


_ROWS = 24
"""Most rows of groups; a model drawn without folds has hundreds of groups."""
_COLUMNS = 32
"""Blocks side by side in the table of widths."""


class Legend:
    """Legend of the colours and signs of a picture; ``colour`` returns the colour of a factor."""

    def __init__(self, atlas: Atlas, view: View, labels: Labels, colour: Callable[[Factor], str]) -> None:
        self.atlas, self.view, self.labels, self.colour = atlas, view, labels, colour
        shown = {factor: None for axis in view.axes for factor in atlas.factors(axis)}
        self.groups = [group for group in atlas.groups if group.factor in shown]
        self.has_frozen = any(factor in atlas.axes.frozen for factor in shown)

    def table(self) -> str:
        """The whole legend."""
        # groups: colour, name, kind and number of units, exactness of removal, and number of axes
        head = "".join(f'<TD ALIGN="LEFT"><B>{text}</B></TD>' for text in ("group", "a unit is", "units", "removal"))
        groups = [f"<TR><TD></TD>{head}</TR>", *map(self._group_row, self.groups[:_ROWS])]
        if len(self.groups) > _ROWS:
            rest = f"and {plural(len(self.groups) - _ROWS, 'more group')}: their names are in the tooltips"
            groups.append(_row(WHITE, (rest, "", "", "")))
        if self.has_frozen:
            groups.append(_row(FROZEN, ("frozen: cannot be removed", "fixed", "", "reason in the tooltip")))
        parts = (groups, self._note_rows(), self._width_rows())
        tables = (f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3">{"".join(rows)}</TABLE>' for rows in parts if rows)
        rows = "".join(f'<TR><TD ALIGN="LEFT">{table}</TD></TR>' for table in tables)
        return f'<TABLE BORDER="1" COLOR="#b8b8b8" CELLBORDER="0" CELLSPACING="4">{rows}</TABLE>'

    def _group_row(self, group: Group) -> str:
        assert group.factor is not None
        alike = len(set(self.labels.alike(group.factor)))
        here = len({(m.name, m.axis) for m in group.members}.intersection(self.view.axes))
        total = len(group.members)
        held = f"{here} of {total} axes shown" if here < total else plural(total, "axis", "axes")
        name = f"{group.name} and {alike - 1} alike" if alike > 1 else group.name
        amount = self.labels.amount(group.factor).replace("→", " → ").replace("..", " to ")
        cells = (name, self.labels.kind(group), amount, f"{self.labels.removal(group)}, {held}")
        return _row(self.colour(group.factor), cells)

    def _note_rows(self) -> list[str]:
        notes = [
            ("▭", "an axis, as tensor[axis], and its expression"),
            ("→", "ops couple two axes: a unit is removed from both; the arrow follows the data"),
            ("┄", "two axes of one tensor"),
        ]
        if any(map(self.atlas.is_sum, self.view.axes)):
            strong = hue_of("channel", strong=True)
            notes.append((_coloured("━━▶", strong), "the residual stream"))
            notes.append((_coloured("⊕", strong), "residual add: the output of a branch is added to the stream"))
        if self.view.trigger is not None:
            notes[1] = ("→", "ops couple two axes: the arrow follows the search from the trigger")
            notes.append(("⇢", "dashed: a coupling that the search did not need"))
        if any(owner_block(self.atlas.module(axis), tuple(self.atlas.axes.bypasses)) for axis in self.view.axes):
            notes.append((_coloured("▢", hue_of("layer", strong=True)), "a block that can be removed as a whole"))
        if any(fold.hidden for fold in self.view.folds):
            notes.append(("<B>▢</B>", "thick frame: equal blocks, drawn once; 8..12 is from 8 to 12"))
        if self.atlas.keep is not None:
            notes.append(("◧", "the plan keeps the coloured part; 12→8: of 12 units 8 stay; all coloured: untouched"))
        return [
            f'<TR><TD ALIGN="CENTER">{sign}</TD><TD ALIGN="LEFT"><I>{html.escape(text)}</I></TD></TR>'
            for sign, text in notes
        ]

    def _width_rows(self) -> list[str]:
        """Rows of kinds of groups with a cell for each block: the fraction that stays, or the relative width."""
        shares: dict[tuple[str, int], dict[str, float]] = {}
        for group in self.atlas.groups if self.view.folds else ():
            if group.factor is not None and group.block is not None:
                row = shares.setdefault((self.labels.kind(group), self.atlas.shades[group.factor]), {})
                count = group.size if self.atlas.keep is None else self.atlas.keep.count(group.factor) / group.size
                row[group.block] = 0.0 if group.block in self.atlas.removed else count
        if self.atlas.keep is None:
            shares = {key: {b: size / max(row.values()) for b, size in row.items()} for key, row in shares.items()}
        uneven = {key: row for key, row in shares.items() if min(row.values()) < 1}
        blocks = self.atlas.axes.blocks if uneven else ()
        head = "% of the widest block" if self.atlas.keep is None else "% that stays in block"
        rows = []
        for part in (blocks[i : i + _COLUMNS] for i in range(0, len(blocks), _COLUMNS)):
            numbers = "".join(f"<TD>{html.escape(block.rpartition('.')[2])}</TD>" for block in part)
            rows.append(f'<TR><TD ALIGN="LEFT"><B>{head}</B></TD>{numbers}</TR>')
            for (kind, shade), row in uneven.items():
                number = f" {shade + 1}" if sum(other == kind for other, _ in uneven) > 1 else ""
                cells = (_cell(row[block], hue_of(kind, shade)) if block in row else "<TD></TD>" for block in part)
                rows.append(f'<TR><TD ALIGN="LEFT">{kind}{number}</TD>{"".join(cells)}</TR>')
        return rows


def _cell(share: float, colour: str) -> str:
    colours = colour if share >= 1 else WHITE if share <= 0 else f"{colour};{share:.3f}:{WHITE}"
    angle = ' GRADIENTANGLE="90"' if ":" in colours else ""
    return f'<TD BGCOLOR="{colours}"{angle} BORDER="1" COLOR="#b8b8b8" WIDTH="26">{share:.0%}</TD>'.replace("%<", "<")


def _coloured(text: str, colour: str) -> str:
    return f'<FONT COLOR="{colour}">{text}</FONT>'


def _row(colour: str, cells: Iterable[str]) -> str:
    written = "".join(f'<TD ALIGN="LEFT">{html.escape(cell)}</TD>' for cell in cells)
    return f'<TR><TD BGCOLOR="{colour}" BORDER="1" WIDTH="24"></TD>{written}</TR>'


_FONT = "Helvetica"

_SUM: dict[str, Any] = {
    **{"shape": "circle", "width": "0.34", "fixedsize": "true", "margin": "0", "fontsize": 20},
    **{"style": "filled", "fillcolor": f'"{WHITE}"', "penwidth": "3"},
}
"""Style of a residual sum."""

Items = dict[str, dict[str, str]]
"""Name and tooltip of each box and line of a picture, and the boxes that a line joins, by id."""


def draw(atlas: Atlas, view: View) -> tuple[pydot.Dot, Items]:
    """The picture of ``view``, with the legend below, and its boxes and lines."""
    picture = _Picture(atlas, view)
    return picture.make(), picture.items


@dataclass
class _Box:
    """A module path with its own axes and inner modules."""

    path: str
    axes: list[Axis] = field(default_factory=list)
    inner: dict[str, _Box] = field(default_factory=dict)


class _Picture:
    def __init__(self, atlas: Atlas, view: View) -> None:
        self.atlas, self.view, self.labels = atlas, view, Labels(atlas, view.folds)
        self.folds = {fold.blocks[0]: fold for fold in view.folds}
        self.ids = {axis: f"axis{number}" for number, axis in enumerate(view.axes)}
        self.items: Items = {}

    def make(self) -> pydot.Dot:
        legend = Legend(self.atlas, self.view, self.labels, self._colour)
        dot = pydot.Dot(
            "fxprune",
            graph_type="digraph",
            label=f"<{legend.table()}>",
            labelloc="b",
            fontname=_FONT,
            fontsize=11,
            tooltip=_quoted(self.view.title),
            rankdir="TB",
            nodesep=0.25,
            ranksep=0.4,
            forcelabels="false",
        )
        dot.set_node_defaults(shape="box", fontname=_FONT, fontsize=11, margin=_quoted("0.12,0.06"))
        dot.set_edge_defaults(fontname=_FONT, fontsize=9, fontcolor=_quoted("#555555"), arrowsize=0.6)
        whole = pydot.Subgraph(
            "cluster_picture",
            label=_quoted(self.view.title),
            labelloc="t",
            fontname=_FONT,
            fontsize=16,
            peripheries="0",
            tooltip=_quoted(self.view.title),
        )
        root = _Box("")
        for axis in self.view.axes:
            box, path = root, self._home(axis)
            for part in path.split(".") if path else ():
                box = box.inner.setdefault(part, _Box(f"{box.path}.{part}" if box.path else part))
            box.axes.append(axis)
        self._fill(whole, root)
        dot.add_subgraph(whole)
        for edge in (*map(self._line, self.view.couplings), *self._inside_tensors()):
            dot.add_edge(edge)
        return dot

    def _home(self, axis: Axis) -> str:
        """The path of the frame that ``axis`` is drawn in; an entering axis gets no frame for itself."""
        path = self.atlas.module(axis)
        if axis not in self.view.entering:
            return path
        block = self.atlas.axes.block_of(path)
        return "" if not self.view.folds else path if block is None else block.rpartition(".")[0]

    def _fill(self, into: pydot.Graph, box: _Box, above: str = "", depth: int = 0) -> None:
        """Draw the contents of ``box``, without frames around a single inner frame."""
        for axis in box.axes:
            into.add_node(self._node(axis))
        for inner in box.inner.values():
            while not inner.axes and len(inner.inner) == 1 and inner.path not in self.atlas.axes.blocks:
                inner = next(iter(inner.inner.values()))
            cluster = self._cluster(inner.path, above, depth)
            self._fill(cluster, inner, inner.path, depth + 1)
            into.add_subgraph(cluster)

    def _cluster(self, path: str, above: str, depth: int) -> pydot.Subgraph:
        """The frame of a module: thick for a fold, dashed for a removed block."""
        label, fold = path[len(above) + 1 :] if above else path, self.folds.get(path)
        many = fold is not None and bool(fold.hidden)
        removed = owner_block(path, self.atlas.removed) is not None and not many
        if fold is not None:
            label = self._fold_label(fold, above)
        elif path in self.atlas.removed:
            label = f"{label}: removed as a whole"
        return pydot.Subgraph(
            _quoted(f"cluster_{path}"),
            label=_quoted(label).replace("\\n", "\\l"),
            tooltip=_quoted(f"module {path}"),
            style=_quoted("rounded,filled,dashed" if removed else "rounded,filled"),
            color=_quoted(hue_of("layer", strong=True) if path in self.atlas.axes.bypasses else "#b8b8b8"),
            fillcolor=_quoted("#f7f7f7" if depth % 2 == 0 else "#eeeeee"),
            peripheries="1",
            penwidth="4" if many else "1.5" if path in self.atlas.axes.blocks else "1",
            fontname=_FONT,
            fontsize=15 if many else 12,
            labeljust="l",
        )

    def _fold_label(self, fold: Fold, above: str) -> str:
        """Label of a frame of blocks: which they are, whether their widths differ, and which are removed."""
        among = self.atlas.axes.blocks
        names = block_ranges(fold.blocks, among)
        names = names[len(above) + 1 :] if above else names
        differ = any(len({factor.size for factor in alike}) > 1 for alike in fold.factors.values())
        how = "equal except for widths" if differ else "the same"
        label = f"{names}: {plural(len(fold.blocks), 'block')}, {how}" if fold.hidden else names
        removed = [block for block in fold.blocks if block in self.atlas.removed]
        return f"{label}\n{block_ranges(removed, among)} removed as a whole\n" if removed else label

    def _node(self, axis: Axis) -> pydot.Node:
        """The box of an axis in the colours of its groups.

        Activations are rounded, the trigger has a thick double frame, and a residual sum is a plus in a circle. The
        part that the plan removes is white.
        """
        first = axis == self.view.trigger
        mark = "trigger: " if first else ""
        look: dict[str, Any]
        if self.atlas.is_sum(axis) and axis not in self.view.entering and not first:
            look = {"label": _quoted("+"), "color": _quoted(self._colours(axis, strong=True)[0]), **_SUM}
        else:
            is_entering = axis in self.view.entering
            label = f"stream\n{self.labels.expression(axis)}" if is_entering else self.labels.label(axis)
            parts, share = list(dict.fromkeys(self._colours(axis))), self.labels.share(axis)
            if share < 1:
                parts = [*(f"{colour};{share / len(parts):.4f}" for colour in parts if share > 0), WHITE]
            style = "filled,rounded" if self.atlas.is_activation(axis) else "filled"
            look = {
                "label": _quoted(mark + label),
                "style": _quoted(style if len(parts) == 1 else "striped"),
                "fillcolor": _quoted(":".join(parts)),
                "color": _quoted("#000000" if first else LINE),
                "penwidth": "2.5" if first else "1",
                "peripheries": "2" if first else "1",
            }
        name, tooltip = _name(axis), mark + self.labels.about(axis)
        self.items[self.ids[axis]] = {"name": name, "text": tooltip}
        return pydot.Node(_quoted(name), **look, id=self.ids[axis], tooltip=_quoted(tooltip))

    def _edge(self, source: Axis, target: Axis, tooltip: str, **look: str) -> pydot.Edge:
        name = f"{_name(source)} → {_name(target)}"
        key = f"line{len(self.items) - len(self.ids)}"
        self.items[key] = {"name": name, "text": tooltip, "source": self.ids[source], "target": self.ids[target]}
        ends = (_quoted(_name(source)), _quoted(_name(target)))
        return pydot.Edge(*ends, tooltip=_quoted(tooltip), **look, id=key)  # type: ignore[arg-type]

    def _line(self, coupling: Edge) -> pydot.Edge:
        """A line with a strand for each coupled group; the line of a stream is thick.

        Only lines that follow the execution constrain the ranks.
        """
        # An xlabel is drawn where there is room. With a label on a line inside one rank of nested clusters, Graphviz 2
        # fails with "trouble in init_rank".
        text, tooltip = _quoted(self.labels.ops(coupling)), self.labels.paths(coupling)
        colours = dict.fromkeys(self._colour(factor, strong=True) for factor in coupling.paths)
        stream = self.atlas.is_activation(coupling.source) and self.atlas.is_activation(coupling.target)
        return self._edge(
            coupling.source,
            coupling.target,
            tooltip,
            labeltooltip=_quoted(tooltip),
            color=_quoted(":".join(colours)),
            style="solid" if coupling.in_tree else "dashed",
            penwidth="5" if stream else "1.6",
            weight="8" if stream else "1",
            arrowsize="0.5" if stream else "0.6",
            constraint="true" if coupling.ranks else "false",
            **{"label" if coupling.ranks else "xlabel": text},
        )

    def _inside_tensors(self) -> Iterable[pydot.Edge]:
        """Yield thin lines between the axes of a parameter, in order of their use."""
        last: dict[str, Axis] = {}
        for axis in self.view.axes:
            before = last.get(axis.tensor)
            if before is not None and axis.tensor in self.atlas.weights:
                look = {"color": _quoted("#bbbbbb"), "style": "dotted", "arrowhead": "none"}
                yield self._edge(before, axis, f"two axes of {axis.tensor}", **look)
            last[axis.tensor] = axis

    def _colours(self, axis: Axis, strong: bool = False) -> list[str]:
        return [self._colour(factor, strong) for factor in self.atlas.factors(axis)] or [WHITE]

    def _colour(self, factor: Factor, strong: bool = False) -> str:
        """The colour of a factor: by the kind of its group, grey if frozen, else white."""
        group = self.atlas.by_factor.get(factor)
        if group is not None:
            return hue_of(self.labels.kind(group), self.atlas.shades[factor], strong)
        return LINE if strong else FROZEN if factor in self.atlas.axes.frozen else WHITE


def _name(axis: Axis) -> str:
    return f"{axis.tensor}[{axis.dim}]"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
