"""Modules built without storage, to see what they would be like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet
from fxprune.modelling.blocks import CannotBuildError

__all__ = ["build_on_meta", "on_meta"]

T = TypeVar("T")


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without storage, without gradients and without chatter about odd configs."""
    with quiet(), torch.device("meta"), _Uninitialised(), torch.no_grad():
        yield


class _Uninitialised(TorchFunctionMode):
    """Lets what draws the first values of weights leave them: without storage there are none, and it takes its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_on_meta(build: Callable[..., T], /, *args: Any, **kwargs: Any) -> T | Refusal:
    """Return what a constructor makes on ``meta``, or why it refuses."""
    with on_meta():
        return attempt(build, *args, refusals=(CannotBuildError,), **kwargs)
