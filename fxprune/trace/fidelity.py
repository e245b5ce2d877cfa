"""Comparison of a graph with its module, and the sizes up to which the graph holds.

If the code of a model branches on a size, as in ``if x.shape[1] > 512``, tracing follows the branch of the example. The
conditions for it come from torch's symbolic shapes; the graph asserts them and names the line that each comes from.

A gradient is reduced to a few numbers as soon as it is computed, so that only one is held at a time.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.data.calibration import make_inputs, resize_inputs
from fxprune.errors import PassError
from fxprune.graph.compat import (
    evaluate_expression,
    fake_mode,
    guards_of,
    is_free,
    size_hint,
    size_range,
    spell_expression,
    tree_map,
)
from fxprune.graph.context import preserve_rng, quiet
from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.shapes import failed_check
from fxprune.graph.tensors import (
    TRACED,
    get_tensor,
    has_meta_weights,
    input_tensors,
    is_input,
    map_tensors,
    tensors_of,
    weight_bytes,
    weights,
)
from fxprune.offload.files import offload_large
from fxprune.rules.picked import PickingRun
from fxprune.rules.registry import written_sources
from fxprune.trace.inputs import alias_twin, free_axes, private_parameters, without_cache

aten = torch.ops.aten

Size = tuple[fx.Node, int]
"""A size of an input: the node of the tensor, and the axis."""


def input_sizes(graph: fx.Graph) -> dict[Size, int | torch.SymInt]:
    """The sizes of the inputs along the axes that tracing lets vary if it can."""
    return {
        (node, axis): node.meta["val"].shape[axis]
        for node, _ in input_tensors(graph)
        for axis in range(free_axes(node.meta["val"]))
    }


def limit_sizes(graph_module: fx.GraphModule, found: Mapping[Size, int | torch.SymInt]) -> tuple[str, ...]:
    """Add assertions that refuse input sizes for which the model would compute something else.

    ``found`` has the sizes found by tracing, before some of them were pinned. Returns the limits that come from
    branches of the code, in words.
    """
    free: dict[Size, Any] = {
        place: size for place, size in found.items() if isinstance(size, torch.SymInt) and is_free(size)
    }
    fixed = {place: size_hint(now) for place, now in input_sizes(graph_module.graph).items() if not is_free(now)}
    checks = _SizeAssertions(graph_module.graph, fixed)
    with graph_module.graph.inserting_before(checks.first):
        for place, size in free.items():
            checks.tie(place, size)
        guards = guards_of(next(iter(free.values()))) if free else []
        notes = [note for expression, line in guards if (note := checks.guard(expression, line))]
        notes += [note for place, size in free.items() if (note := checks.bound(place, size))]
        for place, number in fixed.items():
            checks.compare(operator.eq, place, number)
    return tuple(dict.fromkeys(notes))


def limit_size(graph_module: fx.GraphModule, how: Callable[[Any, Any], Any], place: Size, size: int) -> str:
    """Add an assertion that compares the size of an axis with ``size``; return the limit in words."""
    checks = _SizeAssertions(graph_module.graph, {})
    with graph_module.graph.inserting_before(checks.first):
        return checks.compare(how, place, size)


_SYMBOLS = {operator.eq: "==", operator.ne: "!=", operator.le: "<="}


class _SizeAssertions:
    """Inserts assertions about sizes into a graph, whose first op is ``first``.

    ``fixed`` has the sizes that can be one number only; conditions on these alone hold already.
    """

    def __init__(self, graph: fx.Graph, fixed: Mapping[Size, int]) -> None:
        self.graph = graph
        self.fixed = fixed
        inputs = dict(input_tensors(graph))
        self.first = [node for node in graph.nodes if is_input(node)][-1].next
        self.text = {(n, i): f"{name}.shape[{i}]" for n, name in inputs.items() for i in range(n.meta["val"].dim())}
        self.symbols: dict[Any, Size] = {}
        self.bounded: set[Size] = set()

    def tie(self, place: Size, size: torch.SymInt) -> None:
        """Assert a size that tracing found to follow from others; any other size defines its symbol."""
        expression = size.node.expr
        if expression.is_Symbol and expression not in self.symbols:
            self.symbols[expression] = place
        elif expression.free_symbols <= set(self.symbols):
            value = self._evaluate(expression)
            self._assert(operator.eq(self._read(place), value), f"{self.text[place]} == {self._spell(expression)}")

    def guard(self, expression: Any, line: str) -> str:
        """Assert a condition if it is on sizes of inputs; return it in words."""
        if not expression.free_symbols <= set(self.symbols):
            return ""
        places = [self.symbols[symbol] for symbol in expression.free_symbols]
        if all(place in self.fixed for place in places):
            return ""
        if len(places) == 1 and getattr(expression, "rel_op", "") in ("<", "<="):
            self.bounded.update(places)
        text = f"{self._spell(expression)} ({line})"
        try:
            self._assert(self._evaluate(expression), text)
        except Exception:  # torch's arithmetic on sizes may need numbers: then only the traced ones are known to work
            traced = [size_hint(node.meta["val"].shape[axis]) for node, axis in places]
            pairs = zip(places, traced, strict=True)
            text = ", ".join(self.compare(operator.eq, place, size, f" ({line})") for place, size in pairs)
        return text

    def bound(self, place: Size, size: torch.SymInt) -> str:
        """Assert an upper bound of a size, such as the rows of a table; return the condition in words."""
        largest = size_range(size)[1]
        if largest is None or place in self.bounded or place in self.fixed or not size.node.expr.is_Symbol:
            return ""
        return self.compare(operator.le, place, largest)

    def compare(self, how: Callable[[Any, Any], Any], place: Size, number: int, why: str = "") -> str:
        """Assert a comparison of a size with a number; return the condition in words."""
        text = f"{self.text[place]} {_SYMBOLS[how]} {number}{why}"
        self._assert(how(self._read(place), number), text)
        return text

    def _read(self, place: Size) -> fx.Proxy:
        node = self.graph.call_function(aten.sym_size.int, place)
        node.meta["val"] = place[0].meta["val"].shape[place[1]]
        return fx.Proxy(node)

    def _evaluate(self, expression: Any) -> Any:
        values = {symbol: self._read(self.symbols[symbol]) for symbol in expression.free_symbols}
        return evaluate_expression(expression, values)

    def _assert(self, condition: Any, text: str) -> None:
        self.graph.call_function(aten._assert_scalar.default, (condition.node, f"{TRACED}for inputs with {text}"))

    def _spell(self, expression: Any) -> str:
        return spell_expression(expression, {s: self.text[place] for s, place in self.symbols.items()})


_LOSSY = {operator.mod, operator.floordiv}
"""Ops on sizes whose results tracing may take for constants: the number of chunks of a short input is 1."""

_OTHER_SIZES = (3, 64)
"""A batch and a number of tokens, those that work is counted at, that a graph with free sizes must take."""


def pin_sizes(graph_module: fx.GraphModule) -> str:
    """Make the sizes of inputs static in the metadata if the graph takes one size only; return them in words.

    A size may be free, in a range, or one number. A graph that divides sizes is also run without storage at other
    sizes.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    tensors = [node for node in inputs if isinstance(node.meta["val"], torch.Tensor)]
    pinned = [note for node in tensors if (note := _pin(node))]
    divides = any(node.target in _LOSSY for node in graph_module.graph.nodes)
    if divides and not _runs_at_other_sizes(graph_module, inputs):
        pinned = [note for node in tensors if (note := _pin(node, all_but_batch=True))] or pinned
    return ", ".join(dict.fromkeys(pinned))


