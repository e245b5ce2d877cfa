"""Tiny models that are traced and grouped once a session; every caller gets a fork of the graph.

``traced("llama")`` and ``grouped("llama")`` return graphs, ``pruned("llama", ...)`` returns what ``fxprune.prune`` does
for the same model. Instead of a family, each takes a function that returns a module, or a module and its inputs.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import fx, nn

import fxprune
from fxprune.graph.facts import Source, facts_of, fork
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from tests.models import tiny

__all__ = ["Maker", "grouped", "model_of", "pruned", "run", "traced"]

Maker = str | Callable[[], nn.Module | tuple[nn.Module, Mapping[str, Any]]]
"""A family of :mod:`tests.models`, or a function that lasts as long as the session, such as one of a module."""


def traced(maker: Maker, **changes: Any) -> fx.GraphModule:
    """Graph of a model, as :func:`fxprune.trace` returns it; it shares tensors with :func:`model_of` it."""
    return fork(_traced(maker, tuple(sorted(changes.items()))))


def grouped(maker: Maker, norm: str = "sliced", **changes: Any) -> fx.GraphModule:
    """Graph of a model with its groups among the facts."""
    return fork(_grouped(maker, norm, tuple(sorted(changes.items()))))


def model_of(graph_module: fx.GraphModule) -> Any:
    """The model that a graph was traced from, which others read too: do not write to it."""
    return facts_of(graph_module)[Source].model


def run(graph_module: fx.GraphModule, *names: str, **arguments: Any) -> fx.GraphModule:
    """Run registered passes in place; ``arguments`` go to the last one."""
    for name in names:
        own = arguments if name == names[-1] else {}
        graph_module = load_pass(name, **own)(graph_module, inplace=True).graph_module
    return graph_module


def pruned(maker: Maker, calibration: Any = None, *, changes: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Result of pruning a remembered model; ``options`` as for :func:`fxprune.prune`."""
    passes = fxprune.prune_pipeline(calibration, **options).passes
    (norm,) = [step.norm for step in passes if step.name == "find-groups"]
    rest = Pipeline([step for step in passes if step.name != "find-groups"])
    return fxprune.Result.of(rest(grouped(maker, norm, **(changes or {}))).graph_module)


@cache
def _traced(maker: Maker, changes: tuple[tuple[str, Any], ...]) -> fx.GraphModule:
    made = tiny(maker, **dict(changes)) if isinstance(maker, str) else maker(**dict(changes))
    module, inputs = made if isinstance(made, tuple) else (made, None)
    return fxprune.trace(module.eval(), inputs).graph_module


@cache
def _grouped(maker: Maker, norm: str, changes: tuple[tuple[str, Any], ...]) -> fx.GraphModule:
    return run(fork(_traced(maker, changes)), "find-groups", norm=norm)
