"""Comparison of a graph with its module, by outputs at several sizes and by gradients.

A gradient is reduced to a few numbers as soon as it is computed, so that only one is held at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from fxprune.data.verification import make_inputs, resize_inputs
from fxprune.errors import PassError
from fxprune.graph.compat import tree_leaves
from fxprune.graph.context import quiet
from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.shapes import failed_check
from fxprune.graph.tensors import get_tensor, has_meta_weights, input_tensors, map_tensors, weights
from fxprune.rules.aliasing import written_sources
from fxprune.trace.inputs import alias_twin, free_axes, without_cache, written_parameters
from fxprune.trace.limits import forbid

__all__ = ["Fidelity", "SideBySide", "compare_with_module", "require_gradients", "tolerance"]

_TOLERANCE = 1e-5
"""Accepted difference in float32: the same ops in the same order give the same numbers, another kernel a last digit."""

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
        self.written = written_parameters(model, self.inputs)
        self._first: Outputs | None = None

    def resized(self, sizes: tuple[int, int]) -> dict[str, Any] | None:
        """Inputs with other sizes; None if the graph does not take them or its sizes are fixed."""
        inputs = resize_inputs(self.graph_module, self.inputs, sizes)
        shapes, other = ([leaf.shape for leaf in _tensors(values)] for values in (self.inputs, inputs))
        return None if shapes == other or failed_check(self.graph_module, inputs) else inputs

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
        """The relative difference of the gradient of each parameter; empty if there are no gradients."""
        try:
            wanted = _run_or_none(lambda: _gradient_digests(*self._run_module(self.inputs)))
            got = None if wanted is None else _run_or_none(lambda: _gradient_digests(*self._run_graph(self.inputs)))
        except (MemoryError, torch.OutOfMemoryError):  # nothing is known about them
            wanted = None
        if wanted is None:
            return {}
        found: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in wanted:
                continue
            sums, norm = wanted[id(parameter)]
            graph_sums, graph_norm = (got or {}).get(id(parameter), (torch.zeros(()), torch.zeros(())))
            scale = max(float(norm), float(graph_norm))
            difference = max(float((sums - graph_sums).norm()), float((norm - graph_norm).abs()))
            found[name] = difference / scale if scale > 0 else 0.0 if scale == 0 else float("inf")
        return found

    def first_difference(self) -> str:
        """The first module whose outputs differ, and the node that computes them in the graph."""
        outputs = self._record_module_outputs()
        with torch.no_grad(), _same_randomness():
            run = _AliasRun(self.graph_module, {}, keep=True)
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

    def _record_module_outputs(self) -> list[tuple[str, torch.Tensor]]:
        """The first floating point output of each call of a submodule, in the order in which calls end."""
        twin = alias_twin(self.model, self.written)
        outputs: list[tuple[str, torch.Tensor]] = []

        def record(path: str, output: Any) -> None:
            found = next((leaf for leaf in _tensors(output) if leaf.is_floating_point()), None)
            if found is not None:
                outputs.append((path, found.clone()))

        for path, module in twin.named_modules():
            module.register_forward_hook(lambda _module, _args, output, path=path: record(path, output))
        with torch.no_grad(), _same_randomness(), quiet():
            twin(**(without_cache(twin) | _copies(self.inputs)))
        return outputs

    def is_random(self) -> bool:
        """Whether the outputs of the module, once compared with those of the graph, depend on the random seed."""
        with torch.no_grad():
            return self._first is not None and _difference(self._first, self._run_module(self.inputs, seed=1)[0]) != 0

    def _run_module(self, inputs: Mapping[str, Any], seed: int = 0) -> tuple[Outputs, dict[int, torch.Tensor]]:
        twin = alias_twin(self.model, self.written)
        with _same_randomness(seed), quiet():
            output = twin(**(without_cache(twin) | _copies(inputs)))
        pairs = zip(self.model.parameters(), twin.parameters(), strict=True)
        return _tensors(output), {id(parameter): alias for parameter, alias in pairs}

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
        return _tensors(output), aliases


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


class _AliasRun(fx.Interpreter):
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
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: map_tensors(value, torch.clone) for name, value in inputs.items()}


def _tensors(output: Any) -> Outputs:
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


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
    notes = tuple(_forbid_one(pair, accepted))
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
    """Check that the gradients of a graph, for the pass ``asked_by``, are not known to differ from the module's."""
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
            notes += [f"holds for {forbid(graph_module, place, 1)}" for place in places]
    return notes
