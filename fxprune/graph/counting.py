"""MACs of a graph, counted by torch's own counter on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxprune.graph.compat import (
    UNKNOWN_SIZE,
    HigherOrderOperator,
    OpOverload,
    fake_mode,
    is_composite,
    is_free,
    size_hint,
    symbol_hint,
    tree_leaves,
    tree_map,
    work_out,
)
from fxprune.graph.tensors import comparable, device_of, example_of, on_meta

__all__ = ["count_bytes", "count_macs", "count_parameters"]

TOKENS = 64
"""Sequence length of the paper's count (LLM-Pruner, arXiv 2305.11627)."""


def count_macs(graph_module: fx.GraphModule, tokens: int = TOKENS, run: type[fx.Interpreter] = fx.Interpreter) -> int:
    """Return the multiply-accumulates of one forward pass on one sample.

    Half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts: matrix products, attention and
    convolutions. Embedding look-ups, norms and pointwise ops do not count. The traced batch stands for one sample where
    the graph does not take one row alone. Shapes follow from those that are known of the graph, and ops that are called
    alike are counted once. Where some are not known, the graph is run without values; where the work depends on the
    data, on zeros; without weights to run on, the count is unknown and ``2**30 - 1``.

    Args:
        graph_module: the graph.
        tokens: length of integer inputs of two axes, where the graph is dynamic, and of all that has to have the same;
            other inputs keep the traced shape.
        run: the interpreter; one of :mod:`fxprune.masking` leaves weights alone that the graph writes to.
    """
    ways = (False,) if on_meta(graph_module) else (False, True)
    sizes = ((1, tokens), (None, tokens), (None, None))
    for batch, length in sizes:
        try:
            return _by_shapes(graph_module.graph, _chosen(graph_module.graph, batch, length)) // 2
        except Exception:  # a shape that is not known, an op that needs data, a batch that the graph does not take
            continue
    for (batch, length), real in [(size, real) for size in sizes for real in ways]:
        try:
            make = partial(_inputs, graph_module, batch, length)
            flops = size_hint(_flops(run(graph_module), make, nullcontext() if real else fake_mode()))
        except Exception:  # a batch the graph does not take, or an op that needs data: whatever torch raises then
            continue
        if flops != UNKNOWN_SIZE:
            return flops // 2
    return UNKNOWN_SIZE // 2


def _flops(
    run: fx.Interpreter, make: Callable[[], Sequence[Any]], mode: AbstractContextManager[object]
) -> int | torch.SymInt:
    with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        run.run(*make())
    total: int | torch.SymInt = counter.get_total_flops()
    return total


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of scores and of weighted values, from shapes ``(batch, heads, tokens, size)``."""
    batch, heads, rows, size = query
    return 2 * batch * heads * rows * key[-2] * (size + value[-1])


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""torch's counter knows the attention kernels of GPUs alone."""


def count_parameters(graph_module: fx.GraphModule) -> int:
    """Return the number of elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in graph_module.parameters())


def count_bytes(graph_module: fx.GraphModule) -> int:
    """Return the bytes of all parameters in the types that they have, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in graph_module.parameters())


def _inputs(graph_module: fx.GraphModule, batch: int | None, tokens: int | None) -> list[Any]:
    """Return zeros: ``batch`` samples of ``tokens`` tokens (None: as many as were traced); what is no tensor as it was.

    Sizes that tracing found to be the same stay the same.
    """
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    chosen = _chosen(graph_module.graph, batch, tokens)
    device = device_of(graph_module)

    def zeros(value: torch.Tensor) -> torch.Tensor:
        shape = [chosen.get(str(size), size_hint(size)) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device=device)

    return [example_of(value, zeros) for value in values]


def _chosen(graph: fx.Graph, batch: int | None, tokens: int | None) -> dict[str, int]:
    """Return the numbers that stand for sizes of integer inputs of two axes, by how the sizes are spelled."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    chosen: dict[str, int] = {}
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            wanted = zip(value.shape, (batch, tokens), strict=True)
            chosen |= {str(size): new for size, new in wanted if new is not None and is_free(size)}
    return chosen


def _by_shapes(graph: fx.Graph, chosen: Mapping[str, int]) -> int:
    """Return the operations of a graph from the shapes of its values, without running it.

    Raises:
        Exception: a value is not known, or an op cannot work on shapes alone.
    """
    sizes = _Sizes(chosen)
    known: dict[object, int] = {}
    total = 0
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
            raise TypeError(f"{node.target} holds a graph")
        if not isinstance(node.target, OpOverload) or not _may_count(node.target):
            continue
        key = node.target, sizes.described(node.args), sizes.described(node.kwargs)
        if key not in known:
            known[key] = _flops_of(node.target, *fx.map_arg((node.args, node.kwargs), sizes.of))
        total += known[key]
    return total


@cache
def _may_count(op: OpOverload) -> bool:
    """Whether torch's counter counts an op, or may count one of those that it is made of."""
    return op.overloadpacket in flop_registry or op.overloadpacket in _ATTENTION or is_composite(op)


def _flops_of(op: OpOverload, args: Any, kwargs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        op(*args, **kwargs)
    return int(counter.get_total_flops())


class _Sizes:
    """Values of a graph with numbers for their sizes.

    Args:
        chosen: numbers, by how a size is spelled; others are as they were traced.
    """

    def __init__(self, chosen: Mapping[str, int]) -> None:
        self.chosen = chosen
        self.known: dict[Any, int] = {}
        self._described: dict[fx.Node, object] = {}

    def described(self, argument: Any) -> object:
        """Return an argument of a node, with nodes by the shapes and numbers that they stand for, as what hashes."""
        if isinstance(argument, fx.Node):
            if argument not in self._described:
                value = self.of(argument) if argument.target is getattr else argument.meta["val"]
                self._described[argument] = comparable(tree_map(self._traits, value))
            return self._described[argument]
        if isinstance(argument, tuple | list):
            return type(argument).__name__, *map(self.described, argument)
        if isinstance(argument, Mapping):
            return tuple((key, self.described(item)) for key, item in argument.items())
        return comparable(argument)

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node with numbers for sizes, and tensors on ``meta``."""
        if node.target is getattr:
            source, name = node.args
            assert isinstance(source, fx.Node) and isinstance(name, str)
            return getattr(self.of(source), name)
        return tree_map(self._leaf, node.meta["val"])

    def _traits(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(self._number(size) for size in value.shape), value.dtype
        return self._number(value) if isinstance(value, torch.SymInt) else value

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty([self._number(size) for size in value.shape], dtype=value.dtype, device="meta")
        return self._number(value) if isinstance(value, torch.SymInt) else value

    def _number(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self.known:
            given = self.chosen
            symbols = {s: given[str(s)] if str(s) in given else symbol_hint(s, size) for s in expression.free_symbols}
            self.known[expression] = int(work_out(expression, symbols))
        return self.known[expression]
