"""Modules built without storage, to see what they would be like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.compat import DeviceContext
from fxprune.graph.silence import quiet
from fxprune.modelling.blocks import CannotBuildError

__all__ = ["build_on_meta", "on_meta"]

T = TypeVar("T")


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without storage, without gradients and without chatter about odd configs."""
    with quiet(), _Uninitialised("meta"), torch.no_grad():
        yield


class _Uninitialised(DeviceContext):
    """A device on which what draws the first values of weights leaves them: without storage there are none.

    Drawing takes its time all the same, and so does each context that sees the calls of torch: this is one for both.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


def build_on_meta(build: Callable[..., T], /, *args: Any, **kwargs: Any) -> T | Refusal:
    """Return what a constructor makes on ``meta``, or why it refuses."""
    with on_meta():
        return attempt(build, *args, refusals=(CannotBuildError,), **kwargs)
