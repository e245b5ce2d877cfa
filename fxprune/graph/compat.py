"""The torch names that carry no compatibility promise, in one place."""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "AUTOCAST",
    "GRADIENTS",
    "SIZE",
    "UNKNOWN_SIZE",
    "DeviceContext",
    "FakeTensor",
    "FakeTensorMode",
    "FakeTensorProp",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "TreeSpec",
    "argument_names",
    "disable_proxy_modes_tracing",
    "enable_python_dispatcher",
    "fake_mode",
    "forgetting",
    "get_proxy_mode",
    "get_proxy_slot",
    "guards_of",
    "has_unbacked_sizes",
    "is_check",
    "is_composite",
    "is_free",
    "is_impure",
    "is_pointwise",
    "is_random",
    "is_size",
    "known_of_sizes",
    "size_hint",
    "size_range",
    "spell_expression",
    "storage_of",
    "symbol_hint",
    "track_tensor",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "work_out",
]

GRADIENTS = "wrap_with_set_grad_enabled"
"""A higher-order op that sets a mode around a subgraph; the mode, whether there are gradients, comes first."""

AUTOCAST = "wrap_with_autocast"
"""The same for autocast: device, dtype, whether it is on, and whether casts are kept come first."""

UNKNOWN_SIZE = 2**31 - 1
"""Stands for a size that only the data decides; such an axis is frozen.

A prime larger than any axis of a model, so that it equals no size and no size divides it.
"""


def fake_mode(fixed: bool = False) -> FakeTensorMode:
    """A mode whose tensors have shape, dtype and device but no storage, with symbolic sizes allowed.

    Args:
        fixed: sizes will be numbers: what torch keeps of what ops make of shapes then pays, even if it is off for
            sizes that vary.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = mode.cache_enabled or fixed
    return mode


@contextmanager
def forgetting() -> Iterator[None]:
    """Let torch forget, when the outermost of these contexts ends, what it learnt about symbolic sizes in it.

    Its caches of results and of answers about sizes have no bound, and what is in them keeps itself alive, as C++ holds
    the sizes, where the garbage collector does not look. The next trace has other symbols, and no use for them. What it
    learnt about sizes that are numbers serves the next trace as well, and stays.
    """
    start = ShapeEnv.__init__
    if start.__name__ == _started.__name__:
        yield
        return

    @functools.wraps(_started)
    def started(sizes: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        start(sizes, *args, **kwargs)
        _SIZES.add(sizes)

    ShapeEnv.__init__ = started  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ShapeEnv.__init__ = start  # type: ignore[method-assign]
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for sizes in _SIZES:
            sizes.fake_tensor_cache.clear()
            (sizes.tracked_fakes or []).clear()


def _started(sizes: ShapeEnv) -> None:
    """Stands for ``ShapeEnv.__init__`` while :func:`forgetting` lasts."""


_SIZES: WeakSet[ShapeEnv] = WeakSet()
"""The symbolic sizes of traces that are still there: their caches fill again when a later pass works with them."""


def size_hint(size: int | torch.SymInt) -> int:
    """The size seen while tracing, for a symbolic size too; a large prime where it depends on the data."""
    hint = size if isinstance(size, int) else size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def symbol_hint(symbol: Any, size: torch.SymInt) -> int:
    """The number that was seen while tracing for a symbol in the expression of ``size``."""
    return int(size.node.shape_env.backed_var_to_val[symbol])


def is_free(size: int | torch.SymInt) -> bool:
    """Whether ``size`` varies: a symbol that tracing found to have one value only does not."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def size_range(size: int | torch.SymInt) -> tuple[int, int | None]:
    """The smallest and the largest value that tracing found ``size`` may have; None if there is no largest."""
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.lower), None if bounds.upper is int_oo else int(bounds.upper)


_CODE_OF_OPS = ("_decomp", "_meta_registrations.py", "_refs")


