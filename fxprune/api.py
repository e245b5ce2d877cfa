"""The face of the package: prune a model, or apply a plan to one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxprune.discovery.groups import DEFAULT_KINDS, as_kinds
from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.graph.facts import facts_of
from fxprune.graph.source import Source, put_back
from fxprune.pipeline.arguments import as_seed, flag, refuse
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.pipeline.registry import load_pass, parse_pass, pass_names
from fxprune.pipeline.spelling import read_spelling
from fxprune.removal.plan import Plan
from fxprune.removal.scores import Scores
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
    ratio: float | Mapping[str, float] = 0.2,
    kinds: str | Sequence[str] = DEFAULT_KINDS,
    importance: str | Pass = "taylor",
    taylor: str | None = None,
    scores: Scores | str | os.PathLike[str] | None = None,
    reduction: str = "sum",
    ranking: str = "local",
    group_ratio: float | Mapping[str, float] | None = None,
    protect: tuple[int, int] | tuple[()] | None = None,
    round_to: int | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove the least important structures of ``model``, which stays as it is: run :func:`prune_pipeline` on it.

    Args:
        model: a Hugging Face model, or any module that ``torch.export`` can trace.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader, or None for criteria
            that need no data.
        ratio: fraction of the parameters that goes, in [0, 1); reached within half a percentage point. By kind, as in
            ``{"mlp": 0.3, "head": 0.1}``: the fraction of the parameters in structures of that kind.
        kinds: what may go: ``mlp``, ``head``, ``channel``, ``head_dim``, ``expert``, ``layer``; or a ratio by kind.
        importance: ``taylor``, ``l1``, ``l2``, ``random`` or another registered importance pass, with arguments of its
            own as in ``"taylor{order=second}"``; or a pass.
        taylor: ``vector``, ``first``, ``second`` or ``mix``; the same as ``importance="taylor{order=...}"``.
        scores: kept from an earlier run, or the path of a file with such; they take the place of ``importance``.
        reduction: how members of a group are combined: ``sum``, ``prod``, ``max``, ``mean``, ``first``, ``last``.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere.
        group_ratio: the paper's ratio, a fraction of the units of every group; takes the place of ``ratio``.
        protect: layers kept whole at the front and the end; None: 4 and 2 of 32 as in the paper, scaled; ``()``: none.
        round_to: slim widths are multiples of this. By kind, as in ``{"mlp": 64, "head": 2}``, it counts units.
        uniform: the same widths in every layer, and such that the model's own config class takes them: the checkpoint
            then loads in stock transformers, and in whatever reads its format. ``protect`` must be empty or None.
        tensor_parallel: devices that share each layer: MLP channels and heads of one that shrinks are multiples of it.
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
    return _run(prune_pipeline(**options), model, example_inputs, inplace)


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
        plan=_plan(plan),
        compensate=compensate,
        verify=verify,
        inplace=inplace,
    )
    return _run(pipeline, model, example_inputs, inplace)


def _run(pipeline: Pipeline, model: nn.Module, example_inputs: Mapping[str, Any] | None, inplace: bool) -> Result:
    """Run a pipeline on a model; where it fails in place, put back what was cut off the model."""
    pipeline.check_arguments()
    graph_module = trace(model, example_inputs).graph_module
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
    ratio: float | Mapping[str, float] = 0.2,
    kinds: str | Sequence[str] = DEFAULT_KINDS,
    importance: str | Pass = "taylor",
    taylor: str | None = None,
    scores: Scores | str | os.PathLike[str] | None = None,
    reduction: str = "sum",
    ranking: str = "local",
    group_ratio: float | Mapping[str, float] | None = None,
    protect: tuple[int, int] | tuple[()] | None = None,
    round_to: int | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
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
    verify, inplace, track = flag("verify", verify), flag("inplace", inplace), _track(track)
    kinds, wanted = _wanted(kinds, ratio, group_ratio)
    shared = {"kinds": kinds, "reduction": reduction, "seed": as_seed("seed", seed), "track": track}
    widths = {"ranking": ranking, "protect": protect, "round_to": round_to, "uniform": uniform}
    widths |= {"tensor_parallel": tensor_parallel}
    by = "select-by-ratio" if group_ratio is None else "select-by-group-ratio"
    scoring = {"memory": _LITTLE_MEMORY} if inplace else {}
    importance = _with_order("taylor", importance, taylor) if scores is None else _kept("load-scores", scores)
    if plan is not None:
        decide = [load_pass("plan-from-json", text=_plan(plan).to_json())]
    else:
        decide = [
            _stage(importance, "importance", **shared, **scoring),
            _stage(by if select is None else select, "select", **shared, **widths, **wanted),
        ]
    return Pipeline(
        [
            *([] if calibration is None else [load_pass("calibrate", data=calibration)]),
            "find-groups",
            *decide,
            "count-work",
            *([] if compensate is None else [_stage(compensate, "compensate", **shared)]),
            load_pass("make-verification-inputs", seed=seed),
            *(["record-expected", "shrink", "verify-removal"] if verify else ["shrink"]),
            "emit-model",
            "make-report",
        ]
    )


def _track(track: Track | None) -> Track:
    """Return what shows progress; nothing does where ``track`` is None."""
    if track is not None:
        check_track(track)
    return track or no_progress


def _plan(plan: Any) -> Plan:
    """Return ``plan``, which has to be one."""
    if isinstance(plan, Plan):
        return plan
    raise refuse("plan", plan, "a Plan, as in fxprune.Plan.from_json(text)")


def _wanted(kinds: Any, ratio: Any, group_ratio: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the kinds that may go, and what is wanted of them; a ratio by kind says which they are."""
    asked = ratio if group_ratio is None else group_ratio
    named = tuple(asked) or kinds if isinstance(asked, Mapping) else kinds
    return as_kinds(named), {"ratio" if group_ratio is None else "group_ratio": asked}


def _kept(name: str, scores: Scores | str | os.PathLike[str]) -> Pass:
    """Return the pass ``name``, which takes scores, or a file of them."""
    return load_pass(name, scores=scores) if isinstance(scores, Scores) else load_pass(name, file=scores)


def _with_order(name: str, importance: str | Pass, order: str | None) -> str | Pass:
    """Return the spelling of the importance ``name`` with an order, unless another importance is asked for."""
    if order is None:
        return importance
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
    known = pass_names(stage)
    if isinstance(choice, Pass):
        if choice.stage in ("", stage):
            return choice
        raise ArgumentError(
            f"{stage} is the pass {choice.name}, of the stage {choice.stage!r}",
            where=stage,
            remedy=f"Pass one of {', '.join(known)}, or a pass of your own of the stage {stage!r}",
        )
    if not isinstance(choice, str):
        raise refuse(stage, choice, f"one of {', '.join(known)}, or a pass, as in fxprune.load_pass({known[0]!r})")
    name = read_spelling(choice)[0]
    if name not in known:
        raise UnknownNameError(_WORDS.get(stage, stage), name, known)
    return parse_pass(choice, **defaults)
