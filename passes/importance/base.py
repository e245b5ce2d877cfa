"""Base of importance passes, and their memory for sums over samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import psutil
import torch
from torch import fx

from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds
from fxprune.errors import PassError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.tensors import weights
from fxprune.masking.parts import Part, cut, numbers
from fxprune.offload.files import recalled, remembering
from fxprune.offload.prefetch import place_of
from fxprune.offload.ranks import of_first
from fxprune.pipeline.arguments import MEMORY, number, one_of
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.scores import REDUCTIONS, Scores, score_groups

__all__ = ["ImportancePass", "allowed", "amount", "axis_sums", "parts_within"]

_FILE = "scores.safetensors"
"""Where a run that may be stopped keeps its scores."""


@dataclass(frozen=True, eq=False)
class ImportancePass(Pass):
    """Scores every unit of the groups of ``kinds``.

    Args:
        kinds: kinds of groups to score.
        reduction: how the scores of the members of a group make one.
    """

    kinds: tuple[str, ...] = DEFAULT_KINDS
    reduction: str = "sum"

    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    def __post_init__(self) -> None:
        """Refuse unknown names before any work is done; one kind may stand alone."""
        object.__setattr__(self, "kinds", as_kinds(self.kinds))
        one_of("reduction", self.reduction, REDUCTIONS)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Score; the graph is not changed."""
        facts = facts_of(graph_module)
        known = recalled(_FILE)
        if known is not None:
            facts.put(Scores.load(known))
            return PassResult(graph_module, False)
        scores = replace(of_first(self.score(graph_module, facts[Groups].of_kinds(self.kinds))), source=str(self))
        with remembering(_FILE) as file:
            if file is not None:
                scores.save(file)
        facts.put(scores)
        return PassResult(graph_module, False)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        """Scores of ``groups``, from scores per position of each member axis."""
        wanted = {(m.name, m.axis): None for group in groups for m in group.parameters}
        return score_groups(groups, self.positions(graph_module, tuple(wanted)), self.reduction)

    def positions(
        self, graph_module: fx.GraphModule, wanted: tuple[tuple[str, int], ...]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """For each wanted ``(parameter, axis)`` one score per position along the axis.

        A criterion that scores units as a whole writes :meth:`score` in place of this.

        Raises:
            PassError: it writes neither.
        """
        raise PassError(
            "it scores nothing", where=f"pass {self.name}", remedy="Write `positions`, or `score` for units as a whole"
        )


def axis_sums(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all axes but ``axis``: ``(value.shape[axis],)``."""
    others = [i for i in range(value.dim()) if i != axis]
    return value.sum(dim=others) if others else value


_LOW = 0.1
"""Of the bytes of the weights."""

_SMALLER = (0.5, 0.25, 0.125)
"""Of what is allowed: parts as small as that are tried."""


def amount(memory: Any) -> float | str:
    """Return the argument ``memory`` of a pass as it is used.

    Raises:
        ArgumentError: it is no number above 0.
        UnknownNameError: it is none of the words.
    """
    if isinstance(memory, str):
        one_of("memory", memory, MEMORY)
        return memory
    return number("memory", memory, above=0)


def allowed(memory: float | str, graph_module: fx.GraphModule, wanted: float) -> float:
    """Return the bytes that sums may take at a time; infinity where they all fit.

    Args:
        memory: from :func:`amount`.
        graph_module: whose weights the sums are about.
        wanted: the bytes of all of them.
    """
    total = float(sum(tensor.nbytes for _, tensor in weights(graph_module)))
    if not isinstance(memory, str):
        return memory * total
    fits = memory == "fast" or (memory == "auto" and 2 * wanted <= _free(place_of(graph_module)))
    return math.inf if fits else _LOW * total


def _free(device: torch.device) -> float:
    """Bytes that are free on a device, or for a device without a count of its own on the machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def parts_within(
    memory: float | str, graph_module: fx.GraphModule, costs: Mapping[str, float], tokens: int
) -> list[Part]:
    """Return the parts of a graph whose sums fit into the memory allowed.

    With little memory those are taken with which a part, and what is kept of all samples where parts meet, take the
    least together.

    Args:
        memory: from :func:`amount`.
        graph_module: the graph.
        costs: bytes that are kept of each weight while its part runs, by name.
        tokens: of all samples.
    """
    limit = allowed(memory, graph_module, sum(costs.values()))
    found = cut(graph_module.graph, costs, limit)
    if isinstance(memory, float) or limit == math.inf:
        return found
    traced = max((numbers(node) for node in graph_module.graph.nodes if node.op == "placeholder"), default=1)
    scale = 4.0 * tokens / max(1, traced)

    def taken(parts: list[Part]) -> float:
        largest = max(sum(costs.get(name, 0.0) for name in set(part.reads)) for part in parts)
        return largest + scale * sum(numbers(node) for part in parts for node in part.gives)

    smaller = (cut(graph_module.graph, costs, limit * share) for share in _SMALLER)
    return min((found, *smaller), key=taken)
