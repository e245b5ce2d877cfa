"""What each expert adds to the stream, by the tokens that are routed to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.axes import Factor, factors, unit_index
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.groups import Consumer, Group, find_consumers
from fxprune.graph.facts import facts_of
from fxprune.graph.tensors import tensor_name
from fxprune.masking.parts import observe
from fxprune.removal.scores import Scores
from fxprune.rules.registry import Values, find_rule

from .forward import ForwardImportancePass, refuse_group

__all__ = ["ReapImportancePass"]


@dataclass(frozen=True)
class _Site:
    """Where experts have been weighed by their gates.

    Args:
        value: what the experts give times the gates.
        width: its axis with the numbers that one expert gives for one token.
        experts: its axis that holds the experts; None where rows are those of routed tokens.
        positions: which expert each row is of; None where an axis holds the experts.
    """

    value: fx.Node
    width: int
    experts: int | None
    positions: fx.Node | None


@dataclass(frozen=True, eq=False)
class ReapImportancePass(ForwardImportancePass):
    """An expert is worth what it adds to the tokens that are routed to it, on average.

    With gate ``g_e(x)`` and output ``f_e(x)`` of expert ``e``::

        mean over tokens x routed to e of g_e(x) * norm(f_e(x))

    An expert that no token is routed to is worth nothing.

    Source: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (arXiv 2510.13999).
    """

    name: ClassVar[str] = "reap"
    carries: ClassVar[bool] = True

    kinds: tuple[str, ...] = ("expert",)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """One number for each expert.

        Raises:
            PassError: a group is none of experts, or nothing multiplies what they give by gates.
        """
        facts = facts_of(graph_module)
        axes = facts[Dependencies].axes
        consumers = find_consumers(graph_module.graph, axes)
        sums: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]] = {}
        watch: dict[fx.Node, list[partial[None]]] = {}
        for group in groups:
            site = _site(graph_module.graph, group, consumers, axes)
            if site is None or group.factor is None:
                raise refuse_group(group, self.name, "outputs that gates multiply")
            total = sums[group.name] = np.zeros((2, group.size))
            _watch(watch, site, axes, group.factor, total)
        seen = {node: partial(_tell, told) for node, told in watch.items()}
        observe(graph_module, self.calibration(graph_module), seen, self.batch, self.tracked)
        return Scores({name: total[0] / np.maximum(total[1], 1) for name, total in sums.items()})


def _tell(told: list[partial[None]], value: torch.Tensor) -> None:
    for see in told:
        see(value)


def _watch(
    watch: dict[fx.Node, list[partial[None]]],
    site: _Site,
    axes: AxisMap,
    factor: Factor,
    total: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> None:
    """Add up norms and tokens of each expert in ``total`` as values are seen."""
    rows: list[torch.Tensor] = []

    def note(value: torch.Tensor) -> None:
        rows[:] = [value]

    def add(value: torch.Tensor) -> None:
        norms = value.double().norm(dim=site.width, keepdim=True)
        if site.experts is not None:
            unit = unit_index(axes.tensors[tensor_name(site.value)][site.experts], factor)
            per_expert = norms.movedim(site.experts, 0).flatten(1)
            index = torch.from_numpy(unit).to(value.device)[:, None].expand_as(per_expert)
        else:
            per_expert, index = norms.flatten(), rows[0].flatten()
        routed = per_expert > 0
        counted = np.asarray([per_expert[routed].cpu().numpy(), np.ones(int(routed.sum()))])
        for place, numbers in enumerate(counted):
            total[place] += np.bincount(index[routed].cpu().numpy(), numbers, minlength=factor.size)[: factor.size]

    if site.positions is not None:
        watch.setdefault(site.positions, []).append(partial(note))
    watch.setdefault(site.value, []).append(partial(add))


def _site(graph: fx.Graph, group: Group, consumers: tuple[Consumer, ...], axes: AxisMap) -> _Site | None:
    """Return where the outputs of a group's experts are multiplied by gates; None where nowhere."""
    if group.kind != "expert" or group.factor is None:
        return None
    held = {member.name for member in group.parameters}
    for consumer in reversed([c for c in consumers if c.name in held]):
        value = _weighed(consumer.node)
        site = None if value is None else _described(value, consumer, group.factor, axes)
        if site is not None:
            return site
    return None


def _weighed(product: fx.Node) -> fx.Node | None:
    """Return the first multiplication of what a product gives, moved, cast or added to; None where there is none."""
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


def _described(value: fx.Node, consumer: Consumer, factor: Factor, axes: AxisMap) -> _Site | None:
    """Return the axes of weighed outputs; None where they are not told apart."""
    weight = [expr for i, expr in enumerate(axes.tensors[consumer.name]) if i != consumer.axis]
    given = [expr for expr in weight if factor not in factors(expr)]
    exprs = axes.tensors[tensor_name(value)]
    width = [i for i, expr in enumerate(exprs) if expr in given]
    experts = [i for i, expr in enumerate(exprs) if factor in factors(expr)]
    positions = _positions(consumer, factor, axes)
    if len(width) != 1 or len(experts) > 1 or not (experts or positions):
        return None
    return _Site(value, width[0], experts[0] if experts else None, None if experts else positions)


def _positions(consumer: Consumer, factor: Factor, axes: AxisMap) -> fx.Node | None:
    """Return the numbers of the experts whose weights a product reads; None where it reads all."""
    for node in consumer.node.all_input_nodes:
        while node.op == "call_function" and node.all_input_nodes:
            for source in node.all_input_nodes[1:]:
                along = axes.positions.get(tensor_name(source))
                if along is not None and factor in factors(along):
                    return source
            node = node.all_input_nodes[0]
    return None
