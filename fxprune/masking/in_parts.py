"""A graph cut into parts that run one after the other, each for all samples: forward, and back with gradients.

Plain training runs all parts for one sample and then for the next. Here a part runs for all samples before the next
one begins, so that sums over samples, and weights where these are read from files, are in memory for one part at a
time. What is alive where two parts meet is kept for each sample; a part runs again when its gradients are due, so that
the price is one more forward run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import computing
from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.graph.shelf import stored
from fxprune.masking.masked_run import UntouchedRun
from fxprune.rules.aliasing import alias_roots, writes, written_sources

__all__ = ["Part", "PartRuns", "cut"]

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """Ops that run together.

    Args:
        nodes: in order of execution: ops, and before the first op of the part that needs it each weight.
        takes: values that ops before it, or the caller, made.
        gives: values that ops behind it use.
    """

    nodes: tuple[fx.Node, ...]
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the weights it reads."""
        return tuple(str(node.target) for node in self.nodes if node.op == "get_attr")


def cut(graph: fx.Graph, cost: Mapping[str, float], limit: float) -> list[Part]:
    """Return the parts of a graph, in order of execution.

    It is cut where the values alive are smallest, as they are where two blocks meet; a graph that writes to its weights
    or inputs is not cut at all.

    Args:
        graph: the graph.
        cost: of each weight, by name; 0 for others.
        limit: the cost of the weights in a part; one that is more than that has a part of its own.
    """
    ops = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
    if written_sources(graph):
        return [_part(ops)]
    reads = [{str(w.target) for w in op.all_input_nodes if w.op == "get_attr"} & cost.keys() for op in ops]
    alive, closed = _alive(ops), _closed(graph, ops)
    found, begin = [], 0
    while begin < len(ops):
        end = begin + _end([(reads[i], alive[i + 1], i + 1 in closed) for i in range(begin, len(ops))], cost, limit)
        found.append(_part(ops[begin:end]))
        begin = end
    return found


def _end(steps: Sequence[tuple[Collection[str], int, bool]], cost: Mapping[str, float], limit: float) -> int:
    """How many of the steps make up a part: in its second half by cost, until the fewest numbers are alive.

    Args:
        steps: of each op, the weights it reads, how many numbers are alive behind it, and whether no cut may be there.
        cost: of each weight.
        limit: of the cost of a part.
    """
    read, reach = set[str](), dict[int, float]()
    for count, (names, _, closed) in enumerate(steps, start=1):
        read.update(names)
        spent = sum(cost[name] for name in read)
        if spent > limit and reach:
            break
        if not closed:
            reach[count] = spent
    else:
        if spent <= limit:
            return len(steps)
    half = max(reach.values()) / 2
    return min((count for count in reach if reach[count] >= half), key=lambda count: (steps[count - 1][1], -count))


def _alive(ops: Sequence[fx.Node]) -> list[int]:
    """How many numbers are alive before each op, and after the last."""
    place = {op: i for i, op in enumerate(ops)}
    change = [0] * (len(ops) + 2)
    for op, i in place.items():
        last = max((place[user] for user in op.users), default=i)
        change[i + 1] += _numbers(op)
        change[last + 1] -= _numbers(op)
    found, now = [], 0
    for step in change[: len(ops) + 1]:
        now += step
        found.append(now)
    return found


