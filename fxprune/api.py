"""The face of the package: prune a model, or apply a plan to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxprune.discovery.groups import DEFAULT_KINDS, as_kinds
from fxprune.errors import FxpruneError, UnknownNameError
from fxprune.graph.facts import facts_of
from fxprune.graph.source import Source, put_back
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.progress import Track, no_progress
from fxprune.pipeline.registry import load_pass, parse_pass, pass_names
from fxprune.pipeline.spelling import read_spelling
from fxprune.removal.plan import Plan
from fxprune.result import Result
from fxprune.trace import trace

__all__ = ["Result", "apply", "prune", "prune_pipeline"]

_LITTLE_MEMORY = 0.1
"""In place, memory matters more than time: sums of gradients take a tenth of the bytes of the weights."""

_WORDS = {"compensate": "compensation", "select": "selection"}
"""What a stage is called in messages, where not by its own name."""


def prune(
    model: nn.Module,
    calibration: Any = None,
    *,
    ratio: float = 0.2,
    kinds: str | Sequence[str] = DEFAULT_KINDS,
    importance: str | Pass = "taylor",
    taylor: str | None = None,
    reduction: str = "sum",
    ranking: str = "local",
    group_ratio: float | None = None,
    protect: tuple[int, int] | tuple[()] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove the least important structures of ``model``; the model passed is not changed.

    What runs is :func:`prune_pipeline`: passes that can be printed, copied and changed.

    Args:
        model: a Hugging Face model, or any module that ``torch.export`` can trace.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader, or None for criteria
            that need no data.
        ratio: fraction of the parameters that goes, in [0, 1); reached within half a percentage point.
        kinds: which structures may go: ``mlp``, ``head``, ``channel``, ``head_dim``, ``expert``, ``layer``.
        importance: ``taylor``, ``l1``, ``l2``, ``random`` or another registered importance pass, with arguments of its
            own as in ``"taylor{order=second}"``; or a pass.
        taylor: ``vector``, ``first``, ``second`` or ``mix``; the same as ``importance="taylor{order=...}"``.
        reduction: how members of a group are combined: ``sum``, ``prod``, ``max``, ``mean``, ``first``, ``last``.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere.
        group_ratio: the paper's ratio, a fraction of the units of every group; takes the place of ``ratio``.
        protect: how many layers stay whole at the front and at the end; None for the paper's 4 and 2 of 32, scaled
            to the depth; ``()`` for none.
        round_to: slim widths are multiples of this.
        uniform: the same widths in every layer, and such that the model's own config class takes them: the checkpoint
            then loads in stock transformers, and in whatever reads its format. ``protect`` must be empty or None.
        select: a registered selection pass, or a pass, in place of what ``ratio`` or ``group_ratio`` stands for.
        compensate: ``least-squares``, perhaps with arguments: weights that lost inputs are fitted to what the dense
            model computes on the calibration data; or a pass. None leaves every kept number as it is.
        seed: for ``random`` importance and the verification inputs.
        verify: check that masking equals shrinking, and that the emitted model equals the graph.
        inplace: free each dense tensor as its slim one is made; ``model`` then *becomes* the slim model.
        example_inputs: keyword inputs for modules that are not Hugging Face models.
        track: shows progress, as ``track(items, what, total)``.

    Raises:
        FxpruneError: one of its subclasses, naming what is wrong and what to do; the model is then unchanged.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "example_inputs")}
    pipeline = prune_pipeline(**options)
    return _run(pipeline, trace(model, example_inputs).graph_module, inplace)


def apply(
    model: nn.Module,
    plan: Plan,
    calibration: Any = None,
    *,
    compensate: str | Pass | None = None,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> Result:
    """Remove from ``model`` what ``plan`` says.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from an earlier result or :meth:`Plan.from_json`.
        calibration: as for :func:`prune`; for ``compensate`` alone.
        compensate: as for :func:`prune`.
        verify: as for :func:`prune`.
        inplace: as for :func:`prune`.
        example_inputs: as for :func:`prune`.

    Raises:
        PlanError: the plan does not fit the model.
    """
    pipeline = prune_pipeline(
        calibration,
        plan=plan,
        compensate=compensate,
        verify=verify,
        inplace=inplace,
    )
    return _run(pipeline, trace(model, example_inputs).graph_module, inplace)


def _run(pipeline: Pipeline, graph_module: fx.GraphModule, inplace: bool) -> Result:
    """Run a pipeline; where it fails in place, put back what was cut off the model."""
    try:
        return Result.of(pipeline(graph_module, inplace=inplace).graph_module)
    except BaseException:  # whatever stops it, an interrupt too: the model is not left half cut
        source = facts_of(graph_module).get(Source)
        if source is not None and source.cut:
            put_back(source)
        raise


def prune_pipeline(
    calibration: Any = None,
    *,
    ratio: float = 0.2,
    kinds: str | Sequence[str] = DEFAULT_KINDS,
    importance: str | Pass = "taylor",
    taylor: str | None = None,
    reduction: str = "sum",
    ranking: str = "local",
    group_ratio: float | None = None,
    protect: tuple[int, int] | tuple[()] | None = None,
    round_to: int = 1,
    uniform: bool = False,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    plan: Plan | None = None,
    track: Track | None = None,
) -> Pipeline:
    """Return the passes that :func:`prune` runs with these options; see there for what they mean.

    ``str()`` of it is its spelling, and ``Pipeline(text)`` reads that back; objects such as calibration data have none.
    Run it on ``fxprune.trace(model).graph_module``.

    Args:
        plan: the decision of an earlier run, in place of importance and selection: what :func:`apply` runs.
    """
    shared = {"kinds": as_kinds(kinds), "reduction": reduction, "seed": seed, "track": track or no_progress}
    widths = {"ranking": ranking, "protect": protect, "round_to": round_to, "uniform": uniform}
    by = "select-by-ratio" if group_ratio is None else "select-by-group-ratio"
    wanted = {"ratio": ratio} if group_ratio is None else {"group_ratio": group_ratio}
    scoring = {"memory": _LITTLE_MEMORY} if inplace else {}
    if taylor is not None:
        importance = _with_order("taylor", importance, taylor)
    if plan is not None:
        decide = [load_pass("plan-from-json", text=plan.to_json())]
    else:
        decide = [
            _stage(importance, "importance", **shared, **scoring),
            _stage(select or by, "select", **shared, **widths, **wanted),
        ]
    return Pipeline(
        [
            *([] if calibration is None else [load_pass("calibrate", data=calibration)]),
            "find-groups",
            *decide,
            "count-work",
            *([] if compensate is None else [_stage(compensate, "compensate", **shared)]),
            load_pass("make-verification-inputs", seed=seed),
            *(["record-expected"] if verify else []),
            "shrink",
            *(["verify-removal"] if verify else []),
            "emit-model",
            "make-report",
        ]
    )


def _with_order(name: str, importance: str | Pass, order: str) -> str:
    """Return the spelling of the importance ``name`` with an order, unless another importance is asked for."""
    spelled = f"{name}{{order={order}}}"
    if importance == name:
        return spelled
    raise FxpruneError(
        f"{name}={order!r} beside importance={str(importance)!r}",
        where=name,
        remedy=f"Leave one of them out; importance={spelled!r} says both",
    )


def _stage(choice: str | Pass, stage: str, **defaults: Any) -> Pass:
    """Return the pass, or the one of ``stage`` spelled so; ``defaults`` fill in what the spelling leaves open."""
    if isinstance(choice, Pass):
        return choice
    name, known = read_spelling(choice)[0], pass_names(stage)
    if name not in known:
        raise UnknownNameError(_WORDS.get(stage, stage), name, known)
    return parse_pass(choice, **defaults)
