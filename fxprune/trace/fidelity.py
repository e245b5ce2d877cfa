"""Graph against module: outputs and gradients compared.

Of each gradient a few numbers are put down, so that no more than one is held at a time.

Tracing follows one example through the code of a module, in another dtype perhaps, and knows no gradients. So the two
are compared at two sizes and, where the graph takes one sample or one token, at that too; and by the gradients of all
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.data.verification import make_inputs, resize_inputs
from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.context import quiet
from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.shapes import refusal
from fxprune.graph.tensors import example_of, get_tensor, input_tensors, on_meta, weights
from fxprune.trace.inputs import alias_twin, free_axes, without_cache
from fxprune.trace.limits import forbid

__all__ = ["TOLERANCE", "Fidelity", "Probe", "assess", "require_gradients"]

TOLERANCE = 1e-5
"""Accepted difference in float32: the same ops in the same order give the same numbers, another kernel a last digit."""

Outputs = list[torch.Tensor]
Digests = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Probe:
    """A graph and its module, run side by side.

    Neither is changed: they run on the same weights, on copies of buffers and inputs, and draw the same random numbers.

    Args:
        graph_module: the graph.
        model: the module.
        given: the inputs of the caller, if any.
    """

    def __init__(self, graph_module: fx.GraphModule, model: nn.Module, given: Mapping[str, Any] | None) -> None:
        self.graph_module = graph_module
        self.model = model
        self.inputs = make_inputs(graph_module, given, seed=0)

    def resized(self, sizes: tuple[int, int]) -> dict[str, Any] | None:
        """Return inputs of other sizes; None if the graph does not take such or has no others."""
        inputs = resize_inputs(self.graph_module, self.inputs, sizes)
        same = _shapes(inputs) == _shapes(self.inputs)
        return None if same or refusal(self.graph_module, inputs) else inputs

    def error(self, inputs: Mapping[str, Any]) -> float | None:
        """Return the largest relative difference of outputs; infinite if the graph fails; None if the module does."""
        with torch.no_grad():
            wanted = self._attempt(lambda: self._run_module(inputs)[0])
            got = None if wanted is None else self._attempt(lambda: self._run_graph(inputs)[0])
        if wanted is None:
            return None
        return float("inf") if got is None else _difference(wanted, got)

    def gradients(self) -> dict[str, float]:
        """Return the relative difference of the gradient of each parameter; empty where there are no gradients."""
        wanted = self._attempt(lambda: self._digests(*self._run_module(self.inputs)))
        got = None if wanted is None else self._attempt(lambda: self._digests(*self._run_graph(self.inputs)))
        if wanted is None:
            return {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[key]: _gradient_difference(key, wanted, got or {}) for key in wanted if key in names}

    def first_apart(self) -> str:
        """Return the first module whose outputs differ, and the node that gives them in the graph."""
        seen = _seen_by_module(self)
        with torch.no_grad(), _same_randomness():
            run = _AliasRun(self.graph_module, {}, keep=True)
            run.run(*_copies(self.inputs).values())
        last = _last_by_module(self.graph_module, run.env)
        for path, value in seen:
            node = last.get(path)
            found = run.env.get(node) if node is not None else None
            if node is None or not isinstance(found, torch.Tensor) or found.shape != value.shape:
                continue
            if not _difference([value], [found]) <= TOLERANCE:
                return f"{node.name} ({node.target}) in {path or 'the model'}"
        return "the outputs"

    def _run_module(self, inputs: Mapping[str, Any]) -> tuple[Outputs, dict[int, torch.Tensor]]:
        twin = alias_twin(self.model)
        with _same_randomness(), quiet():
            output = twin(**(without_cache(twin) | _copies(inputs)))
        pairs = zip(self.model.parameters(), twin.parameters(), strict=True)
        return _tensors(output), {id(parameter): alias for parameter, alias in pairs}

    def _run_graph(self, inputs: Mapping[str, Any]) -> tuple[Outputs, dict[int, torch.Tensor]]:
        aliases: dict[int, torch.Tensor] = {}
        for _, tensor in weights(self.graph_module):
            if isinstance(tensor, nn.Parameter) and not tensor.is_inference():
                aliases[id(tensor)] = tensor.detach().requires_grad_()
            else:
                aliases[id(tensor)] = tensor.detach().clone()
        with _same_randomness():
            output = _AliasRun(self.graph_module, aliases).run(*_copies(inputs).values())
        return _tensors(output), aliases

    def _digests(self, outputs: Outputs, aliases: Mapping[int, torch.Tensor]) -> Digests:
        """Return what is put down of each gradient: its sums along the last axis, and its size."""
        found: Digests = {}

        def put_down(key: int, alias: torch.Tensor) -> None:
            assert alias.grad is not None
            gradient = alias.grad.float()
            found[key] = (gradient.sum(-1) if gradient.dim() else gradient, gradient.norm())
            alias.grad = None

        for key, alias in aliases.items():
            if alias.requires_grad:
                alias.register_post_accumulate_grad_hook(lambda alias, key=key: put_down(key, alias))
        parts = [(out.float() * _direction(out)).sum() for out in outputs if out.requires_grad]
        if parts:
            torch.stack(parts).sum().backward()
        zero = torch.zeros(())
        return {key: found.get(key, (zero, zero)) for key, alias in aliases.items() if alias.requires_grad}

    def _attempt(self, run: Any) -> Any:
        try:
            return run()
        except Exception:  # sizes and values that code refuses end in whatever it raises; the caller decides
            return None


class _AliasRun(fx.Interpreter):
    """Runs a graph on other tensors than its own."""

    def __init__(self, graph_module: fx.GraphModule, aliases: Mapping[int, torch.Tensor], keep: bool = False) -> None:
        super().__init__(graph_module, garbage_collect_values=not keep)
        self.aliases = aliases

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the tensor that stands for a weight; a copy of it where there is none."""
        own = get_tensor(self.module, str(target))
        return self.aliases[id(own)] if id(own) in self.aliases else own.detach().clone()


