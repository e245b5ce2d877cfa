"""Comparison of masking and shrinking: whole outputs, or block by block.

Block by block, the slim graph is compared with the recorded outputs of each masked block, cut to the kept units, and
continues with them, so that rounding does not accumulate. A value that cannot be compared where it leaves its block
flows on as the slim graph made it, into what is compared later. In a graph whose ops write to values none is replaced,
since others may share the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.axes import kept_mask
from fxprune.discovery.dependency import AxisMap
from fxprune.graph.facts import Change, Fact
from fxprune.graph.tensors import tensor_name, upstream, weight_bytes
from fxprune.masking.masked_run import MaskedRun, PreciseRun, UntouchedRun, output_tensors
from fxprune.offload.files import offload_large, offloaded
from fxprune.offload.prefetch import inputs_on_device
from fxprune.removal.removal import Removal
from fxprune.rules.registry import writes

Inputs = Mapping[str, torch.Tensor]


_LARGE_VALUES = 0.02
"""Bytes of a value for all batches, by those of the weights, from which on it goes to a file if they are in files."""


class PairedRuns:
    """The dense and the masked run over some batches, node by node in step.

    Values of the dense run at a node may be used to change the weights that the masked run reads next. Values are freed
    after their last use, so that memory holds those alive at one node, of all batches. Where weights are in files, so
    are values that are large beside them.

    Args:
        places: for each batch, the places of its samples in the batch of a single process, and the size of that one.
        known: values of the dense run that are known, by node and batch; nodes that only these depend on are not run.
        read: nodes whose dense values are read, where some are known.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        removal: Removal,
        batches: Sequence[Inputs],
        places: Sequence[tuple[Sequence[int], int]] = (),
        known: Mapping[fx.Node, Sequence[Any]] = MappingProxyType({}),
        read: Iterable[fx.Node] = (),
    ) -> None:
        self.graph, self.places, self.known = graph_module.graph, places, known
        needed = upstream(read, known) if known else self.graph.nodes
        self.needed = {node for node in self.graph.nodes if node.op == "placeholder"}.union(needed)
        self.dense = [PreciseRun(graph_module) for _ in batches]
        self.masked = [MaskedRun(graph_module, removal) for _ in batches]
        self._offload = offload_large(_LARGE_VALUES * weight_bytes(graph_module) / max(1, len(self.masked)))
        for runs in (self.dense, self.masked):
            runs[0].in_step()
            for run, inputs in zip(runs, batches, strict=True):
                run.args_iter = iter(inputs.values())

    def __iter__(self) -> Iterator[fx.Node]:
        """Yield each node, after its dense values and before its masked ones are computed."""
        for node in self.graph.nodes:
            if node in self.known:
                for run, value in zip(self.dense, self.known[node], strict=True):
                    run.env[node] = value
            elif node in self.needed:
                self._step(self.dense, node)
            yield node
            self._step(self.masked, node)
            for run in (*self.dense, *self.masked):
                for used in run.user_to_last_uses.get(node, ()):
                    run.env.pop(used, None)  # it may not have been run

    def values(self, node: fx.Node) -> Iterator[tuple[Any, Any]]:
        """Yield the dense and the masked value of ``node``, which must still be in use, for each batch."""
        for dense, masked in zip(self.dense, self.masked, strict=True):
            yield dense.env[node], masked.env[node]

    def has(self, node: fx.Node) -> bool:
        return node in self.dense[0].env and node in self.masked[0].env

    def keep_until(self, value: fx.Node, user: fx.Node) -> None:
        """Free ``value`` no earlier than after ``user``; call before the first node is run."""
        for run in (*self.dense, *self.masked):
            run.keep_until(value, user)

    def rerun_masked(self, *nodes: fx.Node) -> None:
        """Run nodes again in the masked runs: a weight that changed after they read it, and views of it."""
        for node in nodes:
            self._step(self.masked, node)

    def _step(self, runs: Sequence[UntouchedRun], node: fx.Node) -> None:
        shared = node.op == "get_attr" and str(node.target) not in runs[0].written
        value = runs[0].run_node(node) if shared else None  # weights are read and masked once for all batches
        with self._offload:
            for run in runs:
                run.env[node] = value if shared else run.run_node(node)


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """The kept part of an output of a block of the masked dense graph."""

    block: str
    value: torch.Tensor


def block_output_nodes(graph: fx.Graph, axes: AxisMap) -> dict[fx.Node, str]:
    """Return the ops of each block whose values are used outside it, with the module path of the block."""
    ops = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
    owner = {node: axes.block_of(axes.modules.get(node.name, "")) for node in ops}
    found = {node: block for node, block in owner.items() if any(owner[user] != block for user in node.users)}
    return {node: block for node, block in found.items() if block is not None}