def has_unbacked_sizes(value: Any) -> bool:
    """Whether the shape of a tensor in ``value``, or a number in it, depends on data."""
    return any(free_unbacked_symbols(leaf) for leaf in tree_leaves(value) if isinstance(leaf, _SIZED))


SIZE = torch.SymInt | torch.SymFloat | torch.SymBool
"""What is worked out of sizes that vary."""

_SIZED = torch.Tensor | SIZE


def is_size(node: Node) -> bool:
    """Whether ``node`` is an op that works out something of sizes that vary."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), SIZE)


def guards_of(size: torch.SymInt) -> list[tuple[Any, str]]:
    """Return the conditions under which a trace holds that the code of a model asked about, and where it did.

    What torch asks for itself, to choose among layouts in memory, does not change what is computed; an equation among
    sizes in the code of its ops does, such as how many parts there are of a tensor that is split.

    Args:
        size: any size of the trace; the conditions, sympy expressions, are those on all of them. Sizes that turned out
            to be a number, or another size, after they were asked about are that in them.
    """
    env = size.node.shape_env
    asked = [(guard.expr, guard.sloc.framework_loc) for guard in env.guards]
    return [
        (env.replace(expression), f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}")
        for expression, frame in asked
        if isinstance(frame, traceback.FrameSummary) and _matters(expression, Path(frame.filename))
    ]


def _matters(expression: Any, file: Path) -> bool:
    """Whether what was asked in ``file`` decides what is computed; modules of torch are code of models, too."""
    root = Path(torch.__file__).parent
    if not file.is_relative_to(root) or file.is_relative_to(root / "nn"):
        return True
    return getattr(expression, "rel_op", "") == "==" and file.relative_to(root).parts[0] in _CODE_OF_OPS


def known_of_sizes(mode: FakeTensorMode) -> object:
    """Return what was found out about the sizes of ``mode`` so far, as something that compares."""
    env = mode.shape_env
    if env is None:
        return None
    counts = tuple(len(found) for found in (env.guards, env.axioms, env.divisible, env.deferred_runtime_asserts))
    return dict(env.replacements), dict(env.var_to_range), counts


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells the storage of ``tensor`` from others that are there, without values too."""
    return int(tensor.untyped_storage()._cdata)


def work_out(expression: Any, values: dict[Any, Any]) -> Any:
    """Return the value of a sympy expression for ``values`` of its symbols, which may be proxies of a graph."""
    return sympy_interp(PythonReferenceAnalysis, values, expression)


def spell_expression(expression: Any, names: dict[Any, str]) -> str:
    """Return a sympy expression as Python code, with ``names`` for its symbols."""
    spelled = PythonPrinter().doprint(expression)
    for symbol, name in names.items():
        spelled = re.sub(rf"\b{symbol}\b", name, spelled)
    return str(spelled)


def argument_names(op: OpOverload) -> list[tuple[str, Any, bool]]:
    """Return name, default value (None if it has none) and whether it is keyword only, of each argument of ``op``."""
    return [(arg.name, arg.default_value, arg.kwarg_only) for arg in op._schema.arguments]


def is_composite(op: OpOverload) -> bool:
    """Whether torch makes ``op`` of others where it is run."""
    return bool(op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


def is_pointwise(op: object) -> bool:
    """Whether torch itself marks ``op`` as pointwise."""
    return isinstance(op, OpOverload) and torch.Tag.pointwise in op.tags


def is_random(op: object) -> bool:
    """Whether torch itself marks ``op`` as drawing random numbers."""
    return isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def is_check(node: Node) -> bool:
    """Whether ``node`` raises unless its first argument is true; its second one says why."""
    return node.target is torch.ops.aten._assert_scalar.default


def is_impure(node: Node) -> bool:
    """Whether ``node`` has to stay even if nothing uses it: it writes to a tensor, or is an input or output.

    torch's own answer also keeps everything that may draw random numbers, which attention may.
    """
    if node.op in ("placeholder", "output") or is_check(node):
        return True
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)
