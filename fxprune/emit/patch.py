"""Attributes that a class derives from other sizes: set explicitly, or copied from the dense model."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fxprune.emit.snapshot import (
    MISSING_AXIS,
    Axis,
    Number,
    Shape,
    Snapshot,
    build_on_meta,
    is_number,
    mismatches,
    take_snapshot,
)
from fxprune.graph.context import Refusal, attempt
from fxprune.graph.facts import within

__all__ = [
    "Patches",
    "Resized",
    "carry_over",
    "leaf_patches",
    "merged",
    "numbers_of",
    "patches_by_hand",
    "scope_patches",
]

Patches = dict[str, dict[str, Number]]
"""Attributes to set, by module path and name."""


def numbers_of(module: nn.Module) -> Patches:
    """Integer attributes of a module and its submodules, by module path."""
    found: Patches = {}
    for (path, name), value in take_snapshot(module).numbers.items():
        found.setdefault(path, {})[name] = value
    return found


def merged(first: Patches, second: Patches) -> Patches:
    """Both sets of attributes; the second wins."""
    paths = first.keys() | second.keys()
    return {path: {**first.get(path, {}), **second.get(path, {})} for path in sorted(paths)}


def scope_patches(before: Snapshot, after: Snapshot, wrong: frozenset[Axis]) -> Patches:
    """Integer attributes as in a block built with other fields, below the smallest module that holds all of ``wrong``.

    Args:
        before: the block as it is.
        after: the block under an assignment that gives the wanted sizes on the axes in ``wrong``, whatever it
            does elsewhere.
    """
    paths = [name.split(".")[:-1] for name, _ in wrong]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    scope = ".".join(parts[0] for parts in shared)
    found: Patches = {}
    for (path, name), value in after.numbers.items():
        inside = not scope or within(f"{path}.", (scope,))
        if inside and before.numbers.get((path, name), value) != value:
            found.setdefault(path, {})[name] = value
    return found


def leaf_patches(module: nn.Module, wanted: Mapping[str, Shape], skip: tuple[str, ...] = ()) -> Patches:
    """Attributes of the modules that own a resized tensor, as they follow from the tensor.

    Args:
        wanted: shapes by name within ``module``.
        skip: module paths whose subtrees are left alone.
    """
    found: Patches = {}
    for path, child in module.named_modules():
        if within(f"{path}.", skip):
            continue
        prefix = f"{path}." if path else ""
        own = {name: wanted[prefix + name] for name in (*child._parameters, *child._buffers) if prefix + name in wanted}
        have = _own_shapes(child)
        if mismatches({name: have[name] for name in own if name in have}, own):
            patched = _by_constructor(child, have, own) or _by_equal_sizes(child, have, own)
            found.update({path: patched} if patched else {})
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
    first = None
    for start in starts:
        moved = dict(start)
        for axis in sorted(mismatches(_own_shapes(built), {**_own_shapes(built), **wanted})):
            _move_argument(module, moved, axis, wanted)
        new = _construct(module, moved)
        first = first or new
        shapes = {} if new is None else _own_shapes(new)
        if new is not None and all(shapes.get(name) == shape for name, shape in wanted.items()):
            return _differing(new, module)
    return {} if first is None else _differing(first, module)


_MOST_COUNTED = 64
"""Numbers of groups and the like that are tried one by one."""


def _differing(new: nn.Module, module: nn.Module) -> dict[str, Number]:
    numbers = {name: value for name, value in vars(new).items() if is_number(value)}
    return {name: value for name, value in numbers.items() if vars(module).get(name, value) != value}


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


def _move_argument(module: nn.Module, arguments: dict[str, Any], axis: Axis, wanted: Mapping[str, Shape]) -> None:
    """Set one argument to the value under which an axis has the wanted size, if one drives it."""
    name, index = axis

    def size_with(changed: Mapping[str, Any]) -> int | None:
        built = _construct(module, {**arguments, **changed})
        shape = () if built is None else _own_shapes(built).get(name, ())
        return shape[index] if 0 <= index < len(shape) else None

    size = size_with({})
    if index == MISSING_AXIS or size is None:
        return
    places = [(argument, value, *place) for argument, value in arguments.items() for place in _items(value)]
    for argument, value, position, item in places:
        for delta in (1, item):  # a multiple, where a class insists on divisibility
            nudged = size_with({argument: _with_item(value, position, item + delta)})
            if nudged is None or nudged == size:
                continue
            step = Fraction((wanted[name][index] - size) * delta, nudged - size)
            if step.denominator == 1 and item + step > 0:
                arguments[argument] = _with_item(value, position, item + int(step))
                return


def _items(value: object) -> Iterator[tuple[int, int]]:
    if is_number(value):
        yield from enumerate(value if isinstance(value, tuple) else (value,))


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
        items = [moved.get(item, item) for _, item in _items(value)]
        new_value = tuple(items) if isinstance(value, tuple) else items[0]
        if new_value != value:
            found[name] = new_value
    return found


@dataclass(frozen=True)
class Resized:
    """Units that go: a number of units and the sizes of axes that they are on, before and after.

    Args:
        scope: path of the smallest module that holds all of these axes.
        sizes: numbers afterwards by those before.
    """

    scope: str
    sizes: Mapping[int, int]


def patches_by_hand(model: nn.Module, wanted: Mapping[str, Shape], resized: Sequence[Resized]) -> Iterator[Patches]:
    """Yield attributes of a model whose tensors are resized, found by their values where its classes set none.

    Those of torch's modules follow from their tensors. Those of others change if they hold a number that changes within
    their scope: at first all of these, then all but one of a name, then all but two.

    Args:
        model: with its dense attributes.
        wanted: shapes by name.
        resized: where numbers change, and which.
    """
    leaves = leaf_patches(model, wanted)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for one in resized:
        for path, module in model.get_submodule(one.scope).named_modules(prefix=one.scope):
            if type(module).__module__.startswith("torch.nn."):
                continue
            for name, value in vars(module).items():
                if type(value) is int and value in one.sizes and not name.startswith("_"):
                    found.setdefault(path, {}).setdefault(name, (value, one.sizes[value]))
    kinds = sorted({(name, old) for own in found.values() for name, (old, _) in own.items()})
    without = itertools.chain.from_iterable(itertools.combinations(kinds, count) for count in range(3))
    for left in itertools.islice(without, _MOST_BY_HAND):
        changed: Patches = {
            path: {name: new for name, (old, new) in own.items() if (name, old) not in left}
            for path, own in found.items()
        }
        yield {path: own for path, own in merged(leaves, changed).items() if own}


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
        held = vars(twin)
        held.update({name: value for name, value in vars(module).items() if _is_kept(name, value, held)})


def _is_kept(name: str, value: object, there: Mapping[str, object]) -> bool:
    """Whether an attribute keeps its dense value, given the attributes of the slim module."""
    if name == "training":
        return False
    if isinstance(value, torch.Tensor):
        return True
    if name not in there:
        if isinstance(value, functools.partial):  # set by the user: copied if it holds no module
            parts = (*value.args, *value.keywords.values())
            return inspect.isfunction(value.func) and not any(isinstance(part, nn.Module) for part in parts)
        return isinstance(value, float | bool | str)
    if name.startswith("_") or is_number(there[name]):
        return False
    return isinstance(value, float | bool | str) or value is None
