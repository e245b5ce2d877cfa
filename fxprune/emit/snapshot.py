"""What a module looks like from outside: tensor shapes and the scalar attributes its forward may read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from fxprune.graph.blocks import within

__all__ = [
    "MISSING_AXIS",
    "Axis",
    "Number",
    "Shape",
    "Snapshot",
    "is_number",
    "mismatches",
    "shapes_of",
    "take_snapshot",
]

Shape = tuple[int, ...]
Axis = tuple[str, int]
Number = int | tuple[int, ...]

MISSING_AXIS = -1
"""The axis of a tensor that only one of two modules has, or that has another number of axes."""


@dataclass(frozen=True)
class Snapshot:
    """Shapes and attributes of one built module.

    Args:
        shapes: shape by parameter and buffer name, tied names included.
        numbers: integer (or tuple of integers) attributes by module path and attribute name.
        scalars: float and bool attributes by module path and attribute name.
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
    """Return the shapes by name of all parameters and buffers, tied and non-persistent ones included."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    shapes.update((name, tuple(b.shape)) for name, b in module.named_buffers(remove_duplicate=False))
    return shapes


def take_snapshot(module: nn.Module, skip: Collection[str] = ()) -> Snapshot:
    """Return the shapes and scalar attributes of a module.

    Args:
        module: any module, usually on ``meta``.
        skip: module paths whose subtrees are left out.
    """
    modules = [(path, child) for path, child in module.named_modules() if not within(f"{path}.", skip)]
    held = {(path, name): value for path, child in modules for name, value in vars(child).items()}
    held = {key: value for key, value in held.items() if key[1] != "training" and not key[1].startswith("_")}
    numbers = {key: value for key, value in held.items() if is_number(value)}
    scalars = {key: value for key, value in held.items() if isinstance(value, float | bool)}
    shapes = {name: shape for name, shape in shapes_of(module).items() if not within(name, skip)}
    return Snapshot(shapes, numbers, scalars)


def mismatches(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> frozenset[Axis]:
    """Return the axes on which two sets of shapes differ; see ``MISSING_AXIS`` for names that only one side has."""
    wrong: set[Axis] = {(name, MISSING_AXIS) for name in shapes.keys() ^ wanted.keys()}
    for name in shapes.keys() & wanted.keys():
        have, want = shapes[name], wanted[name]
        if len(have) != len(want):
            wrong.add((name, MISSING_AXIS))
            continue
        wrong.update((name, axis) for axis, size in enumerate(have) if size != want[axis])
    return frozenset(wrong)