def _pin(node: fx.Node, all_but_batch: bool = False) -> str:
    """Make the sizes of an input static that are one number, or all but the first; return the shape if any is."""
    value = node.meta["val"]
    pinned: set[int] = set()
    for axis, size in enumerate(value.shape):
        smallest, largest = size_range(size)
        if is_free(size) and (axis > 0 if all_but_batch else smallest == largest):
            pinned.add(axis)
    sizes = [size_hint(s) if axis in pinned or not is_free(s) else s for axis, s in enumerate(value.shape)]
    if all(isinstance(size, int) for size in value.shape) or not hasattr(value, "fake_mode"):
        return ""
    with value.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    shape = ", ".join(str(size) if isinstance(size, int) else "any" for size in sizes)
    fixes = bool(pinned) or any(not is_free(size) for size in value.shape[: free_axes(value)])
    return f"{node.target} of shape ({shape}) alone" if fixes else ""


def _runs_at_other_sizes(graph_module: fx.GraphModule, inputs: list[fx.Node]) -> bool:
    def other(value: torch.Tensor) -> torch.Tensor:
        wanted = [_OTHER_SIZES[min(i, 1)] if is_free(size) else size_hint(size) for i, size in enumerate(value.shape)]
        return torch.zeros(wanted, dtype=value.dtype)

    try:
        with quiet(), fake_mode(), torch.no_grad():
            fx.Interpreter(graph_module).run(*(map_tensors(node.meta["val"], other) for node in inputs))
    except Exception:  # ops may refuse sizes with any error
        return False
    return True


