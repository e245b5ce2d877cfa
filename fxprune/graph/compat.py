"""Private torch names, which carry no compatibility promise, in one place."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache as disable_fake_tensor_cache
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing as disable_proxy_modes_tracing
from torch.fx.experimental.proxy_tensor import get_proxy_mode as get_proxy_mode
from torch.fx.experimental.proxy_tensor import get_proxy_slot as get_proxy_slot
from torch.fx.experimental.proxy_tensor import track_tensor as track_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.passes.fake_tensor_prop import FakeTensorProp as FakeTensorProp
from torch.utils import _pytree
from torch.utils._device import DeviceContext as DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

_LEAVES = (bool, int, float, str, type(None), torch.Tensor, torch.nn.Parameter, FakeTensor, torch.dtype, torch.device)


def tree_leaves(value: Any) -> list[Any]:
    """The leaves of nested containers, as torch's function finds them, which is slow on plain ones."""
    kind = type(value)
    if kind in _LEAVES:
        return [value]
    if kind is dict:
        value = [*value.values()]
    elif kind is not tuple and kind is not list:
        return _pytree.tree_leaves(value)
    return [leaf for item in value for leaf in tree_leaves(item)]


def tree_map(make: Callable[..., Any], value: Any, *others: Any) -> Any:
    """Containers with ``make(leaf, ..)`` for each leaf, also of ``others``, as torch's function makes them."""
    kind = type(value)
    if others:
        return _pytree.tree_map(make, value, *others)
    if kind in _LEAVES:
        return make(value)
    if kind is tuple or kind is list:
        return kind([tree_map(make, item) for item in value])
    if kind is dict:
        return {key: tree_map(make, item) for key, item in value.items()}
    return _pytree.tree_map(make, value)


disable_modes = _disable_current_modes
"""A context without the modes that intercept calls of ops, such as those of a trace."""

GRADIENTS = "wrap_with_set_grad_enabled"
"""A higher-order op that sets gradient mode around a subgraph; its first argument is the mode."""

AUTOCAST = "wrap_with_autocast"
"""The same for autocast; its first arguments are device, dtype, whether it is enabled and whether casts are cached."""

UNKNOWN_SIZE = 2**31 - 1
"""Placeholder for a size that depends on data; such an axis is frozen.

A prime larger than any axis of a model, so that it equals no size and no size divides it.
"""


def fake_mode(fixed: bool = False) -> FakeTensorMode:
    """Fake tensor mode with symbolic sizes allowed.

    If sizes will be numbers (``fixed``), torch's cache of op results pays even if it is off for symbolic sizes.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = mode.cache_enabled or fixed
    return mode


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode, dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor on the CPU of the shape of ``tensor``; for a parameter, a parameter."""
    made: Any = FakeTensor(mode, torch.empty(tensor.shape, dtype=dtype, device="meta"), torch.device("cpu"))
    if isinstance(tensor, torch.nn.Parameter):  # as one is marked of which the class is not Parameter, without a copy
        made.requires_grad_(tensor.requires_grad)._is_param = True
    return made  # type: ignore[no-any-return]


