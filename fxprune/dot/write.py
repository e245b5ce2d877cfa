"""Write the dependency graph as a picture that people can read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import networkx as nx

from fxprune.discovery.groups import Group
from fxprune.dot.atlas import Atlas
from fxprune.dot.draw import draw
from fxprune.dot.view import View, contracted, searched
from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.graph.blocks import within
from fxprune.pipeline.arguments import as_path, flag, instance, refuse
from fxprune.rules.statements import Axis

__all__ = ["write_dot"]

_INDEX = re.compile(r"-?[0-9]{1,9}")
"""The index of a block, as text."""


def write_dot(
    graph: nx.Graph[Axis],
    path: str | os.PathLike[str],
    layer: str | int | None = None,
    group: Group | str | None = None,
    everything: bool = False,
) -> None:
    """Write a picture of ``graph`` to a file, in Graphviz's DOT language.

    Boxes are axes of parameters and buffers, in one colour a group and nested in the modules they belong to; frozen
    axes are grey. A line joins two axes that an op, or a chain of ops, couples. Tooltips tell the whole story.

    Args:
        graph: from :func:`fxprune.dependency_graph`.
        path: the file to write; ``dot -Tsvg`` makes a picture of it.
        layer: show one block, by its index or module path, or the part of the model below any module path. By
            default the block in the middle; of a model without blocks, everything.
        group: show this group, by itself or its name, with the activations that the search passes from its trigger
            on. Together with ``layer``, the part of it that lies there.
        everything: show the parameters of the whole model.

    Raises:
        ArgumentError: an argument is of the wrong type.
        UnknownNameError: no such layer or group; suggests the nearest.
        FxpruneError: the file cannot be written.
    """
    everything, target = flag("everything", everything), Path(as_path("path", path))
    atlas = Atlas(graph)
    if group is not None:
        view = _group_view(atlas, _find_group(atlas, group), layer)
    elif everything or (layer is None and not atlas.axes.blocks):
        view = contracted(atlas, "Axes of all parameters", _below(atlas, ""))
    else:
        view = _module_view(atlas, _find_module(atlas, layer))
    try:
        target.write_text(draw(atlas, view).to_string(), encoding="utf-8")
    except OSError as error:
        raise FxpruneError(
            f"cannot be written: {error.strerror}",
            where=str(target),
            remedy="Choose a file in a folder that is there and can be written to",
        ) from error


def _find_group(atlas: Atlas, group: Group | str) -> Group:
    name = group if isinstance(group, str) else instance("group", group, Group, "a group, or the name of one").name
    found = next((g for g in atlas.groups if g.name == name), None)
    if found is None:
        raise UnknownNameError("group", name, (g.name for g in atlas.groups))
    return found


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


def _module_view(atlas: Atlas, module: str) -> View:
    """Return a picture of the axes of one module, and of buffers shared by all blocks that are coupled to them."""
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
    blocks = atlas.axes.blocks
    place = f", block {blocks.index(module) + 1} of {len(blocks)}" if module in blocks else ""
    return contracted(atlas, f"Axes of the parameters of {module}{place}", [*own, *shared])


def _group_view(atlas: Atlas, group: Group, layer: str | int | None) -> View:
    if group.factor is None:
        assert group.block is not None
        return replace(_module_view(atlas, group.block), title=f"Group {group.name}: the whole block goes")
    title = f"Group {group.name}: removing a unit removes it from every axis shown"
    if layer is None:
        return searched(atlas, title, group)
    module = _find_module(atlas, layer)
    inside = (axis for axis in atlas.graph.nodes if _is_below(atlas.module(axis), module))
    return searched(atlas, f"{title}; the part in {module}", group, inside)
