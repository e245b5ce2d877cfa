"""Modules built without storage, to see what they would be like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet
from fxprune.modelling.blocks import CannotBuildError

__all__ = ["build_on_meta", "on_meta"]

T = TypeVar("T")


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without storage, without gradients and without chatter about odd configs."""
    with quiet(), torch.device("meta"), torch.no_grad():
        yield


def build_on_meta(build: Callable[..., T], /, *args: Any, **kwargs: Any) -> T | Refusal:
    """Return what a constructor makes on ``meta``, or why it refuses."""
    with on_meta():
        return attempt(build, *args, refusals=(CannotBuildError,), **kwargs)