_TOLERANCE = 1e-5
"""Accepted difference in float32: the same ops in the same order give the same numbers, another kernel a last digit."""

_LARGE_GRADIENTS = 0.05
"""Bytes of a gradient, by those of the weights, from which on it goes to a file if they are in files."""

Result = TypeVar("Result")
Outputs = list[torch.Tensor]
GradientDigest = tuple[torch.Tensor, torch.Tensor]
"""The sums of a gradient along its last axis, and its norm."""


class SideBySide:
    """A graph and its module, run side by side on ``given`` inputs, if any.

    Neither is changed: they run on the same weights, on copies of buffers and inputs, and draw the same random numbers.
    """

    def __init__(self, graph_module: fx.GraphModule, model: nn.Module, given: Mapping[str, Any] | None) -> None:
        self.graph_module = graph_module
        self.model = model
        self.inputs = make_inputs(graph_module, given, seed=0)
        self.written = private_parameters(model, self.inputs)
        self._first: Outputs | None = None

    def resized(self, sizes: tuple[int, int]) -> dict[str, Any] | None:
        """Inputs with other sizes; None if the graph does not take them or its sizes are fixed."""
        inputs = resize_inputs(self.graph_module, self.inputs, sizes)
        shapes, other = ([leaf.shape for leaf in tensors_of(values)] for values in (self.inputs, inputs))
        return None if shapes == other or failed_check(self.graph_module, inputs) else inputs

    def doubled(self, places: Sequence[Size]) -> dict[str, Any]:
        """Inputs twice as large along some axes."""
        wanted = {(id(node.meta["val"]), axis) for node, axis in places}

        def double(traced: Any, value: Any) -> Any:
            for axis in range(traced.dim() if isinstance(traced, torch.Tensor) else 0):
                value = torch.cat([value, value], axis) if (id(traced), axis) in wanted else value
            return value

        traced = {str(n.target): n.meta["val"] for n in self.graph_module.graph.nodes if n.op == "placeholder"}
        return {name: tree_map(double, traced[name], value) for name, value in self.inputs.items()}

    def error(self, inputs: Mapping[str, Any]) -> float | None:
        """The largest relative difference of outputs; infinite if the graph fails; None if the module does."""
        with torch.no_grad():
            wanted = _run_or_none(lambda: self._run_module(inputs)[0])
            self._first = wanted if inputs is self.inputs else self._first
            got = None if wanted is None else _run_or_none(lambda: self._run_graph(inputs)[0])
        if wanted is None:
            return None
        return float("inf") if got is None else _difference(wanted, got)

    def gradients(self) -> dict[str, float]:
        """The relative difference of the gradient of each parameter; empty if there are no gradients.

        One that is far smaller than those of its module's other parameters is compared with these: the gradient of a
        key bias is zero but for rounding, since softmax ignores what is added to all scores.
        """
        try:
            with offload_large(_LARGE_GRADIENTS * weight_bytes(self.graph_module)):
                wanted = _run_or_none(lambda: _gradient_digests(*self._run_module(self.inputs)))
                got = None if wanted is None else _run_or_none(lambda: _gradient_digests(*self._run_graph(self.inputs)))
        except (MemoryError, torch.OutOfMemoryError):  # nothing is known about them
            wanted = None
        if wanted is None:
            return {}
        found: dict[str, float] = {}
        known = [(name, parameter) for name, parameter in self.model.named_parameters() if id(parameter) in wanted]
        floors: dict[str, float] = {}
        for name, parameter in known:
            owner = name.rpartition(".")[0]
            floors[owner] = max(floors.get(owner, 0.0), _ZERO_GRADIENT * float(wanted[id(parameter)][1]))
        for name, parameter in known:
            sums, norm = wanted[id(parameter)]
            graph_sums, graph_norm = (got or {}).get(id(parameter), (torch.zeros(()), torch.zeros(())))
            scale = max(float(norm), float(graph_norm), floors[name.rpartition(".")[0]])
            difference = max(float((sums - graph_sums).norm()), float((norm - graph_norm).abs()))
            found[name] = difference / scale if scale > 0 else 0.0 if scale == 0 else float("inf")
        return found

    def first_difference(self) -> str:
        """The first module whose outputs differ, and the node that computes them in the graph."""
        twin = alias_twin(self.model, self.written)
        outputs: list[tuple[str, torch.Tensor]] = []  # the first of each call, in the order in which calls end

        def record(path: str, output: Any) -> None:
            found = next((leaf for leaf in tensors_of(output) if leaf.is_floating_point()), None)
            if found is not None:
                outputs.append((path, found.clone()))

        for path, module in twin.named_modules():
            module.register_forward_hook(lambda _module, _args, output, path=path: record(path, output))
        with torch.no_grad(), _same_randomness(), quiet():
            twin(**(without_cache(twin) | _copies(self.inputs)))
        del twin, module  # before the graph runs, which keeps all its values
        run = _AliasRun(self.graph_module, {}, keep=True)
        with torch.no_grad(), _same_randomness():
            run.run(*_copies(self.inputs).values())
        last: dict[str, tuple[fx.Node, torch.Tensor]] = {}
        for node, value in run.env.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and node.op == "call_function":
                for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                    last[str(path)] = node, value
        for path, wanted in outputs:
            if path not in last:
                continue
            node, found = last[path]
            if found.shape == wanted.shape and not _difference([wanted], [found]) <= _TOLERANCE:
                return f"{node.name} ({node.target}) in {path or 'the model'}"
        return "the outputs"

    def is_random(self) -> bool:
        """Whether the outputs of the module, once compared with those of the graph, depend on the random seed."""
        with torch.no_grad():
            return self._first is not None and _difference(self._first, self._run_module(self.inputs, seed=1)[0]) != 0

    def _run_module(self, inputs: Mapping[str, Any], seed: int = 0) -> tuple[Outputs, dict[int, torch.Tensor]]:
        twin = alias_twin(self.model, self.written)
        with _same_randomness(seed), quiet():
            output = twin(**(without_cache(twin) | _copies(inputs)))
        pairs = zip(self.model.parameters(), twin.parameters(), strict=True)
        return tensors_of(output), {id(parameter): alias for parameter, alias in pairs}

    def _run_graph(self, inputs: Mapping[str, Any]) -> tuple[Outputs, dict[int, torch.Tensor]]:
        aliases: dict[int, torch.Tensor] = {}
        written = written_sources(self.graph_module.graph)
        for name, tensor in weights(self.graph_module):
            if isinstance(tensor, nn.Parameter) and not tensor.is_inference() and tensor.is_floating_point():
                alias = tensor.detach().clone() if name in written else tensor.detach()
                aliases[id(tensor)] = alias.requires_grad_()
            else:
                aliases[id(tensor)] = tensor.detach().clone()
        with _same_randomness():
            output = _AliasRun(self.graph_module, aliases).run(*_copies(inputs).values())
        return tensors_of(output), aliases


