"""Criteria for whole structures: experts by what they add to the stream, layers by how far they turn their input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.axes import Factor, factors, unit_index
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.groups import Consumer, Group, as_kinds, find_consumers
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import tensor_name
from fxprune.offload.ranks import all_reduce
from fxprune.pipeline.arguments import argument
from fxprune.removal.scores import Scores
from fxprune.rules.registry import Values, find_rule

from .forward import ForwardImportancePass

__all__ = ["BlockInfluenceImportancePass", "ReapImportancePass"]


@dataclass
class _GatedOutputs:
    """The outputs of experts times their gates, and sums of their norms.

    Args:
        width: the axis of ``value`` with the outputs of one expert for one token.
        experts: its axis of experts; None if rows are those of routed tokens.
        unit: the expert of each position of that axis.
        routing: the expert of each row; None if an axis holds the experts.
        sums: of the norms of each expert, and its number of tokens: ``(2, experts)``.
    """

    value: fx.Node
    width: int
    experts: int | None
    unit: np.ndarray[tuple[int], np.dtype[np.int64]] | None
    routing: fx.Node | None
    sums: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def see(self, node: fx.Node, value: torch.Tensor) -> None:
        if node is self.routing:
            self.rows = value
            return
        norms = value.double().norm(dim=self.width, keepdim=True)
        if self.experts is not None and self.unit is not None:
            by_expert = norms.movedim(self.experts, 0).flatten(1)
            index = torch.from_numpy(self.unit).to(value.device)[:, None].expand_as(by_expert)
        else:
            by_expert, index = norms.flatten(), self.rows.flatten()
        routed = by_expert > 0
        count = self.sums.shape[1]
        counted = np.asarray([by_expert[routed].cpu().numpy(), np.ones(int(routed.sum()))])
        for place, numbers in enumerate(counted):
            self.sums[place] += np.bincount(index[routed].cpu().numpy(), numbers, minlength=count)[:count]


@dataclass(frozen=True, eq=False)
class ReapImportancePass(ForwardImportancePass):
    """Scores experts by their mean contribution to the tokens that are routed to them.

    With gate ``g_e(x)`` and output ``f_e(x)`` of expert ``e``::

        mean over tokens x routed to e of g_e(x) * norm(f_e(x))

    An expert that no token is routed to scores 0.

    Source: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv 2510.13999).
    """

    name: ClassVar[str] = "reap"
    prefetches: ClassVar[bool] = True

    kinds: tuple[str, ...] = argument(("expert",), "Kinds of groups to score: experts only.", check=as_kinds)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        found: dict[str, _GatedOutputs] = {}
        for group in groups:
            outputs = _gated_outputs(group, consumers, axes)
            if outputs is None:
                raise self.not_scored(group, "outputs that gates multiply")
            found[group.name] = outputs
        watching: dict[fx.Node, list[_GatedOutputs]] = {}
        for outputs in found.values():
            for node in (outputs.routing, outputs.value):
                if node is not None:
                    watching.setdefault(node, []).append(outputs)

        def see(node: fx.Node, value: torch.Tensor) -> None:
            for outputs in watching[node]:
                outputs.see(node, value)

        self.observe(graph_module, {node: partial(see, node) for node in watching}, in_shards=True)
        all_reduce(torch.from_numpy(one.sums) for one in found.values())
        return Scores({name: one.sums[0] / np.maximum(one.sums[1], 1) for name, one in found.items()})


def _gated_outputs(group: Group, consumers: Sequence[Consumer], axes: AxisMap) -> _GatedOutputs | None:
    """The gated outputs of a group of experts; None if there are none, or their axes are ambiguous."""
    if group.kind != "expert" or group.factor is None:
        return None
    held = {member.name for member in group.parameters}
    for consumer in reversed([c for c in consumers if c.name in held]):
        value = _first_multiplication(consumer.node)
        if value is None:
            continue
        weight = [expr for i, expr in enumerate(axes.tensors[consumer.name]) if i != consumer.axis]
        inner = [expr for expr in weight if group.factor not in factors(expr)]
        exprs = axes.tensors[tensor_name(value)]
        width = [i for i, expr in enumerate(exprs) if expr in inner]
        experts = [i for i, expr in enumerate(exprs) if group.factor in factors(expr)]
        routing = None if experts else _routing(consumer, group.factor, axes)
        if len(width) == 1 and len(experts) <= 1 and (experts or routing):
            unit = unit_index(exprs[experts[0]], group.factor) if experts else None
            sums = np.zeros((2, group.size))
            return _GatedOutputs(value, width[0], experts[0] if experts else None, unit, routing, sums)
    return None


def _first_multiplication(product: fx.Node) -> fx.Node | None:
    """The first multiplication of the output of a product, which may be moved, cast or added to before."""
    chain, pending = {product}, [product]
    while pending:
        for user in pending.pop(0).users:
            if user.target is torch.ops.aten.mul.Tensor and not chain.issuperset(user.all_input_nodes):
                return user
            rule = find_rule(user.target) if user.op == "call_function" else None
            follows = rule is not None and (rule.values in (Values.MOVED, Values.CAST) or rule.adds)
            if follows and user not in chain:
                chain.add(user)
                pending.append(user)
    return None


def _routing(consumer: Consumer, factor: Factor, axes: AxisMap) -> fx.Node | None:
    """The numbers of the experts whose weights a product reads; None if it reads all."""
    for node in consumer.node.all_input_nodes:
        while node.op == "call_function" and node.all_input_nodes:
            for source in node.all_input_nodes[1:]:
                along = axes.positions.get(tensor_name(source))
                if along is not None and factor in factors(along):
                    return source
            node = node.all_input_nodes[0]
    return None


@dataclass(frozen=True, eq=False)
class BlockInfluenceImportancePass(ForwardImportancePass):
    """Scores layers by one minus the mean cosine of the stream before and after.

    With ``x_l (tokens, width)`` before and ``x_l+1`` after the layer::

        1 - mean over tokens of x_l . x_l+1 / (norm(x_l) norm(x_l+1))

    Source: Men et al., "Layers in Large Language Models are More Redundant Than You Expect" (arXiv
    2403.03853), equation 1.
    """

    name: ClassVar[str] = "block-influence"
    prefetches: ClassVar[bool] = True

    kinds: tuple[str, ...] = argument(("layer",), "Kinds of groups to score: layers only.", check=as_kinds)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        axes, nodes = facts_of(graph_module)[Dependencies].axes, {node.name: node for node in graph_module.graph.nodes}
        ends: dict[str, tuple[fx.Node, fx.Node]] = {}
        for group in groups:
            if group.kind != "layer" or group.block is None:
                raise self.not_scored(group, "input and output of a block")
            bypass = axes.bypasses[group.block]
            ends[group.name] = nodes[bypass.source], nodes[bypass.target]
        opening = {source for source, _ in ends.values()}
        closing = {target: [name for name in ends if ends[name][1] is target] for _, target in ends.values()}
        before: dict[fx.Node, torch.Tensor] = {}
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in ends}

        def see(node: fx.Node, value: torch.Tensor) -> None:
            for name in closing.get(node, ()):
                source = before[ends[name][0]]
                cosines = torch.cosine_similarity(source.double(), value.double(), dim=-1)
                sums[name] += torch.tensor([float(cosines.sum()), cosines.numel()])
            if node in opening:
                before[node] = value

        self.observe(graph_module, {node: partial(see, node) for node in {*opening, *closing}}, in_shards=True)
        all_reduce(sums.values())
        return Scores(
            {name: np.asarray([1 - float(total / count.clamp(min=1))]) for name, (total, count) in sums.items()}
        )
