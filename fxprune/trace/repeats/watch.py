"""What each repeated block does in a run on fake tensors.

Every op of a block is written down with its numbers and with where each of its tensors comes from: which input of the
block it is, which of its weights, or which value that it made before. A tensor is known by its storage and by what it
is of it, not as an object of Python: a view, ``x.data`` and the like are then seen for what they are.
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
from fxprune.graph.context import unseen

__all__ = ["BlockWatch", "Call", "CallLog", "Said"]

Said = tuple[Any, ...]
"""A call: the name of the function, then what matters of what it takes and gives."""


class CallLog(TorchFunctionMode):
    """Writes down each call of a torch function: its name, its numbers, and the dtypes it takes and gives.

    Attributes:
        calls: the calls so far, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Said] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        idle = name.endswith("dropout") and 0.0 in (*args[1:2], (kwargs or {}).get("p"))
        if not name.endswith("__get__") and not idle:
            self.calls.append((name, *map(_said, tree_leaves((args, kwargs, result)))))
        return result


def _said(value: Any) -> Any:
    """What matters of an argument or a result."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if isinstance(value, bool | int | float | str | torch.dtype) else type(value).__name__


Key = tuple[Any, ...]
"""What tells a tensor from all others that there were in a run."""


@dataclass(eq=False)
class Call:
    """One call of a block.

    Args:
        path: the path of the block.
        start: how many calls of torch functions there were before it.
        labels: where the tensors that it has seen so far come from.
        given: the storages that it was given, in its inputs and as its weights.
        own: the storages that it made.
        said: all that it did, as something that hashes.
        foreign: what it did that is not its own affair; empty if nothing.
        end: how many calls of torch functions there were after it.
        spec: the structure of what it returns, and ``leaves`` what is in it.
        inputs: the tensors and the rest that it was called with.
    """

    path: str
    start: int
    labels: dict[Key, object] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    own: set[int] = field(default_factory=set)
    said: list[object] = field(default_factory=list)
    foreign: str = ""
    end: int = 0
    spec: Any = None
    leaves: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)


class BlockWatch(TorchDispatchMode):
    """Writes down what blocks do; :meth:`around` has to be called where they are.

    Attributes:
        calls: the calls of blocks so far, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._now: Call | None = None
        self._seen: set[Key] = set()
        self._makers: dict[int, Call] = {}
        self._kept: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with unseen():
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self._kept += (args, kwargs, result)  # what is gone would leave its place in memory to others
        if self._now is None:
            self.outside((args, kwargs))
            self._seen.update(map(_key, _tensors(result)))
        else:
            self._inside(self._now, func, args, kwargs or {}, result)

    def enter(self, path: str, block: nn.Module, args: Any, kwargs: Any, start: int) -> None:
        """A block is called.

        Args:
            path: its path.
            block: the block.
            args: what it is called with, and ``kwargs`` by name.
            start: how many calls of torch functions there were before.
        """
        if self._now is not None:
            self._now.foreign = f"calls {path}"
            raise RuntimeError(f"{path} is called by {self._now.path}")
        self.outside((args, kwargs))
        call = Call(path, start)
        call.inputs, spec = tree_flatten((args, kwargs))
        call.said.append(repr(spec))
        for place, leaf in enumerate(call.inputs):
            if isinstance(leaf, torch.Tensor):
                call.labels.setdefault(_key(leaf), ("input", place))
                call.given.add(storage_of(leaf))
            call.said.append(_said_watch(leaf, call))
        for name, tensor in _weights(block):
            call.labels.setdefault(_key(tensor), ("weight", name))
            call.given.add(storage_of(tensor))
            call.said.append((name, type(tensor), tensor.requires_grad, _said_watch(tensor, call)))
        self._kept.append((args, kwargs))
        self.calls.append(call)
        self._now = call

    def leave(self, result: Any, end: int) -> None:
        """The block that was called returns.

        Args:
            result: what it returns.
            end: how many calls of torch functions there are now.
        """
        call, self._now = self._now, None
        assert call is not None
        call.end = end
        call.leaves, call.spec = tree_flatten(result)
        call.said.append(repr(call.spec))
        call.said.extend(_said_watch(leaf, call) for leaf in call.leaves)
        for storage in call.own:
            self._makers[storage] = call
        self._seen.update(map(_key, _tensors(call.leaves)))
        self._kept.append(result)

    def outside(self, values: Any) -> None:
        """Values are used outside of blocks: what a block made and did not return is not for it to keep."""
        for tensor in _tensors(values):
            maker = self._makers.get(storage_of(tensor))
            if maker is not None and _key(tensor) not in self._seen:
                maker.foreign = maker.foreign or "what it makes is used elsewhere"

    def alike(self) -> list[list[Call]]:
        """Return the blocks that were called once and do the same, together, in the order of their calls."""
        times = Counter(call.path for call in self.calls)
        groups: dict[object, list[Call]] = {}
        for call in self.calls:
            if not call.foreign and times[call.path] == 1:
                groups.setdefault(tuple(call.said), []).append(call)
        return list(groups.values())

    def _inside(self, call: Call, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        call.said.append(
            (func, _said_watch(args, call), tuple((name, _said_watch(value, call)) for name, value in kwargs.items()))
        )
        if func._schema.is_mutable:
            for written in _written(func, args, kwargs):
                if storage_of(written) not in call.own:
                    call.foreign = call.foreign or f"{func} writes to what it did not make"
        for tensor in _tensors(result):
            storage = storage_of(tensor)
            if storage not in call.given:
                call.own.add(storage)
            call.labels.setdefault(_key(tensor), ("made", len(call.said), len(call.labels)))
            call.said.append(_said_watch(tensor, call))


def _key(tensor: torch.Tensor) -> Key:
    place = storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    return *place, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _said_watch(value: Any, call: Call) -> object:
    """What there is to know of an argument, a result or an input, as something that hashes and compares."""
    if isinstance(value, torch.Tensor):
        label = call.labels.get(_key(value))
        if label is None:
            call.foreign = call.foreign or "it uses a tensor that is none of its inputs and weights"
        return label, value.dtype, value.device.type, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return type(value), tuple(_said_watch(item, call) for item in value)
    if isinstance(value, float | complex):
        return type(value), repr(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    return type(value), id(value)


_PLAIN = (bool, int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What equals what is spelled alike; of anything else, only the very same object does."""


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif values is not None:
        yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The arguments that an op writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


def _weights(block: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)
