"""What calls of torch a model makes: whether they depend on the dtype of its weights, or on its mode.

A float32 model is traced in bfloat16 (see :mod:`fxprune.trace.capture`). That is only right if its code makes the same
calls with the same numbers in both: one that reads ``torch.finfo(x.dtype).eps``, branches on ``x.dtype`` or makes a
constant of it does not. And a graph is the model in evaluation mode, which is another than in training if the calls
differ. Both are run without storage, and the calls are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from fxprune.graph.compat import fake_mode, tree_leaves
from fxprune.graph.silence import quiet
from fxprune.trace.twin import fake_twin, without_cache

__all__ = ["differs_by_dtype", "differs_in_training"]

Call = tuple[Any, ...]

_EVAL: Mapping[str, bool] = {}
"""A twin is in evaluation mode."""


def differs_by_dtype(model: nn.Module, inputs: Mapping[str, Any], own: torch.dtype, other: torch.dtype) -> str:
    """Return the first call that ``model`` makes otherwise in dtype ``other`` than in its ``own``; empty if none.

    Args:
        model: the model; it is not run, copies without storage are.
        inputs: keyword inputs, of which only shape and dtype matter.
        own: the dtype of its weights.
        other: the dtype to try.
    """
    return _first_apart([_calls(model, inputs, own, dtype) for dtype in (own, other)], own, other)


def differs_in_training(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the first call that ``model`` makes otherwise in its mode than in evaluation mode; empty if none.

    Args:
        model: the model; it is not run, copies without storage are.
        inputs: keyword inputs, of which only shape and dtype matter.
    """
    if not any(module.training for module in model.modules()):
        return ""
    own = next(model.parameters()).dtype
    modes = {path: module.training for path, module in model.named_modules()}
    return _first_apart([_calls(model, inputs, own, own, mode) for mode in ({}, modes)], own, own)


def _first_apart(runs: list[list[Call] | None], own: torch.dtype, other: torch.dtype) -> str:
    """Return the first call in which two runs differ; empty where they do not, or one did not come to an end."""
    mine, others = runs
    for a, b in zip_longest(mine or (), others or (), fillvalue=()) if mine and others else ():
        if not _alike(a, b, own, other):
            return str((a or b)[0])
    return ""


class _Log(TorchFunctionMode):
    """Writes down each call of a torch function: its name, its numbers, and the dtypes it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

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


def _calls(
    model: nn.Module, inputs: Mapping[str, Any], own: torch.dtype, dtype: torch.dtype, modes: Mapping[str, bool] = _EVAL
) -> list[Call] | None:
    """Return the calls of a run without storage; None where the code of the model raises without it."""
    mode = fake_mode(fixed=True)
    try:
        twin = fake_twin(model, mode, own, dtype)
        for path, training in modes.items():
            twin.get_submodule(path).training = training
        with mode, quiet(), torch.no_grad(), _Log() as log:
            values = {
                name: torch.zeros(value.shape, dtype=dtype if value.dtype == own else value.dtype)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in inputs.items()
            }
            log.calls.clear()
            twin(**values, **without_cache(twin))
    except Exception:  # whatever the model's code raises, copied or run without storage: tracing will say what
        return None
    return list(log.calls)


def _alike(mine: Call, others: Call, own: torch.dtype, other: torch.dtype) -> bool:
    """Whether two calls are the same but for the dtype of the model, or for an infinity of it."""
    same = {(own, other)} | {
        (getattr(torch.finfo(own), end), getattr(torch.finfo(other), end)) for end in ("min", "max")
    }
    return len(mine) == len(others) and all(
        (a, b) in same or (a == b and a != other) for a, b in zip(mine, others, strict=True)
    )
