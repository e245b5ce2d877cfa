"""The calls of torch functions that code makes, written down."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from fxprune.graph.compat import tree_leaves

__all__ = ["CallLog", "Said"]

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
