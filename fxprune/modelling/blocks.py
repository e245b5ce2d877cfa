"""Blocks of widths of their own: their configs, copies with some fields of their own, and how they are built."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_FOLLOWED = ("_attn_implementation_internal", "_experts_implementation_internal")
_PARENT = "_fxprune_parent"


def put_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set config fields in place without validation: widths that no stock config allows are the point.

    A number for a field that is a list with one entry per block becomes all of its entries: a block reads its own.
    """
    held = vars(config)
    for name, value in fields.items():
        old = held.get(name)
        if type(value) is int and isinstance(old, list | tuple):
            value = [value] * len(old) if isinstance(old, list) else (value,) * len(old)
        held[name] = value


def block_config(config: PreTrainedConfig, fields: Mapping[str, Any], absent: Iterable[str] = ()) -> PreTrainedConfig:
    """Copy a model's config with some fields changed; the choice of kernels stays that of the model.

    A later ``set_attn_implementation`` on the model writes to the model's config only; blocks that hold a copy
    must see it, or masks and attention kernels no longer fit.

    Args:
        config: the config of the whole model; kept by reference.
        absent: fields to delete from the copy.
    """
    view = copy.deepcopy(config)
    put_fields(view, fields)
    for name in (*_FOLLOWED, *absent):
        vars(view).pop(name, None)
    vars(view)[_PARENT] = config
    base: Any = type(config)
    view.__class__ = _follower(base)
    return view


@cache
def _follower(base: Any) -> Any:
    """Class of configs that read some fields from one of class ``base``, and ignore writes to them."""
    members: dict[str, object] = {name: _followed(name) for name in _FOLLOWED}
    members["__reduce_ex__"] = lambda self, _: (_restore, (vars(self)[_PARENT], dict(vars(self))))
    return type(base.__name__, (base,), members)


def _followed(name: str) -> property:
    """Property that reads from the model's config and ignores writes."""

    def read(self: PreTrainedConfig) -> Any:
        return getattr(vars(self)[_PARENT], name, None)

    return property(read, lambda self, value: None)


def _restore(parent: PreTrainedConfig, state: dict[str, Any]) -> PreTrainedConfig:
    base: Any = type(parent)
    view: PreTrainedConfig = base.__new__(_follower(base))
    vars(view).update(state)
    return view


Builder = Callable[[PreTrainedConfig, int], nn.Module]

BUILT_AT = "fxprune_built_at"
"""Attribute of a block whose class builds another kind at its index: it is built at ``index`` with ``fields``."""

_INDEX_ENDINGS = ("idx", "index", "layer_id", "block_id", "layer_number", "layer_num")
"""Endings of the names of a block's index, as arguments and attributes. Not every ``id``: tokens have some too."""


class CannotBuildError(ValueError):
    """A block cannot be built again by its class."""


def names_index(name: str) -> bool:
    """Whether an argument or attribute is named like the index of a block."""
    return name.endswith(_INDEX_ENDINGS)


def flags_of(block: nn.Module) -> dict[str, Any]:
    """Flags and strings among the attributes of a block and of the modules in it; the outer and the first ones win."""
    every = [item for module in block.modules() for item in vars(module).items()]
    return {name: value for name, value in reversed(every) if isinstance(value, bool | str)}


def builder_of(block: nn.Module, built_at: Mapping[str, Any] | None) -> Builder | None:
    """Builder of blocks like this one from a config and an index; None if the class requires more.

    Args:
        block: another argument is read off its attribute of this name, or one of a module in it, if that is a flag or
            a string; a number may be a size, which changes.
        built_at: index and fields at which the class builds the wanted kind of block, if that is not its index.
    """
    kind, flags = type(block), flags_of(block)
    named = {p.name: p for p in inspect.signature(kind).parameters.values() if p.kind not in _VARIADIC}
    first, *others = named or [""]
    place = next((name for name in others if names_index(name)), None)
    held = {name: flags[name] for name in others if name != place and name in flags}
    if not first or any(named[name].default is inspect.Parameter.empty for name in {*others} - {place, *held}):
        return None

    def build(config: PreTrainedConfig, index: int) -> nn.Module:
        if place is None:
            return kind(config, **held)
        at = built_at or {}
        start, fields, values = at.get("index", index), at.get("fields", {}), vars(config)
        own = {name: values[name] for name in fields}
        values.update(fields)
        made = kind(config, **held, **{place: start})
        values.update(own)
        if at:
            vars(made)[BUILT_AT] = at
        renumber(made, start, index)
        return made

    return build


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def renumber(block: nn.Module, old: int, new: int, follows: Callable[[str, str], bool] | None = None) -> None:
    """Set the attributes that hold the index of a block to the new one.

    Args:
        follows: whether an attribute, by module path and name, is the index; by default if it is named like one.
    """
    for path, module in block.named_modules() if old != new else ():
        same = [name for name, value in vars(module).items() if type(value) is int and value == old]
        indices = [name for name in same if (follows(path, name) if follows else names_index(name))]
        vars(module).update(dict.fromkeys(indices, new))
