"""The legend of a picture, as the table in HTML that Graphviz draws: groups, signs, and widths by layer."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping

from fxprune.axes import Factor
from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.colours import FROZEN, WHITE, hue_of
from fxprune.dot.view import View
from fxprune.dot.words import Words, plural
from fxprune.graph.blocks import owner_block

__all__ = ["Legend"]

_ROWS = 24
"""Rows that fit below a picture; a model drawn without folds has hundreds of groups."""
_COLUMNS = 32
"""Layers side by side in the table of widths."""


class Legend:
    """What the colours and signs of a picture mean.

    Args:
        atlas: the graph.
        view: what is shown of it.
        words: how that is told.
        colour: gives the colour of a factor.
    """

    def __init__(self, atlas: Atlas, view: View, words: Words, colour: Callable[[Factor], str]) -> None:
        self.atlas, self.view, self.words, self.colour = atlas, view, words, colour
        self.alike = {factor: row for fold in view.folds for factor, row in fold.factors.items()}
        shown = {factor: None for axis in view.axes for factor in atlas.factors(axis)}
        self.groups = [group for group in atlas.groups if group.factor in shown]
        self.has_frozen = any(factor in atlas.axes.frozen for factor in shown)

    def table(self) -> str:
        """Return the whole legend."""
        parts = (self._group_rows(), self._note_rows(), self._width_rows())
        tables = (f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3">{"".join(rows)}</TABLE>' for rows in parts if rows)
        rows = "".join(f'<TR><TD ALIGN="LEFT">{table}</TD></TR>' for table in tables)
        return f'<TABLE BORDER="1" COLOR="#b8b8b8" CELLBORDER="0" CELLSPACING="4">{rows}</TABLE>'

    def _group_rows(self) -> list[str]:
        """Colour, name, what a unit is, how many there are, whether removal is exact, and how many axes hold them."""
        head = "".join(f'<TD ALIGN="LEFT"><B>{text}</B></TD>' for text in ("group", "a unit is", "units", "removal"))
        rows = [f"<TR><TD></TD>{head}</TR>", *map(self._group_row, self.groups[:_ROWS])]
        if len(self.groups) > _ROWS:
            rest = f"and {plural(len(self.groups) - _ROWS, 'more group')}: their names are in the tooltips"
            rows.append(_row(WHITE, (rest, "", "", "")))
        if self.has_frozen:
            rows.append(_row(FROZEN, ("frozen: cannot be removed", "fixed", "", "reason in the tooltip")))
        return rows

    def _group_row(self, group: Group) -> str:
        assert group.factor is not None
        alike = len(set(self.alike.get(group.factor, (group.factor,))))
        here = len({(m.name, m.axis) for m in group.members}.intersection(self.view.axes))
        total = len(group.members)
        held = f"{here} of {total} axes shown" if here < total else plural(total, "axis", "axes")
        name = f"{group.name} and {alike - 1} alike" if alike > 1 else group.name
        amount = self.words.amount(group.factor).replace("→", " → ").replace("..", " to ")
        return _row(
            self.colour(group.factor), (name, self.words.kind(group), amount, f"{self.words.removal(group)}, {held}")
        )

    def _note_rows(self) -> list[str]:
        stream = _coloured("━━▶", hue_of("channel", strong=True))
        plus = _coloured("⊕", hue_of("channel", strong=True))
        notes = [
            ("▭", "an axis, as tensor[axis], and what it is made of"),
            ("→", "ops couple two axes: what one loses, the other loses; it points the way the data goes"),
            ("┄", "two axes of one tensor"),
        ]
        if any(map(self.atlas.is_sum, self.view.axes)):
            notes.append((stream, "the residual stream"))
            notes.append((plus, "residual add: what a branch computed is added to the stream"))
        if self.view.trigger is not None:
            notes[1] = ("→", "ops couple two axes: the search went this way from the trigger")
            notes.append(("⇢", "dashed: couples, too, and was not needed to get here"))
        if any(owner_block(self.atlas.module(axis), tuple(self.atlas.axes.bypasses)) for axis in self.view.axes):
            notes.append((_coloured("▢", hue_of("layer", strong=True)), "a block that can go as a whole"))
        if any(fold.hidden for fold in self.view.folds):
            notes.append(("<B>▢</B>", "thick frame: blocks that are the same, drawn once; 8..12 is from 8 to 12"))
        if self.atlas.keep is not None:
            notes.append(("◧", "the plan leaves the coloured part; 12→8: of 12 units 8 stay; all coloured: untouched"))
        return [
            f'<TR><TD ALIGN="CENTER">{sign}</TD><TD ALIGN="LEFT"><I>{html.escape(text)}</I></TD></TR>'
            for sign, text in notes
        ]

    def _width_rows(self) -> list[str]:
        """A row for each kind of group in blocks, with a cell for each block: what stays, or how wide it is."""
        shares: dict[tuple[str, int], dict[str, float]] = {}
        for group in self.atlas.groups if self.view.folds else ():
            if group.factor is not None and group.block is not None:
                row = shares.setdefault((self.words.kind(group), self.atlas.shades[group.factor]), {})
                row[group.block] = self._width(group)
        if self.atlas.keep is None:
            shares = {key: {b: size / max(row.values()) for b, size in row.items()} for key, row in shares.items()}
        uneven = {key: row for key, row in shares.items() if min(row.values()) < 1}
        blocks = self.atlas.axes.blocks if uneven else ()
        parts = (blocks[i : i + _COLUMNS] for i in range(0, len(blocks), _COLUMNS))
        return [line for part in parts for line in self._width_part(part, uneven)]

    def _width(self, group: Group) -> float:
        """The fraction of a group's units that a plan leaves; without a plan, how many units there are."""
        assert group.factor is not None
        if self.atlas.keep is None:
            return group.size
        return 0.0 if group.block in self.atlas.removed else self.atlas.keep.count(group.factor) / group.size

    def _width_part(self, blocks: Iterable[str], shares: Mapping[tuple[str, int], Mapping[str, float]]) -> list[str]:
        head = "% of the widest block" if self.atlas.keep is None else "% that stays in block"
        numbers = "".join(f"<TD>{html.escape(block.rpartition('.')[2])}</TD>" for block in blocks)
        rows = [f'<TR><TD ALIGN="LEFT"><B>{head}</B></TD>{numbers}</TR>']
        for (kind, shade), row in shares.items():
            number = f" {shade + 1}" if sum(other == kind for other, _ in shares) > 1 else ""
            cells = (_cell(row[block], hue_of(kind, shade)) if block in row else "<TD></TD>" for block in blocks)
            rows.append(f'<TR><TD ALIGN="LEFT">{kind}{number}</TD>{"".join(cells)}</TR>')
        return rows


def _cell(share: float, colour: str) -> str:
    """A cell that is filled from below as far as ``share`` says."""
    colours = colour if share >= 1 else WHITE if share <= 0 else f"{colour};{share:.3f}:{WHITE}"
    angle = ' GRADIENTANGLE="90"' if ":" in colours else ""
    return f'<TD BGCOLOR="{colours}"{angle} BORDER="1" COLOR="#b8b8b8" WIDTH="26">{share:.0%}</TD>'.replace("%<", "<")


def _coloured(text: str, colour: str) -> str:
    return f'<FONT COLOR="{colour}">{text}</FONT>'


def _row(colour: str, cells: Iterable[str]) -> str:
    written = "".join(f'<TD ALIGN="LEFT">{html.escape(cell)}</TD>' for cell in cells)
    return f'<TR><TD BGCOLOR="{colour}" BORDER="1" WIDTH="24"></TD>{written}</TR>'
