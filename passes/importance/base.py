"""Base of importance passes, and criteria that need no data: magnitudes, random numbers, scores of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import fx

from fxprune.discovery.groups import DEFAULT_KINDS, Group, Groups, as_kinds
from fxprune.errors import CalibrationError, PassError, PlanError
from fxprune.graph.facts import Change, Fact, facts_of
from fxprune.graph.tensors import get_tensor, weight_bytes, weights
from fxprune.masking.parts import Part, cut_graph, output_numel, part_bytes
from fxprune.offload.files import cached, write_cached
from fxprune.offload.prefetch import compute_device, free_bytes
from fxprune.offload.ranks import broadcast_object, check_same
from fxprune.pipeline.arguments import (
    MEMORY,
    Memory,
    argument,
    as_seed,
    format_value,
    instance,
    number,
    one_of,
    path_or_empty,
)
from fxprune.pipeline.contract import Pass, PassResult
from fxprune.removal.removal import REDUCTIONS, Scores, score_groups

PRECISION = (
    "Precision of the products: ``float32``, ``bf16``, or ``auto``, which is ``bf16`` if the device supports it "
    "natively and no op of the graph refuses it. In ``bf16`` there is a copy of the weights in half their bytes."
)
"""Documentation of the argument ``precision``, the same for all criteria that have it."""

Positions = dict[tuple[str, int], torch.Tensor]
"""By parameter and axis: a score for each position along the axis."""

Shape = tuple[int, ...]

Wanted = Mapping[tuple[str, int], Shape]
"""By parameter and axis: the shape of the scores, ``(size,)`` or ``(rows, size)``."""


@dataclass(frozen=True, eq=False)
class ImportancePass(Pass):
    """Scores every unit of the groups of ``kinds``."""

    kinds: tuple[str, ...] = argument(DEFAULT_KINDS, "Kinds of groups to score.", check=as_kinds)
    reduction: str = argument(
        "sum",
        f"How the scores of the members of a group become one: {', '.join(REDUCTIONS)}.",
        check=partial(one_of, known=REDUCTIONS),
    )

    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        known = cached("scores.safetensors")  # of an interrupted run
        if known is not None:
            facts.put(Scores.load(known))
            return PassResult(graph_module, False)
        # a criterion may call ``backward``, and the gradients of parameters are those of the user's model
        gradients = [(tensor, tensor.grad) for _, tensor in weights(graph_module) if tensor.is_leaf]
        try:
            found: Any = self.score(graph_module, facts[Groups].of_kinds(self.kinds))
        finally:
            for tensor, gradient in gradients:
                if tensor.grad is not gradient:
                    tensor.grad = gradient
        if not isinstance(found, Scores):
            raise PassError(f"`score` gave {format_value(found)}", where=f"pass {self.name}", remedy="Return Scores")
        found = found.spread(facts[Groups])
        found.check(facts[Groups], f"Let {self.name} give a finite score for each unit, or check weights and samples")
        scores = replace(broadcast_object(found), source=str(self))
        write_cached("scores.safetensors", scores.save)
        facts.put(scores)
        return PassResult(graph_module, False)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        wanted: dict[tuple[str, int], Shape] = {}
        for member in (member for group in groups for member in group.parameters):
            shape = get_tensor(graph_module, member.name).shape
            rows = () if member.rows is None else (shape[0],)
            key = member.name, member.axis
            wanted[key] = max(wanted.get(key, ()), (*rows, shape[member.axis]), key=len)
        found = self.positions(graph_module, wanted)
        check_positions(found, wanted, self.name)
        return score_groups(groups, found, self.reduction)

    def positions(self, graph_module: fx.GraphModule, wanted: Wanted) -> Positions:
        """For each wanted ``(parameter, axis)`` one score per position along the axis.

        Of weights whose rows, along the first axis, keep units of their own, as experts do, ``(rows, size)`` scores are
        wanted; with ``(size,)`` all rows keep the same.

        A criterion that scores units as a whole defines :meth:`score` instead.
        """
        raise PassError(
            "scores nothing", where=f"pass {self.name}", remedy="Define `positions`, or `score` for units as a whole"
        )


def check_positions(found: Any, wanted: Wanted, criterion: str) -> None:
    """Refuse position scores of a criterion that are not one for each position along each axis."""
    if not isinstance(found, Mapping):
        remedy = "Return a dict of tensors, by parameter and axis"
        raise PassError(f"`positions` gave {format_value(found)}", where=f"pass {criterion}", remedy=remedy)
    for place, shape in wanted.items():
        value = found.get(place)
        fits = isinstance(value, torch.Tensor) and tuple(value.shape) in (shape, shape[-1:]) and not value.is_complex()
        if not fits:
            what = f"`positions` gave {format_value(value)} for {place}, not a tensor of {shape[-1]} scores"
            raise PassError(what, where=f"pass {criterion}", remedy="Give a real number for each position")


def axis_sums(value: torch.Tensor, axis: int, shape: Shape | None = None) -> torch.Tensor:
    """Sums over all axes except ``axis``, and except the first one if ``shape``, that of the result, is of two."""
    others = [i for i in range(value.dim()) if i != axis and (i or shape is None or len(shape) == 1)]
    return value.sum(dim=others) if others else value


def require_finite(value: torch.Tensor, where: str) -> None:
    """Raise :class:`~fxprune.errors.CalibrationError` if a value from the inputs of a product is not finite."""
    if not bool(value.isfinite().all()):
        remedy = "Check the weights and the samples"
        raise CalibrationError("its inputs are not finite", where=where, remedy=remedy)


def memory_limit(name: str, memory: Any) -> float | Memory:
    """Return ``memory``, the argument ``name``: a word, or a fraction above 0 of the bytes of the weights."""
    if isinstance(memory, str):
        return cast("Memory", one_of(name, memory, MEMORY))
    return number(name, memory, above=0)


def usable_bytes(memory: float | Memory, graph_module: fx.GraphModule, wanted: float) -> float:
    """Bytes that sums may take at a time, of ``wanted`` bytes of all of them; infinity if they all fit."""
    if not isinstance(memory, str):
        return memory * weight_bytes(graph_module)
    if memory == "auto":
        memory = broadcast_object("fast" if 2 * wanted <= free_bytes(compute_device(graph_module)) else "low")
    return math.inf if memory == "fast" else part_bytes(graph_module)


def parts_within(
    memory: float | Memory, graph_module: fx.GraphModule, costs: Mapping[str, float], tokens: int
) -> list[Part]:
    """The parts of a graph whose sums fit into the memory allowed.

    With little memory, the parts chosen minimise the sums of a part plus the values of all samples that are kept
    between parts.

    Args:
        costs: bytes that are kept of each weight while its part runs, by name.
        tokens: of all samples.
    """
    limit = usable_bytes(memory, graph_module, sum(costs.values()))
    shares = (1.0,) if isinstance(memory, float) or limit == math.inf else (1.0, 0.5, 0.25, 0.125)
    traced = max((output_numel(node) for node in graph_module.graph.nodes if node.op == "placeholder"), default=1)
    scale = 4.0 * tokens / max(1, traced)

    def bytes_taken(parts: Sequence[Part]) -> float:
        largest = max(sum(costs.get(name, 0.0) for name in set(part.reads)) for part in parts)
        return largest + scale * sum(output_numel(node) for part in parts for node in part.gives)

    found = min((cut_graph(graph_module.graph, costs, limit * share) for share in shares), key=bytes_taken)
    check_same(lambda: {"the parts of the graph": [part.nodes for part in found]}, where="memory")
    return found


@dataclass(frozen=True, eq=False)
class L1ImportancePass(ImportancePass):
    """Scores slices by the sum of the magnitudes of their weights."""

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1

    def positions(self, graph_module: fx.GraphModule, wanted: Wanted) -> Positions:
        found = {}
        for (name, axis), shape in wanted.items():
            weight = get_tensor(graph_module, name).detach()
            found[name, axis] = axis_sums(weight.float().abs().pow_(self.power), axis, shape)
        return found


@dataclass(frozen=True, eq=False)
class L2ImportancePass(L1ImportancePass):
    """Scores slices by the sum of the squares of their weights (as in the reference implementation, without root)."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2


