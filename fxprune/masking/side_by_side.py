"""The dense graph and the masked one, run side by side, one node at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from fxprune.axes import Keep
from fxprune.discovery.dependency import AxisMap
from fxprune.masking.masked_run import MaskedRun, PreciseRun, UntouchedRun

__all__ = ["SideBySide"]

Inputs = Mapping[str, torch.Tensor]
_Run = TypeVar("_Run", bound=fx.Interpreter)


class SideBySide:
    """The dense and the masked run over some batches, in step.

    What the dense run computes at a node may serve to change the weights that the masked run reads next. Values are
    freed after their last use, so that memory is for what is alive at one node, of all batches.

    Args:
        graph_module: the dense graph.
        axes: its solved axes.
        keep: units that stay in the masked run.
        removed_blocks: blocks it goes around.
        batches: keyword inputs of the graph.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        axes: AxisMap,
        keep: Keep,
        removed_blocks: Sequence[str],
        batches: Sequence[Inputs],
    ) -> None:
        self.graph = graph_module.graph
        self.dense = [_begun(PreciseRun(graph_module), inputs) for inputs in batches]
        self.masked = [_begun(MaskedRun(graph_module, axes, keep, removed_blocks), inputs) for inputs in batches]

    def __iter__(self) -> Iterator[fx.Node]:
        """Yield each node in turn, when its dense values are there and its masked ones are not yet."""
        for node in self.graph.nodes:
            self._step(self.dense, node)
            yield node
            self._step(self.masked, node)
            for run in (*self.dense, *self.masked):
                for value in run.user_to_last_uses.get(node, ()):
                    del run.env[value]

    def values(self, node: fx.Node) -> Iterator[tuple[Any, Any]]:
        """Yield the dense and the masked value of ``node``, which has been run and is still in use, for each batch."""
        for dense, masked in zip(self.dense, self.masked, strict=True):
            yield dense.env[node], masked.env[node]

    def has(self, node: fx.Node) -> bool:
        """Whether both values of ``node`` are there."""
        return node in self.dense[0].env and node in self.masked[0].env

    def hold(self, value: fx.Node, user: fx.Node) -> None:
        """Free ``value`` no earlier than after ``user``; to be said before the first node is run."""
        for run in (*self.dense, *self.masked):
            run.keep_until(value, user)

    def read_again(self, *nodes: fx.Node) -> None:
        """Run nodes again in the masked runs: a weight, changed after they had read it, and what is picked from it."""
        for node in nodes:
            self._step(self.masked, node)

    def _step(self, runs: Sequence[UntouchedRun], node: fx.Node) -> None:
        shared = node.op == "get_attr" and not runs[0].writes_to(str(node.target))
        value = runs[0].run_node(node) if shared else None  # a weight is read, and masked, once for all batches
        for run in runs:
            run.env[node] = value if shared else run.run_node(node)


def _begun(run: _Run, inputs: Inputs) -> _Run:
    """Return ``run``, ready for its first node."""
    run.args_iter = iter(inputs.values())
    return run
