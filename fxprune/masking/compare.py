"""Masking against shrinking: outputs compared, whole or block by block.

A run of the whole graph adds up what each block rounds, and says little of where a difference begins. Here the values
that leave a block of the masked dense graph are kept, cut to the units that stay; the slim graph is compared with them
there, and goes on with them. Every block is so compared on the same inputs, and the last one with the outputs.

That is as sound as a comparison of outputs alone. A value that cannot be cut, for want of one index along an axis, and
one that is no float, is not compared where it leaves its block: it flows on as the slim graph made it, into what is
compared further on. In a graph whose ops write to values none is replaced, since others may be in the same memory; all
are compared, each with the rounding of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from fxprune.axes import Expr, Keep, kept_mask
from fxprune.discovery.dependency import AxisMap
from fxprune.errors import VerificationError
from fxprune.graph.facts import Change, Fact, owner_block
from fxprune.graph.tensors import tensor_name
from fxprune.masking.masked_run import MaskedRun, PreciseRun, UntouchedRun, output_tensors
from fxprune.offload.files import stored
from fxprune.offload.prefetch import inputs_at_place
from fxprune.rules.aliasing import writes

__all__ = [
    "TOLERANCE",
    "Expected",
    "Leaving",
    "SideBySide",
    "Verified",
    "compare",
    "find_divergence",
    "kept_part",
    "leaving_nodes",
    "masked_by_block",
    "masked_outputs",
    "require_equal",
    "slim_by_block",
    "slim_outputs",
]

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


TOLERANCE = 1e-4
"""Largest accepted difference in float32, relative to the largest output or 1, whichever is larger.

About a thousand times the relative step of float32 (1.2e-7): room for sums taken in another order all through a deep
model, and far less than one wrong unit makes.
"""


@dataclass(frozen=True, eq=False)
class Expected(Fact):
    """What the slim graph has to compute: the outputs of the dense one with the structures that go zeroed.

    Args:
        outputs: float tensors, in order; None where the weights are on ``meta`` and nothing can be run.
        dense: the dense graph, to say at which node the two part if they do; None where its tensors are given up.
        leaving: what leaves each block, by the name of the node, where blocks are compared one by one.
    """

    about: ClassVar[Change] = "weights"
    outputs: tuple[torch.Tensor, ...] | None
    dense: fx.GraphModule | None = None
    leaving: Mapping[str, Leaving] = field(default_factory=dict)


@dataclass(frozen=True)
class Verified(Fact):
    """The outcome of comparing the slim graph with the masked dense one.

    Args:
        error: the largest difference of outputs, and of what leaves a block where blocks are compared one by one,
            relative to the largest value or 1; None if nothing could be run.
        blocks: the largest difference of what leaves each block, by its module path in the dense model; empty where
            blocks were not compared one by one.
    """

    about: ClassVar[Change] = "weights"
    error: float | None
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The block with the largest difference; empty where blocks were not compared one by one."""
        return max(self.blocks, key=lambda block: self.blocks[block], default="")


def masked_outputs(
    graph_module: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> tuple[torch.Tensor, ...]:
    """Return the float outputs of the dense graph with the removed structures zeroed, without copying its weights."""
    with torch.no_grad():
        run = MaskedRun(graph_module, axes, keep, removed_blocks)
        return output_tensors(run.run(*inputs_at_place(graph_module, inputs)))


def slim_outputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return the float outputs of a graph, computed in float32 at least."""
    with torch.no_grad():
        return output_tensors(PreciseRun(graph_module).run(*inputs_at_place(graph_module, inputs)))


def compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest expected value or 1; infinite if shapes differ."""
    worst = 0.0
    for want, got in zip(expected, actual, strict=True):
        if want.shape != got.shape:
            return float("inf")
        scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
        difference = float((want - got).detach().abs().max()) / scale if want.numel() else 0.0
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def find_divergence(
    dense: fx.GraphModule,
    slim: fx.GraphModule,
    axes: AxisMap,
    keep: Keep,
    removed_blocks: Sequence[str],
    inputs: Mapping[str, Any],
) -> str:
    """Return name, op and module of the first node whose slim value is not the kept part of the masked dense one."""
    masked = MaskedRun(dense, axes, keep, removed_blocks, garbage_collect_values=False)
    plain = PreciseRun(slim, garbage_collect_values=False)
    with torch.no_grad():
        masked.run(*inputs_at_place(dense, inputs))
        plain.run(*inputs_at_place(slim, inputs))
    values = {node.name: value for node, value in masked.env.items()}
    for node, got in plain.env.items():
        want = values.get(node.name)
        if not isinstance(got, torch.Tensor) or not isinstance(want, torch.Tensor) or not got.is_floating_point():
            continue
        try:
            want = kept_part(want, axes.tensors[tensor_name(node)], keep)
        except KeyError:  # a choice per outer unit that lies on another axis: no single index to compare by
            continue
        if compare([want], [got]) > TOLERANCE:
            return f"{node.name} ({node.target}) in {axes.modules.get(node.name) or 'the model'}"
    return "the outputs"


def require_equal(error: float, where: str) -> None:
    """Refuse an ``error`` above :data:`TOLERANCE`.

    Raises:
        VerificationError: it is above; names the difference and ``where`` it begins.
    """
    if not error <= TOLERANCE:
        raise VerificationError(
            f"slim and masked outputs differ by {error:.2e}, more than {TOLERANCE:.0e}",
            where=where,
            remedy="Please report the model's config; freeze the group concerned by leaving its kind out",
        )
