"""Attributes set by hand: those that a class derives from other sizes, and epsilons of norms.

A norm that is kept as masking has it adds another epsilon over fewer units.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx, nn

from fxprune.emit.layout import plain_config, stock_class
from fxprune.emit.snapshot import (
    Axis,
    Number,
    Shape,
    Snapshot,
    build_on_meta,
    common_module,
    is_number,
    mismatches,
    part_of,
    take_snapshot,
)
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import within
from fxprune.graph.tensors import set_argument
from fxprune.modelling.blocks import put_fields
from fxprune.removal.removal import RescaledNumber

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

Attribute = tuple[str, str]
"""The path of a module, and the name of its attribute."""

Patches = dict[Attribute, Number]
"""Attributes to set."""


def by_module(values: Mapping[Attribute, T]) -> dict[str, dict[str, T]]:
    """Values of attributes by module path and name, as a blueprint has them."""
    found: dict[str, dict[str, T]] = {}
    for (path, name), value in values.items():
        found.setdefault(path, {})[name] = value
    return found


def scope_patches(before: Snapshot, after: Snapshot, wrong: frozenset[Axis]) -> Patches:
    """Integer attributes in which ``after``, of the wanted sizes on the axes in ``wrong``, differs from ``before``.

    Of the block ``after``, which may have any other sizes, only the smallest module that holds these axes counts.
    """
    scope = common_module(name for name, _ in wrong)
    inside = {key: value for key, value in after.numbers.items() if not scope or within(f"{key[0]}.", (scope,))}
    return {key: value for key, value in inside.items() if before.numbers.get(key, value) != value}


def leaf_patches(module: nn.Module, wanted: Mapping[str, Shape], skip: tuple[str, ...] = ()) -> Patches:
    """New values of the attributes of modules that own a resized tensor, outside the subtrees to ``skip``."""
    found: Patches = {}
    for path, child in module.named_modules():
        if within(f"{path}.", skip):
            continue
        prefix = f"{path}." if path else ""
        own = {name: wanted[prefix + name] for name in (*child._parameters, *child._buffers) if prefix + name in wanted}
        have = _own_shapes(child)
        if mismatches({name: have[name] for name in own if name in have}, own):
            patched = _by_constructor(child, have, own) or _by_equal_sizes(child, have, own)
            found.update({(path, name): value for name, value in patched.items()})
    return found


def _own_shapes(module: nn.Module) -> dict[str, Shape]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


def _by_constructor(module: nn.Module, have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Number]:
    """Return the attributes of the same class built for the wanted shapes, by changing its constructor arguments.

    If arguments that are moved one by one do not give these shapes, those that hold a size which changes move at once,
    and then a further one is made smaller, such as the number of groups.
    """
    arguments = _arguments(module)
    built = None if arguments is None else _construct(module, arguments)
    if arguments is None or built is None or _own_shapes(built).keys() != have.keys():
        return {}
    equal = {name: value for name, value in _by_equal_sizes(module, have, wanted).items() if name in arguments}
    starts = [arguments, {**arguments, **equal}]
    counts = {name: value for name, value in arguments.items() if type(value) is int and value <= _MOST_COUNTED}
    fewer = [{name: n} for name, value in counts.items() if name not in equal for n in range(value - 1, 0, -1)]
    starts += [{**start, **one} for start in reversed(starts) for one in fewer]
    best: nn.Module | None = None
    for moved in starts:
        for axis in sorted(mismatches(_own_shapes(built), {**_own_shapes(built), **wanted})):
            moved = _moved(module, moved, axis, wanted)
        new = _construct(module, moved)
        if new is not None and wanted.items() <= _own_shapes(new).items():
            best = new
            break
        best = best or new
    numbers = {name: value for name, value in vars(best).items() if is_number(value)} if best is not None else {}
    return {name: value for name, value in numbers.items() if vars(module).get(name, value) != value}


_MOST_COUNTED = 64
"""Numbers of groups and the like that are tried one by one."""


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Return the constructor arguments of a module, read off its attributes; None if one cannot be."""
    signature = attempt(inspect.signature, type(module))
    if isinstance(signature, Refusal):
        return None
    found: dict[str, Any] = {}
    held, plain = vars(module), bool | float | str | None
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in module._parameters:
            found[parameter.name] = module._parameters[parameter.name] is not None
        elif parameter.name in held and (is_number(held[parameter.name]) or isinstance(held[parameter.name], plain)):
            found[parameter.name] = held[parameter.name]
        elif parameter.default is parameter.empty:
            return None
    return found