def _gradient_digests(outputs: Outputs, aliases: Mapping[int, torch.Tensor]) -> dict[int, GradientDigest]:
    """The digest of the gradient of each tensor in ``aliases`` that requires one."""
    found: dict[int, GradientDigest] = {}

    def digest(key: int, alias: torch.Tensor) -> None:
        assert alias.grad is not None
        gradient = alias.grad.float()
        found[key] = (gradient.sum(-1) if gradient.dim() else gradient, gradient.norm())
        alias.grad = None

    for key, alias in aliases.items():
        if alias.requires_grad:
            alias.register_post_accumulate_grad_hook(lambda alias, key=key: digest(key, alias))
    losses = []
    for out in outputs:
        if out.requires_grad:  # a fixed gradient of the loss, in which no two neighbours are alike
            direction = torch.cos(torch.arange(out.numel(), device=out.device)).reshape(out.shape)
            losses.append((out.float() * direction).sum())
    if losses:
        torch.stack(losses).sum().backward()
    zero = torch.zeros(())
    return {key: found.get(key, (zero, zero)) for key, alias in aliases.items() if alias.requires_grad}


def _run_or_none(run: Callable[[], Result]) -> Result | None:
    try:
        return run()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # code may refuse sizes and values with any error
        return None


class _AliasRun(PickingRun):
    """Runs a graph with other tensors in place of its weights."""

    def __init__(self, graph_module: fx.GraphModule, aliases: Mapping[int, torch.Tensor], keep: bool = False) -> None:
        super().__init__(graph_module, garbage_collect_values=not keep)
        self.aliases = aliases

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = get_tensor(self.module, str(target))
        return self.aliases[id(own)] if id(own) in self.aliases else own.detach().clone()


