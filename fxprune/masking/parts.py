"""A graph cut into parts that run one after the other for all samples.

Plain training runs all parts for one sample and then for the next. Here a part runs for all samples before the next
one begins, so that sums over samples, and weights where these are read from files, are in memory for one part at a
time. What is alive where two parts meet is kept for each sample; a part runs again when its gradients are due, so that
the price is one more forward run.

Where weights are carried to another device, those of the part that runs are there, and those of the next one on their
way. What is kept between parts is where the weights are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample, computing, stacked
from fxprune.errors import EvaluationError
from fxprune.graph.compat import size_hint, tree_leaves
from fxprune.graph.tensors import device_of, example_of, get_tensor, weights
from fxprune.masking.masked_run import PreciseRun, UntouchedRun, widened
from fxprune.offload.files import shelved, stored
from fxprune.offload.prefetch import current_carrier, place_of, to_place
from fxprune.rules.aliasing import alias_roots, writes, written_sources
from fxprune.trace import trace

__all__ = ["Hooks", "InBlocks", "Part", "PartRuns", "cut", "numbers", "observe", "parts_by_weights"]


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
        change[i + 1] += numbers(op)
        change[last + 1] -= numbers(op)
    found, now = [], 0
    for step in change[: len(ops) + 1]:
        now += step
        found.append(now)
    return found


def numbers(node: fx.Node) -> int:
    """Return how many numbers a node gives, at the sizes that the graph was traced with."""
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


Inputs = Mapping[str, Any]
Hooks = Mapping[fx.Node, Callable[[Any], Any]]
"""What to call with the value of a node; what it returns takes the place of the value, where that is anything."""
NOTHING: Hooks = MappingProxyType({})

_PART = 0.1
"""Of the bytes of the weights: a part of the graph that runs at a time."""


def parts_by_weights(graph_module: fx.GraphModule) -> list[Part]:
    """Return the parts of a graph, each with a tenth of the bytes of its weights, or with one that is more."""
    costs = {name: float(tensor.nbytes) for name, tensor in weights(graph_module)}
    return cut(graph_module.graph, costs, _PART * sum(costs.values()))


class PartRuns:
    """Samples on their way through the parts of a graph.

    Args:
        graph_module: the graph.
        parts: from :func:`cut`.
        samples: the inputs of each sample, by name.
        reached: names of weights whose gradients are wanted.
        precise: compute in float32 at least, whatever the dtypes of weights and casts.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        parts: Sequence[Part],
        samples: Sequence[Inputs],
        reached: Collection[str],
        *,
        precise: bool = False,
    ) -> None:
        self.parts = parts
        self.graph_module = graph_module
        self.home, self.place, self.carrier = device_of(graph_module), place_of(graph_module), current_carrier()
        self.run = (_PrecisePartRun if precise else _PartRun)(graph_module)
        self.behind = _behind(graph_module.graph, reached)
        places = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self.inputs = samples
        self.values: list[dict[fx.Node, Any]] = [
            {node: self.run.taken(value) for node, value in zip(places, inputs.values(), strict=True)}
            for inputs in samples
        ]
        self.gradients: list[dict[fx.Node, torch.Tensor]] = [{} for _ in samples]
        self.brought: Part | None = None

    def forward(self, part: Part, watch: Hooks | None = None) -> Iterator[int]:
        """Run a part for each sample and keep what it gives; yields the number of each sample when it is done.

        Args:
            part: the first one, or one before which :meth:`forward` has run.
            watch: what to call with the value of a node, where the part has it.
        """
        self._bring(part, 1)
        for number, values in enumerate(self.values):
            with torch.no_grad(), computing(self.inputs[number]):
                takes = {node: to_place(values[node], self.place) for node in part.takes}
                env = self.run.part(part, takes, {}, watch or {})
            values.update({node: self._kept(env[node]) for node in part.gives})
            yield number

    def backward(
        self,
        part: Part,
        weights: Callable[[int], Mapping[str, torch.Tensor]],
        loss: Callable[[int, Any], torch.Tensor],
        watch: Callable[[int], Hooks] = lambda _: NOTHING,
    ) -> Iterator[int]:
        """Run a part again for each sample, and back; yields the number of each sample when it is done.

        Args:
            part: the last one, or one behind which :meth:`backward` has run.
            weights: given the number of a sample, what is read in place of weights.
            loss: of the last part, given the number of a sample and what the graph returns.
            watch: given the number of a sample, what to call with the value of a node on the way forward.
        """
        last = part is self.parts[-1]
        self._bring(part, -1)
        for number, values in enumerate(self.values):
            gradients = self.gradients[number]
            leaves = {node: self._leaf(node, values[node]) for node in part.takes}
            with computing(self.inputs[number]):
                takes = {node: _on(leaf) for node, leaf in leaves.items()}
                env = self.run.part(part, takes, weights(number), watch(number))
            if last:
                loss(number, env[part.nodes[-1]]).backward()
            else:
                ends = [node for node in part.gives if node in gradients and env[node].requires_grad]
                if ends:
                    torch.autograd.backward(
                        [env[node] for node in ends], [self._there(gradients.pop(node)) for node in ends]
                    )
            del env
            for node, leaf in leaves.items():
                if isinstance(leaf, torch.Tensor) and leaf.grad is not None:
                    found, more = gradients.get(node), to_place(leaf.grad, self.home)
                    gradients[node] = self._kept(more if found is None else found + more)
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

    def value(self, node: fx.Node) -> Any:
        """What a node gave in the part that runs, while something behind it is still to use it."""
        return self.run.env[node]

    def tensor(self, name: str) -> torch.Tensor:
        """A weight that the part reads which runs, or ran last, on the device that it runs on."""
        return self.run.held[name] if name in self.run.held else get_tensor(self.graph_module, name)

    def _bring(self, part: Part, step: int) -> None:
        """Have the weights of a part on the device, and those of the one that runs next on their way there."""
        if self.carrier is None or part is self.brought:
            return
        self.brought = part
        self.run.held = {name: self.run.held[name] for name in part.reads if name in self.run.held}
        missing = [name for name in part.reads if name not in self.run.held]
        there = self.carrier.carry([get_tensor(self.graph_module, name) for name in missing])
        self.run.held = self.run.held | dict(zip(missing, there, strict=True))
        number = self.parts.index(part) + step
        following = self.parts[number].reads if 0 <= number < len(self.parts) else ()
        self.carrier.ahead(get_tensor(self.graph_module, name) for name in following if name not in self.run.held)

    def _there(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = to_place(value, self.place)
        return found

    def _kept(self, value: Any) -> Any:
        return stored(to_place(value.detach(), self.home)) if isinstance(value, torch.Tensor) else value

    def _leaf(self, node: fx.Node, value: Any) -> Any:
        value = to_place(value, self.place)
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
        self.held: dict[str, torch.Tensor] = {}
        self.last_uses: dict[Part, dict[fx.Node, list[fx.Node]]] = {}

    def part(
        self,
        part: Part,
        takes: Mapping[fx.Node, Any],
        weights: Mapping[str, torch.Tensor],
        watch: Hooks = NOTHING,
    ) -> Mapping[Any, Any]:
        """Return the values of what a part gives, and of the output of the graph."""
        if part not in self.last_uses:
            self.last_uses[part] = _last_uses(part)
        freed = self.last_uses[part]
        self.weights, self.env, self._copies = weights, dict(takes), {}
        for node in part.nodes:
            self.env[node] = self.run_node(node)
            if node in watch:
                other = watch[node](self.env[node])
                self.env[node] = self.env[node] if other is None else other
            for value in freed.get(node, ()):
                del self.env[value]
        found, self.env, self.weights = self.env, {}, {}
        return found

    def read(self, name: str) -> Any:
        """Return a weight where it was brought to."""
        return self.held[name] if name in self.held else super().read(name)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight, or what is read in its place."""
        return self.weights[target] if target in self.weights else super().get_attr(target, args, kwargs)

    def taken(self, value: Any) -> Any:
        """Return an input as it is taken."""
        return value


class _PrecisePartRun(_PartRun, PreciseRun):
    """One that computes in float32 at least."""

    def taken(self, value: Any) -> Any:
        """Return an input, cast up where it is a narrower float."""
        return example_of(value, widened)


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


def _on(leaf: Any) -> Any:
    """Return a value that ops may write to without writing to the leaf, which gets its gradient."""
    return leaf.view_as(leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


Observers = Mapping[fx.Node, Callable[[Any], None]]


def observe(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    watch: Observers,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
    *,
    in_turn: bool = True,
) -> None:
    """Run a graph, in float32 at least, over samples, as far as the last node that is watched.

    Values are freed after their last use, so that memory is for what is alive at one node, of one batch.

    Args:
        graph_module: the graph.
        samples: single samples.
        watch: what to call with the value of a node, once for each batch.
        batch: samples that run at once.
        track: shows progress over the batches.
        in_turn: all values of a batch have to be seen before those of the next one. Without, weights that are carried
            to another device go there once for all batches, and the graph runs in parts.

    Raises:
        CalibrationError: the graph cannot compute the samples.
    """
    nodes = list(graph_module.graph.nodes)
    last = max((i for i, node in enumerate(nodes) if node in watch), default=-1)
    batches = list(stacked(samples, graph_module, batch))
    if not in_turn and current_carrier() is not None and not written_sources(graph_module.graph):
        _run_in_parts(graph_module, batches, watch, track)
        return
    with torch.no_grad():
        for inputs in track(batches, len(batches)):
            with computing(inputs):
                _run(PreciseRun(graph_module), inputs, nodes[: last + 1], watch)


def _run_in_parts(
    graph_module: fx.GraphModule,
    batches: Sequence[Mapping[str, Any]],
    watch: Observers,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> None:
    """Run all batches through one part of the graph, and then through the next one."""
    parts = parts_by_weights(graph_module)
    last = max((i for i, part in enumerate(parts) if not watch.keys().isdisjoint(part.nodes)), default=-1)
    runs = PartRuns(graph_module, parts, batches, (), precise=True)
    steps = (number for part in parts[: last + 1] for number in runs.forward(part, watch))
    for _ in track(steps, len(batches) * (last + 1)):
        pass


def _run(run: fx.Interpreter, inputs: Mapping[str, torch.Tensor], nodes: Sequence[fx.Node], watch: Observers) -> None:
    run.args_iter = iter(inputs.values())
    for node in nodes:
        run.env[node] = run.run_node(node)
        if node in watch:
            watch[node](run.env[node])
        for value in run.user_to_last_uses.get(node, ()):
            del run.env[value]


class InBlocks:
    """A language model whose weights are read once for all windows: those in files may be more than memory holds.

    Its graph is cut where the fewest numbers are alive, into parts of a tenth of the bytes of the weights. What is
    alive between two parts is kept in a temporary folder. Called, it runs on one batch, and reads all weights for it.

    Args:
        model: a Hugging Face model that can be traced, or whatever takes ``input_ids`` alone.

    Raises:
        TraceError: it cannot be traced.
        EvaluationError: it takes more than token ids.
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
        """Return what the model returns for token ids ``(batch, tokens)``."""
        return self.graph_module(input_ids)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return device_of(self.graph_module)

    def outputs(
        self, windows: Sequence[torch.Tensor], track: Callable[[Iterable[Any], int], Iterable[Any]]
    ) -> Iterator[Any]:
        """Yield what the model returns for each batch of windows.

        Args:
            windows: token ids, each ``(batch, tokens)``.
            track: shows progress over all batches in all parts.
        """
        found: list[Any] = []
        watch = {node: found.append for node in self.graph_module.graph.nodes if node.op == "output"}
        with tempfile.TemporaryDirectory() as place, shelved(Path(place), None):
            runs = PartRuns(self.graph_module, self.parts, [{self.name: ids} for ids in windows], ())
            steps = (part for part in self.parts for _ in runs.forward(part, watch))
            for _ in track(steps, len(self.parts) * len(windows)):
                while found:
                    yield found.pop()
