"""The check that masking equals shrinking, block by block: each block of the slim graph on what masking gives it.

A run of the whole graph adds up what each block rounds, and says little of where a difference begins. Here the values
that leave a block of the masked dense graph are kept, cut to the units that stay; the slim graph is compared with them
there, and goes on with them. Every block is so compared on the same inputs, and the last one with the outputs.

That is as sound as a comparison of outputs alone. A value that cannot be cut, for want of one index along an axis, and
one that is no float, is not compared where it leaves its block: it flows on as the slim graph made it, into what is
compared further on. In a graph whose ops write to values none is replaced, since others may be in the same memory; all
are compared, each with the rounding of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.axes import Expr, Keep, kept_mask
from fxprune.discovery.dependency import AxisMap
from fxprune.graph.blocks import owner_block
from fxprune.graph.carrier import inputs_at_place
from fxprune.graph.names import tensor_name
from fxprune.graph.shelf import stored
from fxprune.masking.masked_run import MaskedRun, PreciseRun, output_tensors
from fxprune.rules.aliasing import writes

__all__ = ["Leaving", "kept_part", "leaving_nodes", "masked_by_block", "slim_by_block"]

Visit = Callable[[fx.Node, Any], Any]
"""Is given a node and its value; returns the value that the run goes on with."""


@dataclass(frozen=True, eq=False)
class Leaving:
    """What leaves a block of the masked dense graph.

    Args:
        block: module path of the block in the dense model.
        value: the part of it that stays.
    """

    block: str
    value: torch.Tensor


def leaving_nodes(graph: fx.Graph, axes: AxisMap) -> dict[fx.Node, str]:
    """Return the ops of each block whose values are used behind it, with the module path of the block."""
    ops = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
    owner = {node: owner_block(axes.modules.get(node.name, ""), axes.blocks) for node in ops}
    found = {node: block for node, block in owner.items() if any(owner[user] != block for user in node.users)}
    return {node: block for node, block in found.items() if block is not None}


def kept_part(value: torch.Tensor, exprs: Sequence[Expr], keep: Keep) -> torch.Tensor:
    """Return the entries of ``value`` that stay.

    Args:
        value: from the dense graph.
        exprs: its axes.
        keep: the units that stay.

    Raises:
        KeyError: which entries of an axis stay depends on the place along another one.
    """
    for axis, expr in enumerate(exprs):
        mask = torch.from_numpy(kept_mask(expr, keep).copy())
        value = value if mask.all() else value.index_select(axis, mask.nonzero()[:, 0].to(value.device))
    return value


def masked_by_block(
    graph_module: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> tuple[tuple[torch.Tensor, ...], dict[str, Leaving]]:
    """Run the dense graph with the removed structures zeroed.

    Returns:
        Its float outputs, and what leaves each block, by the name of the node.
    """
    nodes = leaving_nodes(graph_module.graph, axes)
    found: dict[str, Leaving] = {}

    def visit(node: fx.Node, value: Any) -> Any:
        if node in nodes and isinstance(value, torch.Tensor) and value.is_floating_point():
            try:
                part = kept_part(value, axes.tensors[tensor_name(node)], keep)
            except KeyError:  # no single index to cut by: it is compared further on
                return value
            found[node.name] = Leaving(nodes[node], stored(part.clone() if part is value else part))
        return value

    outputs = _run(MaskedRun(graph_module, axes, keep, removed_blocks), inputs_at_place(graph_module, inputs), visit)
    return outputs, found


def slim_by_block(
    graph_module: fx.GraphModule,
    expected: Mapping[str, Leaving],
    inputs: Mapping[str, Any],
    compare: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float],
) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    """Run the slim graph, each block on what masking gives it.

    Args:
        graph_module: the slim graph.
        expected: from :func:`masked_by_block`.
        inputs: keyword inputs of both.
        compare: says by how much values differ.

    Returns:
        Its float outputs, and the largest difference of what leaves each block, by module path in the dense model.
    """
    found: dict[str, float] = {}
    apart = not any(writes(node) for node in graph_module.graph.nodes if node.op == "call_function")

    def visit(node: fx.Node, value: Any) -> Any:
        leaving = expected.get(node.name)
        if leaving is None or not isinstance(value, torch.Tensor):
            return value
        error = compare([leaving.value], [value])
        found[leaving.block] = max(found.get(leaving.block, 0.0), error)
        return leaving.value if apart and value.shape == leaving.value.shape else value

    return _run(PreciseRun(graph_module), inputs_at_place(graph_module, inputs), visit), found


def _run(run: fx.Interpreter, inputs: Sequence[Any], visit: Visit) -> tuple[torch.Tensor, ...]:
    run.args_iter = iter(inputs)
    value: Any = None
    with torch.no_grad():
        for node in run.module.graph.nodes:  # type: ignore[union-attr]
            value = run.env[node] = visit(node, run.run_node(node))
            for used in run.user_to_last_uses.get(node, ()):
                del run.env[used]
    return output_tensors(value)
