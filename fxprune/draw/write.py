"""Write pictures as DOT files, images drawn by Graphviz, and HTML pages."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
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
from fxprune.draw.graphviz import Items, draw
from fxprune.draw.view import View, contracted, plural, searched
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.graph.facts import owner_block
from fxprune.offload.atomic import write_file
from fxprune.pipeline.arguments import as_path, flag, instance, refuse
from fxprune.removal.plan import Plan
from fxprune.rules.statements import Axis

_WITHOUT = "This page was written without Graphviz: it lists the boxes of the picture instead."


def html_page(items: Items, title: str, svg: str | None) -> str:
    """A picture as a self-contained HTML page; ``svg`` is by Graphviz, None lists the boxes instead."""
    if svg is None:
        boxes = {key: html.escape(item["name"]) for key, item in items.items() if "source" not in item}
        listed = "".join(f'<li id="{key}" class="node">{name}</li>' for key, name in boxes.items())
        picture = f"<p>{_WITHOUT}</p><ol>{listed}</ol>"
    else:
        picture = svg[svg.index("<svg") :]
    parts = {
        "title": html.escape(title),
        "picture": picture,
        "items": json.dumps(items, ensure_ascii=False).replace("<", "\\u003c"),
    }
    template = files("fxprune.draw").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


RENDERED = (".svg", ".png", ".pdf")
"""Suffixes of files that Graphviz draws."""

PICTURE_SUFFIXES = (".dot", ".gv", *RENDERED, ".html")
"""Suffixes of all files that a picture can be written to."""


def check_target(path: str | os.PathLike[str]) -> Path:
    """Check that a picture can be written to a file, and return it as a path."""
    target = Path(path)
    where = str(target)
    if target.suffix.lower() not in PICTURE_SUFFIXES:
        what = f"a picture cannot be written as {target.suffix or 'a file without a suffix'}"
        raise ArgumentError(what, where=where, remedy=f"Use one of the suffixes {', '.join(PICTURE_SUFFIXES)}")
    if target.suffix.lower() in RENDERED and shutil.which("dot") is None:
        what = f"{target.suffix} files are drawn by Graphviz, and the program dot is not installed"
        raise FxpruneError(what, where=where, remedy="Install the system package graphviz, or write .html or .dot")
    if not target.parent.is_dir():
        remedy = "Choose a file in an existing, writable folder"
        raise FxpruneError("cannot be written: the folder does not exist", where=where, remedy=remedy)
    return target


def write_picture(dot: pydot.Dot, items: Items, title: str, target: Path) -> None:
    """Write what :func:`draw` returned to a file checked by :func:`check_target`, in the format of its suffix."""
    suffix, text = target.suffix.lower(), dot.to_string()
    data = text.encode("utf-8")
    if suffix in RENDERED:
        data = _render(text, suffix[1:])
    elif suffix == ".html":
        svg = None if shutil.which("dot") is None else _render(text, "svg").decode("utf-8")
        data = html_page(items, title, svg).encode("utf-8")
    write_file(target, data)


def _render(text: str, form: str) -> bytes:
    command = [str(shutil.which("dot")), f"-T{form}"]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode:
        message = done.stderr.decode("utf-8", errors="replace").strip().partition("\n")[0]
        remedy = "Show less of the model, by layer or group, or write a .dot file and draw it yourself"
        raise FxpruneError(f"drawing failed: {message}", where="graphviz", remedy=remedy)
    return done.stdout


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
    frozen axes are grey. A line joins two axes that are coupled by an op or a chain of ops. Tooltips have the details.
    In pictures of the whole model, and of a group that spans it, equal blocks are drawn once.

    Args:
        graph: from :func:`fxprune.dependency_graph`.
        path: the file to write. The suffix selects the format: ``.dot`` is text in the language of Graphviz; ``.svg``,
            ``.png`` and ``.pdf`` are drawn by Graphviz, which must be installed; ``.html`` is a self-contained page
            that zooms, searches, and shows rules and reasons on a click.
        layer: show one block, by its index or module path, or the part of the model below any module path. By
            default the block in the middle; of a model without blocks, everything.
        group: show this group, given itself or by name, with the activations that the search reaches from its
            trigger. Together with ``layer``, the part of the group in it.
        everything: show the parameters of the whole model.
        plan: show how much of each axis this plan keeps. It must be a plan for this model.
        fold: draw equal blocks once; False to draw each.

    Raises:
        ArgumentError: an argument is of the wrong type, or the suffix is unknown.
        UnknownNameError: no such layer or group; suggests the nearest.
        PlanError: the plan is for another model.
        FxpruneError: the file cannot be written, or Graphviz is needed and not installed.
    """
    everything, fold, target = flag("everything", everything), flag("fold", fold), check_target(as_path("path", path))
    if plan is not None:
        instance("plan", plan, Plan, "a plan, as in Plan.from_json(text), or None")
    atlas = Atlas(graph, plan)
    if group is not None:
        name = group if isinstance(group, str) else instance("group", group, Group, "a group, or the name of one").name
        view = _group_view(atlas, find_group(atlas.groups, name), layer, fold)
    elif everything or (layer is None and not atlas.axes.blocks):
        view = _whole_view(atlas, fold)
    else:
        view = _module_view(atlas, _find_module(atlas, layer))
    write_picture(*draw(atlas, view), view.title, target)


