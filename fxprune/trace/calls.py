"""What calls of torch a model makes: whether they depend on the dtype of its weights, or on its mode.

A float32 model is traced in bfloat16 (see :mod:`fxprune.trace.capture`). That is only right if its code makes the same
calls with the same numbers in both: one that reads ``torch.finfo(x.dtype).eps``, branches on ``x.dtype`` or makes a
constant of it does not. And a graph is the model in evaluation mode, which is another than in training if the calls
differ. Both are run without storage, and the calls are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from fxprune.graph.compat import fake_mode
from fxprune.graph.silence import quiet
from fxprune.trace.inputs import blank
from fxprune.trace.log import CallLog, Said
from fxprune.trace.repeats import EVAL, Observed, calls_dry
from fxprune.trace.twin import fake_twin, without_cache

__all__ = ["Dependence", "dependence"]


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
