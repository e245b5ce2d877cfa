"""Slim versions of a model to be timed beside it, for targets of speed."""

from __future__ import annotations

from typing import Any

import fxprune
from fxprune.cli.console import working
from fxprune.errors import EvaluationError, RatioError
from fxprune.evaluation.speed import times_file
from fxprune.graph.counting import count_parameters
from fxprune.graph.facts import fork
from fxprune.graph.tensors import device_of

__all__ = ["slim_versions"]

_RATIOS = (0.15, 0.3, 0.45)


def slim_versions(model: Any) -> tuple[dict[str, Any], Any]:
    """Models of a few sizes by random units, by name, and the file that their times are kept in.

    Raises:
        EvaluationError: there is no slim model to time.
    """
    found: dict[str, Any] = {}
    with working("tracing the model"):
        graph_module = fxprune.trace(model).graph_module
    place = times_file(count_parameters(graph_module), device_of(graph_module))
    for ratio in _RATIOS:
        pipeline = fxprune.prune_pipeline(recipe="fast", importance="random", ratio=ratio, verify=False)
        with working(f"pruning by {ratio:.0%}"):
            try:
                result = fxprune.Result.of(pipeline(fork(graph_module)).graph_module)
            except RatioError as error:
                if not found:
                    raise EvaluationError(error.what, where="--sweep", remedy=error.remedy) from error
                break
        if result.model is None:
            reasons = "; ".join(result.report.model_reasons[:3])
            remedy = "Time exported graphs, and name the table as in '1.3x decode@times.json'"
            raise EvaluationError(f"there is no slim model to time: {reasons}", where="--sweep", remedy=remedy)
        found[f"{ratio:.0%} less"] = result.model
    return found, place
