"""Norm epsilons in the modules and the config of a model, found by the values that its graph has.

A norm that is kept as masking has it adds another epsilon over fewer units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fxprune.emit.layout import plain_config, stock_class
from fxprune.emit.snapshot import build_on_meta, part_of, take_snapshot
from fxprune.graph.context import Refusal
from fxprune.graph.facts import within
from fxprune.graph.tensors import set_argument
from fxprune.modelling.block_config import put_fields
from fxprune.removal.removal import RescaledNumber

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attribute", "NormEpsilons", "enlarged_epsilons", "epsilon_fields", "find_epsilons", "set_attributes"]

Attribute = tuple[str, str]
"""The path of a module, and the name of its attribute."""

_LARGE = 0.1
"""An epsilon that shows in the output of a norm: next to a mean of squares near 1."""


@dataclass(frozen=True)
class NormEpsilons:
    """Where a model holds the norm epsilons that change.

    Args:
        values: by attribute, the epsilon before and after.
        nodes: by attribute, the arguments of the graph that it became: names of nodes, and the place in each.
        reasons: for the epsilons that no attribute of their own holds, why.
    """

    values: Mapping[Attribute, tuple[float, float]] = field(default_factory=dict)
    nodes: Mapping[Attribute, tuple[tuple[str, tuple[Any, ...]], ...]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for (path, name), (_, after) in self.values.items():
            found.setdefault(path, {})[name] = after
        return found


def find_epsilons(
    graph: fx.Graph, model: nn.Module, changes: Mapping[tuple[str, tuple[Any, ...]], RescaledNumber]
) -> NormEpsilons:
    """Find the attributes of modules that hold epsilons of a graph.

    The attribute belongs to the innermost module around the op that has one of this value. All ops that read the
    attribute must change alike.

    Args:
        graph: the graph, before or after the epsilons changed; nodes that it lacks are ignored.
        changes: numbers of the graph, by the name of a node and the place of the argument.
    """
    modules = dict(model.named_modules())
    nodes = {node.name: node for node in graph.nodes}
    here = {key: change for key, change in changes.items() if key[0] in nodes}
    values: dict[Attribute, tuple[float, float]] = {}
    holding: dict[Attribute, list[tuple[str, tuple[Any, ...]]]] = {}
    reasons: dict[str, None] = {}
    for (name, path), change in here.items():
        attribute = _attribute_of(nodes[name], modules, change.before)
        if isinstance(attribute, str):
            reasons[attribute] = None
            continue
        if values.setdefault(attribute, (change.before, change.after)) != (change.before, change.after):
            reasons[f"{attribute[0]}.{attribute[1]}: two norms read it and need different values"] = None
        holding.setdefault(attribute, []).append((name, path))
    befores = {change.before for change in here.values()}
    changed = {name for name, _ in here}
    for node in graph.nodes:
        floats = [value for value in (*node.args, *node.kwargs.values()) if type(value) is float]
        for value in befores.intersection(floats) if node.name not in changed else ():
            attribute = _attribute_of(node, modules, value)
            if attribute in values:
                reasons[f"{attribute[0]}.{attribute[1]}: {node.name} reads it too, and does not change"] = None
    return NormEpsilons(values, {place: tuple(held) for place, held in holding.items()}, tuple(reasons))


def _attribute_of(node: fx.Node, modules: Mapping[str, nn.Module], value: float) -> Attribute | str:
    """Return the attribute that a node read a number from, or the reason why there is none."""
    stack = [str(path).partition("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    for path in reversed(stack):
        held = vars(modules[path]) if path in modules else {}
        names = [name for name, own in held.items() if type(own) is float and own == value and name[0] != "_"]
        if len(names) > 1:
            return f"{path}: several attributes are {value}: {', '.join(names)}"
        if names:
            return path, names[0]
    return f"{stack[-1] if stack else 'the model'}: no attribute is {value}, which its norm adds"


def epsilon_fields(
    model: PreTrainedModel, part: str, epsilons: NormEpsilons, removed: tuple[str, ...] = ()
) -> dict[str, float]:
    """Return the config field that gives all epsilons their new value and changes nothing else; empty if none does.

    Args:
        part: the nested config that the dense model's blocks are built from; empty for the model's own.
    """
    pairs = set(epsilons.values.values())
    if len(pairs) != 1:
        return {}
    ((before, after),) = pairs

    def build(fields: Mapping[str, float]) -> nn.Module:
        config = plain_config(model)
        put_fields(part_of(config, part), fields)
        made: nn.Module = stock_class(model)(config)
        return made

    def scalars(fields: Mapping[str, float]) -> Mapping[Attribute, float]:
        built = build_on_meta(build, fields)
        return {} if isinstance(built, Refusal) else take_snapshot(built).scalars

    held = vars(part_of(model.config, part)).items()
    names = [name for name, value in held if type(value) is float and value == before != after]
    old = scalars({}) if names else {}
    for name in names:
        new = scalars({name: after}).items()
        moved = {key: value for key, value in new if old.get(key) != value and not within(f"{key[0]}.", removed)}
        if old and moved == dict.fromkeys(epsilons.values, after):
            return {name: after}
    return {}


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Set attributes by module path and name; return the values that they had."""
    before: dict[str, dict[str, float]] = {}
    for path, own in attributes.items():
        held = vars(model.get_submodule(path))
        before[path] = {name: held[name] for name in own}
        held.update(own)
    return before


@contextmanager
def enlarged_epsilons(
    graph: fx.Graph, model: nn.Module, epsilons: NormEpsilons, names: Mapping[str, str]
) -> Iterator[None]:
    """Set the epsilons of a graph and of its model to large values, each to another one, inside the context.

    Outputs look right even where a small epsilon is wrong; with a large one they do not.

    Args:
        epsilons: where they are, by module paths of the dense model.
        names: module paths in ``model``, by those paths.
    """
    nodes = {node.name: node for node in graph.nodes}
    large = {place: _LARGE * (1 + i / len(epsilons.values)) for i, place in enumerate(epsilons.values)}
    held = [(nodes[name], nodes[name].args, nodes[name].kwargs) for here in epsilons.nodes.values() for name, _ in here]
    wanted: dict[str, dict[str, float]] = {}
    for (path, name), value in large.items():
        wanted.setdefault(names[path], {})[name] = value
    before = set_attributes(model, wanted)
    try:
        for place, value in large.items():
            for name, where in epsilons.nodes[place]:
                set_argument(nodes[name], where, value)
        yield
    finally:
        set_attributes(model, before)
        for node, args, kwargs in held:
            node.args, node.kwargs = args, kwargs
