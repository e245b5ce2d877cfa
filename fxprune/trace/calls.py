"""What calls of torch a model makes: whether they depend on the dtype of its weights, or on its mode.

A float32 model is traced in bfloat16 (see :mod:`fxprune.trace.capture`). That is only right if its code makes the same
calls with the same numbers in both: one that reads ``torch.finfo(x.dtype).eps``, branches on ``x.dtype`` or makes a
constant of it does not. And a graph is the model in evaluation mode, which is another than in training if the calls
differ. Both are run without storage, and the calls are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from fxprune.graph.compat import fake_mode, tree_leaves
from fxprune.graph.silence import quiet
from fxprune.trace.twin import fake_twin, without_cache

__all__ = ["Dependence", "dependence"]

Call = tuple[Any, ...]

_EVAL: Mapping[str, bool] = {}
"""A twin is in evaluation mode."""


@dataclass(frozen=True)
class Dependence:
    """The first calls that a model makes otherwise; empty where there is none.

    Args:
        dtype: than with weights of its own dtype.
        mode: than in evaluation mode.
    """

    dtype: str = ""
    mode: str = ""


def dependence(model: nn.Module, inputs: Mapping[str, Any], own: torch.dtype, other: torch.dtype) -> Dependence:
    """Return in which calls ``model`` depends on the dtype of its weights, and on the mode that it is in.

    A run that takes both away from what the graph is compares with one that has both, if neither matters; only where
    it does not, each is looked at alone.

    Args:
        model: the model; it is not run, copies without storage are.
        inputs: keyword inputs, of which only shape and dtype matter.
        own: the dtype of its weights.
        other: the dtype to try.
    """
    training = {path: module.training for path, module in model.named_modules()}
    trains, varies = any(training.values()), other != own
    if not trains and not varies:
        return Dependence()
    plain = _calls(model, inputs, own, own)
    if trains and varies:
        neither = _calls(model, inputs, own, other, training)
        if plain and neither and not _first_apart(plain, neither, own, other):
            return Dependence()
    return Dependence(
        _first_apart(plain, _calls(model, inputs, own, other), own, other) if varies else "",
        _first_apart(plain, _calls(model, inputs, own, own, training), own, own) if trains else "",
    )


def _first_apart(mine: list[Call] | None, others: list[Call] | None, own: torch.dtype, other: torch.dtype) -> str:
    """Return the first call in which two runs differ; empty where they do not, or one did not come to an end."""
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