def _construct(module: nn.Module, arguments: Mapping[str, Any]) -> nn.Module | None:
    built = build_on_meta(type(module), **arguments)
    return None if isinstance(built, Refusal) else built


def _moved(module: nn.Module, arguments: dict[str, Any], axis: Axis, wanted: Mapping[str, Shape]) -> dict[str, Any]:
    """Return arguments of which one has the value that gives an axis the wanted size, if one drives it."""
    name, index = axis

    def size_with(changed: Mapping[str, Any]) -> int | None:
        built = _construct(module, {**arguments, **changed})
        shape = () if built is None else _own_shapes(built).get(name, ())
        return shape[index] if 0 <= index < len(shape) else None

    size = size_with({})
    places = [(argument, position) for argument, value in arguments.items() for position in _positions(value)]
    if size is None:
        return arguments
    for argument, position in places:
        value = arguments[argument]
        item = value if isinstance(value, int) else value[position]
        for delta in (1, item):  # a multiple, where a class insists on divisibility
            nudged = size_with({argument: _with_item(value, position, item + delta)})
            if nudged is None or nudged == size:
                continue
            step = Fraction((wanted[name][index] - size) * delta, nudged - size)
            if step.denominator == 1 and item + step > 0:
                return {**arguments, argument: _with_item(value, position, item + int(step))}
    return arguments


def _positions(value: object) -> range:
    return range(len(value) if isinstance(value, tuple) else 1) if is_number(value) else range(0)


def _with_item(value: Number, position: int, item: int) -> Number:
    return item if isinstance(value, int) else (*value[:position], item, *value[position + 1 :])


def _by_equal_sizes(module: nn.Module, have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Number]:
    """Return the new value of attributes that equal a size which changes wherever it occurs."""
    renamed: dict[int, set[int]] = {}
    for name, shape in wanted.items():
        for old, new in zip(have.get(name, ()), shape, strict=False):
            renamed.setdefault(old, set()).add(new)
    moved = {old: next(iter(new)) for old, new in renamed.items() if len(new) == 1}
    found: dict[str, Number] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not is_number(value):
            continue
        if isinstance(value, tuple) and sum(item in moved for item in value) > 1:
            continue  # the sides of a window, not a shape
        items: tuple[int, ...] = value if isinstance(value, tuple) else (value,)
        changed = [moved.get(item, item) for item in items]
        new_value: Number = tuple(changed) if isinstance(value, tuple) else changed[0]
        if new_value != value:
            found[name] = new_value
    return found


@dataclass(frozen=True)
class Resized:
    """The changes in a number of units, and in the sizes of the axes that they are on, if no others go.

    Args:
        scope: path of the smallest module that holds all of these axes.
        sizes: numbers afterwards by those before.
        axes: sizes of the axes afterwards.
    """

    scope: str
    sizes: Mapping[int, int]
    axes: Mapping[Axis, int] = field(default_factory=dict)

    def inner(self, name: str) -> str:
        """The name within the scope of a tensor or module."""
        return name[len(self.scope) + bool(self.scope) :]


def patches_by_hand(model: nn.Module, wanted: Mapping[str, Shape], resized: Sequence[Resized]) -> Iterator[Patches]:
    """Yield attributes of a model whose tensors are resized, found by their values where its classes set none.

    Those of torch's modules follow from their tensors. Those of others change if they hold a size of a tensor of their
    own, or a number that changes within their scope: at first all of these, then all but one of a name, then all but
    two.
    """
    leaves, found = _followers(model, wanted)
    for one in resized:
        for path, module in model.get_submodule(one.scope).named_modules(prefix=one.scope):
            for name, value in vars(module).items() if not _is_of_torch(module) else ():
                if type(value) is int and value in one.sizes and not name.startswith("_"):
                    found.setdefault((path, name), (value, one.sizes[value]))
    kinds = sorted({(name, old) for (_, name), (old, _) in found.items()})
    without = itertools.chain.from_iterable(itertools.combinations(kinds, count) for count in range(3))
    for left in itertools.islice(without, _MOST_BY_HAND):
        yield leaves | {place: new for place, (old, new) in found.items() if (place[1], old) not in left}


def _followers(model: nn.Module, wanted: Mapping[str, Shape]) -> tuple[Patches, dict[Attribute, tuple[int, int]]]:
    """Return the attributes that follow from resized tensors, and numbers that may follow, before and after."""
    leaves: Patches = {}
    found: dict[Attribute, tuple[int, int]] = {}
    for (path, name), value in leaf_patches(model, wanted).items():
        module = model.get_submodule(path)
        if type(value) is int and not _is_of_torch(module):
            found[path, name] = vars(module)[name], value
        else:
            leaves[path, name] = value
    return leaves, found