@contextmanager
def clear_symbolic_caches() -> Iterator[None]:
    """Clear torch's caches about symbolic sizes when the outermost of these contexts ends.

    They have no bound, and their entries keep themselves alive: C++ holds the sizes, invisible to the garbage
    collector. Entries about fixed sizes serve the next trace as well, and stay.
    """
    init = ShapeEnv.__init__
    if init.__name__ == "recording_init":
        yield
        return

    def recording_init(env: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        init(env, *args, **kwargs)
        _ENVIRONMENTS.add(env)

    ShapeEnv.__init__ = recording_init  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ShapeEnv.__init__ = init  # type: ignore[method-assign]
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for env in _ENVIRONMENTS:
            env.fake_tensor_cache.clear()
            (env.tracked_fakes or []).clear()


_ENVIRONMENTS: WeakSet[ShapeEnv] = WeakSet()
"""Those of traces that are still alive: their caches fill again when a later pass works with them."""


def size_hint(size: int | torch.SymInt) -> int:
    """The traced value of a size, symbolic or not; :data:`UNKNOWN_SIZE` if it depends on data."""
    hint = size if isinstance(size, int) else size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def is_free(size: int | torch.SymInt) -> bool:
    """Whether ``size`` varies; a symbol that tracing specialised to one value does not."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def size_range(size: int | torch.SymInt) -> tuple[int, int | None]:
    """The smallest and the largest value of ``size`` in a trace; None if there is no largest."""
    if isinstance(size, int):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.lower), None if bounds.upper is int_oo else int(bounds.upper)


def has_unbacked_sizes(value: Any) -> bool:
    """Whether the shape of a tensor in ``value``, or a number in it, depends on data."""
    return any(free_unbacked_symbols(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor | SIZE))


SIZE = torch.SymInt | torch.SymFloat | torch.SymBool
"""Values computed from symbolic sizes."""


def is_size(node: Node) -> bool:
    """Whether ``node`` is an op that computes a value from symbolic sizes."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), SIZE)


def guards_of(size: torch.SymInt) -> list[tuple[Any, str]]:
    """Return the guards of a trace that the code of the model set, as sympy expressions with their source location.

    Guards that torch sets for itself, to choose among memory layouts, do not change results; equations among sizes in
    the code of its ops do, such as the number of parts of a tensor that is split. Any ``size`` of the trace will do.
    """
    env = size.node.shape_env
    found, root = [], Path(torch.__file__).parent
    for guard in env.guards:
        frame = guard.sloc.framework_loc
        if not isinstance(frame, traceback.FrameSummary):
            continue
        file = Path(frame.filename)
        is_model = not file.is_relative_to(root) or file.is_relative_to(root / "nn")
        is_op = not is_model and file.relative_to(root).parts[0] in ("_decomp", "_meta_registrations.py", "_refs")
        if is_model or (is_op and getattr(guard.expr, "rel_op", "") == "=="):
            found.append((env.replace(guard.expr), f"{file.name}:{frame.lineno} in {frame.name}"))
    return found


def shape_env_state(mode: FakeTensorMode) -> object:
    """Return the knowledge of ``mode`` about its sizes so far, for comparison with a later state."""
    env = mode.shape_env
    if env is None:
        return None
    counts = tuple(len(found) for found in (env.guards, env.axioms, env.divisible, env.deferred_runtime_asserts))
    return dict(env.replacements), dict(env.var_to_range), counts


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of the storage of ``tensor`` among live ones, also on ``meta``."""
    return int(tensor.untyped_storage()._cdata)


def evaluate_expression(expression: Any, values: dict[Any, Any]) -> Any:
    """Return the value of a sympy expression for values of its symbols, which may be proxies of a graph."""
    return sympy_interp(PythonReferenceAnalysis, values, expression)


def spell_expression(expression: Any, names: dict[Any, str]) -> str:
    """Format a sympy expression as Python code, with ``names`` for its symbols."""
    spelled = PythonPrinter().doprint(expression)
    for symbol, name in names.items():
        spelled = re.sub(rf"\b{symbol}\b", name, spelled)
    return str(spelled)


def cache_of(output: Any) -> Any:
    """Return the key-value cache among the named outputs of a model; None if there is none.

    transformers renamed it, and warns where its old name is read as an attribute.
    """
    fields = getattr(output, "__dict__", {})  # a tuple has none
    return fields.get("cache") or fields.get("past_key_values")


def argument_names(op: OpOverload) -> list[tuple[str, Any, bool]]:
    """Return name, default value (None if there is none) and whether it is keyword-only for each argument of ``op``."""
    return [(arg.name, arg.default_value, arg.kwarg_only) for arg in op._schema.arguments]


def is_random(op: object) -> bool:
    """Whether torch tags ``op`` as drawing random numbers."""
    return isinstance(op, OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def is_check(node: Node) -> bool:
    """Whether ``node`` raises, with its second argument as message, unless its first is true."""
    return node.target is torch.ops.aten._assert_scalar.default


def is_impure(node: Node) -> bool:
    """Whether ``node`` must stay even if nothing uses it: it writes to a tensor, or is an input, output or check.

    torch's own predicate also keeps every op that may draw random numbers, as attention may.
    """
    if node.op in ("placeholder", "output") or is_check(node):
        return True
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)
