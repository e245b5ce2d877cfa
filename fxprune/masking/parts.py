"""A graph cut into parts, each of which runs for all samples before the next one begins.

Sums over samples, and weights read from files or prefetched, are so in memory for one part at a time. Values alive
between two parts are kept for each sample; a part runs again when its gradients are due, as in gradient checkpointing.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from fxprune.data.calibration import Sample, batch_indices, batched, clear_sample_errors
from fxprune.errors import EvaluationError
from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.graph.tensors import device_of, get_tensor, map_tensors, weights
from fxprune.masking.masked_run import PreciseRun, TrainingRun, UntouchedRun, at_least_float32
from fxprune.offload.files import is_offloading, offload_to, offloaded, release_freed
from fxprune.offload.prefetch import autocast, compute_device, current_prefetcher, free_bytes, to_device
from fxprune.offload.ranks import broadcast_object
from fxprune.rules.picked import picks_matrices
from fxprune.rules.registry import alias_roots, writes, written_sources
from fxprune.trace import trace


@dataclass(frozen=True, eq=False)
class Part:
    """Ops that run together.

    Args:
        nodes: ops in order of execution, and each weight before its first use in the part.
        takes: values from ops before the part, or from the caller.
        gives: values that ops after the part use.
    """

    nodes: tuple[fx.Node, ...]
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(str(node.target) for node in self.nodes if node.op == "get_attr")

    @cached_property
    def freed(self) -> dict[fx.Node, list[fx.Node]]:
        """By op, the values that neither a later op of the part nor one after it uses."""
        last = {value: node for node in self.nodes for value in node.all_input_nodes}
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            if value not in self.gives:
                found.setdefault(node, []).append(value)
        return found


def cut_graph(graph: fx.Graph, cost: Mapping[str, float], limit: float) -> list[Part]:
    """Cut a graph into parts, in order of execution.

    A part ends in its second half by cost, where the fewest numbers are alive, as between two blocks, and not between
    two readers of a weight of one block; a graph that writes to its weights or inputs is not cut at all.

    Args:
        cost: of each weight, by name; 0 for others.
        limit: the largest cost of the weights in a part; what cannot be cut apart may exceed it.
    """
    ops = [node for node in graph.nodes if node.op not in ("get_attr", "placeholder")]
    if written_sources(graph):
        return [_part(ops)]
    reads = [{str(w.target) for w in op.all_input_nodes if w.op == "get_attr"} & cost.keys() for op in ops]
    place = {op: i for i, op in enumerate(ops)}
    change = [0] * (len(ops) + 2)
    for op, i in place.items():
        last = max((place[user] for user in op.users), default=i)
        change[i + 1] += output_numel(op)
        change[last + 1] -= output_numel(op)
    alive = list(itertools.accumulate(change[: len(ops) + 1]))  # numbers before each op, and after the last
    uncuttable = _uncuttable(graph, ops, reads, cost)
    found, begin = [], 0
    while begin < len(ops):
        read, reach = set[str](), dict[int, float]()  # cost of the weights before each place where the part may end
        for end in range(begin + 1, len(ops) + 1):
            read |= reads[end - 1]
            spent = sum(cost[name] for name in read)
            if spent > limit and reach:
                break
            if end not in uncuttable:
                reach[end] = spent
        half = max(reach.values()) / 2
        fewest = min((place for place in reach if reach[place] >= half), key=lambda place: (alive[place], -place))
        end = len(ops) if spent <= limit else fewest
        found.append(_part(ops[begin:end]))
        begin = end
    return found


def output_numel(node: fx.Node) -> int:
    """Number of elements in the value of a node, at the traced sizes."""
    leaves = (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
    return sum(math.prod(size_hint(size) for size in leaf.shape) for leaf in leaves)


def _uncuttable(
    graph: fx.Graph, ops: Sequence[fx.Node], reads: Sequence[Collection[str]], cost: Mapping[str, float]
) -> set[int]:
    """Positions where no cut may be.

    They are between an op that writes to a value and others that use the same memory; and between readers of a weight
    of one block, which parts on both sides would need: with all that is read between them, it has at most a quarter of
    the cost. Weights of shared layers, and tied ones of embedding and output, are read far apart.
    """
    root, place = alias_roots(graph), {op: i for i, op in enumerate(ops)}
    written = {root[value] for op in ops if writes(op) for value in op.all_input_nodes}
    span: dict[fx.Node | str, list[int]] = {}
    for op, i in place.items():
        for value in (op, *op.all_input_nodes):
            if root[value] in written:
                span.setdefault(root[value], []).append(i)
        if picks_matrices(op):  # they may not exist apart from their product
            span[op] = [i, *(place[user] for user in op.users)]
    readers: dict[str, list[int]] = {}
    for i, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, []).append(i)
    most = sum(cost[name] for name in readers) / 4
    for name, places in readers.items():
        if sum(cost[other] for other in set[str]().union(*reads[places[0] : places[-1] + 1])) <= most:
            span[name] = places
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


Inputs = Mapping[str, Any]
Hooks = Mapping[fx.Node, Callable[[Any], Any]]
"""Functions called with the value of a node; a result other than None replaces the value."""

_NO_HOOKS: Hooks = MappingProxyType({})


LOW_MEMORY = 0.1
"""Of the bytes of all weights, those of a part, or of sums, that are there at a time with little memory."""

_OF_FREE = 0.125
"""Of the free memory, the most that a part takes: the next one is there too, and gradients and sums as large."""


def part_bytes(graph_module: fx.GraphModule) -> float:
    """Bytes of weights, or of sums, in a part: a tenth of those of all weights, halved while free memory is short.

    They are not halved where that would keep many more values between parts, as those inside a block. The first process
    decides for all. Halves, so that a run that resumes most likely has the parts of the first.
    """

    def values_kept(limit: float) -> int:
        return max(sum(map(output_numel, part.gives)) for part in cut_graph(graph_module.graph, costs, limit))

    costs = _bytes_of_weights(graph_module)
    limit, free = LOW_MEMORY * sum(costs.values()), broadcast_object(free_bytes(compute_device(graph_module)))
    least = max(_OF_FREE * free, min(costs.values(), default=0.0))
    most = 2 * values_kept(limit) if limit > least else 0
    while limit > least and values_kept(limit / 2) <= most:
        limit /= 2
    return limit


def _bytes_of_weights(graph_module: fx.GraphModule) -> dict[str, float]:
    return {name: float(tensor.nbytes) for name, tensor in weights(graph_module)}


def parts_by_weights(graph_module: fx.GraphModule) -> list[Part]:
    """Cut a graph into parts whose weights have at most :func:`part_bytes`, or are a single larger weight."""
    return cut_graph(graph_module.graph, _bytes_of_weights(graph_module), part_bytes(graph_module))


def parts_to_run_again(graph_module: fx.GraphModule) -> list[Part]:
    """Cut a graph into the parts that need the least memory in a backward run which runs each of them again.

    That is for the values of the largest part, and for those between parts.
    """

    def numbers(parts: Sequence[Part]) -> int:
        inside = (sum(output_numel(node) for node in part.nodes if node.op != "get_attr") for part in parts)
        return max(inside) + sum(output_numel(node) for part in parts for node in part.gives)

    costs = _bytes_of_weights(graph_module)
    limits = (sum(costs.values()) / count for count in (1, 4, 8, 16, 32, 64, 128))
    return min((cut_graph(graph_module.graph, costs, limit) for limit in limits), key=numbers)


def run_in_parts(run: UntouchedRun, parts: Sequence[Part], inputs: Iterable[Any]) -> Any:
    """Run a graph whose backward run computes a part again when its gradients are due: activation checkpointing.

    It must not write to its weights and inputs.
    """
    places = [node for node in run.module.graph.nodes if node.op == "placeholder"]  # type: ignore[union-attr]
    values: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
    last_taker = {node: part for part in parts for node in part.takes}
    for part in parts:
        ends = part.gives or part.nodes[-1:]

        def outputs(*taken: Any, part: Part = part, ends: Sequence[fx.Node] = ends) -> tuple[Any, ...]:
            release_freed()
            env = _run_part(run, part, dict(zip(part.takes, taken, strict=True)))
            return tuple(env[node] for node in ends)

        found = checkpoint(outputs, *(values[node] for node in part.takes), use_reentrant=False)
        values |= dict(zip(ends, found, strict=True))
        values = {node: value for node, value in values.items() if node in ends or last_taker.get(node) is not part}
    return values[parts[-1].nodes[-1]]


def _run_part(
    run: UntouchedRun, part: Part, takes: Mapping[fx.Node, Any], watch: Hooks = _NO_HOOKS
) -> Mapping[fx.Node, Any]:
    """Run the ops of a part on the values that it takes; return the values that it gives, and that of its last op."""
    run.env = dict(takes)
    try:
        for node in part.nodes:
            run.env[node] = run.run_node(node)
            if node in watch:
                other = watch[node](run.env[node])
                run.env[node] = run.env[node] if other is None else other
            for value in part.freed.get(node, ()):
                del run.env[value]
        return run.env
    finally:  # a run for gradients ends in an exception of torch's once all that they need is there
        run.env = {}


class PartRuns:
    """Samples on their way through the parts of a graph.

    Args:
        samples: the inputs of each sample, by name.
        reached: names of weights whose gradients are wanted.
        precise: compute in at least float32, whatever the dtypes of weights and casts.
        forward_only: no part runs again, so that values are freed after their last use.
        bf16: compute products in bfloat16; if False, in the precision that the caller has set.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        parts: Sequence[Part],
        samples: Sequence[Inputs],
        reached: Collection[str],
        *,
        precise: bool = False,
        forward_only: bool = False,
        bf16: bool = False,
    ) -> None:
        self.parts, self.bf16 = parts, bf16
        self.last_taker = {node: part for part in parts for node in part.takes} if forward_only else {}
        self.graph_module = graph_module
        self.home, self.place = device_of(graph_module), compute_device(graph_module)
        self.prefetcher = current_prefetcher()
        self.run = (_PrecisePartRun if precise else _PartRun)(graph_module)
        self.differentiable: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            sources = self.differentiable.intersection(node.all_input_nodes)
            if sources or (node.op == "get_attr" and node.target in reached):
                self.differentiable.add(node)
        places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self.inputs = samples
        self.values: list[dict[fx.Node, Any]] = []
        for inputs in samples:
            given = map_tensors([*inputs.values()], at_least_float32) if precise else inputs.values()
            self.values.append(dict(zip(places, given, strict=True)))
        self.gradients: list[dict[fx.Node, torch.Tensor]] = [{} for _ in samples]
        self.loaded: Part | None = None

    def forward(self, part: Part, watch: Hooks = _NO_HOOKS) -> Iterator[int]:
        """Run a part for each sample and keep the values it gives; yield the number of each sample when it is done.

        The part is the first one, or comes after one that has run.
        """
        release_freed()
        self._load(part, 1)
        for number, values in enumerate(self.values):
            with torch.no_grad(), self._precision(), clear_sample_errors(self.inputs[number]):
                takes = {node: to_device(values[node], self.place) for node in part.takes}
                env = self.run.part(part, takes, {}, watch)
            values.update({node: self._to_home(env[node]) for node in part.gives})
            for node in part.takes:
                if self.last_taker.get(node) is part:
                    del values[node]
            yield number

    def backward(
        self,
        part: Part,
        weights: Callable[[int], Mapping[str, torch.Tensor]],
        loss: Callable[[int, Any], torch.Tensor],
        watch: Callable[[int], Hooks] = lambda _: _NO_HOOKS,
    ) -> Iterator[int]:
        """Run a part forward again and backward for each sample; yield the number of each sample when it is done.

        Args:
            part: the last one, or one before a part that :meth:`backward` has run.
            weights: given the number of a sample, tensors to read in place of weights.
            loss: of the last part, given the number of a sample and the output of the graph.
            watch: given the number of a sample, hooks on nodes on the way forward.
        """
        last = part is self.parts[-1]
        release_freed()
        self._load(part, -1)
        for number, values in enumerate(self.values):
            gradients = self.gradients[number]
            leaves = {node: self._leaf(node, values[node]) for node in part.takes}
            with clear_sample_errors(self.inputs[number]):
                # views, so that ops may write to them without writing to a leaf that requires gradients
                takes = {n: v.view_as(v) if getattr(v, "requires_grad", False) else v for n, v in leaves.items()}
                with self._precision():
                    env = self.run.part(part, takes, weights(number), watch(number))
            if last:
                loss(number, env[part.nodes[-1]]).backward()
            else:
                ends = [node for node in part.gives if node in gradients and env[node].requires_grad]
                if ends:
                    due = [to_device(gradients.pop(node), self.place) for node in ends]
                    torch.autograd.backward([env[node] for node in ends], due)
            del env
            for node, leaf in leaves.items():
                if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                    found, more = gradients.get(node), to_device(leaf.grad, self.home)
                    gradients[node] = self._to_home(more if found is None else found + more)
            yield number
        before = {node for other in self.parts[: self.parts.index(part)] for node in other.takes}
        for values in self.values:
            for node in values.keys() - before:
                del values[node]

    def gradients_by_name(self, sample: int) -> dict[str, torch.Tensor]:
        """Gradients for a sample of the values given by parts that have not run backward yet, by node name."""
        return {node.name: value for node, value in self.gradients[sample].items()}

    def take_gradients(self, sample: int, named: Mapping[str, torch.Tensor]) -> None:
        """Resume with the gradients that :meth:`gradients_by_name` gave for a sample in an earlier run."""
        nodes = {node.name: node for part in self.parts for node in part.nodes}
        self.gradients[sample] = {nodes[name]: value for name, value in named.items()}

    def needs_gradients(self, part: Part) -> bool:
        """Whether gradients of weights that a part reads, or of values that it takes, are wanted."""
        return any(node in self.differentiable for node in part.nodes)

    def value(self, node: fx.Node) -> Any:
        """The value of a node in the running part, as long as a later node uses it."""
        return self.run.env[node]

    def tensor(self, name: str) -> torch.Tensor:
        """A weight of the running part, or of the last one, on the device that it runs on."""
        return self.run.held[name] if name in self.run.held else get_tensor(self.graph_module, name)

    def _precision(self) -> AbstractContextManager[Any]:
        return autocast(self.place, True) if self.bf16 else nullcontext()

    def _load(self, part: Part, step: int) -> None:
        """Fetch the weights of a part to the device, and prefetch those of the next, ``step`` parts on."""
        if self.prefetcher is None or part is self.loaded:
            return
        self.loaded = part
        self.run.held = {name: self.run.held[name] for name in part.reads if name in self.run.held}
        missing = [name for name in part.reads if name not in self.run.held]
        there = self.prefetcher.fetch([get_tensor(self.graph_module, name) for name in missing])
        self.run.held = self.run.held | dict(zip(missing, there, strict=True))
        number = self.parts.index(part) + step
        following = self.parts[number].reads if 0 <= number < len(self.parts) else ()
        self.prefetcher.prefetch(get_tensor(self.graph_module, name) for name in following if name not in self.run.held)

    def _to_home(self, value: Any) -> Any:
        return offloaded(to_device(value.detach(), self.home)) if isinstance(value, torch.Tensor) else value

    def _leaf(self, node: fx.Node, value: Any) -> Any:
        value = to_device(value, self.place)
        if node not in self.differentiable or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().requires_grad_()