@contextmanager
def _same_randomness() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: example_of(value, torch.clone) for name, value in inputs.items()}


def _shapes(inputs: Mapping[str, Any]) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, torch.Tensor)]


def _tensors(output: Any) -> Outputs:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _direction(value: torch.Tensor) -> torch.Tensor:
    """Return fixed numbers of the shape of ``value``, as a gradient of the loss: no two neighbours alike."""
    return torch.cos(torch.arange(value.numel(), device=value.device)).reshape(value.shape)


def _difference(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of values, relative to the largest one; infinite if there is no comparing."""
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


def _gradient_difference(key: int, wanted: Digests, got: Digests) -> float:
    (sums, size), (own_sums, own_size) = wanted[key], got.get(key, (torch.zeros(()), torch.zeros(())))
    scale = max(float(size), float(own_size))
    if not scale > 0:
        return 0.0 if scale == 0 else float("inf")
    apart = (sums - own_sums).norm(), (size - own_size).abs()
    return max(float(value) / scale for value in apart)


def _seen_by_module(probe: Probe) -> list[tuple[str, torch.Tensor]]:
    """Return the first floating point output of each call of a submodule, in the order in which they are done."""
    twin = alias_twin(probe.model)
    seen: list[tuple[str, torch.Tensor]] = []

    def note(path: str, output: Any) -> None:
        found = next((leaf for leaf in _tensors(output) if leaf.is_floating_point()), None)
        if found is not None:
            seen.append((path, found.clone()))

    for path, module in twin.named_modules():
        module.register_forward_hook(lambda _module, _args, output, path=path: note(path, output))
    with torch.no_grad(), _same_randomness(), quiet():
        twin(**(without_cache(twin) | _copies(probe.inputs)))
    return seen


def _last_by_module(graph_module: fx.GraphModule, values: Mapping[fx.Node, Any]) -> dict[str, fx.Node]:
    """Return the last node that computes floats in each module."""
    last: dict[str, fx.Node] = {}
    for node in graph_module.graph.nodes:
        value = values.get(node)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and node.op == "call_function":
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                last[str(path)] = node
    return last


_SECOND = (3, 5)
"""Batch and tokens of the second comparison: the first one has two samples of more tokens."""

_GRADIENTS = 100.0
"""How much further gradients may lie apart than outputs: they add up over all tokens."""


@dataclass(frozen=True)
class Fidelity(Fact):
    """How close a graph is to the module it was traced from.

    Args:
        error: the largest difference of outputs, relative to the largest output; None where nothing could be run.
        gradients: the same of the gradients of the parameters; None where there are none.
        apart: the parameters whose gradients differ by more than rounding.
        notes: what the user should know, in words.
        where: where the outputs begin to differ; empty where they do not.
    """

    error: float | None
    gradients: float | None = None
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    where: str = ""


def assess(graph_module: fx.GraphModule, model: nn.Module, given: Mapping[str, Any] | None) -> Fidelity:
    """Compare a graph with its module; neither is changed, but that the graph refuses sizes at which they differ.

    Args:
        graph_module: the graph.
        model: the module; on ``meta``, nothing is compared.
        given: the inputs of the caller, if any.
    """
    if on_meta(graph_module) or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return Fidelity(None)
    accepted = max(tolerance(parameter.dtype) for parameter in model.parameters())
    probe = Probe(graph_module, model, given)
    error = probe.error(probe.inputs)
    if error is None:
        return Fidelity(None, notes=("not compared with the module: it does not run on the inputs made for it",))
    second = probe.resized(_SECOND)
    error = max(error, (second and probe.error(second)) or 0.0)
    if not error <= accepted:
        return Fidelity(error, where=probe.first_apart() if math.isfinite(error) else "the outputs")
    notes = tuple(_forbid_one(probe, graph_module, accepted))
    gradients = probe.gradients()
    apart = tuple(name for name, difference in gradients.items() if not difference <= accepted * _GRADIENTS)
    if apart:
        notes += (
            f"the gradients of {_listed(apart)} differ from the module's: do not train the graph, or prune by a "
            "criterion of gradients",
        )
    return Fidelity(error, max(gradients.values(), default=None), apart, notes)


def require_gradients(graph_module: fx.GraphModule, asked_by: str) -> None:
    """Raise if the gradients of a graph are known to be others than those of its module.

    Args:
        graph_module: a graph that was traced.
        asked_by: the name of the pass that needs them.

    Raises:
        PassError: they are.
    """
    found = facts_of(graph_module).get(Fidelity)
    if found is not None and found.apart:
        raise PassError(
            f"the gradients of {_listed(found.apart)} are not those of the module: its code gives them a backward of "
            "their own",
            where=f"pass {asked_by}",
            remedy="Choose a criterion without gradients, such as l2, or take the custom autograd.Function out",
        )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def tolerance(dtype: torch.dtype) -> float:
    """Return the accepted difference for a weight of ``dtype``: a few units in the last place, where that is more."""
    return max(TOLERANCE, 4 * torch.finfo(dtype).eps)


def _forbid_one(probe: Probe, graph_module: fx.GraphModule, accepted: float) -> list[str]:
    """Let the graph refuse one sample, or one token, where the module takes another branch for it; return the limits.

    Tracing takes for granted that a size that varies is not 1.
    """

    def differs(sizes: tuple[int, int]) -> bool:
        inputs = probe.resized(sizes)
        error = None if inputs is None else probe.error(inputs)
        return error is not None and not error <= accepted

    notes = []
    for axis, sizes in ((0, (1, _SECOND[1])), (1, (_SECOND[0], 1)), (0, (1, 1))):
        if differs(sizes):
            places = [(n, axis) for n, _ in input_tensors(graph_module.graph) if axis < free_axes(n.meta["val"])]
            notes += [f"holds for {forbid(graph_module, place, 1)}" for place in places]
    return notes
