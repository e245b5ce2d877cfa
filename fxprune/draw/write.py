"""Pictures as files: DOT, what Graphviz renders, and HTML pages."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import networkx as nx
import pydot
from torch import fx

from fxprune.discovery.dependency import dependency_graph
from fxprune.discovery.explain import find_group
from fxprune.discovery.groups import Group
from fxprune.draw.atlas import Atlas, Fold, find_folds
from fxprune.draw.graphviz import draw
from fxprune.draw.view import View, contracted, plural, searched
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.graph.facts import owner_block, within
from fxprune.pipeline.arguments import as_path, flag, instance, refuse
from fxprune.removal.plan import Plan
from fxprune.rules.statements import Axis

__all__ = ["DRAWN", "SUFFIXES", "check_target", "layer_svg", "page", "write_dot", "write_picture"]

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
    template = files("fxprune.draw").joinpath("page.html").read_text(encoding="utf-8")
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


DRAWN = (".svg", ".png", ".pdf")
"""What Graphviz has to be there for."""

SUFFIXES = (".dot", ".gv", *DRAWN, ".html")
"""What a picture can be written as."""


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the file to write, where a picture can be written to it.

    Raises:
        ArgumentError: its suffix is none of a picture.
        FxpruneError: Graphviz is needed and not there, or there is no such folder.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ArgumentError(
            f"no picture is written as {target.suffix or 'a file without a suffix'}",
            where=str(target),
            remedy=f"End the name in one of {', '.join(SUFFIXES)}",
        )
    if target.suffix.lower() in DRAWN and shutil.which("dot") is None:
        raise FxpruneError(
            f"{target.suffix} is drawn by Graphviz, and there is no program dot here",
            where=str(target),
            remedy="Install the package graphviz of your system, or write .html or .dot",
        )
    if not target.parent.is_dir():
        raise _unwritable(target, "no such folder")
    return target


def write_picture(dot: pydot.Dot, title: str, target: Path) -> None:
    """Write ``dot`` to a file, in the format of its suffix.

    Args:
        dot: the picture.
        title: what it shows.
        target: a file that :func:`check_target` found to be one.

    Raises:
        FxpruneError: the file cannot be written, or Graphviz fails.
    """
    suffix, text = target.suffix.lower(), dot.to_string()
    if suffix in DRAWN:
        data = _drawn(text, suffix[1:])
    elif suffix == ".html":
        svg = None if shutil.which("dot") is None else _drawn(text, "svg").decode("utf-8")
        data = page(dot, title, svg).encode("utf-8")
    else:
        data = text.encode("utf-8")
    try:
        target.write_bytes(data)
    except OSError as error:
        raise _unwritable(target, str(error.strerror)) from error


def _drawn(text: str, form: str) -> bytes:
    """What Graphviz makes of DOT text."""
    command = [str(shutil.which("dot")), f"-T{form}"]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", errors="replace").strip().partition("\n")[0]
        raise FxpruneError(
            f"it failed: {said}", where="graphviz", remedy="Show less, by layer or group, or draw a .dot file by hand"
        )
    return done.stdout


def _unwritable(target: Path, why: str) -> FxpruneError:
    return FxpruneError(
        f"cannot be written: {why}",
        where=str(target),
        remedy="Choose a file in a folder that is there and can be written to",
    )


_INDEX = re.compile(r"-?[0-9]{1,9}")
"""The index of a block, as text."""


def write_dot(
    graph: nx.Graph[Axis],
    path: str | os.PathLike[str],
    layer: str | int | None = None,
    group: Group | str | None = None,
    everything: bool = False,
    plan: Plan | None = None,
    fold: bool = True,
) -> None:
    """Write a picture of ``graph`` to a file.

    Boxes are axes of parameters and buffers, in one hue for each kind of unit and nested in the modules they belong to;
    frozen axes are grey. A line joins two axes that an op, or a chain of ops, couples. Tooltips tell the whole story.
    In pictures of the whole model, and of a group that spans it, blocks that are the same are drawn once.

    Args:
        graph: from :func:`fxprune.dependency_graph`.
        path: the file to write. Its suffix says what is written: ``.dot`` is text in Graphviz's language; ``.svg``,
            ``.png`` and ``.pdf`` are drawn by Graphviz, which has to be there; ``.html`` is a page of its own that
            zooms, searches, and tells the rule and the reason of what is clicked.
        layer: show one block, by its index or module path, or the part of the model below any module path. By
            default the block in the middle; of a model without blocks, everything.
        group: show this group, by itself or its name, with the activations that the search passes from its trigger
            on. Together with ``layer``, the part of it that lies there.
        everything: show the parameters of the whole model.
        plan: show what this plan takes of each axis. It has to be a plan for this model.
        fold: draw blocks that are the same once; False for each by itself.

    Raises:
        ArgumentError: an argument is of the wrong type, or the suffix is none of those.
        UnknownNameError: no such layer or group; suggests the nearest.
        PlanError: the plan is for another model.
        FxpruneError: the file cannot be written, or Graphviz is needed and not there.
    """
    everything, fold, target = flag("everything", everything), flag("fold", fold), check_target(as_path("path", path))
    if plan is not None:
        instance("plan", plan, Plan, "a plan, as in Plan.from_json(text), or None")
    atlas = Atlas(graph, plan)
    view = _view(atlas, layer, group, everything, fold)
    write_picture(draw(atlas, view), view.title, target)


def _view(atlas: Atlas, layer: str | int | None, group: Group | str | None, everything: bool, fold: bool) -> View:
    """Return the picture that the arguments of :func:`write_dot` ask for."""
    if group is not None:
        name = group if isinstance(group, str) else instance("group", group, Group, "a group, or the name of one").name
        return _group_view(atlas, find_group(atlas.groups, name), layer, fold)
    if everything or (layer is None and not atlas.axes.blocks):
        return _whole_view(atlas, fold)
    return _module_view(atlas, _find_module(atlas, layer))


def _find_module(atlas: Atlas, layer: str | int | None) -> str:
    """Return the module path meant by ``layer``."""
    blocks = atlas.axes.blocks
    if layer is None:
        return blocks[len(blocks) // 2]
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        raise refuse("layer", layer, "the index of a block, or a module path")
    if isinstance(layer, int) or _INDEX.fullmatch(layer):
        if not -len(blocks) <= int(layer) < len(blocks):
            raise UnknownNameError("layer", int(layer), (f"{i}" for i in range(len(blocks))))
        return blocks[int(layer)]
    modules = {name.rpartition(".")[0] for name in atlas.weights}
    known = {module[:end] for module in modules for end in _ends(module)}
    if layer not in known:
        raise UnknownNameError("layer", layer, blocks)
    return layer


def _ends(path: str) -> Iterable[int]:
    """Return where the paths of a module and of those around it end in ``path``."""
    return (i for i in range(len(path) + 1) if i == len(path) or path[i] == ".")


def _below(atlas: Atlas, module: str) -> list[Axis]:
    """Return the axes of parameters and buffers below ``module`` that have anything to remove or to freeze."""
    return [
        axis
        for axis, data in atlas.graph.nodes(data=True)
        if data["role"] != "activation" and data["size"] > 1 and _is_below(atlas.module(axis), module)
    ]


def _is_below(path: str, module: str) -> bool:
    """Whether ``path`` is ``module`` or lies below it; all do below the model, whose path is empty."""
    return not module or path == module or within(path, (module,))


def _whole_view(atlas: Atlas, fold: bool) -> View:
    """Return a picture of the axes of all parameters; of blocks that are the same, of those of the first."""
    folds = find_folds(atlas) if fold else ()
    sums = _outside(atlas, atlas.sums, folds)
    entering = frozenset(_sources(atlas, sums)).difference(sums)
    shown = [*_outside(atlas, _coupled(atlas, _below(atlas, "")), folds), *sums, *entering]
    count, drawn = len(atlas.axes.blocks), len(folds)
    title = f"The whole model: {plural(count, 'block')}, of which {drawn} drawn" if drawn < count and fold else ""
    return replace(contracted(atlas, title or "Axes of all parameters", shown), entering=entering, folds=folds)


def _coupled(atlas: Atlas, axes: Sequence[Axis]) -> list[Axis]:
    """Return ``axes`` without those of buffers that no parameter is coupled to."""
    roles = atlas.graph.nodes
    held = {factor for axis in axes if roles[axis]["role"] == "parameter" for factor in atlas.factors(axis)}
    return [axis for axis in axes if roles[axis]["role"] == "parameter" or held.intersection(atlas.factors(axis))]


def _sources(atlas: Atlas, sums: Iterable[Axis]) -> list[Axis]:
    """Return the axes of the streams that ``sums`` add to."""
    sources = (Axis(atlas.axes.residuals[axis.tensor], axis.dim) for axis in sums)
    return [axis for axis in sources if axis in atlas.graph]


def _outside(atlas: Atlas, axes: Iterable[Axis], folds: Sequence[Fold]) -> list[Axis]:
    """Return those of ``axes`` that are not in a block for which another is drawn."""
    hidden = tuple(block for fold in folds for block in fold.hidden)
    return [axis for axis in axes if owner_block(atlas.module(axis), hidden) is None]


def _module_view(atlas: Atlas, module: str) -> View:
    """Return a picture of the axes of one module, and of buffers shared by all blocks that are coupled to them.

    Where a stream runs through the module, its sums there are shown, and what comes in.
    """
    own = _below(atlas, module)
    held = {factor for axis in own for factor in atlas.factors(axis)}
    shared = [
        axis
        for axis in _below(atlas, "")
        if atlas.graph.nodes[axis]["role"] == "buffer"
        and held.intersection(atlas.factors(axis))
        and not _is_below(axis.tensor, module)
        and not any(_is_below(axis.tensor, block) for block in atlas.axes.blocks)
    ]
    sums = [axis for axis in atlas.sums if _is_below(atlas.module(axis), module)]
    entering = frozenset(axis for axis in _sources(atlas, sums) if not _is_below(atlas.module(axis), module))
    blocks = atlas.axes.blocks
    place = f", block {blocks.index(module) + 1} of {len(blocks)}" if module in blocks else ""
    title = f"Axes of the parameters of {module}{place}"
    return replace(contracted(atlas, title, [*own, *shared, *sums, *entering]), entering=entering)


def _group_view(atlas: Atlas, group: Group, layer: str | int | None, fold: bool) -> View:
    if group.factor is None:
        assert group.block is not None
        return replace(_module_view(atlas, group.block), title=f"Group {group.name}: the whole block goes")
    title = f"Group {group.name}: removing a unit removes it from every axis shown"
    if layer is not None:
        module = _find_module(atlas, layer)
        inside = [axis for axis in atlas.graph.nodes if _is_below(atlas.module(axis), module)]
        return searched(atlas, f"{title}; the part in {module}", group, inside)
    folds = find_folds(atlas) if fold and group.block is None else ()
    return replace(searched(atlas, title, group, _outside(atlas, atlas.graph.nodes, folds)), folds=folds)


def layer_svg(graph_module: fx.GraphModule, norm: str = "sliced") -> str:
    """Return the layer in the middle of a graph as inline SVG; nothing where graphviz is not installed, or fails.

    Args:
        graph_module: a traced graph.
        norm: as for :func:`fxprune.dependency_graph`.
    """
    if shutil.which("dot") is None:
        return ""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "layer.svg"
        with suppress(FxpruneError):
            write_dot(dependency_graph(graph_module, norm), file)
        found = re.search(r"<svg.*</svg>", file.read_text(encoding="utf-8"), re.S) if file.exists() else None
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", found[0]) if found else ""  # a page knows SVG without them