class _PartRun(TrainingRun):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.weights: Mapping[str, torch.Tensor] = {}
        self.held: dict[str, torch.Tensor] = {}

    def part(
        self, part: Part, takes: Mapping[fx.Node, Any], weights: Mapping[str, torch.Tensor], watch: Hooks
    ) -> Mapping[Any, Any]:
        self.weights, self._copies = weights, {}
        found = _run_part(self, part, takes, watch)
        self.weights = {}
        return found

    def read(self, name: str) -> Any:
        return self.held[name] if name in self.held else super().read(name)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)


class _PrecisePartRun(_PartRun, PreciseRun): ...


Observers = Mapping[fx.Node, Callable[[Any], None]]


def observe_nodes(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    watch: Observers,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
    *,
    batch_by_batch: bool = True,
) -> None:
    """Run a graph over samples, in at least float32, up to the last watched node.

    Values are freed after their last use, so that memory holds those alive at one node, of one batch.

    Args:
        watch: functions called with the value of a node, once for each batch.
        batch_by_batch: every value of a batch comes before those of the next. If False and weights are prefetched to
            another device, or in files, the graph runs in parts, so that they are read once for all batches.
    """
    numbers = batch_indices(samples, graph_module, batch)
    batches = [batched([samples[i] for i in together], graph_module) for together in numbers]
    streams = current_prefetcher() is not None or is_offloading()
    if not batch_by_batch and streams and not written_sources(graph_module.graph):
        parts = parts_by_weights(graph_module)
        end = max((i for i, part in enumerate(parts, 1) if not watch.keys().isdisjoint(part.nodes)), default=0)
        runs = PartRuns(graph_module, parts, batches, (), precise=True, forward_only=True)
        steps = (number for part in parts[:end] for number in runs.forward(part, watch))
        for _ in track(steps, len(batches) * end):
            pass
        return
    last = next((node for node in reversed(graph_module.graph.nodes) if node in watch), None)
    if last is None:
        return

    def visit(node: fx.Node, value: Any) -> Any:
        if node in watch:
            watch[node](value)
        return value

    with torch.no_grad():
        for inputs in track(batches, len(batches)):
            with clear_sample_errors(inputs):
                PreciseRun(graph_module).run_nodes(inputs.values(), visit, until=last)


