"""The face of the package: prune a model, or apply a plan to one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from fxprune.data.text import check_tokenizer
from fxprune.discovery.groups import as_kinds
from fxprune.graph.facts import facts_of
from fxprune.graph.source import Source, put_back
from fxprune.pipeline.arguments import as_seed, flag, refuse
from fxprune.pipeline.contract import Pass
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.progress import Track, check_track, no_progress
from fxprune.pipeline.registry import load_pass
from fxprune.recipes import Making, Recipe, Wishes, as_recipe, compose
from fxprune.recipes.choices import NONE, kept_scores, needs_no_data, said, stage_passes, unless, with_order
from fxprune.removal.plan import Plan
from fxprune.removal.scores import Scores
from fxprune.result import Result
from fxprune.trace import trace

__all__ = ["Result", "apply", "prune", "prune_pipeline"]

_LITTLE_MEMORY = 0.1
"""In place, memory matters more than time: sums of gradients take a tenth of the bytes of the weights."""

_DEFAULT, _PUBLISHED = "balanced", "llm-pruner"
"""The recipe of a call that leaves the choice, and of one that names an importance."""


def prune(
    model: nn.Module,
    calibration: Any = None,
    *,
    recipe: str | Recipe | os.PathLike[str] | None = None,
    ratio: float | Mapping[str, float] | None = None,
    kinds: str | Sequence[str] | None = None,
    importance: str | Pass | None = None,
    taylor: str | None = None,
    scores: Scores | str | os.PathLike[str] | None = None,
    reduction: str | None = None,
    ranking: str | None = None,
    group_ratio: float | Mapping[str, float] | None = None,
    protect: tuple[float, float] | tuple[()] | None = None,
    round_to: int | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
    budget: str = "params",
    steps: int = 1,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    tune: str | Pass | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove the least important structures of ``model``, which stays as it is: run :func:`prune_pipeline` on it.

    What is left out, or None, is as the recipe says.

    Args:
        model: a Hugging Face model, or any module that ``torch.export`` can trace.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader; or None for built-in text
            where there is a tokenizer, else for criteria that need no data.
        recipe: ``balanced``, ``fast``, ``best`` or ``llm-pruner``, as ``fxprune recipes`` lists them; a file with one;
            or a pipeline in text. None: ``balanced``, but where an importance is named ``llm-pruner``, the paper as
            published, which adds nothing to what the other arguments say.
        ratio: fraction of the parameters that goes, in [0, 1), 0.2 by default; reached within half a percentage point.
            By kind, as in ``{"mlp": 0.3, "head": 0.1}``: the fraction of the parameters in structures of that kind.
        kinds: what may go: ``mlp``, ``head``, ``channel``, ``head_dim``, ``expert``, ``layer``; or a ratio by kind.
            ``exact-`` in front of one, as in ``exact-mlp``, leaves out its groups that a norm runs over.
        importance: ``taylor``, ``l1``, ``l2``, ``random`` or another registered importance pass, with arguments of its
            own as in ``"taylor{order=second}"``; or a pass. One that needs no samples, where there are none, fits
            nothing either.
        taylor: ``vector``, ``first``, ``second`` or ``mix``; the same as ``importance="taylor{order=...}"``.
        scores: kept from an earlier run, or the path of a file with such; they take the place of ``importance``.
        reduction: how members of a group are combined: ``sum``, ``prod``, ``max``, ``mean``, ``first``, ``last``.
        ranking: ``local``: the same fraction in every group; ``global``: the lowest scores anywhere.
        group_ratio: the paper's ratio, a fraction of the units of every group; takes the place of ``ratio``.
        protect: layers kept whole at the front and the end, or fractions of the depth; ``()``: none. The paper's are
            4 and 2 of 32, scaled.
        round_to: slim widths are multiples of this. By kind, as in ``{"mlp": 64, "head": 2}``, it counts units.
        uniform: the same widths in every layer, and such that the model's own config class takes them: the checkpoint
            then loads in stock transformers, and in whatever reads its format. ``protect`` must be empty or None.
        tensor_parallel: devices that share each layer: MLP channels and heads of one that shrinks are multiples of it.
        budget: what ``ratio`` is of: ``params``, ``macs``, ``kv`` (bytes of the key-value cache), ``bytes@q8_0``, ..
        steps: how often it scores: after each step a part has gone, what stays is fitted, and the rest scored again.
        select: a registered selection pass, or a pass, in place of what ``ratio`` or ``group_ratio`` stands for.
        compensate: ``least-squares``, perhaps with arguments: weights that lost inputs are fitted to what the dense
            model computes on the calibration data; or a pass. ``"none"`` leaves every kept number as it is.
        tune: ``tune``, perhaps with arguments as in ``"tune{epochs=2}"``: a few vectors are learned end to end on the
            slim model; or a pass. ``"none"``: no tuning.
        tokenizer: the model's own: it turns built-in text into calibration samples where none are given, and into
            held-out text of another kind for tuning to stop by.
        seed: for ``random`` importance, the verification inputs and the order of samples in tuning.
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
    tune: str | Pass | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    inplace: bool = False,
    example_inputs: Mapping[str, Any] | None = None,
) -> Result:
    """Remove from ``model`` what ``plan`` says.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from an earlier result or :meth:`Plan.from_json`.
        calibration: as for :func:`prune`; for ``compensate`` and ``tune`` alone.
        compensate: as for :func:`prune`; None leaves every kept number as it is.
        tune: as for :func:`prune`; None for no tuning.
        tokenizer: as for :func:`prune`.
        verify: as for :func:`prune`.
        inplace: as for :func:`prune`.
        example_inputs: as for :func:`prune`.

    Raises:
        PlanError: the plan does not fit the model.
    """
    pipeline = prune_pipeline(
        calibration,
        recipe=_PUBLISHED,
        plan=_plan(plan),
        compensate=compensate,
        tune=tune,
        tokenizer=tokenizer,
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
    recipe: str | Recipe | os.PathLike[str] | None = None,
    ratio: float | Mapping[str, float] | None = None,
    kinds: str | Sequence[str] | None = None,
    importance: str | Pass | None = None,
    taylor: str | None = None,
    scores: Scores | str | os.PathLike[str] | None = None,
    reduction: str | None = None,
    ranking: str | None = None,
    group_ratio: float | Mapping[str, float] | None = None,
    protect: tuple[float, float] | tuple[()] | None = None,
    round_to: int | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
    budget: str = "params",
    steps: int = 1,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    tune: str | Pass | None = None,
    tokenizer: Any = None,
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
    flags = {"verify": flag("verify", verify), "inplace": flag("inplace", inplace), "uniform": flag("uniform", uniform)}
    check_tokenizer(tokenizer)
    importance = with_order("taylor", importance, taylor)
    free = calibration is None and (plan is not None or scores is not None or needs_no_data(importance))
    paper = importance is not None or plan is not None or free
    chosen = as_recipe((_PUBLISHED if paper else _DEFAULT) if recipe is None else recipe)
    shared = said({"seed": as_seed("seed", seed) or None, "track": None if track is None else _track(track)})
    kinds, wanted = _wanted(kinds, ratio, group_ratio)
    widths = said({"kinds": kinds, "ranking": ranking, "protect": protect, **wanted})
    widths |= unless("round_to", round_to, 1) | unless("tensor_parallel", tensor_parallel, 1)
    widths |= unless("budget", budget, "params")
    widths |= {"uniform": True, "protect": () if protect is None else protect} if flags["uniform"] else {}
    options = {
        "": shared,
        "importance": said({"kinds": kinds, "reduction": reduction, "memory": _LITTLE_MEMORY if inplace else None}),
        "select": widths,
        "tune": said({"tokenizer": tokenizer}),
    }
    choices: dict[str, str | Pass | None] = {
        "importance": importance if scores is None else kept_scores("load-scores", scores),
        "select": select if select is not None or group_ratio is None else "select-by-group-ratio",
        "compensate": compensate,
        "tune": tune,
    }
    places: dict[str, Making] = {
        stage: partial(stage_passes, choice, stage, {**shared, **options.get(stage, {})})
        for stage, choice in choices.items()
        if choice is not None
    }
    if plan is not None:
        carried = load_pass("plan-from-json", text=_plan(plan).to_json())
        places |= {"importance": lambda _: (), "select": lambda _: (carried,)}
    asked = any(choice not in (None, NONE) for choice in (compensate, tune))
    own = None if free and not asked else tokenizer
    reads = calibration is not None or own is not None
    samples = load_pass("calibrate", data=calibration, tokenizer=own) if reads else None
    again = partial(load_pass, "score-in-steps", steps=steps) if steps != 1 else None
    return Pipeline(compose(chosen, Wishes(places, options, samples, free, flags["verify"], again)))


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


def _wanted(kinds: Any, ratio: Any, group_ratio: Any) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """Return the kinds that may go, None for those of the recipe, and what is wanted of them.

    A ratio by kind says which they are.
    """
    asked = ratio if group_ratio is None else group_ratio
    named = tuple(asked) or kinds if isinstance(asked, Mapping) else kinds
    return None if named is None else as_kinds(named), {"ratio" if group_ratio is None else "group_ratio": asked}
