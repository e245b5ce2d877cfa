"""Multiply-accumulate operations, counted by torch's own counter on tensors without storage."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from fxprune.compat import UNKNOWN_SIZE, fake_mode, is_free, size_hint
from fxprune.tensors import device_of, weights

__all__ = ["count_macs", "count_parameters"]

TOKENS = 64
"""Sequence length of the paper's count."""


def count_macs(graph_module: fx.GraphModule, tokens: int = TOKENS) -> int:
    """Multiply-accumulates of one forward pass on one sample.

    Half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts: matrix products, attention and
    convolutions. Embedding look-ups, norms and pointwise ops do not count. Where the work depends on the data, the
    graph is run on zeros; without weights to run on, the count is unknown and ``2**30 - 1``.

    Args:
        graph_module: the graph.
        tokens: length of integer inputs of two axes, where the graph is dynamic, and of all that has to have the same;
            other inputs keep the traced shape.
    """
    try:
        flops = _flops(graph_module, tokens, fake_mode())
    except Exception:  # an op that needs the data to say what comes out raises whatever torch's meta function does
        flops = UNKNOWN_SIZE
    if size_hint(flops) == UNKNOWN_SIZE and not any(tensor.is_meta for _, tensor in weights(graph_module)):
        flops = _flops(graph_module, tokens, nullcontext())
    return size_hint(flops) // 2


def _flops(graph_module: fx.GraphModule, tokens: int, mode: AbstractContextManager[object]) -> int | torch.SymInt:
    with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        fx.Interpreter(graph_module).run(*_inputs(graph_module, tokens))
    total: int | torch.SymInt = counter.get_total_flops()
    return total


def count_parameters(graph_module: fx.GraphModule) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in graph_module.parameters())


def _inputs(graph_module: fx.GraphModule, tokens: int) -> list[torch.Tensor]:
    """Zeros of one sample of ``tokens`` tokens; sizes that tracing found to be the same stay the same."""
    values = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    chosen: dict[str, int] = {}
    for value in values:
        if value.dim() == 2 and not value.is_floating_point():
            chosen |= {str(size): new for size, new in zip(value.shape, (1, tokens), strict=True) if is_free(size)}
    shapes = [[chosen.get(str(size), size_hint(size)) for size in value.shape] for value in values]
    device = device_of(graph_module)
    return [torch.zeros(shape, dtype=v.dtype, device=device) for v, shape in zip(values, shapes, strict=True)]