@contextmanager
def _same_randomness(seed: int = 0) -> Iterator[None]:
    """Seed the random numbers of torch, Python and numpy, and restore their states."""
    with preserve_rng():
        # torch.manual_seed notes the seed, with the stack, for each kind of device that may be used one day
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def _copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: map_tensors(value, torch.clone) for name, value in inputs.items()}


def _difference(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """The largest difference of values, relative to the largest value; infinite if they cannot be compared."""
    if [(w.shape, w.dtype) for w in wanted] != [(g.shape, g.dtype) for g in got]:
        return float("inf")
    worst = 0.0
    for want, have in zip(wanted, got, strict=True):
        if torch.equal(want, have) or not want.numel():
            continue
        a, b = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (want, have))
        finite = a.isfinite()
        if not torch.equal(a.masked_fill(finite, 0).nan_to_num(7.0), b.masked_fill(finite, 0).nan_to_num(7.0)):
            return float("inf")
        a, b = a.masked_fill(~finite, 0), b.masked_fill(~finite, 0)
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny)))
    return worst


_SECOND_SIZES = (3, 5)
"""Batch and tokens of the second comparison: the first one has two samples of more tokens."""

_ZERO_GRADIENT = 1e-3
"""A gradient below this fraction of the largest in its module may be nothing but rounding."""

_GRADIENT_FACTOR = 100.0
"""Accepted difference of gradients, in units of that of outputs: gradients are summed over all tokens."""


@dataclass(frozen=True)
class Fidelity(Fact):
    """How close a graph is to the module it was traced from.

    Args:
        error: the largest difference of outputs, relative to the largest output; None if nothing could be run.
        gradients: the same for the gradients of the parameters; None if there are none.
        unlike: the parameters whose gradients differ by more than rounding.
        notes: limits of the graph, in words.
        where: the place at which the outputs begin to differ; empty if they do not.
        random: whether the module draws random numbers in evaluation mode.
    """

    error: float | None
    gradients: float | None = None
    unlike: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    where: str = ""
    random: bool = False