def composed_patches(
    model: nn.Module, wanted: Mapping[str, Shape], alone: Sequence[tuple[Resized, Patches]]
) -> Patches:
    """Attributes of a model that loses units of several groups, from those that change where one goes alone.

    These are by paths within the scope. A number that several groups change is a product of theirs or, where that is no
    whole number, a sum.
    """
    steps: dict[Attribute, list[int]] = {}
    for one, patches in alone:
        for (inner, name), value in patches.items():
            path = f"{one.scope}.{inner}".strip(".")
            module = model.get_submodule(path)
            if type(value) is int and not _is_of_torch(module):
                steps.setdefault((path, name), []).append(one.sizes.get(vars(module)[name], value))
    found, _ = _followers(model, wanted)
    for (path, name), values in steps.items():
        old = vars(model.get_submodule(path))[name]
        scaled = math.prod((Fraction(value, old) for value in values), start=Fraction(old))
        found[path, name] = int(scaled) if scaled.denominator == 1 else old + sum(value - old for value in values)
    return found


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


_MOST_BY_HAND = 32
"""Bounds the time: each is built and run without storage."""


def carry_over(dense: nn.Module, slim: nn.Module) -> None:
    """Copy floats, flags and plain tensors from the dense model to a slim one: a scale does not follow a head's width.

    Buffers that the model adds to a finished block are added to a block that was rebuilt, too.
    """
    twins: dict[str, nn.Module] = dict(slim.named_modules())
    for path, module in dense.named_modules():
        twin = twins.get(path)
        if twin is None:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in (*twin._buffers, *twin._parameters):
                persistent = name not in module._non_persistent_buffers_set
                twin.register_buffer(name, torch.empty_like(buffer, device="meta"), persistent)
        there = vars(twin)
        there.update({name: value for name, value in vars(module).items() if _is_kept(name, value, there)})


def _is_kept(name: str, value: object, there: Mapping[str, object]) -> bool:
    """Whether an attribute keeps its dense value, given the attributes of the slim module."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, functools.partial) and name not in there:  # set by the user: copied if it holds no module
        parts = (*value.args, *value.keywords.values())
        return inspect.isfunction(value.func) and not any(isinstance(part, nn.Module) for part in parts)
    if name == "training" or name.startswith("_") or is_number(there.get(name)):  # private: such as a mark of hooks
        return False
    return isinstance(value, float | bool | str) or (value is None and name in there)


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
    def attributes(self) -> dict[Attribute, float]:
        return {place: after for place, (_, after) in self.values.items()}


def find_epsilons(
    graph: fx.Graph, model: nn.Module, changes: Mapping[tuple[str, tuple[Any, ...]], RescaledNumber]
) -> NormEpsilons:
    """Find the attributes of modules that hold epsilons of a graph.

    The attribute belongs to the innermost module around the op that has one of this value. All ops that read the
    attribute must change alike. ``changes`` are numbers of the graph, by the name of a node and the place of the
    argument; nodes that it lacks are ignored. The graph may be that before or after the change.
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
    """Return the config field that gives all epsilons their new value and changes nothing else; empty if none does."""
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


def set_attributes(model: nn.Module, values: Mapping[Attribute, float]) -> dict[Attribute, float]:
    """Set attributes of modules; return the values that they had."""
    before: dict[Attribute, float] = {}
    for (path, name), value in values.items():
        held = vars(model.get_submodule(path))
        before[path, name] = held[name]
        held[name] = value
    return before


@contextmanager
def enlarged_epsilons(
    graph: fx.Graph, model: nn.Module, epsilons: NormEpsilons, names: Mapping[str, str]
) -> Iterator[None]:
    """Set the epsilons of a graph and of its model to large values, each to another one, inside the context.

    Outputs look right even where a small epsilon is wrong; with a large one they do not. ``names`` are module paths in
    ``model`` by those in the dense model, which the epsilons have.
    """
    nodes = {node.name: node for node in graph.nodes}
    large = {place: _LARGE * (1 + i / len(epsilons.values)) for i, place in enumerate(epsilons.values)}
    held = [(nodes[name], nodes[name].args, nodes[name].kwargs) for here in epsilons.nodes.values() for name, _ in here]
    before = set_attributes(model, {(names[path], name): value for (path, name), value in large.items()})
    try:
        for place, value in large.items():
            for name, where in epsilons.nodes[place]:
                set_argument(nodes[name], where, value)
        yield
    finally:
        set_attributes(model, before)
        for node, args, kwargs in held:
            node.args, node.kwargs = args, kwargs
