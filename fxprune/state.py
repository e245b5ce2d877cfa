"""What passes know and learn about a graph: one typed object in ``GraphModule.meta``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from fxprune.errors import PassError

if TYPE_CHECKING:
    import networkx as nx
    import torch

    from fxprune.axes import Keep
    from fxprune.calibration import Sample
    from fxprune.groups import Group
    from fxprune.plan import Plan
    from fxprune.rules.base import Axis
    from fxprune.scores import Scores

__all__ = ["State", "attach", "state_of"]

_KEY = "fxprune"

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def _silent(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """No progress shown."""
    return items


@dataclass
class State:
    """Facts about one graph, filled in by the passes in turn.

    Args:
        blocks: module paths of the repeated blocks of the model, from tracing.
        notes: what had to be given up on the way, in words.
        constants: names of the tensors the graph reads that are no parameter or buffer of the model, from tracing.
        calibration: samples for criteria that need data.
        track: wraps an iterable that takes long, to show progress: ``track(items, what, total)``.
        accepts: whether a stock config can say what a plan leaves; None where there is none to ask.
        probe: keyword inputs that verification runs the dense and the slim module on.
        graph: the dependency graph, from discovery.
        groups: what can be removed together, from discovery.
        scores: what each unit is worth, from an importance pass.
        keep: kept units by factor, from selection.
        plan: kept indices by parameter and removed blocks, from selection.
        expected: outputs of the masked dense module on ``probe``, from the first half of verification.
        error: largest difference between slim and masked dense outputs, relative to the largest output (or 1).
    """

    blocks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    calibration: tuple[Sample, ...] = ()
    track: Track = field(default=_silent)
    accepts: Callable[[Plan], bool] | None = None
    probe: Mapping[str, torch.Tensor] | None = None
    graph: nx.Graph[Axis] | None = None
    groups: tuple[Group, ...] = ()
    scores: Scores | None = None
    keep: Keep | None = None
    plan: Plan | None = None
    expected: tuple[torch.Tensor, ...] = ()
    error: float | None = None


def attach(graph_module: fx.GraphModule, state: State) -> None:
    """Make ``state`` the state of ``graph_module``."""
    graph_module.meta[_KEY] = state


def state_of(graph_module: fx.GraphModule) -> State:
    """The state of ``graph_module``.

    Raises:
        PassError: the module did not come from :func:`fxprune.trace`.
    """
    state = graph_module.meta.get(_KEY)
    if not isinstance(state, State):
        raise PassError("the graph carries no fxprune state", remedy="Start from fxprune.trace(model).graph_module")
    return state