@dataclass(frozen=True, eq=False)
class RandomImportancePass(ImportancePass):
    """Scores units uniformly at random in [0, 1)."""

    name: ClassVar[str] = "random"
    seed: int = argument(0, "Random seed.", check=as_seed)

    def score(self, graph_module: fx.GraphModule, groups: tuple[Group, ...]) -> Scores:
        generator = np.random.default_rng(self.seed)
        return Scores({group.name: generator.random(group.shape) for group in groups})


@dataclass(frozen=True, eq=False)
class LoadScoresPass(Pass):
    """Takes existing scores: those of one run serve any ratio, ranking and width."""

    name: ClassVar[str] = "load-scores"
    stage: ClassVar[str] = "importance"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Groups,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Scores,)

    scores: Scores | None = argument(
        None,
        "Scores, such as ``result.scores``.",
        check=partial(instance, kind=Scores, wanted="scores, such as result.scores", error=PlanError),
        spelled=False,
    )
    file: str = argument(
        "", "In their place, the path of a file written by :meth:`fxprune.Scores.save`.", check=path_or_empty
    )

    def check_arguments(self) -> None:
        self._load()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        facts = facts_of(graph_module)
        scores = self._load().spread(facts[Groups])
        scores.check(facts[Groups])
        facts.put(scores)
        return PassResult(graph_module, False)

    def _load(self) -> Scores:
        if self.scores is not None:
            return self.scores
        if self.file:
            return Scores.load(self.file)
        raise PlanError(
            "no scores", where=f"pass {self.name}", remedy="Pass scores, or file with what Scores.save wrote"
        )
