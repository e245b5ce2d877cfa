"""MACs of a graph, counted by torch's own counter on fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxprune.graph.compat import (
    UNKNOWN_SIZE,
    HigherOrderOperator,
    OpOverload,
    evaluate_expression,
    fake_mode,
    is_free,
    size_hint,
    tree_leaves,
    tree_map,
)
from fxprune.graph.facts import Fact, fork, unshare
from fxprune.graph.tensors import comparable, device_of, has_meta_weights, map_tensors

TOKENS = 64
"""Sequence length of the paper's count (LLM-Pruner, arXiv 2305.11627)."""


@dataclass(frozen=True)
class Work(Fact):
    """Size of the dense graph, and the work of one sample, recorded when the model is traced.

    Args:
        macs: multiply-accumulates of one sample of ``tokens`` tokens.
        memory: bytes of the parameters.
        outside: parameters of the model that the graph does not read.
    """

    parameters: int
    macs: int
    tokens: int = TOKENS
    memory: int = 0
    model: str = ""
    outside: int = 0


def count_macs(graph_module: fx.GraphModule, tokens: int = TOKENS) -> int:
    """MACs per sample: half of the operations that :class:`torch.utils.flop_counter.FlopCounterMode` counts.

    It counts matrix products, attention and convolutions, but no embedding look-ups, norms or pointwise ops. If the
    graph does not take a single row, the traced batch stands for one sample. Shapes follow from the recorded ones, and
    equal calls are counted once. If some are unknown, the graph is run on fake tensors; if the work depends on data, on
    zeros; without weights to run on, the count is unknown and ``2**30 - 1``.

    ``tokens`` is the length of integer inputs of two axes in a dynamic graph, and of axes tied to it. Without such
    inputs, a sample is one row of all inputs if they have the same number. Other sizes are the traced ones.
    """
    ways = (False,) if has_meta_weights(graph_module) else (False, True)
    sizes = ((1, tokens), (None, tokens), (None, None))
    for batch, length in sizes:
        try:
            shaped = SampleSizes(_chosen(graph_module.graph, batch, length))
            return sum(map(shaped.operations, graph_module.graph.nodes)) // 2
        except Exception:  # an unknown shape, an op that needs data, a batch that the graph does not take
            continue
    for (batch, length), real in itertools.product(sizes, ways):
        try:
            runnable = graph_module
            if real:  # on copies of the weights, which the graph may write to
                runnable = fork(graph_module)
                unshare(runnable, graph_module)
            run = partial(_run_on_zeros, runnable, batch, length)
            flops = size_hint(_flops(run, nullcontext() if real else fake_mode()))
        except Exception:  # a batch the graph does not take, or an op that needs data: torch raises anything
            continue
        if flops != UNKNOWN_SIZE:
            return flops // 2
    return UNKNOWN_SIZE // 2


def _flops(work: Callable[[], object], mode: AbstractContextManager[object]) -> int | torch.SymInt:
    with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        work()
    total: int | torch.SymInt = counter.get_total_flops()
    return total


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of scores and of weighted values, from shapes ``(batch, heads, tokens, size)``."""
    batch, heads, rows, size = query
    return 2 * batch * heads * rows * key[-2] * (size + value[-1])


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""torch's counter knows only the attention kernels of GPUs."""


def count_parameters(graph_module: fx.GraphModule) -> int:
    """Number of elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in graph_module.parameters())


def count_bytes(graph_module: fx.GraphModule) -> int:
    """Bytes of all parameters in their dtypes, tied ones once."""
    return sum(parameter.nbytes for parameter in graph_module.parameters())


def _run_on_zeros(graph_module: fx.GraphModule, batch: int | None, tokens: int | None) -> None:
    """Run a graph on zeros: ``batch`` samples of ``tokens`` tokens (None: the traced size), other sizes as traced."""
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    chosen = _chosen(graph_module.graph, batch, tokens)
    device = device_of(graph_module)

    def zeros(value: torch.Tensor) -> torch.Tensor:
        shape = [chosen.get(str(size), size_hint(size)) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device=device)

    fx.Interpreter(graph_module).run(*[map_tensors(value, zeros) for value in values])


def _chosen(graph: fx.Graph, batch: int | None, tokens: int | None) -> dict[str, int]:
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.dim()]
    texts = [value for value in tensors if value.dim() == 2 and not value.is_floating_point()]
    pairs = [pair for value in texts for pair in zip(value.shape, (batch, tokens), strict=True)]
    if not texts and len({str(value.shape[0]) for value in tensors}) == 1:  # images, sounds: rows of one number
        pairs = [(tensors[0].shape[0], batch)]
    return {str(size): new for size, new in pairs if new is not None and is_free(size)}


@cache
def _may_count(op: OpOverload) -> bool:
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return op.overloadpacket in flop_registry or op.overloadpacket in _ATTENTION or bool(composite)


class SampleSizes:
    """Values of a graph with numbers for their sizes: ``chosen`` by symbol, else as they were traced."""

    @classmethod
    def of_sample(cls, graph: fx.Graph) -> SampleSizes:
        """The sizes of one sample of :data:`TOKENS` tokens."""
        return cls(_chosen(graph, 1, TOKENS))

    def __init__(self, chosen: Mapping[str, int]) -> None:
        self.chosen = chosen
        self.known: dict[Any, int] = {}
        self._counted: dict[object, int] = {}
        self._values: dict[fx.Node, Any] = {}

    def operations(self, node: fx.Node) -> int:
        """Return the operations that torch counts for a node; raises if its shapes do not tell."""
        if isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
            raise TypeError(f"{node.target} holds a graph")
        if not isinstance(node.target, OpOverload) or not _may_count(node.target):
            return 0
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        key = node.target, comparable(map_tensors((args, kwargs), lambda tensor: (tensor.shape, tensor.dtype)))
        if key not in self._counted:
            self._counted[key] = int(_flops(partial(node.target, *args, **kwargs), nullcontext()))
        return self._counted[key]

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node with numbers for sizes and tensors on ``meta``."""
        if node.target is getattr:
            source, name = node.args
            assert isinstance(source, fx.Node) and isinstance(name, str)
            return getattr(self.of(source), name)
        if node not in self._values:
            self._values[node] = tree_map(self._leaf, node.meta["val"])
        return self._values[node]

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty([self.number(size) for size in value.shape], dtype=value.dtype, device="meta")
        return self.number(value) if isinstance(value, torch.SymInt) else value

    def number(self, size: int | torch.SymInt) -> int:
        """Return a size as a number."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self.known:
            chosen, traced = self.chosen, size.node.shape_env.backed_var_to_val
            names = {symbol: str(symbol) for symbol in expression.free_symbols}
            symbols = {s: chosen[name] if name in chosen else int(traced[s]) for s, name in names.items()}
            self.known[expression] = int(evaluate_expression(expression, symbols))
        return self.known[expression]
