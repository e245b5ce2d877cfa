"""Sizes that the code of a model fixes although tracing let them vary."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from fxprune.graph.compat import fake_mode, is_free, size_hint, size_range
from fxprune.graph.inputs import example_of
from fxprune.graph.silence import quiet
from fxprune.trace.inputs import free_axes

__all__ = ["pin_sizes"]

_LOSSY = {operator.mod, operator.floordiv}
"""What turns a size into one that tracing may take for a constant: the number of chunks of a short input is 1."""

_OTHER = (3, 64)
"""A batch and a number of tokens that a graph whose sizes vary has to take.

Other than those traced with, and as many tokens as work is counted at, so that this much runs.
"""


def pin_sizes(graph_module: fx.GraphModule) -> str:
    """Write the size into the metadata of inputs of which the graph takes one size only.

    A size may be free, in a range, or one number. Where a graph divides sizes it is also run without storage at other
    ones.

    Returns:
        What was fixed, in words; empty if nothing was.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    pinned = [note for node in tensors if (note := _pin(node, _is_one_number))]
    divided = any(node.target in _LOSSY for node in graph_module.graph.nodes)
    if divided and not _runs(graph_module, inputs):
        pinned = [note for node in tensors if (note := _pin(node, lambda _, axis: axis > 0))] or pinned
    return ", ".join(dict.fromkeys(pinned))


def _is_one_number(size: int | torch.SymInt, axis: int) -> bool:
    smallest, largest = size_range(size)
    return smallest == largest


def _pin(node: fx.Node, fixed: Callable[[int | torch.SymInt, int], bool]) -> str:
    """Put numbers in place of the sizes of an input that are ``fixed``; return the shape if any is a number."""
    value = node.meta["val"]
    pinned = {axis for axis, size in enumerate(value.shape) if is_free(size) and fixed(size, axis)}
    sizes = [size_hint(s) if axis in pinned or not is_free(s) else s for axis, s in enumerate(value.shape)]
    if all(isinstance(size, int) for size in value.shape) or not hasattr(value, "fake_mode"):
        return ""
    with value.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in sizes)
    fixes = bool(pinned) or any(not is_free(size) for size in value.shape[: free_axes(value)])
    return f"{node.target} of shape ({shape}) alone" if fixes else ""


def _runs(graph_module: fx.GraphModule, inputs: list[fx.Node]) -> bool:
    """Whether the graph computes at all at sizes other than the traced ones."""

    def other(value: torch.Tensor) -> torch.Tensor:
        wanted = [_OTHER[min(i, 1)] if is_free(size) else size_hint(size) for i, size in enumerate(value.shape)]
        return torch.zeros(wanted, dtype=value.dtype)

    try:
        with quiet(), fake_mode(), torch.no_grad():
            fx.Interpreter(graph_module).run(*(example_of(node.meta["val"], other) for node in inputs))
    except Exception:  # ops refuse sizes that they do not take with whatever error they like
        return False
    return True
