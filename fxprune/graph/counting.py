"""Multiply-accumulate operations, counted by torch's own counter on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from fxprune.graph.compat import UNKNOWN_SIZE, fake_mode, is_free, size_hint, tree_leaves
from fxprune.graph.inputs import example_of
from fxprune.graph.tensors import device_of, on_meta

__all__ = ["count_macs", "count_parameters"]

TOKENS = 64
"""Sequence length of the paper's count (LLM-Pruner, arXiv 2305.11627)."""


def count_macs(graph_module: fx.GraphModule, tokens: int = TOKENS, run: type[fx.Interpreter] = fx.Interpreter) -> int:
    """Return the multiply-accumulates of one forward pass on one sample.

    Half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts: matrix products, attention and
    convolutions. Embedding look-ups, norms and pointwise ops do not count. The traced batch stands for one sample where
    the graph does not take one row alone. Where the work depends on the data, the graph is run on zeros; without
    weights to run on, the count is unknown and ``2**30 - 1``.

    Args:
        graph_module: the graph.
        tokens: length of integer inputs of two axes, where the graph is dynamic, and of all that has to have the same;
            other inputs keep the traced shape.
        run: the interpreter; one of :mod:`fxprune.masking` leaves weights alone that the graph writes to.
    """
    ways = (False,) if on_meta(graph_module) else (False, True)
    sizes = ((1, tokens), (None, tokens), (None, None))
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


def _inputs(graph_module: fx.GraphModule, batch: int | None, tokens: int | None) -> list[Any]:
    """Return zeros: ``batch`` samples of ``tokens`` tokens (None: as many as were traced); what is no tensor as it was.

    Sizes that tracing found to be the same stay the same.
    """
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    chosen: dict[str, int] = {}
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            wanted = zip(value.shape, (batch, tokens), strict=True)
            chosen |= {str(size): new for size, new in wanted if new is not None and is_free(size)}
    device = device_of(graph_module)

    def zeros(value: torch.Tensor) -> torch.Tensor:
        shape = [chosen.get(str(size), size_hint(size)) for size in value.shape]
        return torch.zeros(shape, dtype=value.dtype, device=device)

    return [example_of(value, zeros) for value in values]
