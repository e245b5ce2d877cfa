"""Configs of single blocks: copies with some fields of their own that follow the model's choice of kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["block_config", "put_fields"]

_FOLLOWED = ("_attn_implementation_internal", "_experts_implementation_internal")
_PARENT = "_fxprune_parent"
_FOLLOWERS: dict[type, type] = {}


def put_fields(config: PreTrainedConfig, fields: Mapping[str, Any]) -> None:
    """Set config fields without validation: widths that no stock config allows are the point.

    Args:
        config: changed in place.
        fields: the values. A number for a field that is a list with one entry per block becomes all of its entries:
            a block reads its own.
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
        fields: the values that differ for this block, as :func:`put_fields` writes them.
        absent: fields to delete from the copy.
    """
    view = copy.deepcopy(config)
    put_fields(view, fields)
    for name in (*_FOLLOWED, *absent):
        vars(view).pop(name, None)
    vars(view)[_PARENT] = config
    view.__class__ = _follower(type(config))
    return view


def _follower(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Class of configs that follow one of class ``base``; made once for each."""
    if base not in _FOLLOWERS:
        members: dict[str, object] = {name: _followed(name) for name in _FOLLOWED}
        members["__reduce_ex__"] = lambda self, _: (_restore, (vars(self)[_PARENT], dict(vars(self))))
        _FOLLOWERS[base] = type(base.__name__, (base,), members)
    return _FOLLOWERS[base]


def _restore(parent: PreTrainedConfig, state: dict[str, Any]) -> PreTrainedConfig:
    follower = _follower(type(parent))
    view = follower.__new__(follower)
    vars(view).update(state)
    return view


def _followed(name: str) -> property:
    """Property that reads from the model's config and ignores writes."""

    def read(self: PreTrainedConfig) -> Any:
        return getattr(vars(self)[_PARENT], name, None)

    return property(read, lambda self, value: None)
