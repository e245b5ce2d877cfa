"""A second device for tests on a machine that has a CPU alone.

It computes what the CPU does and refuses, as a GPU would, to take tensors of both. torch knows it as ``away`` for as
long as a process lives, so that tests use it in a process of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "away"
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Away(torch.Tensor):
    """A tensor of the device: one of the CPU inside."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Away:
        kept = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(NAME, 0), **kept)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, *args, **(kwargs or {}))


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Away)}
    here = [tensor for tensor in tensors if not isinstance(tensor, Away) and tensor.dim()]
    if there and here and func not in MOVES:
        raise RuntimeError(f"{func}: tensors of {NAME} and of the CPU, of shape {tuple(here[0].shape)}")
    device = kwargs.get("device")
    goes = bool(there) if device is None else torch.device(device).type == NAME
    if device is not None and goes:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def inside(value: Any) -> Any:
        return value.inner if isinstance(value, Away) else value

    def outside(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not goes:
            return value
        return there[id(value)] if id(value) in there else Away(value)

    return tree_map(outside, func(*tree_map(inside, args), **tree_map(inside, kwargs)))


class Backend(_DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> torch.device:
    """Make the device known to torch; returns it."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    KEPT.append(library)
    return torch.device(NAME, 0)


KEPT: list[torch.library.Library] = []