class PartwiseModel:
    """A language model that runs part by part, so that its weights in files may exceed memory.

    All windows run through one part before the next, so that each weight is read once; values alive between two parts
    are kept in a temporary folder. A call runs on one batch, and reads all weights for it. The model must be
    traceable, and take only ``input_ids``.
    """

    def __init__(self, model: Any) -> None:
        traced = isinstance(model, fx.GraphModule)
        self.graph_module: fx.GraphModule = model if traced else trace(model, check=False).graph_module
        names = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        if len(names) != 1:
            raise EvaluationError(
                f"the graph takes {', '.join(names)}", where="model", remedy="Leave memory at fast for such a model"
            )
        self.name = names[0]
        self.parts = parts_by_weights(self.graph_module)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Return the output of the model for token ids ``(batch, tokens)``."""
        return self.graph_module(input_ids)

    @property
    def device(self) -> torch.device:
        return device_of(self.graph_module)

    def outputs(
        self, windows: Sequence[torch.Tensor], track: Callable[[Iterable[Any], int], Iterable[Any]]
    ) -> Iterator[Any]:
        """Yield the output of the model for each batch of windows, token ids ``(batch, tokens)``."""
        found: list[Any] = []
        watch = {node: found.append for node in self.graph_module.graph.nodes if node.op == "output"}
        with tempfile.TemporaryDirectory() as place, offload_to(Path(place), None):
            inputs = [{self.name: ids} for ids in windows]
            runs = PartRuns(self.graph_module, self.parts, inputs, (), forward_only=True)
            steps = (part for part in self.parts for _ in runs.forward(part, watch))
            for _ in track(steps, len(self.parts) * len(windows)):
                while found:
                    yield found.pop()
