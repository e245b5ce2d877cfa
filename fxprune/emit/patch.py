"""Attributes that a class derives from other sizes are set by hand where no config field reaches them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from torch import nn

from fxprune.emit.layout import on_meta
from fxprune.emit.snapshot import (
    MISSING_AXIS,
    Axis,
    Number,
    Shape,
    Snapshot,
    is_number,
    mismatches,
    take_snapshot,
)

__all__ = ["Patches", "common_path", "leaf_patches", "merged", "numbers_of", "scope_patches"]

Patches = dict[str, dict[str, Number]]


def common_path(names: Mapping[str, Shape] | frozenset[str]) -> str:
    """Path of the smallest module that holds all the named tensors."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def numbers_of(module: nn.Module) -> Patches:
    """Integer attributes by module path."""
    found: Patches = {}
    for (path, name), value in take_snapshot(module).numbers.items():
        found.setdefault(path, {})[name] = value
    return found


def merged(first: Patches, second: Patches) -> Patches:
    """Both sets of attributes; the second wins."""
    paths = first.keys() | second.keys()
    return {path: {**first.get(path, {}), **second.get(path, {})} for path in sorted(paths)}


def scope_patches(before: Snapshot, after: Snapshot, wrong: frozenset[Axis]) -> Patches:
    """Integer attributes move as they do in a block built with other fields, inside the module that changes.

    Args:
        before: The block as it is.
        after: The block under an assignment that gives the wanted sizes on the axes in `wrong`, whatever it
            does elsewhere.
        wrong: Axes that have to change.

    Returns:
        Attributes by module path, for modules at or below the smallest one that holds all of `wrong`.
    """
    scope = common_path(frozenset(name for name, _ in wrong))
    found: Patches = {}
    for (path, name), value in after.numbers.items():
        inside = not scope or path == scope or path.startswith(f"{scope}.")
        if inside and before.numbers.get((path, name), value) != value:
            found.setdefault(path, {})[name] = value
    return found


def leaf_patches(module: nn.Module, wanted: Mapping[str, Shape], skip: tuple[str, ...] = ()) -> Patches:
    """Attributes of the modules that own a resized tensor follow the tensor.

    Args:
        module: A block or a model, as it is.
        wanted: Shapes by name within `module`.
        skip: Module paths whose subtrees are left alone.
    """
    found: Patches = {}
    for path, child in module.named_modules():
        if any(f"{path}.".startswith(f"{other}.") for other in skip):
            continue
        prefix = f"{path}." if path else ""
        own = {name: wanted[prefix + name] for name in (*child._parameters, *child._buffers) if prefix + name in wanted}
        have = _own_shapes(child)
        if own and mismatches({name: have[name] for name in own if name in have}, own):
            patched = _resized(child, own) or _equal_sizes(child, have, own)
            if patched:
                found[path] = patched
    return found


def _own_shapes(module: nn.Module) -> dict[str, Shape]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


def _resized(module: nn.Module, wanted: Mapping[str, Shape]) -> dict[str, Number]:
    """Attributes of the same class built for the wanted shapes, by its own constructor arguments."""
    arguments = _arguments(module)
    if arguments is None:
        return {}
    built = _construct(module, arguments)
    if built is None or _own_shapes(built).keys() != _own_shapes(module).keys():
        return {}
    for name, axis in sorted(mismatches(_own_shapes(built), {**_own_shapes(built), **wanted})):
        _move_argument(module, arguments, (name, axis), wanted)
    new = _construct(module, arguments)
    if new is None:
        return {}
    numbers = {name: value for name, value in vars(new).items() if is_number(value)}
    return {name: value for name, value in numbers.items() if vars(module).get(name, value) != value}


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in module._parameters:
            found[parameter.name] = module._parameters[parameter.name] is not None
        elif _plain(vars(module).get(parameter.name, parameter)):
            found[parameter.name] = vars(module)[parameter.name]
        elif parameter.default is parameter.empty:
            return None
    return found


def _plain(value: object) -> bool:
    return value is None or is_number(value) or isinstance(value, bool | float | str)


def _construct(module: nn.Module, arguments: Mapping[str, Any]) -> nn.Module | None:
    try:
        with on_meta():
            return type(module)(**arguments)
    except Exception:
        return None


def _move_argument(module: nn.Module, arguments: dict[str, Any], axis: Axis, wanted: Mapping[str, Shape]) -> None:
    """One argument takes the value under which an axis has the wanted size, if one drives it."""
    name, index = axis
    now = _construct(module, arguments)
    if index == MISSING_AXIS or now is None:
        return
    size = _own_shapes(now)[name][index]
    for argument, value in arguments.items():
        for position, item in _items(value):
            nudged = _construct(module, {**arguments, argument: _with(value, position, item + 1)})
            slope = 0 if nudged is None else _own_shapes(nudged)[name][index] - size
            step = Fraction(wanted[name][index] - size, slope) if slope else Fraction(1, 2)
            if step.denominator == 1 and item + step > 0:
                arguments[argument] = _with(value, position, item + int(step))
                return


def _items(value: object) -> Iterator[tuple[int, int]]:
    if is_number(value):
        yield from enumerate(value if isinstance(value, tuple) else (value,))


def _with(value: Number, position: int, item: int) -> Number:
    if isinstance(value, int):
        return item
    return (*value[:position], item, *value[position + 1 :])


def _equal_sizes(module: nn.Module, have: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Number]:
    """Attributes that equal a size which changes everywhere take its new value."""
    renamed: dict[int, set[int]] = {}
    for name, shape in wanted.items():
        for old, new in zip(have.get(name, ()), shape, strict=False):
            renamed.setdefault(old, set()).add(new)
    moved = {old: next(iter(new)) for old, new in renamed.items() if len(new) == 1}
    found: dict[str, Number] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or not is_number(value):
            continue
        items = [moved.get(item, item) for _, item in _items(value)]
        new_value = tuple(items) if isinstance(value, tuple) else items[0]
        if new_value != value:
            found[name] = new_value
    return found