def _numbers(node: fx.Node) -> int:
    leaves = (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
    return sum(math.prod(size_hint(size) for size in leaf.shape) for leaf in leaves)


def _closed(graph: fx.Graph, ops: Sequence[fx.Node]) -> set[int]:
    """Where no cut may be: between an op that writes to a value and what has to do with the same memory."""
    root, place = alias_roots(graph), {op: i for i, op in enumerate(ops)}
    written = {root[value] for op in ops if writes(op) for value in op.all_input_nodes}
    span: dict[fx.Node, list[int]] = {}
    for op, i in place.items():
        for value in (op, *op.all_input_nodes):
            if root[value] in written:
                span.setdefault(root[value], []).append(i)
    return {position for places in span.values() for position in range(min(places) + 1, max(places) + 1)}


def _part(ops: Sequence[fx.Node]) -> Part:
    inside = set(ops)
    nodes, takes = dict[fx.Node, None](), dict[fx.Node, None]()
    for op in ops:
        for value in op.all_input_nodes:
            if value.op == "get_attr":
                nodes[value] = None
            elif value not in inside:
                takes[value] = None
        nodes[op] = None
    gives = tuple(op for op in ops if any(user not in inside for user in op.users))
    return Part(tuple(nodes), tuple(takes), gives)


class PartRuns:
    """Samples on their way through the parts of a graph.

    Args:
        graph_module: the graph.
        parts: from :func:`cut`.
        samples: the inputs of each sample, by name, on the device of the graph.
        reached: names of weights whose gradients are wanted.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        parts: Sequence[Part],
        samples: Sequence[Inputs],
        reached: Collection[str],
    ) -> None:
        self.parts = parts
        self.run = _PartRun(graph_module)
        self.behind = _behind(graph_module.graph, reached)
        places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self.inputs = samples
        self.values: list[dict[fx.Node, Any]] = [dict(zip(places, inputs.values(), strict=True)) for inputs in samples]
        self.gradients: list[dict[fx.Node, torch.Tensor]] = [{} for _ in samples]

    def forward(self, part: Part) -> Iterator[int]:
        """Run a part for each sample and keep what it gives; yields the number of each sample when it is done."""
        for number, values in enumerate(self.values):
            with torch.no_grad(), computing(self.inputs[number]):
                env = self.run.part(part, {node: values[node] for node in part.takes}, {})
            values.update({node: _kept(env[node]) for node in part.gives})
            yield number

    def backward(
        self,
        part: Part,
        weights: Callable[[int], Mapping[str, torch.Tensor]],
        loss: Callable[[int, Any], torch.Tensor],
    ) -> Iterator[int]:
        """Run a part again for each sample, and back; yields the number of each sample when it is done.

        Args:
            part: the last one, or one behind which :meth:`backward` has run.
            weights: given the number of a sample, what is read in place of weights.
            loss: of the last part, given the number of a sample and what the graph returns.
        """
        last = part is self.parts[-1]
        for number, values in enumerate(self.values):
            gradients = self.gradients[number]
            leaves = {node: self._leaf(node, values[node]) for node in part.takes}
            with computing(self.inputs[number]):
                env = self.run.part(part, {node: _on(leaf) for node, leaf in leaves.items()}, weights(number))
            if last:
                loss(number, env[part.nodes[-1]]).backward()
            else:
                ends = [node for node in part.gives if node in gradients and env[node].requires_grad]
                if ends:
                    torch.autograd.backward([env[node] for node in ends], [gradients.pop(node) for node in ends])
            del env
            for node, leaf in leaves.items():
                if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                    found = gradients.get(node)
                    gradients[node] = _kept(leaf.grad if found is None else found + leaf.grad)
            yield number
        self._forget(part)

    def gradients_by_name(self) -> dict[str, torch.Tensor]:
        """The gradients of values that parts which are still to run back have given, for :meth:`take_gradients`."""
        numbered = enumerate(self.gradients)
        return {f"gradient {i} {node.name}": value for i, found in numbered for node, value in found.items()}

    def take_gradients(self, named: Mapping[str, torch.Tensor]) -> None:
        """Go on with gradients of an earlier run; other tensors among them are left out."""
        nodes = {node.name: node for part in self.parts for node in part.nodes}
        self.gradients = [{} for _ in self.values]
        for key, value in named.items():
            what, number, name = key.split(" ", 2)
            if what == "gradient":
                self.gradients[int(number)][nodes[name]] = value

    def needs_gradients(self, part: Part) -> bool:
        """Whether gradients of weights that a part reads, or of values that it takes, are wanted."""
        return any(node in self.behind for node in part.nodes)

    def _leaf(self, node: fx.Node, value: Any) -> Any:
        if node not in self.behind or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().requires_grad_()

    def _forget(self, part: Part) -> None:
        """Drop what no part before this one takes."""
        before = {node for other in self.parts[: self.parts.index(part)] for node in other.takes}
        for values in self.values:
            for node in [node for node in values if node not in before]:
                del values[node]


class _PartRun(UntouchedRun):
    """An interpreter for one part at a time."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.weights: Mapping[str, torch.Tensor] = {}
        self.last_uses: dict[Part, dict[fx.Node, list[fx.Node]]] = {}

    def part(self, part: Part, takes: Mapping[fx.Node, Any], weights: Mapping[str, torch.Tensor]) -> Mapping[Any, Any]:
        """Return the values of what a part gives, and of the output of the graph."""
        if part not in self.last_uses:
            self.last_uses[part] = _last_uses(part)
        freed = self.last_uses[part]
        self.weights, self.env, self._copies = weights, dict(takes), {}
        for node in part.nodes:
            self.env[node] = self.run_node(node)
            for value in freed.get(node, ()):
                del self.env[value]
        found, self.env, self.weights = self.env, {}, {}
        return found

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight, or what is read in its place."""
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)


def _last_uses(part: Part) -> dict[fx.Node, list[fx.Node]]:
    """The values to free after each node: nothing behind it in the part uses them, and no other part does."""
    last = {value: node for node in part.nodes for value in node.all_input_nodes}
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value not in part.gives:
            found.setdefault(node, []).append(value)
    return found


def _behind(graph: fx.Graph, reached: Collection[str]) -> set[fx.Node]:
    """The nodes whose values depend on a weight of these names."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "get_attr" and node.target in reached) or any(v in found for v in node.all_input_nodes):
            found.add(node)
    return found


def _kept(value: Any) -> Any:
    return stored(value.detach()) if isinstance(value, torch.Tensor) else value


def _on(leaf: Any) -> Any:
    """Return a value that ops may write to without writing to the leaf, which gets its gradient."""
    return leaf.view_as(leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
