"""The face of the package: prune a model, or apply a plan to one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.checkpoint.low_memory import load_mapped, on_disk, request_of
from fxprune.checkpoint.write import check_request
from fxprune.graph.facts import Source, facts_of, put_back
from fxprune.graph.tensors import device_of
from fxprune.offload.prefetch import carrier_to, carrying, check_device
from fxprune.pipeline.arguments import refuse
from fxprune.pipeline.contract import Pass, Track
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.registry import load_pass
from fxprune.recipes import Options, Recipe, Wishes, as_recipe, compose, selects_by_samples
from fxprune.recipes.choices import NONE, kept_scores, made_places, needs_no_data, with_order
from fxprune.removal.plan import Plan
from fxprune.removal.scores import Scores
from fxprune.result import Result
from fxprune.trace import trace

__all__ = ["Result", "apply", "prune", "prune_checkpoint", "prune_pipeline"]

_DEFAULT, _PUBLISHED = "balanced", "llm-pruner"
"""The recipe of a call that leaves the choice, and of one that names an importance."""

_LOGGER = logging.getLogger("fxprune")


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
    round_to: int | str | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
    budget: str = "params",
    norm: str | None = None,
    steps: int = 1,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    tune: str | Pass | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    memory: str | None = None,
    device: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove the least important structures of ``model``, which stays as it is: run :func:`prune_pipeline` on it.

    What is left out, or None, is as the recipe says. :class:`fxprune.recipes.Options` says what each argument means.

    Args:
        model: a Hugging Face model, or any module that ``torch.export`` can trace.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, a DataLoader; or None: with a tokenizer
            for built-in text and what the model writes itself, else for criteria that need no data.
        device: where to compute, such as ``"cuda"``, while the weights stay where they are: those of a part of the
            model go there and are given up again, the next ones on their way. Passes that cannot do so compute where
            the weights are; None for all of them.
        example_inputs: keyword inputs for modules that are not Hugging Face models.

    Raises:
        FxpruneError: one of its subclasses, naming what is wrong and what to do; the model is then unchanged.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "example_inputs", "device")}
    return _run(prune_pipeline(**options), model, example_inputs, inplace, device)


def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "500MB",
    force: bool = False,
    also: Callable[[Result, Path], object] | None = None,
    **options: Any,
) -> Result:
    """Prune a model in a folder, larger than memory perhaps, and write the slim one to another folder.

    Weights are read from the files of the folder where a part of the model runs, and what is fitted and what is left
    are in files as well: memory is for a part of the model and the activations of the samples. It takes the time that
    reading takes; a run that was killed is gone on with where it is asked the same of the same files, from the last
    part scored and the last weight fitted. Until it is done it keeps what it found in ``<out>.unfinished``.

    Tuning reads all weights twice a step, so that there is none unless ``tune`` asks for it. Weights that transformers
    builds from several tensors of a file, as those of experts side by side, are held in memory.

    Args:
        source: a folder of safetensors that transformers loads, or the id of one on a hub; or a GGUF file, which is
            unpacked to float32 beside ``out`` first.
        out: where to, as for :func:`fxprune.save_pretrained`.
        calibration: as for :func:`prune`.
        tokenizer: as for :func:`prune`; saved with the model.
        max_shard_size: the largest file of weights; one is in memory when it is written.
        force: as for :func:`fxprune.save_pretrained`.
        also: is called with the result and the new folder before it takes its place, to write more files into it.
        options: as for :func:`prune`; ``device="cuda"`` computes there, a part of the model after the other.

    Returns:
        What :func:`prune` returns; its weights are in files without a name.

    Raises:
        CheckpointError: ``source`` cannot be loaded, or ``out`` holds something else.
        FxpruneError: as for :func:`prune`.
    """
    settings = {"memory": "low", "tune": NONE, **options}
    check_request(out, tokenizer, max_shard_size)
    example_inputs, device = settings.pop("example_inputs", None), check_device(settings.pop("device", None))
    pipeline = prune_pipeline(calibration, tokenizer=tokenizer, **settings)
    with on_disk(out, request_of(source, calibration, str(pipeline)), force=force) as work:
        result = _run(pipeline, load_mapped(source, work), example_inputs, inplace=False, device=device)
        more = None if also is None else partial(also, result)
        result.save_pretrained(out, tokenizer, max_shard_size=max_shard_size, force=force, also=more)
    return result


def apply(
    model: nn.Module,
    plan: Plan,
    calibration: Any = None,
    *,
    compensate: str | Pass | None = None,
    tune: str | Pass | None = None,
    norm: str | None = None,
    tokenizer: Any = None,
    verify: bool = True,
    inplace: bool = False,
    device: Any = None,
    example_inputs: Mapping[str, Any] | None = None,
    track: Track | None = None,
) -> Result:
    """Remove from ``model`` what ``plan`` says.

    Args:
        model: the model the plan was made for, or one of the same shape.
        plan: from an earlier result or :meth:`Plan.from_json`.
        calibration: as for :func:`prune`; for ``compensate`` and ``tune`` alone.
        compensate: as for :func:`prune`; None leaves every kept number as it is.
        tune: as for :func:`prune`; None for no tuning.
        norm: as for :func:`prune`; None for what the plan says.
        tokenizer: as for :func:`prune`.
        verify: as for :func:`prune`.
        inplace: as for :func:`prune`.
        device: as for :func:`prune`.
        example_inputs: as for :func:`prune`.
        track: as for :func:`prune`.

    Raises:
        PlanError: the plan does not fit the model.
    """
    pipeline = prune_pipeline(
        calibration,
        recipe=_PUBLISHED,
        plan=_plan(plan),
        compensate=compensate,
        tune=tune,
        norm=norm,
        tokenizer=tokenizer,
        verify=verify,
        inplace=inplace,
        track=track,
    )
    return _run(pipeline, model, example_inputs, inplace, device)


def _run(
    pipeline: Pipeline, model: nn.Module, example_inputs: Mapping[str, Any] | None, inplace: bool, device: Any
) -> Result:
    """Run a pipeline on a model; where it fails in place, put back what was cut off the model."""
    pipeline.check_arguments()
    check_device(device)
    start = time.perf_counter()
    graph_module = trace(model, example_inputs).graph_module
    _LOGGER.info("trace: %.1f s", time.perf_counter() - start)
    try:
        with carrying(carrier_to(device, device_of(graph_module))):
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
    round_to: int | str | Mapping[str, int] = 1,
    uniform: bool = False,
    tensor_parallel: int = 1,
    budget: str = "params",
    norm: str | None = None,
    steps: int = 1,
    select: str | Pass | None = None,
    compensate: str | Pass | None = None,
    tune: str | Pass | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    verify: bool = True,
    inplace: bool = False,
    memory: str | None = None,
    plan: Plan | None = None,
    track: Track | None = None,
) -> Pipeline:
    """Return the passes that :func:`prune` runs with these options; see there for what they mean.

    ``Pipeline(str(it))`` reads it back, but for data in memory. Run it on ``fxprune.trace(model).graph_module``.

    Args:
        plan: the decision of an earlier run, in place of importance and selection: what :func:`apply` runs.
    """
    norm = _plan(plan).norm if plan is not None and norm is None else norm
    given = Options(**{name: value for name, value in locals().items() if name != "plan"})
    scoring = with_order("taylor", importance, taylor)
    free = calibration is None and (plan is not None or scores is not None or needs_no_data(scoring))
    default = _DEFAULT if scoring is None and plan is None and not free else _PUBLISHED
    chosen = as_recipe(default if recipe is None else recipe)
    plain = "select-by-ratio" if free and selects_by_samples(chosen) else None
    scorer = scoring if scores is None else kept_scores("load-scores", scores)
    selector = select if select is not None else plain if group_ratio is None else "select-by-group-ratio"
    choices = {"importance": scorer, "select": selector, "compensate": compensate, "tune": tune}
    places = made_places(choices, given.by_stage, {"tune": "record-teacher"})
    if plan is not None:
        carried = load_pass("plan-from-json", text=_plan(plan).to_json())
        places |= {"importance": lambda _: (), "select": lambda _: (carried,)}
    asked = any(choice is not None and str(choice) != NONE for choice in (compensate, tune))
    own = tokenizer if asked or not free else None
    reads = calibration is not None or own is not None
    samples = load_pass("calibrate", data=calibration, tokenizer=own) if reads else None
    again = partial(load_pass, "score-in-steps", steps=steps) if steps != 1 else None
    wishes = Wishes(places, given.by_stage, samples, free, given.verify, again)
    return Pipeline(compose(chosen, wishes))


def _plan(plan: Any) -> Plan:
    """Return ``plan``, which has to be one."""
    if isinstance(plan, Plan):
        return plan
    raise refuse("plan", plan, "a Plan, as in fxprune.Plan.from_json(text)")
