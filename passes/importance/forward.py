"""Criteria from forward passes: moments of the inputs of products, and what whole structures add or turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from fxprune.axes import Factor, Index, factors, unit_index
from fxprune.data.calibration import Calibration, Sample, batch_indices, spread
from fxprune.discovery.dependency import AxisMap, Dependencies
from fxprune.discovery.groups import Consumer, Group, Groups, as_kinds, consumers_of, find_consumers
from fxprune.errors import PassError
from fxprune.graph.facts import Fact, Runnable, facts_of
from fxprune.graph.tensors import get_tensor, require_weights, tensor_name
from fxprune.masking.parts import Observers, observe_nodes
from fxprune.masking.teacher import logits_use_bf16
from fxprune.offload.prefetch import autocast, compute_device
from fxprune.offload.ranks import all_reduce, batch_for_all, check_enough, deal, gathered
from fxprune.pipeline.arguments import Precision, argument
from fxprune.pipeline.contract import PassCost, tracked
from fxprune.removal.removal import Scores
from fxprune.rules.products import stacked_product
from fxprune.rules.registry import Values, is_sum, values_of

from .base import PRECISION, ImportancePass, Positions, Wanted, axis_sums, require_finite

Place = tuple[fx.Node, int]
"""A value, and the axis of it that products sum over."""


@dataclass
class Moments:
    """Sums over all tokens of the inputs of a product.

    Args:
        sums: of each input, ``(in,)``.
        squares: of its square, ``(in,)``.
        count: number of tokens.
    """

    sums: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs ``(tokens, in)``."""
        self.sums += rows.sum(0)
        self.squares += rows.square().sum(0)
        self.count += len(rows)

    def all_reduce(self) -> None:
        count = self.sums.new_full((), self.count, dtype=torch.int64)
        all_reduce((self.sums, self.squares, count))
        self.count = int(count)

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance of each input."""
        spread = self.squares - self.sums.square() / max(self.count, 1)
        return spread.clamp_min(0) / max(self.count - 1, 1)


def sum_moments(each: Sequence[Moments]) -> Moments:
    """The moments of all tokens of several."""
    sums = torch.stack([moments.sums for moments in each]).sum(0)
    squares = torch.stack([moments.squares for moments in each]).sum(0)
    return Moments(sums, squares, sum(moments.count for moments in each))


@dataclass(frozen=True)
class Stack:
    """The matrices of a weight of three axes, one for each row of the activations, as tokens have experts.

    Args:
        axis: the axis of the weight that has the matrices.
        size: their number.
        index: the number of the matrix of each row; None if row ``m`` has matrix ``m``.
        order: all axes of the activations, that of rows first and that of inputs last.
    """

    axis: int
    size: int
    index: fx.Node | None
    order: tuple[int, ...]

    def split(self, value: torch.Tensor, numbers: torch.Tensor | None) -> list[torch.Tensor]:
        """The inputs of each matrix, ``(tokens, in)``; ``numbers`` are those in ``index``."""
        rows = value.permute(self.order)
        return [(rows[i] if numbers is None else rows[numbers == i]).flatten(0, -2) for i in range(self.size)]


def find_stack(consumer: Consumer) -> Stack | None:
    """The matrices of the weight that a consumer reads; None if it is one."""
    product = stacked_product(consumer.node)
    if product is None or (product.source, product.order[2]) != (consumer.source, consumer.axis):
        return None
    size = product.weight.meta["val"].shape[product.order[0]]
    index = None if product.picked is None else product.picked.index
    return Stack(product.order[0], size, index, product.source_order)


@dataclass
class MatrixMoments:
    """Moments of the inputs along an axis of a value, of each matrix of ``stack`` apart; of all if that is None."""

    dim: int
    stack: Stack | None
    each: list[Moments] = field(default_factory=list)
    batches: int = 0

    def add(self, numbers: Sequence[torch.Tensor], value: torch.Tensor) -> None:
        """Add the inputs of the next batch; ``numbers`` are those that rows pick matrices by, of each batch."""
        rows = [value.movedim(self.dim, -1).flatten(0, -2)]
        if self.stack is not None:
            rows = self.stack.split(value, None if self.stack.index is None else numbers[self.batches])
        if not self.each:
            self.each = [Moments(*own.new_zeros(2, own.shape[1], dtype=torch.float64)) for own in rows]
        for moments, own in zip(self.each, rows, strict=True):
            moments.add(own.double())
        self.batches += 1

    def pooled(self) -> MatrixMoments:
        """The moments of all matrices together."""
        return MatrixMoments(self.dim, None, [sum_moments(self.each)])

    def along(self, value: torch.Tensor, axis: int, dims: int) -> torch.Tensor:
        """Numbers ``(matrices, in)`` as a factor of a weight of ``dims`` axes, whose ``axis`` is summed over."""
        shape = [1] * dims
        shape[axis] = value.shape[1]
        if self.stack is None:
            return value.reshape(shape)
        shape[self.stack.axis] = len(value)
        return (value if self.stack.axis < axis else value.T).reshape(shape)


@dataclass(frozen=True, eq=False)
class ForwardImportancePass(ImportancePass):
    """Base of criteria from activations on the calibration samples."""

    needs: ClassVar[tuple[type[Fact], ...]] = (Groups, Dependencies, Calibration, Runnable)
    preconditions: ClassVar[tuple[Callable[[fx.GraphModule, str], None], ...]] = (require_weights,)

    samples: int | None = argument(None, "Calibration samples, evenly spread; None for all.", least=1)
    batch: int = argument(8, "Samples that run at once.", least=1)

    def cost(self, samples: int) -> PassCost:
        taken = min(self.samples or samples, samples)
        return PassCost(runs=taken, batch=min(self.batch, taken))

    def calibration(self, graph_module: fx.GraphModule) -> tuple[Sample, ...]:
        return spread(facts_of(graph_module)[Calibration].samples, self.samples)

    def observe(
        self, graph_module: fx.GraphModule, watch: Observers, *, in_shards: bool = False, batch_by_batch: bool = True
    ) -> None:
        """Run the graph over the calibration samples and call ``watch`` with values of nodes.

        Args:
            in_shards: each process runs a part of the batches; what is summed must be all-reduced.
            batch_by_batch: every value of a batch comes before those of the next; if False, node by node where that
                saves memory.
        """
        samples = self.calibration(graph_module)
        batch = batch_for_all(self.batch, len(samples)) if in_shards else self.batch
        if in_shards:
            check_enough(samples)
            batches = deal(list(batch_indices(samples, graph_module, batch)))
            samples = tuple(samples[i] for numbers in batches for i in numbers)

        def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
            return tracked(batches, self.name, total)

        observe_nodes(graph_module, samples, watch, batch, track, batch_by_batch=batch_by_batch)

    def observe_inputs(
        self,
        graph_module: fx.GraphModule,
        consumers: Iterable[Consumer],
        see: Callable[[Place, torch.Tensor], None],
    ) -> None:
        """Run this process's samples, and call ``see`` with the inputs of the consumers, ``(tokens, in)``, by place."""
        dims: dict[fx.Node, dict[int, None]] = {}
        for consumer in consumers:
            dims.setdefault(consumer.source, {})[consumer.dim] = None

        def split(node: fx.Node, value: torch.Tensor) -> None:
            for dim in dims[node]:
                see((node, dim), value.movedim(dim, -1).flatten(0, -2))

        self.observe(graph_module, {node: partial(split, node) for node in dims}, in_shards=True)

    def moments(self, graph_module: fx.GraphModule, consumers: Sequence[Consumer]) -> dict[Consumer, Moments]:
        """Moments of the inputs of each consumer over the calibration samples; those of all experts together."""
        found = self.matrix_moments(graph_module, consumers)
        return {consumer: found[consumer].pooled().each[0] for consumer in consumers}

    def matrix_moments(
        self, graph_module: fx.GraphModule, consumers: Sequence[Consumer]
    ) -> dict[Consumer, MatrixMoments]:
        """Moments of the inputs of each consumer; of stacked experts, those of the tokens that reach each of them."""
        order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        places: dict[Consumer, tuple[Place, Stack | None]] = {}
        for consumer in consumers:
            stack = find_stack(consumer)
            is_late = stack is not None and stack.index is not None and order[stack.index] > order[consumer.source]
            places[consumer] = (consumer.source, consumer.dim), None if is_late else stack
        found = {place: MatrixMoments(place[0][1], place[1]) for place in places.values()}
        numbers: dict[fx.Node | None, list[torch.Tensor]] = {}
        watch: dict[fx.Node, list[Callable[[torch.Tensor], None]]] = {}
        for ((source, _), stack), moments in found.items():
            index = None if stack is None else stack.index
            if index is not None and index not in numbers:
                watch.setdefault(index, []).insert(0, numbers.setdefault(index, []).append)
            watch.setdefault(source, []).append(partial(moments.add, numbers.get(index, ())))

        def see(node: fx.Node, value: torch.Tensor) -> None:
            for receive in watch[node]:
                receive(value)

        self.observe(graph_module, {node: partial(see, node) for node in watch}, in_shards=True, batch_by_batch=False)
        for one in (one for moments in found.values() for one in moments.each):
            one.all_reduce()
        for consumer, place in places.items():
            require_finite(torch.stack([one.squares for one in found[place].each]), consumer.name)
        return {consumer: found[place] for consumer, place in places.items()}

    def _by_weight(
        self,
        graph_module: fx.GraphModule,
        names: Set[str],
        score: Callable[[str, torch.Tensor, Mapping[int, Sequence[MatrixMoments]]], Positions],
    ) -> Positions:
        """Scores of weights from the moments of their inputs, by summed axis; each process scores its own weights."""
        axes = facts_of(graph_module)[Dependencies].axes
        consumers = [c for c in find_consumers(graph_module.graph, axes) if c.name in names]
        uses: dict[str, dict[int, list[MatrixMoments]]] = {}
        for consumer, moments in self.matrix_moments(graph_module, consumers).items():
            uses.setdefault(consumer.name, {}).setdefault(consumer.axis, []).append(moments)
        for there in (there for by_axis in uses.values() for there in by_axis.values()):
            if len({use.stack and use.stack.axis for use in there}) > 1:  # of one weight, some rows pick, others do not
                there[:] = [use.pooled() for use in there]
        mine = [
            score(name, get_tensor(graph_module, name).detach(), uses.get(name, {})) for name in deal(sorted(names))
        ]
        return dict(item for found in gathered(mine) for item in found.items())

    def consumers(
        self, graph_module: fx.GraphModule, groups: Sequence[Group]
    ) -> list[tuple[Group, tuple[Consumer, ...]]]:
        """Each group with the products that sum over its units; a group must have one."""
        consumers = find_consumers(graph_module.graph, facts_of(graph_module)[Dependencies].axes)
        pairs = [(group, consumers_of(group, consumers)) for group in groups]
        for group, own in pairs:
            if not own:
                raise self.not_scored(group, "weight that sums over its units")
        return pairs

    def readers(self, graph_module: fx.GraphModule, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups with those of their members alone that products sum over; a group must have one."""
        found = []
        for group, consumers in self.consumers(graph_module, groups):
            held = {(consumer.name, consumer.axis) for consumer in consumers}
            found.append(replace(group, members=tuple(m for m in group.members if (m.name, m.axis) in held)))
        return tuple(found)

    def not_scored(self, group: Group, missing: str) -> PassError:
        return PassError(
            f"{group.name}, of the kind {group.kind!r}, has no {missing}",
            where=f"pass {self.name}",
            remedy="Leave that kind out, or score it by another importance, such as taylor",
        )


@dataclass(frozen=True, eq=False)
class WandaImportancePass(ForwardImportancePass):
    """Scores weights by their magnitude times the root mean square of their input; slices by the sum.

    With weight ``W (out, in)`` and inputs ``X (tokens, in)``, the element ``(o, i)`` counts as::

        |W_oi| * norm(X_i) / sqrt(tokens)

    Parameters in no product with activations, such as biases and weights of norms, count as multiplying ones. Of
    stacked experts, the tokens are those that reach each of them.

    Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (arXiv
    2306.11695), equation 1, there for single weights.
    """

    name: ClassVar[str] = "wanda"
    prefetches: ClassVar[bool] = True

    readers_only: bool = argument(
        False,
        """Count only the weights that read a unit, if there are any. Those that compute it have other units as inputs,
        whose norms say nothing about this one; a few of these norms are often hundreds of times the others.""",
    )
    precision: Precision = argument("float32", PRECISION)

    def cost(self, samples: int) -> PassCost:
        return replace(super().cost(samples), weights=0.0 if self.precision == "float32" else 0.5)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        if self.readers_only:
            consumers = find_consumers(graph_module.graph, facts_of(graph_module)[Dependencies].axes)
            read = [group for group in groups if consumers_of(group, consumers)]
            others = tuple(group for group in groups if group not in read)
            groups = (*self.readers(graph_module, read), *others)
        return super().score(graph_module, groups)

    def positions(self, graph_module: fx.GraphModule, wanted: Wanted) -> Positions:
        def score(name: str, weight: torch.Tensor, uses: Mapping[int, Sequence[MatrixMoments]]) -> Positions:
            weight = weight.float().abs()
            for axis, there in uses.items():
                every = map(sum_moments, zip(*(use.each for use in there), strict=True))
                rms = torch.stack([(moments.squares / max(moments.count, 1)).sqrt() for moments in every])
                weight = weight * there[0].along(rms.float().to(weight.device), axis, weight.dim())
            return {key: axis_sums(weight, key[1], shape) for key, shape in wanted.items() if key[0] == name}

        bf16 = logits_use_bf16(self.precision, graph_module, self.calibration(graph_module)[0], self.name)
        with autocast(compute_device(graph_module), bf16):
            return self._by_weight(graph_module, {name for name, _ in wanted}, score)


@dataclass(frozen=True, eq=False)
class FlapImportancePass(ForwardImportancePass):
    """Scores units by the variance of their outputs: a constant can be compensated by a bias.

    With the consumer's weight ``W (out, in)`` and inputs ``X (tokens, in)``, the input ``i`` counts as::

        var(X_i) * sum over o of W_oi ** 2

    and a unit as the sum over its inputs, in all consumers.

    Source: An, Zhao, Yu, Tang, Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (arXiv
    2312.11983): the weighted fluctuation of inputs, and its standardised form.
    """

    name: ClassVar[str] = "flap"
    prefetches: ClassVar[bool] = True

    standardise: bool = argument(
        False,
        """Standardise the scores of each group (subtract their mean, divide by their standard deviation), which makes
        layers and kinds comparable: what the paper does before ``ranking="global"``.""",
    )

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        scores = super().score(graph_module, self.readers(graph_module, groups))
        if not self.standardise:
            return scores
        return Scores({name: (row - row.mean()) / (row.std() or 1.0) for name, row in scores.units.items()})

    def positions(self, graph_module: fx.GraphModule, wanted: Wanted) -> Positions:
        def score(name: str, weight: torch.Tensor, uses: Mapping[int, Sequence[MatrixMoments]]) -> Positions:
            found: Positions = {}
            squares = weight.double().square()
            for axis, there in uses.items():
                for use in there:
                    variances = torch.stack([moments.variance for moments in use.each]).to(weight.device)
                    shape = wanted.get((name, axis))
                    if use.stack is None:
                        value = variances[0] * axis_sums(squares, axis, shape)
                    else:
                        value = axis_sums(squares * use.along(variances, axis, weight.dim()), axis, shape)
                    found[name, axis] = found[name, axis] + value if (name, axis) in found else value
            return found

        return self._by_weight(graph_module, {name for name, _ in wanted}, score)


@dataclass
class _GatedOutputs:
    """The outputs of experts times their gates, and sums of their norms.

    Args:
        width: the axis of ``value`` with the outputs of one expert for one token.
        experts: its axis of experts, and the expert of each position; None if rows are those of routed tokens.
        routing: the expert of each row; None if an axis holds the experts.
        sums: of the norms of each expert, and its number of tokens: ``(2, experts)``.
    """

    value: fx.Node
    width: int
    experts: tuple[int, Index] | None
    routing: fx.Node | None
    sums: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def see(self, node: fx.Node, value: torch.Tensor) -> None:
        if node is self.routing:
            self.rows = value
            return
        norms = value.double().norm(dim=self.width, keepdim=True)
        if self.experts is not None:
            by_expert = norms.movedim(self.experts[0], 0).flatten(1)
            index = torch.from_numpy(self.experts[1]).to(value.device)[:, None].expand_as(by_expert)
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
        experts = [(i, unit_index(expr, group.factor)) for i, expr in enumerate(exprs) if group.factor in factors(expr)]
        routing = None if experts else _routing(consumer, group.factor, axes)
        if len(width) == 1 and len(experts) <= 1 and (experts or routing):
            return _GatedOutputs(value, width[0], experts[0] if experts else None, routing, np.zeros((2, group.size)))
    return None


def _first_multiplication(product: fx.Node) -> fx.Node | None:
    """The first multiplication of the output of a product, which may be moved, cast or added to before."""
    chain, pending = {product}, [product]
    while pending:
        for user in pending.pop(0).users:
            if user.target is torch.ops.aten.mul.Tensor and not chain.issuperset(user.all_input_nodes):
                return user
            follows = values_of(user) in (Values.MOVED, Values.CAST) or is_sum(user)
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