def _kept_part(node: fx.Node, value: Any, removal: Removal) -> torch.Tensor | None:
    """The kept entries of a float tensor; None for others, and if those of an axis depend on the place on another."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    kept: torch.Tensor = value
    try:
        for axis, expr in enumerate(removal.axes.tensors[tensor_name(node)]):
            mask = torch.from_numpy(kept_mask(expr, removal.keep).copy())
            kept = kept if mask.all() else kept.index_select(axis, mask.nonzero()[:, 0].to(kept.device))
    except KeyError:  # no single index to cut by
        return None
    return kept


def masked_by_block(
    graph_module: fx.GraphModule, removal: Removal, inputs: Mapping[str, Any], *, by_block: bool = True
) -> tuple[tuple[torch.Tensor, ...], dict[str, BlockOutput]]:
    """Run the dense graph with the removed structures zeroed; return its float outputs, and those of blocks by node.

    Without ``by_block`` none of blocks are recorded.
    """
    nodes = block_output_nodes(graph_module.graph, removal.axes) if by_block else {}
    found: dict[str, BlockOutput] = {}

    def visit(node: fx.Node, value: Any) -> Any:
        part = _kept_part(node, value, removal) if node in nodes else None
        if part is not None:  # else it is compared later
            found[node.name] = BlockOutput(nodes[node], offloaded(part.clone() if part is value else part))
        return value

    with torch.no_grad():
        run = MaskedRun(graph_module, removal).in_step()
        outputs = output_tensors(run.run_nodes(inputs_on_device(graph_module, inputs), visit))
    return outputs, found


def slim_by_block(
    graph_module: fx.GraphModule, expected: Mapping[str, BlockOutput], inputs: Mapping[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    """Run the slim graph, each block on the inputs it has in the masked dense one, with ``expected`` outputs.

    Returns its float outputs, and the largest difference of an output of each block, by module path in the dense model.
    """
    found: dict[str, float] = {}
    may_replace = not any(writes(node) for node in graph_module.graph.nodes if node.op == "call_function")

    def visit(node: fx.Node, value: Any) -> Any:
        leaving = expected.get(node.name)
        if leaving is None or not isinstance(value, torch.Tensor):
            return value
        error = compare([leaving.value], [value])
        found[leaving.block] = max(found.get(leaving.block, 0.0), error)
        return leaving.value if may_replace and value.shape == leaving.value.shape else value

    with torch.no_grad():
        run = PreciseRun(graph_module).in_step()
        return output_tensors(run.run_nodes(inputs_on_device(graph_module, inputs), visit)), found


TOLERANCE = 1e-4
"""Largest accepted difference in float32, relative to the largest output or 1, whichever is larger.

About a thousand times the relative step of float32 (1.2e-7): room for sums in another order throughout a deep model,
and far below the difference that one wrong unit makes.
"""

ROUGH = 2e-2
"""The same in half precision, where another order of summation, or another runtime, rounds differently.

One rounding to bfloat16 is off by up to ``2**-8``; this leaves room for five that add up.
"""


@dataclass(frozen=True)
class Verified(Fact):
    """The outcome of comparing the slim graph with the masked dense one.

    It is about the removal, and stays valid when the weights that are left are trained.

    Args:
        error: the largest difference of outputs, and of outputs of blocks if these were compared, relative to the
            largest value or 1; None if nothing could be run.
        blocks: the largest difference of an output of each block, by its module path in the dense model.
    """

    about: ClassVar[Change] = "graph"
    error: float | None
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The block with the largest difference; empty if blocks were not compared."""
        return max(self.blocks, key=lambda block: self.blocks[block], default="")


def slim_outputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return the float outputs of a graph, computed in at least float32."""
    with torch.no_grad():
        return output_tensors(PreciseRun(graph_module).in_step().run(*inputs_on_device(graph_module, inputs)))


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


def find_divergence(dense: fx.GraphModule, slim: fx.GraphModule, removal: Removal, inputs: Mapping[str, Any]) -> str:
    """Return name, op and module of the first node whose slim value differs from the kept part of the masked one."""
    masked = MaskedRun(dense, removal, garbage_collect_values=False)
    plain = PreciseRun(slim, garbage_collect_values=False)
    with torch.no_grad():
        masked.run(*inputs_on_device(dense, inputs))
        plain.run(*inputs_on_device(slim, inputs))
    values = {node.name: value for node, value in masked.env.items()}
    for node, got in plain.env.items():
        want = _kept_part(node, values.get(node.name), removal)
        if want is not None and isinstance(got, torch.Tensor) and compare([want], [got]) > TOLERANCE:
            return f"{node.name} ({node.target}) in {removal.axes.modules.get(node.name) or 'the model'}"
    return "the outputs"
