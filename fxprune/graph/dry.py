"""Runs without storage in which ops that are called alike are worked out once."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.graph.compat import OpOverload, TorchDispatchMode, storage_of, tree_leaves

__all__ = ["WorkedOutOnce"]

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What equals what is spelled alike."""

_FRESH: dict[OpOverload, bool] = {}
"""Whether an op, by its schema, writes to nothing and returns nothing that it was given."""


class WorkedOutOnce(TorchDispatchMode):
    """While it lasts, an op on ``meta`` that was called alike before returns new tensors like those that it made then.

    The code of a model runs in full, block after block; but what torch works out of shapes, in Python, takes most of
    the time of a run on ``meta``, and blocks that are alike have it worked out again and again. Views, ops that write
    and whatever has a tensor with storage run as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[object, tuple[type[Any] | None, tuple[_Like, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        made = self._made.get(key)
        if made is None:
            result = func(*args, **kwargs)
            likes = _likes(result, (args, kwargs))
            if likes is not None:
                self._made[key] = None if isinstance(result, torch.Tensor) else type(result), likes
            return result
        kind, likes = made
        tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in likes]
        return tensors[0] if kind is None else kind(tensors)


_Like = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _key(func: Any, args: Any, kwargs: Any) -> object:
    """What decides the shapes that an op makes; None where it has to be run."""
    if not isinstance(func, OpOverload) or not _is_fresh(func):
        return None
    try:
        said = _said(args), tuple((name, _said(value)) for name, value in kwargs.items())
    except TypeError:
        return None
    return func, said, torch.get_default_dtype()


def _is_fresh(func: OpOverload) -> bool:
    if func not in _FRESH:
        schema = func._schema
        _FRESH[func] = all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
    return _FRESH[func]


def _said(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or not value.is_meta or value.is_conj():
            raise TypeError("more than a shape")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_said, value))
    if isinstance(value, _PLAIN):
        return type(value), value
    raise TypeError("not known")


def _likes(result: Any, inputs: Any) -> tuple[_Like, ...] | None:
    """What to make the same results of; None where they are more than new tensors of some shape."""
    tensors = [result] if isinstance(result, torch.Tensor) else result
    if type(tensors) not in (list, tuple) or not all(type(t) is torch.Tensor and t.is_meta for t in tensors):
        return None
    storages = [storage_of(tensor) for tensor in tensors]
    given = {storage_of(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
    if len(set(storages)) < len(storages) or not given.isdisjoint(storages):
        return None
    if any(tensor.storage_offset() or tensor.is_conj() or tensor.is_neg() for tensor in tensors):
        return None
    return tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