@quiet()  # entering it for each run clears the caches of all loggers each time
def compare_with_module(graph_module: fx.GraphModule, model: nn.Module, given: Mapping[str, Any] | None) -> Fidelity:
    """Compare a graph with its module; the graph gets checks that refuse sizes at which they differ.

    If any weight is on ``meta``, nothing is compared. ``given`` are the inputs of the caller, if any.
    """
    if has_meta_weights(graph_module) or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return Fidelity(None)
    accepted = max(tolerance(parameter.dtype) for parameter in model.parameters())
    pair = SideBySide(graph_module, model, given)
    error = pair.error(pair.inputs)
    if error is None:
        return Fidelity(None, notes=("not compared with the module: it does not run on the inputs made for it",))
    second = pair.resized(_SECOND_SIZES)
    error = max(error, (second and pair.error(second)) or 0.0)
    if not error <= accepted:
        return Fidelity(error, where=pair.first_difference() if math.isfinite(error) else "the outputs")
    notes = (*_forbid_one(pair, accepted), *_fix_other_axes(pair, accepted))
    gradients = pair.gradients()
    unlike = tuple(name for name, difference in gradients.items() if not difference <= accepted * _GRADIENT_FACTOR)
    if unlike:
        notes += (
            f"the gradients of {_abbreviate(unlike)} differ from the module's: do not train the graph or prune by a "
            "criterion of gradients",
        )
    is_random = pair.is_random()
    if is_random:
        notes += ("the module draws random numbers in evaluation: choices of its Python code are fixed in the graph",)
    return Fidelity(error, max(gradients.values(), default=None), unlike, notes, random=is_random)


def require_gradients(graph_module: fx.GraphModule, asked_by: str) -> None:
    """Check that a graph has gradients for the pass ``asked_by``, not known to differ from the module's."""
    made = next((name for name, tensor in weights(graph_module) if tensor.is_inference()), None)
    if made is not None:
        raise PassError(
            f"{made} was made in inference mode, and takes no part in gradients",
            where=f"pass {asked_by}",
            remedy="Load the model outside torch.inference_mode(), or choose a criterion without gradients, such as l2",
        )
    found = facts_of(graph_module).get(Fidelity)
    if found is not None and found.unlike:
        raise PassError(
            f"the gradients of {_abbreviate(found.unlike)} differ from the module's: its code has a custom backward",
            where=f"pass {asked_by}",
            remedy="Choose a criterion without gradients, such as l2, or remove the custom autograd.Function",
        )


def _abbreviate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def tolerance(dtype: torch.dtype) -> float:
    """The accepted difference for weights in ``dtype``: that of float32, or a few units in the last place if larger."""
    return max(_TOLERANCE, 4 * torch.finfo(dtype).eps)


def _forbid_one(pair: SideBySide, accepted: float) -> list[str]:
    """Add checks that refuse one sample, or one token, if the module takes another branch for it; return the limits.

    Tracing assumes that a size that varies is not 1.
    """
    graph_module, notes = pair.graph_module, []
    for axis, sizes in ((0, (1, _SECOND_SIZES[1])), (1, (_SECOND_SIZES[0], 1)), (0, (1, 1))):
        inputs = pair.resized(sizes)
        error = None if inputs is None else pair.error(inputs)
        if error is not None and not error <= accepted:
            places = [(n, axis) for n, _ in input_tensors(graph_module.graph) if axis < free_axes(n.meta["val"])]
            notes += [f"holds for {limit_size(graph_module, operator.ne, place, 1)}" for place in places]
    return notes


def _fix_other_axes(pair: SideBySide, accepted: float) -> list[str]:
    """Add checks of the sizes of other axes than batch and tokens that the graph cannot vary; return the limits.

    Tracing takes such a size, as of images, for a constant. A network of convolutions alone runs at any size. Axes of
    the same size are doubled together, and one by one where the module does not take that.
    """
    graph_module, notes = pair.graph_module, []
    alike: dict[int, list[Size]] = {}
    for node, _ in input_tensors(graph_module.graph):
        for axis in range(free_axes(node.meta["val"]), node.meta["val"].dim()):
            alike.setdefault(node.meta["val"].shape[axis], []).append((node, axis))
    trials = list(alike.values())
    for places in trials:
        error = pair.error(pair.doubled(places))
        if error is None and len(places) > 1:
            trials += [[place] for place in places]
        elif error is not None and not error <= accepted:
            for node, axis in places:
                size = node.meta["val"].shape[axis]
                notes.append(f"holds for {limit_size(graph_module, operator.eq, (node, axis), size)}")
    return notes
