"""Whether a module that is no Hugging Face model can do with its own code what is left of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from fxprune.emit.epsilons import exaggerated, find_places, set_attributes
from fxprune.errors import PlanError
from fxprune.graph.attempts import Refusal, attempt
from fxprune.graph.silence import quiet
from fxprune.graph.source import Source
from fxprune.graph.tensors import on_meta
from fxprune.masking.compare import TOLERANCE, compare
from fxprune.masking.masked_run import PreciseRun, output_tensors
from fxprune.removal.norms import Change
from fxprune.trace.twin import alias_twin

__all__ = ["check_own_forward"]

_ROUGH = 2e-2
"""Accepted difference in half precision, in which the module runs and the graph does not."""


Numbers = Mapping[tuple[str, tuple[Any, ...]], Change]


def check_own_forward(
    slim: fx.GraphModule,
    source: Source,
    inputs: Mapping[str, Any],
    numbers: Numbers = MappingProxyType({}),
) -> None:
    """Check that a module whose tensors were cut in place still computes what the slim graph does.

    The sizes in a graph are rewritten; those that a module's code holds, such as a number of heads, are not. What its
    norms add is, where attributes hold that.

    Args:
        slim: the slim graph.
        source: the module that it came from; it runs as a copy that shares its parameters. What is on ``meta`` is run
            for its shapes alone.
        inputs: keyword inputs of both.
        numbers: numbers of the graph that changed, by the name of a node and where in it they stand.

    Raises:
        PlanError: the module's own code cannot run any more, or computes something else.
    """
    epsilons = find_places(slim.graph, source.model, numbers)
    if epsilons.reasons:
        raise _refusal(f"cannot be told what its norms add now: {epsilons.reasons[0]}")
    before = set_attributes(source.model, epsilons.attributes)
    try:
        _compare(slim, source, inputs)
        if epsilons.values:
            with exaggerated(slim.graph, source.model, epsilons, {path: path for path, _ in epsilons.values}):
                _compare(slim, source, inputs)
    except BaseException:  # whatever stops it: the module is made whole again
        set_attributes(source.model, before)
        raise


def _compare(slim: fx.GraphModule, source: Source, inputs: Mapping[str, Any]) -> None:
    """Compare what the module computes with what the graph does."""
    twin = alias_twin(source.model)
    with torch.no_grad(), quiet():
        found = attempt(partial(twin, **inputs))
        if isinstance(found, Refusal):
            raise _refusal(f"cannot run with what is left: {found}") from found.error
        wanted, got = output_tensors(PreciseRun(slim).run(*inputs.values())), output_tensors(found)
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in got]:
        raise _refusal("gives outputs of other shapes with what is left")
    halves = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in got)
    if not on_meta(slim) and compare(wanted, [t.float() for t in got]) > (_ROUGH if halves else TOLERANCE):
        raise _refusal("computes something else with what is left")


def _refusal(what: str) -> PlanError:
    return PlanError(
        f"the module's own code {what}. The slim graph does not",
        where="inplace",
        remedy="Leave out inplace and use result.graph_module, or prune kinds whose number its code does not hold",
    )
