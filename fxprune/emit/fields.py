"""Config fields: which one a constructor asks for, and how they are written past validation."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from fxprune.emit.meta import build_on_meta
from fxprune.graph.attempts import Refusal, call_foreign

__all__ = ["Reads", "keep_blocks", "part_of", "record_reads", "value_of", "write_fields"]

_SHARED = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
"""Fields that every config has; none of them is a width."""


@dataclass(frozen=True)
class Reads:
    """Names that a constructor read from its config.

    Args:
        integers: fields that hold an integer.
        hollow: fields that are None, or absent and asked for with a default.
    """

    integers: tuple[str, ...]
    hollow: tuple[str, ...]


def part_of(config: PreTrainedConfig, part: str) -> PreTrainedConfig:
    """Return the nested config that the blocks are built from; the config itself for an empty name."""
    nested: PreTrainedConfig = getattr(config, part) if part else config
    return nested


def write_fields(config: PreTrainedConfig, fields: Mapping[str, float]) -> None:
    """Give fields their values with no validation: widths that no stock config allows are the point."""
    vars(config).update(fields)


def value_of(config: PreTrainedConfig, field: str) -> int | None:
    """Return the integer a config holds under a name, or None."""
    value = vars(config).get(field)
    return value if type(value) is int else None


def record_reads(config: PreTrainedConfig, build: Callable[[PreTrainedConfig], object]) -> Reads:
    """Return the config fields that a constructor looks at.

    It is handed a config whose class notes every name that is looked up. Where the constructor does not take such a
    config, every field counts as read.

    Args:
        config: the config to build from; not changed.
        build: builds something from a config.
    """
    probe, read = copy.deepcopy(config), set[str]()
    probe.__class__ = _recorder(type(config), read)
    if isinstance(build_on_meta(build, probe), Refusal):
        read = set(vars(config))
    aliases = config.attribute_map
    names = {aliases.get(name, name) for name in read if not name.startswith("_")} - _SHARED
    held = vars(config)
    integers = tuple(sorted(name for name in names if type(held.get(name)) is int))
    empty = (name for name in names if held.get(name) is None and not hasattr(type(config), name))
    nones = (name for name in names if name in held and held[name] is None)
    return Reads(integers, tuple(sorted({*empty, *nones})))


def _recorder(base: type[PreTrainedConfig], read: set[str]) -> type[PreTrainedConfig]:
    def note(self: PreTrainedConfig, name: str) -> Any:
        read.add(name)
        return call_foreign(base.__getattribute__, self, name)

    return type(base.__name__, (base,), {"__getattribute__": note})


def keep_blocks(config: PreTrainedConfig, count_field: str | None, total: int, kept: Sequence[int]) -> None:
    """Make a config describe the kept blocks alone: its count, and every list with one entry a block.

    Args:
        config: changed in place.
        count_field: the field with the number of blocks; empty or None where there is none.
        total: the number of blocks before.
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