def _find_module(atlas: Atlas, layer: str | int | None) -> str:
    """The module path of a layer, given by index or path."""
    blocks = atlas.axes.blocks
    if layer is None:
        return blocks[len(blocks) // 2]
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        raise refuse("layer", layer, "the index of a block, or a module path")
    if isinstance(layer, int) or re.fullmatch(r"-?[0-9]{1,9}", layer):
        if not -len(blocks) <= int(layer) < len(blocks):
            raise UnknownNameError("layer", int(layer), (f"{i}" for i in range(len(blocks))))
        return blocks[int(layer)]
    if all(owner_block(name.rpartition(".")[0], (layer,)) is None for name in atlas.weights):
        raise UnknownNameError("layer", layer, blocks)
    return layer


def _below(atlas: Atlas, module: str) -> list[Axis]:
    """The axes of more than one position of parameters and buffers below ``module``."""
    return [
        axis
        for axis, data in atlas.graph.nodes(data=True)
        if data["role"] != "activation" and data["size"] > 1 and _is_below(atlas.module(axis), module)
    ]


def _is_below(path: str, module: str) -> bool:
    """Whether ``path`` is ``module`` or lies below it; the model itself has an empty path."""
    return not module or owner_block(path, (module,)) is not None


def _whole_view(atlas: Atlas, fold: bool) -> View:
    """A picture of the axes of parameters and coupled buffers; of equal blocks, only those of the first."""
    folds = find_folds(atlas) if fold else ()
    sums = _outside(atlas, atlas.sums, folds)
    entering = frozenset(_sources(atlas, sums)).difference(sums)
    below = _below(atlas, "")
    held = {factor for axis in below if axis.tensor in atlas.axes.trained for factor in atlas.factors(axis)}
    coupled = [a for a in below if a.tensor in atlas.axes.trained or held.intersection(atlas.factors(a))]
    shown = [*_outside(atlas, coupled, folds), *sums, *entering]
    count, drawn = len(atlas.axes.blocks), len(folds)
    title = f"The whole model: {plural(count, 'block')}, of which {drawn} drawn" if drawn < count and fold else ""
    return replace(contracted(atlas, title or "Axes of all parameters", shown), entering=entering, folds=folds)


def _sources(atlas: Atlas, sums: Iterable[Axis]) -> list[Axis]:
    """The axes of the streams that enter ``sums``."""
    sources = (Axis(atlas.axes.residuals[axis.tensor], axis.dim) for axis in sums)
    return [axis for axis in sources if axis in atlas.graph]


def _outside(atlas: Atlas, axes: Iterable[Axis], folds: Sequence[Fold]) -> list[Axis]:
    """The ``axes`` outside hidden blocks."""
    hidden = tuple(block for fold in folds for block in fold.hidden)
    return [axis for axis in axes if owner_block(atlas.module(axis), hidden) is None]


def _module_view(atlas: Atlas, module: str) -> View:
    """A picture of the axes of one module, and of coupled buffers that belong to no block.

    If a stream runs through the module, its sums there and its input are shown.
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
        return replace(_module_view(atlas, group.block), title=f"Group {group.name}: the whole block")
    title = f"Group {group.name}: removing a unit removes it from every axis shown"
    if layer is not None:
        module = _find_module(atlas, layer)
        inside = [axis for axis in atlas.graph.nodes if _is_below(atlas.module(axis), module)]
        return searched(atlas, f"{title}; the part in {module}", group, inside)
    folds = find_folds(atlas) if fold and group.block is None else ()
    return replace(searched(atlas, title, group, _outside(atlas, atlas.graph.nodes, folds)), folds=folds)


def layer_svg(graph_module: fx.GraphModule, norm: str = "sliced") -> str:
    """The middle layer of a graph as inline SVG; empty if Graphviz is not installed or fails."""
    if shutil.which("dot") is None:
        return ""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "layer.svg"
        with suppress(FxpruneError):
            write_dot(dependency_graph(graph_module, norm), file)
        found = re.search(r"<svg.*</svg>", file.read_text(encoding="utf-8"), re.S) if file.exists() else None
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", found[0]) if found else ""  # not needed inside HTML
