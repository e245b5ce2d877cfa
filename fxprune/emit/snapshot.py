"""What a module looks like from outside: tensor shapes and the scalar attributes its forward may read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

__all__ = ["Axis", "Number", "Shape", "Snapshot", "is_number", "mismatches", "shapes_of", "take_snapshot"]

Shape = tuple[int, ...]
Axis = tuple[str, int]
Number = int | tuple[int, ...]

MISSING_AXIS = -1


@dataclass(frozen=True)
class Snapshot:
    """Shapes and attributes of one built module.

    Attributes:
        shapes: Shape by parameter and buffer name, tied names included.
        numbers: Integer (or tuple of integers) attributes by module path and attribute name.
        scalars: Float and bool attributes by module path and attribute name.
    """

    shapes: Mapping[str, Shape]
    numbers: Mapping[tuple[str, str], Number]
    scalars: Mapping[tuple[str, str], float]


def is_number(value: object) -> TypeGuard[Number]:
    """Whether a value is an integer or a tuple of integers; a bool is neither."""
    if type(value) is int:
        return True
    return isinstance(value, tuple) and bool(value) and all(type(item) is int for item in value)


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Shapes by name of all parameters and buffers, tied and non-persistent ones included."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    shapes.update((name, tuple(b.shape)) for name, b in module.named_buffers(remove_duplicate=False))
    return shapes


def take_snapshot(module: nn.Module, skip: Collection[str] = ()) -> Snapshot:
    """Shapes and scalar attributes are read off a module.

    Args:
        module: Any module, usually on `meta`.
        skip: Module paths whose subtrees are left out.
    """
    prefixes = tuple(f"{path}." for path in skip)

    def inside(name: str) -> bool:
        return bool(prefixes) and f"{name}.".startswith(prefixes)

    numbers: dict[tuple[str, str], Number] = {}
    scalars: dict[tuple[str, str], float] = {}
    for path, child in module.named_modules():
        if inside(path):
            continue
        for name, value in vars(child).items():
            if name.startswith("_") or name == "training":
                continue
            if is_number(value):
                numbers[path, name] = value
            elif isinstance(value, float | bool):
                scalars[path, name] = value
    shapes = {name: shape for name, shape in shapes_of(module).items() if not inside(name)}
    return Snapshot(shapes, numbers, scalars)


def mismatches(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> frozenset[Axis]:
    """Axes on which two sets of shapes differ; a name that only one side has counts as axis -1."""
    wrong: set[Axis] = {(name, MISSING_AXIS) for name in shapes.keys() ^ wanted.keys()}
    for name in shapes.keys() & wanted.keys():
        have, want = shapes[name], wanted[name]
        if len(have) != len(want):
            wrong.add((name, MISSING_AXIS))
            continue
        wrong.update((name, axis) for axis, size in enumerate(have) if size != want[axis])
    return frozenset(wrong)
