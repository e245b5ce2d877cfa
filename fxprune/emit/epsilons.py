"""The numbers that norms add, in the modules and the config of a model: found by the values that the graph has.

A norm that is kept as masking has it adds another number over fewer units. In the graph that is an argument of an op;
in the model it is an attribute of the module whose code made the op, or a field of the config for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel

from fxprune.emit.snapshot import build_on_meta, part_of, take_snapshot
from fxprune.graph.context import Refusal
from fxprune.graph.facts import within
from fxprune.graph.tensors import set_argument
from fxprune.modelling.block_config import put_fields
from fxprune.removal.removal import RescaledNumber

__all__ = ["Attributes", "Place", "Places", "driving_fields", "exaggerated", "find_places", "set_attributes"]

Attributes = Mapping[str, Mapping[str, float]]
"""Attributes to set, by module path and name."""

Place = tuple[str, str]
"""The path of a module, and the name of its attribute."""

_LARGE = 0.1
"""What numbers are put at to see whether a module reads its own: next to a mean of squares near 1 it shows."""


@dataclass(frozen=True)
class Places:
    """Where a model holds the numbers that change.

    Args:
        values: by place, the number before and after.
        nodes: by place, where it stands in the graph: names of nodes, and where in each.
        reasons: for those that have no place, why not.
    """

    values: Mapping[Place, tuple[float, float]] = field(default_factory=dict)
    nodes: Mapping[Place, tuple[tuple[str, tuple[Any, ...]], ...]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, dict[str, float]]:
        """The new values."""
        found: dict[str, dict[str, float]] = {}
        for (path, name), (_, after) in self.values.items():
            found.setdefault(path, {})[name] = after
        return found


def find_places(
    graph: fx.Graph, model: nn.Module, changes: Mapping[tuple[str, tuple[Any, ...]], RescaledNumber]
) -> Places:
    """Find the attributes of modules that hold numbers of a graph.

    An attribute is that of the innermost module around the op that has one of this value. All ops that would have it
    from there have to change alike.

    Args:
        graph: the graph, before or after these numbers changed; those of nodes that it lacks do not count.
        model: the model that it was traced from.
        changes: numbers of the graph, by the name of a node and where in it they stand.
    """
    modules = dict(model.named_modules())
    nodes = {node.name: node for node in graph.nodes}
    here = {key: change for key, change in changes.items() if key[0] in nodes}
    values: dict[Place, tuple[float, float]] = {}
    holding: dict[Place, list[tuple[str, tuple[Any, ...]]]] = {}
    reasons: dict[str, None] = {}
    for (name, path), change in here.items():
        place = _place(nodes[name], modules, change.before)
        if isinstance(place, str):
            reasons[place] = None
            continue
        if values.setdefault(place, (change.before, change.after)) != (change.before, change.after):
            reasons[f"{place[0]}.{place[1]}: two norms read it, and would have it otherwise"] = None
        holding.setdefault(place, []).append((name, path))
    befores = {change.before for change in here.values()}
    changed = {name for name, _ in here}
    for node in graph.nodes:
        for value in befores.intersection(_numbers(node)) if node.name not in changed else ():
            place = _place(node, modules, value)
            if place in values:
                reasons[f"{place[0]}.{place[1]}: {node.name} reads it too, and does not change"] = None
    return Places(values, {place: tuple(held) for place, held in holding.items()}, tuple(reasons))


def _numbers(node: fx.Node) -> Iterator[float]:
    """The floats among the arguments of a node."""
    yield from (value for value in (*node.args, *node.kwargs.values()) if type(value) is float)


def _place(node: fx.Node, modules: Mapping[str, nn.Module], value: float) -> Place | str:
    """Return the attribute that a node has a number from; in words, why there is none."""
    stack = [str(path).partition("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    for path in reversed(stack):
        held = vars(modules[path]) if path in modules else {}
        names = [name for name, own in held.items() if type(own) is float and own == value and name[0] != "_"]
        if len(names) > 1:
            return f"{path}: several attributes are {value}: {', '.join(names)}"
        if names:
            return path, names[0]
    return f"{stack[-1] if stack else 'the model'}: no attribute is {value}, which its norm adds"


def driving_fields(
    model: PreTrainedModel, part: str, places: Places, removed: tuple[str, ...] = ()
) -> dict[str, float]:
    """Return the config field that gives all places their new value and changes nothing else; none if there is none.

    Args:
        model: the dense model.
        part: of its config that its blocks are built from; empty for all of it.
        places: where the numbers are.
        removed: module paths of blocks that are gone.
    """
    pairs = set(places.values.values())
    if len(pairs) != 1:
        return {}
    ((before, after),) = pairs
    held = vars(part_of(model.config, part)).items()
    names = [name for name, value in held if type(value) is float and value == before != after]
    old = _scalars(model, part, {}) if names else {}
    for name in names:
        new = _scalars(model, part, {name: after}).items()
        moved = {key: value for key, value in new if old.get(key) != value and not within(f"{key[0]}.", removed)}
        if old and moved == dict.fromkeys(places.values, after):
            return {name: after}
    return {}


def _scalars(model: PreTrainedModel, part: str, fields: Mapping[str, float]) -> Mapping[Place, float]:
    """Return the float attributes of a model with other fields of the config; none where it cannot be built."""

    def build() -> nn.Module:
        config = copy.deepcopy(model.config)
        put_fields(part_of(config, part), fields)
        made: nn.Module = type(model)(config)
        return made

    built = build_on_meta(build)
    return {} if isinstance(built, Refusal) else take_snapshot(built).scalars


def set_attributes(model: nn.Module, attributes: Attributes) -> dict[str, dict[str, float]]:
    """Give attributes of modules their values; returns what they were."""
    before: dict[str, dict[str, float]] = {}
    for path, own in attributes.items():
        held = vars(model.get_submodule(path))
        before[path] = {name: held[name] for name in own}
        held.update(own)
    return before


@contextmanager
def exaggerated(graph: fx.Graph, model: nn.Module, places: Places, names: Mapping[str, str]) -> Iterator[None]:
    """Put the numbers of a graph and those of its model at large ones, each at its own, while the context lasts.

    Small numbers may be wrong in a model and its outputs still look right; these may not.

    Args:
        graph: the graph.
        model: a model that is to compute the same.
        places: where the numbers are, by the names of the dense model.
        names: of the modules in ``model``, by those names.
    """
    nodes = {node.name: node for node in graph.nodes}
    large = {place: _LARGE * (1 + i / len(places.values)) for i, place in enumerate(places.values)}
    held = [(nodes[name], nodes[name].args, nodes[name].kwargs) for here in places.nodes.values() for name, _ in here]
    asked: dict[str, dict[str, float]] = {}
    for (path, name), value in large.items():
        asked.setdefault(names[path], {})[name] = value
    before = set_attributes(model, asked)
    try:
        for place, value in large.items():
            for name, where in places.nodes[place]:
                set_argument(nodes[name], where, value)
        yield
    finally:
        set_attributes(model, before)
        for node, args, kwargs in held:
            node.args, node.kwargs = args, kwargs
