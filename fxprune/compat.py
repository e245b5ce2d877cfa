"""The torch names that carry no compatibility promise, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import TreeSpec, tree_leaves

__all__ = [
    "REGION_OPS",
    "UNKNOWN_SIZE",
    "FakeTensorMode",
    "FakeTensorProp",
    "HigherOrderOperator",
    "OpOverload",
    "TreeSpec",
    "argument_names",
    "enable_python_dispatcher",
    "fake_mode",
    "is_impure",
    "is_pointwise",
    "size_hint",
    "tree_leaves",
]

REGION_OPS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
"""Higher-order ops that only set a mode around a subgraph: number and place of their arguments differ."""


UNKNOWN_SIZE = 2**31 - 1
"""Stands for a size that only the data decides; such an axis is frozen."""


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors have shape, dtype and device but no storage, with symbolic sizes allowed."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def size_hint(size: int | torch.SymInt) -> int:
    """The size seen while tracing, for a symbolic size too; a large prime where it depends on the data."""
    hint = size if isinstance(size, int) else size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def argument_names(op: OpOverload) -> list[tuple[str, Any, bool]]:
    """Of each argument of ``op`` in order: name, default value (None if it has none), keyword only."""
    return [(arg.name, arg.default_value, arg.kwarg_only) for arg in op._schema.arguments]


def is_pointwise(op: object) -> bool:
    """Whether torch itself marks ``op`` as pointwise."""
    return isinstance(op, OpOverload) and torch.Tag.pointwise in op.tags


def is_impure(node: Node) -> bool:
    """Whether ``node`` has to stay even if nothing uses it: it writes to a tensor, or is an input or output.

    torch's own answer also keeps everything that may draw random numbers, which attention may.
    """
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)
