"""Alike blocks: the ops of a run on fake tensors, recorded and grouped; dependence on dtype and training mode.

Each tensor is recorded with its origin: an input of the block, a weight, or a value computed before. Tensors are
identified by storage and layout, not as Python objects, so that views, ``x.data`` and the like are recognised.

A dry run is repeated with most alike blocks replaced by copies of the first block's results: if anything else in the
model then behaves differently, for example because blocks count their calls, all blocks are exported one by one. Dry
runs in another dtype and in training mode find code that reads ``torch.finfo(x.dtype).eps`` or branches on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from fxprune.graph.compat import (
    TorchDispatchMode,
    fake_mode,
    storage_of,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from fxprune.graph.context import disable_torch_function, mark_exporting, quiet
from fxprune.graph.facts import find_blocks
from fxprune.graph.shapes import MetaOpCache
from fxprune.graph.tensors import named_tensors
from fxprune.rules.registry import written_arguments
from fxprune.trace.inputs import blank, fake_twin, without_cache

CallRecord = tuple[Any, ...]
"""A call of a torch function: its name, then a summary of each argument and result."""


class CallRecorder(TorchFunctionMode):
    """Records each call of a torch function: its name, its numbers, and the dtypes of arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CallRecord] = []
        self._names: dict[Any, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = resolve_name(func) or getattr(func, "__name__", str(func))
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
    """Records the ops of each block while a copy of a model runs, and groups the blocks that do the same.

    Attributes:
        calls: the calls of blocks.
        groups: once the copy has run, the paths of at least three alike blocks each, in the order of their calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[BlockCall] = []
        self.groups: list[tuple[str, ...]] = []
        self._current: BlockCall | None = None
        self._returned: set[Key] = set()  # tensors made outside of blocks, or returned by one
        self._makers: dict[int, BlockCall] = {}
        self._kept: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with disable_torch_function():
            self._kept += (args, kwargs, result)  # a freed tensor would leave its storage to others
            if self._current is None:
                self._use_outside((args, kwargs))
                self._returned.update(map(_key, _tensors(result)))
            else:
                self._record_op(self._current, func, args, kwargs or {}, result)
        return result

    def watch(self, twin: nn.Module, recorder: CallRecorder) -> None:
        """Record the blocks of a copy that have no hooks; none if a module has two names, which tracing mixes up."""
        names = [name for name, _ in twin.named_modules(remove_duplicate=False)]
        for path in find_blocks(twin) if len(names) == sum(1 for _ in twin.modules()) else ():
            block = twin.get_submodule(path)
            if not (block._forward_hooks or block._forward_pre_hooks or "forward" in vars(block)):
                block.forward = partial(self._call, path, block, recorder)

    def _call(self, path: str, block: nn.Module, recorder: CallRecorder, /, *args: Any, **kwargs: Any) -> Any:
        with disable_torch_function():
            self._enter(path, block, args, kwargs, len(recorder.calls))
        result = type(block).forward(block, *args, **kwargs)
        with disable_torch_function():
            self._leave(result, len(recorder.calls))
        return result

    def _enter(self, path: str, block: nn.Module, args: Any, kwargs: Any, start: int) -> None:
        if self._current is not None:
            raise RuntimeError(f"{path} is called by {self._current.path}")
        self._use_outside((args, kwargs))
        call = BlockCall(path, start)
        inputs, spec = tree_flatten((args, kwargs))
        call.record.append(repr(spec))
        for place, leaf in enumerate(inputs):
            if isinstance(leaf, torch.Tensor):
                call.labels.setdefault(_key(leaf), ("input", place))
                call.given.add(storage_of(leaf))
            call.record.append(_entry(leaf, call))
        for name, tensor in named_tensors(block):
            call.labels.setdefault(_key(tensor), ("weight", name))
            call.given.add(storage_of(tensor))
            call.record.append((name, type(tensor), tensor.requires_grad, _entry(tensor, call)))
        self._kept.append((args, kwargs))
        self.calls.append(call)
        self._current = call

    def _leave(self, result: Any, end: int) -> None:
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

    def _use_outside(self, values: Any) -> None:
        """Record a use of values outside of blocks: a block whose internal tensor is used cannot be skipped."""
        for tensor in _tensors(values):
            maker = self._makers.get(storage_of(tensor))
            if maker is not None and _key(tensor) not in self._returned:
                maker.side_effect = maker.side_effect or "an internal tensor is used elsewhere"

    def finish(self, twin: nn.Module, result: Any) -> None:
        """Group the blocks that were called once and have the same computation and state, after a run of the copy."""
        self._use_outside(result)
        times = Counter(call.path for call in self.calls)
        same: dict[object, list[str]] = {}
        for call in self.calls:
            if not call.side_effect and times[call.path] == 1:
                same.setdefault(tuple(call.record), []).append(call.path)
        for left in same.values():
            while len(left) >= _FEWEST:
                alike = [path for path in left if _same_state(left[0], path, twin)]
                left = [path for path in left if path not in alike]
                self.groups += [tuple(alike)] if len(alike) >= _FEWEST else []

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


_FEWEST = 3
"""Smallest group of alike blocks: the first and the last are exported in any case."""


Repeats = tuple[tuple[str, ...], ...]
"""Groups of alike blocks: the paths of at least three blocks each, in the order of their calls."""


@dataclass(frozen=True)
class DryRun:
    """A run without storage: the groups of alike blocks, and the calls of torch functions outside of skipped blocks."""

    repeats: Repeats
    calls: list[CallRecord]


def find_repeats(model: nn.Module, inputs: Mapping[str, Any], native: torch.dtype) -> DryRun | None:
    """Find alike blocks by a dry run of a copy of ``model`` on ``meta``; None if its code raises there.

    They are confirmed by a run that skips most of them. ``native`` is the dtype of the weights; only shape and dtype of
    the inputs matter.
    """
    blocks = BlockRecorder()
    whole = record_calls(model, inputs, native, native, blocks=blocks)
    if whole is None:  # every block is then exported
        return None
    repeats = tuple(blocks.groups)
    skipped = {path for group in repeats for path in group[1:-1]}
    calls, place = [], 0
    for call in blocks.calls:
        if call.path in skipped:
            calls += whole[place : call.start]
            place = call.end
    calls += whole[place:]
    if repeats and record_calls(model, inputs, native, native, repeats) == calls:
        return DryRun(repeats, calls)
    return DryRun((), whole)


def record_calls(
    model: nn.Module,
    inputs: Mapping[str, Any],
    native: torch.dtype,
    dtype: torch.dtype,
    repeats: Repeats = (),
    modes: Mapping[str, bool] = MappingProxyType({}),
    fake: bool = False,
    blocks: BlockRecorder | None = None,
) -> list[CallRecord] | None:
    """The calls of torch functions in a dry run of a copy of ``model``; None if its code raises.

    Args:
        inputs: keyword inputs, of which only shape and dtype matter.
        native: the dtype of its weights, which ``dtype`` replaces.
        repeats: groups of alike blocks, most of which return copies of the first block's results.
        modes: whether each module is in training, by path; all in evaluation if empty.
        fake: run on fake tensors instead of ``meta``.
        blocks: records the blocks of the copy.
    """
    recorder, mode = CallRecorder(), fake_mode(fixed=True) if fake else None
    try:
        twin = fake_twin(model, mode, native, dtype)
        for path, training in modes.items():
            twin.get_submodule(path).training = training
        for group in repeats:
            _replay_first_block(twin, group)
        if blocks is not None:
            blocks.watch(twin, recorder)
        with mode or torch.device("meta"), nullcontext() if fake else mark_exporting(), quiet(), torch.no_grad():
            values = {name: blank(value, native, dtype) for name, value in inputs.items()}
            with nullcontext() if fake else MetaOpCache(), recorder, blocks or nullcontext():
                result = twin(**values, **without_cache(twin))
        if blocks is not None:
            blocks.finish(twin, result)
    except Exception:  # the model's code may raise anything; tracing reports the error
        return None
    return recorder.calls


def _same_state(one: str, other: str, twin: nn.Module) -> bool:
    """Whether two blocks have the same classes and attributes, except for the number of the block.

    Branches on sizes may depend on attributes without effect at the one size that is run.
    """
    numbers = tuple(int(last) if (last := path.rpartition(".")[2]).isdigit() else None for path in (one, other))
    parts, others = (list(twin.get_submodule(path).named_modules()) for path in (one, other))
    if len(parts) != len(others):
        return False
    for (name, part), (other_name, other_part) in zip(parts, others, strict=True):
        if name != other_name or type(part) is not type(other_part):
            return False
        state, other_state = ({k: v for k, v in vars(m).items() if k not in _HELD} for m in (part, other_part))
        if not _equal(state, other_state, numbers):
            return False
    return True


_HELD = {"_parameters", "_buffers", "_modules", "forward"}
"""Attributes of modules that are compared in other ways."""


def _equal(one: Any, other: Any, numbers: tuple[int | None, ...], depth: int = 6) -> bool:
    """Whether two attributes are equal, or are the ``numbers`` of their blocks, down to some depth."""
    if one is other or (type(one) is int and (one, other) == numbers):
        return True
    if type(one) is not type(other) or depth == 0:
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key], numbers, depth - 1) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b, numbers, depth - 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, partial):
        bound, other_bound = (one.args, one.keywords), (other.args, other.keywords)
        return one.func is other.func and _equal(bound, other_bound, numbers, depth - 1)
    if isinstance(one, _COMPARED):
        return bool(one == other)
    has_state = isinstance(one, nn.Module) or (hasattr(one, "__dict__") and not callable(one))
    return has_state and _equal(vars(one), vars(other), numbers, depth - 1)


_COMPARED = (int, float, str, bytes, complex, set, frozenset, torch.dtype, torch.device)


def _replay_first_block(twin: nn.Module, group: tuple[str, ...]) -> None:
    """Make all blocks of a group but the first and the last return copies of the first block's results."""
    first: Any = twin.get_submodule(group[0])
    inputs: list[Any] = []
    flat: Any = None

    def record(*args: Any, **kwargs: Any) -> Any:
        nonlocal flat
        result = type(first).forward(first, *args, **kwargs)
        inputs[:], flat = tree_leaves((args, kwargs)), tree_flatten(result)
        return result

    def replay(*args: Any, **kwargs: Any) -> Any:
        given = {id(leaf): value for leaf, value in zip(inputs, tree_leaves((args, kwargs)), strict=True)}

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if id(leaf) in given:
                return given[id(leaf)]
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

        with disable_torch_function():
            return tree_unflatten([copy(leaf) for leaf in flat[0]], flat[1])

    first.forward = record
    for path in group[1:-1]:
        twin.get_submodule(path).forward = replay


@dataclass(frozen=True)
class Dependence:
    """The first call that differs with the dtype of the weights, and in training mode; empty if none does."""

    dtype: str = ""
    mode: str = ""


def find_dependence(
    model: nn.Module, inputs: Mapping[str, Any], native: torch.dtype, other: torch.dtype, dry_run: DryRun | None = None
) -> Dependence:
    """Find whether the calls of ``model`` depend on the dtype of its weights, or on its training mode.

    Code that does not run on ``meta`` is run on fake tensors.

    Args:
        native: the dtype of its weights; ``other`` is the one to try.
        dry_run: the run in its dtype and in evaluation mode on ``meta``, if it runs there.
    """
    training = {path: module.training for path, module in model.named_modules()}
    modes, varies = training if any(training.values()) else {}, other != native
    if not (modes or varies):
        return Dependence()
    found = Dependence()
    on_meta = dry_run is not None and (not dry_run.repeats or len(set(modes.values())) < 2)
    for known in (dry_run, None) if on_meta else (None,):
        fake, repeats = known is None, () if known is None else known.repeats
        run = partial(record_calls, model, inputs, native, repeats=repeats, fake=fake)
        plain = run(native) if known is None else known.calls
        by_dtype = run(other) if varies else plain
        by_mode = run(native, modes=modes) if modes else plain
        unlike = _first_difference(plain, by_dtype, native, other)
        found = Dependence(unlike, _first_difference(plain, by_mode, native, native))
        if plain is not None and by_dtype is not None and by_mode is not None:
            break
    return found


def _first_difference(
    plain: list[CallRecord] | None, others: list[CallRecord] | None, native: torch.dtype, other: torch.dtype
) -> str:
    """The function of the first call in which two runs differ; empty if they do not, or if one did not finish.

    The dtypes of the weights count as equal, and so do their largest and smallest numbers.
    """
    ends = ((getattr(torch.finfo(native), end), getattr(torch.finfo(other), end)) for end in ("min", "max"))
    same = {(native, other), *ends}
    for a, b in zip_longest(plain or (), others or (), fillvalue=()) if plain and others else ():
        pairs = zip(a, b, strict=False)
        if len(a) != len(b) or not all((x, y) in same or (x == y and x != other) for x, y in pairs):
            return str((a or b)[0])
    return ""
