"""HTML tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

__all__ = ["html_table"]


def html_table(title: str, rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Return rows as an HTML table below a title; what stands in them is shown as it is written."""
    lines = [_row("th", head)] if head else []
    lines += [_row("td", row) for row in rows]
    caption = Markup('<caption style="text-align: left; caption-side: top"><b>{}</b></caption>').format(title)
    return str(Markup("<table>") + caption + Markup("").join(lines) + Markup("</table>"))


def _row(tag: str, cells: Sequence[object]) -> Markup:
    cell = Markup('<{tag} style="text-align: left">{text}</{tag}>')
    return Markup("<tr>") + Markup("").join(cell.format(tag=tag, text=text) for text in cells) + Markup("</tr>")
