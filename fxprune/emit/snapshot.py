"""Snapshots of a module: tensor shapes and scalar attributes, the config fields it reads, and its names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.graph.compat import DeviceContext
from fxprune.graph.context import Refusal, attempt, call_foreign, quiet
from fxprune.graph.facts import within
from fxprune.modelling.blocks import CannotBuildError

__all__ = [
    "MISSING_AXIS",
    "Axis",
    "Number",
    "Reads",
    "Shape",
    "Snapshot",
    "block_entries",
    "build_on_meta",
    "is_number",
    "keep_blocks",
    "mismatches",
    "names_in",
    "part_of",
    "record_reads",
    "shapes_of",
    "slim_name",
    "take_snapshot",
    "value_of",
    "without_storage",
]

T = TypeVar("T")


def names_in(named: Mapping[str, T], path: str) -> dict[str, T]:
    """Return the values below a module, by name within it."""
    prefix = f"{path}."
    return {name[len(prefix) :]: value for name, value in named.items() if name.startswith(prefix)}


def slim_name(name: str, removed_blocks: Collection[str]) -> str | None:
    """Name in the slim model of a module or tensor of the dense one; None if it was removed.

    Blocks after a removed one, given by module paths such as ``"decoder.3"``, move up.
    """
    if within(f"{name}.", removed_blocks):
        return None
    gone: dict[str, list[int]] = {}
    for path, _, index in (block.rpartition(".") for block in removed_blocks):
        if index.isdigit():
            gone.setdefault(path, []).append(int(index))
    for path, indices in gone.items():
        index, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if within(name, (path,)) and index.isdigit():
            return f"{path}.{int(index) - sum(other < int(index) for other in indices)}{dot}{rest}"
    return name


Shape = tuple[int, ...]
Axis = tuple[str, int]
Number = int | tuple[int, ...]

MISSING_AXIS = -1
"""The axis reported for a tensor that only one of two modules has, or that has another number of axes."""


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
    """Shapes by name of all parameters and buffers, tied and non-persistent ones included."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    shapes.update((name, tuple(b.shape)) for name, b in module.named_buffers(remove_duplicate=False))
    return shapes


def take_snapshot(module: nn.Module, skip: Collection[str] = ()) -> Snapshot:
    """Return the shapes and scalar attributes of a module, without the subtrees at the paths in ``skip``."""
    modules = [(path, child) for path, child in module.named_modules() if not within(f"{path}.", skip)]
    held = {(path, name): value for path, child in modules for name, value in vars(child).items()}
    held = {key: value for key, value in held.items() if key[1] != "training" and not key[1].startswith("_")}
    numbers = {key: value for key, value in held.items() if is_number(value)}
    scalars = {key: value for key, value in held.items() if isinstance(value, float | bool)}
    shapes = {name: shape for name, shape in shapes_of(module).items() if not within(name, skip)}
    return Snapshot(shapes, numbers, scalars)


def mismatches(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> frozenset[Axis]:
    """Axes on which two sets of shapes differ; see ``MISSING_AXIS`` for names that only one side has."""
    wrong: set[Axis] = {(name, MISSING_AXIS) for name in shapes.keys() ^ wanted.keys()}
    for name in shapes.keys() & wanted.keys():
        have, want = shapes[name], wanted[name]
        if len(have) != len(want):
            wrong.add((name, MISSING_AXIS))
            continue
        wrong.update((name, axis) for axis, size in enumerate(have) if size != want[axis])
    return frozenset(wrong)


@contextmanager
def without_storage() -> Iterator[None]:
    """Build modules on ``meta`` inside the context, without gradients and without warnings about odd configs."""
    with quiet(), _Uninitialised("meta"), torch.no_grad():
        yield


class _Uninitialised(DeviceContext):
    """A device context in which ``nn.init`` returns tensors on ``meta`` unchanged.

    Initialisation takes its time also without storage, and so does each context that intercepts calls of torch: this
    one does both jobs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def build_on_meta(build: Callable[..., T], /, *args: Any, **kwargs: Any) -> T | Refusal:
    """Build something on ``meta``; return it, or the refusal of its constructor."""
    with without_storage():
        return attempt(build, *args, refusals=(CannotBuildError,), **kwargs)


_SHARED = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
"""Fields that every config has; none of them is a width."""


@dataclass(frozen=True)
class Reads:
    """Names that a constructor read from its config.

    Args:
        integers: fields that hold an integer, or a list of the same integer throughout.
        unset: fields that are None, or absent and read with a default.
    """

    integers: tuple[str, ...]
    unset: tuple[str, ...]


def part_of(config: PreTrainedConfig, part: str) -> PreTrainedConfig:
    """Nested config that the blocks are built from; the config itself for an empty name."""
    nested: PreTrainedConfig = getattr(config, part) if part else config
    return nested


def value_of(config: PreTrainedConfig, field: str) -> int | None:
    """Integer that a config field holds, itself or as each entry of a list; else None."""
    value = vars(config).get(field)
    entries = value if type(value) in (list, tuple) and value else [value]
    return entries[0] if all(type(entry) is int and entry == entries[0] for entry in entries) else None


def block_entries(config: PreTrainedConfig, total: int, index: int) -> dict[str, int]:
    """Entries of one block in the config's lists of integers with one entry for each of ``total`` blocks, by field.

    There are none for a block of another list of blocks, which may be longer.
    """
    lists = _lists_by_block(config, total) if index < total else ()
    return {name: value[index] for name, value in lists if all(type(entry) is int for entry in value)}


def record_reads(config: PreTrainedConfig, build: Callable[[PreTrainedConfig], object]) -> Reads:
    """Record the config fields that a constructor reads.

    It is given a config whose class records every attribute access. If the constructor refuses such a config, every
    field counts as read.
    """
    probe, read, base = copy.deepcopy(config), set[str](), type(config)

    def record(self: PreTrainedConfig, name: str) -> Any:
        read.add(name)
        return call_foreign(base.__getattribute__, self, name)

    probe.__class__ = type(base.__name__, (base,), {"__getattribute__": record})
    if isinstance(build_on_meta(build, probe), Refusal):
        read = set(vars(config))
    aliases = config.attribute_map
    names = {aliases.get(name, name) for name in read if not name.startswith("_")} - _SHARED
    held = vars(config)
    integers = tuple(sorted(name for name in names if value_of(config, name) is not None))
    empty = (name for name in names if held.get(name) is None)
    return Reads(integers, tuple(sorted(name for name in empty if name in held or not hasattr(base, name))))


def keep_blocks(config: PreTrainedConfig, count_field: str | None, total: int, kept: Sequence[int]) -> None:
    """Make a config describe the kept blocks only: their count, and every list with one entry per block.

    Args:
        count_field: the field with the number of blocks; empty or None if there is none.
        kept: indices of the blocks that stay, in order.
    """
    for name, value in _lists_by_block(config, total):
        vars(config)[name] = type(value)(value[index] for index in kept)
    if count_field:
        vars(config)[count_field] = len(kept)


def _lists_by_block(config: PreTrainedConfig, total: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(config).items()):
        foreign = name in _SHARED or name.startswith("_") or name.endswith(("token_id", "token_ids"))
        if type(value) in (list, tuple) and len(value) == total and not foreign:
            yield name, value
