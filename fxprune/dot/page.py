"""A picture as one HTML file that zooms, searches, and tells about what is clicked; it needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from importlib.resources import files

import pydot

__all__ = ["page"]

_WITHOUT = "Graphviz was not there when this page was made: the boxes of the picture are listed instead."


def page(dot: pydot.Dot, title: str, svg: str | None) -> str:
    """Return the text of the HTML file.

    Args:
        dot: the picture; its boxes and lines have ids.
        title: what it shows.
        svg: the picture as Graphviz draws it; None where there is no Graphviz, and boxes are listed.
    """
    items = _items(dot)
    drawn = _listed(items) if svg is None else svg[svg.index("<svg") :]
    parts = {
        "title": html.escape(title),
        "picture": drawn,
        "items": json.dumps(items, ensure_ascii=False).replace("<", "\\u003c"),
    }
    template = files("fxprune.dot").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


def _items(dot: pydot.Dot) -> dict[str, dict[str, str]]:
    """Return by id what is told of each box, and of each line with the boxes that it joins."""
    nodes = {node.get_name(): node for node in _nodes(dot) if node.get("id")}
    items = {
        node.get("id"): {"name": _plain(name), "text": _plain(node.get("tooltip"))} for name, node in nodes.items()
    }
    for edge in dot.get_edges():
        source, target = str(edge.get_source()), str(edge.get_destination())
        items[edge.get("id")] = {
            "name": f"{_plain(source)} → {_plain(target)}",
            "text": _plain(edge.get("tooltip")),
            "source": nodes[source].get("id"),
            "target": nodes[target].get("id"),
        }
    return items


def _nodes(graph: pydot.Graph) -> Iterator[pydot.Node]:
    yield from graph.get_nodes()
    for inner in graph.get_subgraphs():
        yield from _nodes(inner)


def _plain(quoted: str) -> str:
    """Return a DOT string as the text that it stands for."""
    inner = quoted.removeprefix('"').removesuffix('"')
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], inner, flags=re.S)


def _listed(items: dict[str, dict[str, str]]) -> str:
    boxes = (
        f'<li id="{key}" class="node">{html.escape(item["name"])}</li>'
        for key, item in items.items()
        if "source" not in item
    )
    return f"<p>{_WITHOUT}</p><ol>{''.join(boxes)}</ol>"
