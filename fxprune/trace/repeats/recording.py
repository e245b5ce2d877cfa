"""Recording of the ops of repeated blocks in a run on fake tensors.

Each tensor is recorded with its origin: an input of the block, a weight, or a value computed before. Tensors are
identified by storage and layout, not as Python objects, so that views, ``x.data`` and the like are recognised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from fxprune.graph.compat import TorchDispatchMode, storage_of, tree_flatten, tree_leaves
from fxprune.graph.context import disable_torch_function
from fxprune.rules.aliasing import written_arguments

__all__ = ["BlockRecorder", "CallRecord", "CallRecorder"]

CallRecord = tuple[Any, ...]
"""A call of a torch function: its name, then a summary of each argument and result."""


class CallRecorder(TorchFunctionMode):
    """Records each call of a torch function: its name, its numbers, and the dtypes of arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CallRecord] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        idle = name.endswith("dropout") and 0.0 in (*args[1:2], (kwargs or {}).get("p"))
        if not name.endswith("__get__") and not idle:
            leaves = tree_leaves((args, kwargs, result))
            self.calls.append((name, *map(_summary, leaves)))
        return result


def _summary(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if isinstance(value, bool | int | float | str | torch.dtype) else type(value).__name__


Key = tuple[Any, ...]
"""Storage and layout of a tensor, which identify it within a run."""


@dataclass(eq=False)
class BlockCall:
    """One call of a block, which begins and ends after ``start`` and ``end`` calls of torch functions.

    Args:
        labels: the origin of each tensor seen so far.
        given: the storages of its inputs and weights.
        made: the storages that it allocated.
        record: everything that it did, as hashable entries; equal for blocks that do the same.
        side_effect: an effect outside the block, or a tensor from there, that forbids skipping it; empty if none.
    """

    path: str
    start: int
    labels: dict[Key, object] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)
    record: list[object] = field(default_factory=list)
    side_effect: str = ""
    end: int = 0


class BlockRecorder(TorchDispatchMode):
    """Records the ops of blocks, whose calls are delimited by :meth:`enter` and :meth:`leave`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[BlockCall] = []
        self._current: BlockCall | None = None
        self._returned: set[Key] = set()  # tensors made outside of blocks, or returned by one
        self._makers: dict[int, BlockCall] = {}
        self._kept: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with disable_torch_function():
            self._kept += (args, kwargs, result)  # a freed tensor would leave its storage to others
            if self._current is None:
                self.use_outside((args, kwargs))
                self._returned.update(map(_key, _tensors(result)))
            else:
                self._record_op(self._current, func, args, kwargs or {}, result)
        return result

    def enter(self, path: str, block: nn.Module, args: Any, kwargs: Any, start: int) -> None:
        """Begin the call of a block with its arguments, after ``start`` calls of torch functions."""
        if self._current is not None:
            raise RuntimeError(f"{path} is called by {self._current.path}")
        self.use_outside((args, kwargs))
        call = BlockCall(path, start)
        inputs, spec = tree_flatten((args, kwargs))
        call.record.append(repr(spec))
        for place, leaf in enumerate(inputs):
            if isinstance(leaf, torch.Tensor):
                call.labels.setdefault(_key(leaf), ("input", place))
                call.given.add(storage_of(leaf))
            call.record.append(_entry(leaf, call))
        weights = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
        for name, tensor in weights:
            call.labels.setdefault(_key(tensor), ("weight", name))
            call.given.add(storage_of(tensor))
            call.record.append((name, type(tensor), tensor.requires_grad, _entry(tensor, call)))
        self._kept.append((args, kwargs))
        self.calls.append(call)
        self._current = call

    def leave(self, result: Any, end: int) -> None:
        """End the call of a block with its result, after ``end`` calls of torch functions."""
        call, self._current = self._current, None
        assert call is not None
        call.end = end
        leaves, spec = tree_flatten(result)
        call.record.append(repr(spec))
        call.record.extend(_entry(leaf, call) for leaf in leaves)
        for storage in call.made:
            self._makers[storage] = call
        self._returned.update(map(_key, _tensors(leaves)))
        self._kept.append(result)

    def use_outside(self, values: Any) -> None:
        """Record a use of values outside of blocks: a block whose internal tensor is used cannot be skipped."""
        for tensor in _tensors(values):
            maker = self._makers.get(storage_of(tensor))
            if maker is not None and _key(tensor) not in self._returned:
                maker.side_effect = maker.side_effect or "an internal tensor is used elsewhere"

    def groups(self) -> list[list[BlockCall]]:
        """The blocks that were called once, grouped by what they did, in the order of their calls."""
        times = Counter(call.path for call in self.calls)
        groups: dict[object, list[BlockCall]] = {}
        for call in self.calls:
            if not call.side_effect and times[call.path] == 1:
                groups.setdefault(tuple(call.record), []).append(call)
        return list(groups.values())

    def _record_op(self, call: BlockCall, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        named = tuple((name, _entry(value, call)) for name, value in kwargs.items())
        call.record.append((func, _entry(args, call), named))
        for written in _tensors(written_arguments(func, args, kwargs)) if func._schema.is_mutable else ():
            if storage_of(written) not in call.made:
                call.side_effect = call.side_effect or f"{func} writes to a tensor from outside"
        for tensor in _tensors(result):
            storage = storage_of(tensor)
            if storage not in call.given:
                call.made.add(storage)
            call.labels.setdefault(_key(tensor), ("made", len(call.record), len(call.labels)))
            call.record.append(_entry(tensor, call))


def _key(tensor: torch.Tensor) -> Key:
    place = storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    return *place, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _entry(value: Any, call: BlockCall) -> object:
    """A hashable record of an argument, a result or an input."""
    if isinstance(value, torch.Tensor):
        label = call.labels.get(_key(value))
        if label is None:
            call.side_effect = call.side_effect or "it uses a tensor other than its inputs and weights"
        return label, value.dtype, value.device.type, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return type(value), tuple(_entry(item, call) for item in value)
    if isinstance(value, float | complex):
        return type(value), repr(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    return type(value), id(value)


_PLAIN = (bool, int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types compared by value; an object of any other type equals only itself."""


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif values is not None:
        yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
