"""Write the dependency graph as a picture that people can read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import networkx as nx

from fxprune.discovery.groups import Group
from fxprune.discovery.lookup import find_group
from fxprune.dot.atlas import Atlas
from fxprune.dot.draw import draw
from fxprune.dot.fold import Fold, find_folds
from fxprune.dot.render import check_target, write_picture
from fxprune.dot.view import View, contracted, searched
from fxprune.dot.words import plural
from fxprune.errors import UnknownNameError
from fxprune.graph.blocks import owner_block, within
from fxprune.pipeline.arguments import as_path, flag, instance, refuse
from fxprune.removal.plan import Plan
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
