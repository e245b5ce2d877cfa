"""Repeated blocks that do the same, so that one of each group is exported.

A model is run once without storage, and everything that its blocks do is watched. Then it is run again with what is
said of most alike blocks in their place: if anything else in the model does otherwise, as where blocks count how often
they were called, all of them are exported one by one.

A float32 model is traced in bfloat16 (see :mod:`fxprune.trace.capture`). That is only right if its code makes the same
calls with the same numbers in both: one that reads ``torch.finfo(x.dtype).eps``, branches on ``x.dtype`` or makes a
constant of it does not. And a graph is the model in evaluation mode, which is another than in training if the calls
differ. Both are run without storage, and the calls are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from fxprune.graph.compat import fake_mode, tree_flatten, tree_leaves, tree_unflatten
from fxprune.graph.context import as_exported, quiet, unseen
from fxprune.graph.facts import find_blocks
from fxprune.graph.shapes import WorkedOutOnce
from fxprune.trace.inputs import blank, dry_twin, fake_twin, without_cache
from fxprune.trace.repeats.watch import BlockWatch, Call, CallLog, Said

__all__ = ["EVAL", "Dependence", "Observed", "Repeats", "calls_dry", "dependence", "observe"]

_FEWEST = 3
"""So many blocks that are alike are worth it: the first and the last are exported in any case."""

EVAL: Mapping[str, bool] = {}
"""A twin is in evaluation mode."""


@dataclass(frozen=True)
class Repeats:
    """The blocks that are alike.

    Args:
        groups: their paths, those that are alike together, in the order in which they are called; at least three each.
    """

    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def left_out(self) -> frozenset[str]:
        """The blocks that others speak for: of each group, all but the first and the last."""
        return frozenset(path for group in self.groups for path in group[1:-1])


_NONE = Repeats()
"""No blocks that are alike."""


@dataclass(frozen=True)
class Observed:
    """A run without storage.

    Args:
        repeats: the blocks that are alike.
        calls: the calls of torch functions, but for those of blocks that others speak for.
    """

    repeats: Repeats
    calls: list[Said]


def observe(model: nn.Module, inputs: Mapping[str, Any], own: torch.dtype) -> Observed | None:
    """Run a copy of ``model`` on ``meta``; return what was seen, None where its code raises there.

    Args:
        model: the model; it is not run.
        inputs: keyword inputs, of which only shape and dtype matter.
        own: the dtype of its weights.
    """
    watch, log = BlockWatch(), CallLog()
    try:
        twin = dry_twin(model, own, own)
        paths = _watchable(twin)
        for path in paths:
            block = twin.get_submodule(path)
            block.forward = _watched(path, block, watch, log)
        _run(twin, inputs, own, own, log, watch)
        repeats = Repeats(tuple(tuple(call.path for call in group) for group in _worthwhile(watch.alike(), twin)))
    except Exception:  # whatever the model's code raises on meta: it is then run in another way, or exported in full
        return None
    if repeats.groups:
        calls = _without(log.calls, [call for call in watch.calls if call.path in repeats.left_out])
        if calls_dry(model, inputs, own, own, repeats) == calls:
            return Observed(repeats, calls)
    return Observed(Repeats(), log.calls)


def calls_dry(
    model: nn.Module,
    inputs: Mapping[str, Any],
    own: torch.dtype,
    dtype: torch.dtype,
    repeats: Repeats = _NONE,
    modes: Mapping[str, bool] = EVAL,
) -> list[Said] | None:
    """Return the calls of torch functions that a copy of ``model`` makes on ``meta``; None where its code raises there.

    Args:
        model: the model; it is not run.
        inputs: keyword inputs, of which only shape and dtype matter.
        own: the dtype of its weights.
        dtype: the dtype they get.
        repeats: blocks that are alike, most of which do nothing but return what the first returns.
        modes: which modules are in training, by path; none if left out.
    """
    log = CallLog()
    try:
        twin = dry_twin(model, own, dtype)
        for path, training in modes.items():
            twin.get_submodule(path).training = training
        for group in repeats.groups:
            _speak_for(twin, group)
        _run(twin, inputs, own, dtype, log)
    except Exception:  # whatever the model's code raises on meta: it is then run in another way
        return None
    return log.calls


def _without(calls: list[Said], left_out: list[Call]) -> list[Said]:
    """Return calls of torch functions but for those in some calls of blocks."""
    kept, place = [], 0
    for call in left_out:
        kept += calls[place : call.start]
        place = call.end
    return kept + calls[place:]


def _run(
    twin: nn.Module,
    inputs: Mapping[str, Any],
    own: torch.dtype,
    dtype: torch.dtype,
    log: CallLog,
    watch: BlockWatch | None = None,
) -> None:
    with torch.device("meta"), as_exported(), quiet(), torch.no_grad():
        values = {name: blank(value, own, dtype) for name, value in inputs.items()}
        with WorkedOutOnce(), log, watch or nullcontext():
            result = twin(**values, **without_cache(twin))
    if watch is not None:
        watch.outside(result)


def _watchable(twin: nn.Module) -> tuple[str, ...]:
    """The blocks of a model in which every module has one name: else tracing would not know which of them it is in."""
    names = [name for name, _ in twin.named_modules(remove_duplicate=False)]
    if len(names) != sum(1 for _ in twin.modules()):
        return ()
    return tuple(path for path in find_blocks(twin) if _is_plain(twin.get_submodule(path)))


def _is_plain(block: nn.Module) -> bool:
    return not (block._forward_hooks or block._forward_pre_hooks or "forward" in vars(block))


def _watched(path: str, block: nn.Module, watch: BlockWatch, log: CallLog) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with unseen():
            watch.enter(path, block, args, kwargs, len(log.calls))
        result = type(block).forward(block, *args, **kwargs)
        with unseen():
            watch.leave(result, len(log.calls))
        return result

    return forward


def _worthwhile(groups: list[list[Call]], twin: nn.Module) -> Iterator[list[Call]]:
    """Yield what of some groups is in the same state, too, and enough of it."""
    for group in groups:
        rest = group
        while len(rest) >= _FEWEST:
            same = [call for call in rest if _same_state(rest[0].path, call.path, twin)]
            rest = [call for call in rest if call not in same]
            if len(same) >= _FEWEST:
                yield same


def _same_state(one: str, other: str, twin: nn.Module) -> bool:
    """Whether two blocks are of the same classes and have the same attributes, but for the number of the block.

    What is asked of sizes may depend on these without anything to see at one size.
    """
    numbers = tuple(int(last) if (last := path.rpartition(".")[2]).isdigit() else None for path in (one, other))
    mine, others = (list(twin.get_submodule(path).named_modules()) for path in (one, other))
    return len(mine) == len(others) and all(
        name == its_name and type(part) is type(its) and _same(_state(part), _state(its), numbers)
        for (name, part), (its_name, its) in zip(mine, others, strict=True)
    )


def _state(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in _HELD}


_HELD = {"_parameters", "_buffers", "_modules", "forward"}
"""What modules hold elsewhere."""


def _same(one: Any, other: Any, numbers: tuple[int | None, ...], depth: int = 4) -> bool:
    if one is other or (type(one) is int and (one, other) == numbers):
        return True
    if type(one) is not type(other) or depth == 0:
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], numbers, depth - 1) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b, numbers, depth - 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, partial):
        return one.func is other.func and _same(
            (one.args, one.keywords), (other.args, other.keywords), numbers, depth - 1
        )
    if isinstance(one, _COMPARED):
        return bool(one == other)
    return hasattr(one, "__dict__") and not callable(one) and _same(vars(one), vars(other), numbers, depth - 1)


_COMPARED = (int, float, str, bytes, complex, set, frozenset, torch.dtype, torch.device)


def _speak_for(twin: nn.Module, group: tuple[str, ...]) -> None:
    """Let most of some blocks that are alike do nothing but return what the first one would for their inputs."""
    said: dict[str, Any] = {}
    speaker: Any = twin.get_submodule(group[0])

    def speak(*args: Any, **kwargs: Any) -> Any:
        result = type(speaker).forward(speaker, *args, **kwargs)
        said["inputs"] = {id(leaf): i for i, leaf in enumerate(tree_leaves((args, kwargs))) if _is_tensor(leaf)}
        said["kept"] = args, kwargs
        said["leaves"], said["spec"] = tree_flatten(result)
        return result

    def repeat(*args: Any, **kwargs: Any) -> Any:
        inputs = tree_leaves((args, kwargs))

        def another(leaf: Any) -> Any:
            if id(leaf) in said["inputs"]:
                return inputs[said["inputs"][id(leaf)]]
            if not _is_tensor(leaf):
                return leaf
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

        with unseen():
            return tree_unflatten([another(leaf) for leaf in said["leaves"]], said["spec"])

    speaker.forward = speak
    for path in group[1:-1]:
        block: Any = twin.get_submodule(path)
        block.forward = repeat


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@dataclass(frozen=True)
class Dependence:
    """The first calls that a model makes otherwise; empty where there is none.

    Args:
        dtype: than with weights of its own dtype.
        mode: than in evaluation mode.
    """

    dtype: str = ""
    mode: str = ""


def dependence(
    model: nn.Module,
    inputs: Mapping[str, Any],
    own: torch.dtype,
    other: torch.dtype,
    seen: Observed | None = None,
) -> Dependence:
    """Return in which calls ``model`` depends on the dtype of its weights, and on the mode that it is in.

    A run that takes both away from what the graph is compares with one that has both, if neither matters; only where
    it does not, each is looked at alone. Code that does not run on ``meta`` is run with fake tensors.

    Args:
        model: the model; it is not run, copies without storage are.
        inputs: keyword inputs, of which only shape and dtype matter.
        own: the dtype of its weights.
        other: the dtype to try.
        seen: what it does in its dtype and in evaluation mode on ``meta``, if it runs there.
    """
    training = {path: module.training for path, module in model.named_modules()}
    trains, varies = any(training.values()), other != own
    if not trains and not varies:
        return Dependence()
    modes = training if trains else {}
    if seen is not None and (not seen.repeats.groups or len(set(training.values())) == 1):
        dry = partial(calls_dry, model, inputs, own, repeats=seen.repeats)
        found, finished = _found(dry, seen.calls, own, other, modes)
        if finished:
            return found
    slow = partial(_calls, model, inputs, own)
    return _found(slow, slow(own), own, other, modes)[0]


def _found(
    run: Callable[..., list[Said] | None],
    plain: list[Said] | None,
    own: torch.dtype,
    other: torch.dtype,
    modes: Mapping[str, bool],
) -> tuple[Dependence, bool]:
    """Return what a model depends on, and whether all runs that should tell came to an end."""
    varies = other != own
    if plain and modes and varies:
        neither = run(other, modes=modes)
        if neither and not _first_apart(plain, neither, own, other):
            return Dependence(), True
    by_dtype = run(other) if varies else plain
    by_mode = run(own, modes=modes) if modes else plain
    finished = plain is not None and by_dtype is not None and by_mode is not None
    return Dependence(_first_apart(plain, by_dtype, own, other), _first_apart(plain, by_mode, own, own)), finished


def _first_apart(mine: list[Said] | None, others: list[Said] | None, own: torch.dtype, other: torch.dtype) -> str:
    """Return the first call in which two runs differ; empty where they do not, or one did not come to an end."""
    for a, b in zip_longest(mine or (), others or (), fillvalue=()) if mine and others else ():
        if not _alike(a, b, own, other):
            return str((a or b)[0])
    return ""


def _calls(
    model: nn.Module, inputs: Mapping[str, Any], own: torch.dtype, dtype: torch.dtype, modes: Mapping[str, bool] = EVAL
) -> list[Said] | None:
    """Return the calls of a run without storage; None where the code of the model raises without it."""
    mode = fake_mode(fixed=True)
    try:
        twin = fake_twin(model, mode, own, dtype)
        for path, training in modes.items():
            twin.get_submodule(path).training = training
        with mode, quiet(), torch.no_grad(), CallLog() as log:
            values = {name: blank(value, own, dtype) for name, value in inputs.items()}
            log.calls.clear()
            twin(**values, **without_cache(twin))
    except Exception:  # whatever the model's code raises, copied or run without storage: tracing will say what
        return None
    return list(log.calls)


def _alike(mine: Said, others: Said, own: torch.dtype, other: torch.dtype) -> bool:
    """Whether two calls are the same but for the dtype of the model, or for an infinity of it."""
    same = {(own, other)} | {
        (getattr(torch.finfo(own), end), getattr(torch.finfo(other), end)) for end in ("min", "max")
    }
    return len(mine) == len(others) and all(
        (a, b) in same or (a == b and a != other) for a, b in zip(mine, others, strict=True)
    )
