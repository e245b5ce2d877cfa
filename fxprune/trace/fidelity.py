"""Whether a graph computes what the module it was traced from does.

Tracing follows one example through the code of a module, in another dtype perhaps, and knows no gradients. So the two
are compared at two sizes and, where the graph takes one sample or one token, at that too; and by the gradients of all
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import PassError
from fxprune.graph.facts import Fact, facts_of
from fxprune.graph.inputs import input_tensors
from fxprune.graph.tensors import on_meta
from fxprune.trace.inputs import free_axes
from fxprune.trace.limits import forbid
from fxprune.trace.probe import TOLERANCE, Probe

__all__ = ["Fidelity", "assess", "require_gradients"]

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
