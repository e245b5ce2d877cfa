"""Config fields: which ones a constructor asks for, and what they hold."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from fxprune.emit.meta import build_on_meta
from fxprune.graph.attempts import Refusal, call_foreign

__all__ = ["Reads", "keep_blocks", "own_entries", "part_of", "record_reads", "value_of"]

_SHARED = frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))
"""Fields that every config has; none of them is a width."""


@dataclass(frozen=True)
class Reads:
    """Names that a constructor read from its config.

    Args:
        integers: fields that hold an integer, or a list of the same integer throughout.
        hollow: fields that are None, or absent and asked for with a default.
    """

    integers: tuple[str, ...]
    hollow: tuple[str, ...]


def part_of(config: PreTrainedConfig, part: str) -> PreTrainedConfig:
    """Return the nested config that the blocks are built from; the config itself for an empty name."""
    nested: PreTrainedConfig = getattr(config, part) if part else config
    return nested


def value_of(config: PreTrainedConfig, field: str) -> int | None:
    """Return the integer a config holds under a name, or as each entry of a list under it; else None."""
    value = vars(config).get(field)
    entries = value if type(value) in (list, tuple) and value else [value]
    return entries[0] if all(type(entry) is int and entry == entries[0] for entry in entries) else None


def own_entries(config: PreTrainedConfig, total: int, index: int) -> dict[str, int]:
    """Return what a block reads of the lists of integers that have one entry a block.

    Args:
        config: the config of the model.
        total: the number of blocks.
        index: of the block; none of them if it is in another list of blocks, which may be longer.
    """
    lists = _lists_by_block(config, total) if index < total else ()
    return {name: value[index] for name, value in lists if all(type(entry) is int for entry in value)}


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
    integers = tuple(sorted(name for name in names if value_of(config, name) is not None))
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
