"""The Python API: prune a model, or apply a plan to one."""

from __future__ import annotations

import logging
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from torch import fx, nn

from fxprune.checkpoint.low_memory import load_mapped, request_key, resumable_folder
from fxprune.checkpoint.read import load_model, load_tokenizer
from fxprune.checkpoint.write import check_request
from fxprune.data.built_in import can_generate
from fxprune.data.calibration import BATCH, Calibration, fixed_tokens, most_positions
from fxprune.data.samples import check_tokens, is_in_memory, read_token_rows, token_rows
from fxprune.data.text import is_text
from fxprune.discovery.groups import as_kinds, bare_kind
from fxprune.emit.emitted import PLAN_DIGEST
from fxprune.errors import ArgumentError, CalibrationError, FxpruneError
from fxprune.evaluation.comparison import graph_predictor, measure_quality, token_twin, window_of
from fxprune.graph.context import attempt, default_modes
from fxprune.graph.facts import Source, facts_of, restore_cut
from fxprune.graph.tensors import device_of, has_meta_weights, weights
from fxprune.masking.objective import Objective, predicts_next
from fxprune.offload.distributed import distribute_like, is_distributed, tensor_parallel_size, whole_copy
from fxprune.offload.files import finish_writes, is_offloading, release_freed
from fxprune.offload.prefetch import offer_prefetcher, prefetcher_to
from fxprune.offload.ranks import check_same
from fxprune.pipeline.arguments import as_path, has_vocab, invalid, refuse
from fxprune.pipeline.contract import STAGES, digest_of, no_progress
from fxprune.pipeline.pipeline import Pipeline
from fxprune.pipeline.progress import run_bar
from fxprune.pipeline.registry import load_pass
from fxprune.recipes import ApplyOptions, Options, Recipe, as_recipe, option_table, resolve
from fxprune.recipes.recipe import NONE, changed, needs_samples
from fxprune.removal.plan import Plan
from fxprune.removal.removal import Scores
from fxprune.removal.target import DEFAULT_RATIO
from fxprune.result import Result
from fxprune.trace import trace
from fxprune.trace.inputs import check_merged, inputs_like, is_hugging_face
from fxprune.vocabulary import stage as vocabulary
from fxprune.vocabulary.prune import DenseTeacher, PrunedVocabulary, Use, carry_out
from fxprune.vocabulary.tokenizer import read_tokens, specification

__all__ = ["Result", "apply", "prune", "prune_checkpoint", "prune_pipeline", "prune_traced"]

_LOGGER = logging.getLogger("fxprune")

F = TypeVar("F", bound=Callable[..., Any])


def _documented(declaration: type) -> Callable[[F], F]:
    """Append the options of ``declaration`` to the ``Args`` of a function."""

    def decorate(function: F) -> F:
        wrapped = partial(textwrap.wrap, width=112, initial_indent=" " * 8, subsequent_indent=" " * 12)
        lines = [line for name, (_, one) in option_table(declaration).items() for line in wrapped(f"{name}: {one.doc}")]
        function.__doc__ = (function.__doc__ or "").replace("        options: see below.", "\n".join(lines))
        return function

    return decorate


@_documented(Options)
def prune(model: nn.Module | str | os.PathLike[str], calibration: Any = None, **options: Unpack[Options]) -> Result:
    """Remove the least important structures of a model, which stays as it is.

    Args:
        model: a Hugging Face model, any module that ``torch.export`` can trace, or a folder, a GGUF file or a hub id
            of a causal language model. Of a model that FSDP2, torch's tensor parallelism or a ``device_map`` has
            distributed, the weights are gathered, and the slim model is distributed in the same way.
        calibration: token ids ``(samples, tokens)``, a list of tokenised dicts, or a DataLoader; with a tokenizer, text
            in the form of a file, the name of a data set such as ``"wikitext2"``, ``"c4"`` or ``"owner/name"``, a list
            of texts, or a ``datasets.Dataset``. None, with a tokenizer, for built-in text and samples that the model
            generates, else for criteria that need no data.
        options: see below.

    Raises:
        FxpruneError: one of its subclasses, which names the problem and the remedy; the model is then unchanged.
    """
    check_merged(model)
    if isinstance(model, nn.Module) and is_distributed(model):
        options.setdefault("tensor_parallel", tensor_parallel_size(model))
        if options.get("inplace"):
            what = "the weights of a distributed model are gathered in a copy"
            raise invalid("inplace", True, what, "Leave $inplace out")
        return _distributed(prune(whole_copy(model), calibration, **options), model)
    values = resolve(options)
    if has_vocab(values):
        return _prune_vocabulary(model, calibration, values)
    offload = values["offload"]
    if isinstance(model, nn.Module):
        if offload is not None:
            remedy = "Pass the folder or hub id of the model, or leave $offload out"
            raise invalid("offload", offload, "the weights of a module are in memory already", remedy)
        return _run(_pipeline(calibration, values), model, values)
    _check_place("model", model, "a torch.nn.Module, a folder, a GGUF file, or a hub id")
    if values["tokenizer"] is None and (calibration is None or is_text(calibration)):
        values["tokenizer"] = options["tokenizer"] = load_tokenizer(model, needed=False)
    if offload is not None:
        return _prune_offloaded(model, Path(offload), calibration, options, lambda result: None)
    return _run(_pipeline(calibration, values), load_model(model), values)


def prune_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Any = None,
    *,
    max_shard_size: int | str = "500MB",
    force: bool = False,
    also: Callable[[Result, Path], object] | None = None,
    **options: Unpack[Options],
) -> Result:
    """Prune a model from folder to folder with its weights on disk: :func:`prune` with ``offload``, and saved.

    Memory holds one part of the model and the activations of the samples. Weights that transformers builds from several
    tensors of a file, such as those of experts, are built one at a time, into files. A killed run resumes when it is
    repeated with the same arguments and files; until it is done, intermediate results are in ``<out>.unfinished``.
    Where memory does not hold the weights, each step of tuning reads them three times; ``tune="none"`` leaves it out.
    The weights of the result are in unlinked files.

    Args:
        source: a folder of safetensors that transformers loads, or the hub id of one; or a GGUF file, which is
            unpacked to float32 beside ``out`` first.
        out: the folder to write, as for :func:`fxprune.save_pretrained`, as is ``force``.
        max_shard_size: the largest file of weights; one is in memory when it is written.
        also: called with the result and the new folder before it takes its place, to write more files into it.
        options: as for :func:`prune`; with ``device="cuda"`` each part of the model is moved there when it runs.

    Raises:
        CheckpointError: ``source`` cannot be loaded, or ``out`` holds something else.
        FxpruneError: as for :func:`prune`.
    """
    check_merged(source)
    _check_place("source", source, "a folder, a GGUF file, or a hub id; `fxprune.prune` takes a module")
    tokenizer = options.get("tokenizer")
    out = check_request(out, tokenizer, max_shard_size)

    def save(result: Result) -> None:
        more = None if also is None else partial(also, result)
        result.save_pretrained(out, tokenizer, max_shard_size=max_shard_size, force=force, also=more)

    return _prune_offloaded(source, Path(out), calibration, options, save, force=force)


@_documented(ApplyOptions)
def apply(model: nn.Module, plan: Plan, calibration: Any = None, **options: Unpack[ApplyOptions]) -> Result:
    """Carry out a plan on a model.

    Args:
        model: the model the plan was made for, or one of the same shapes.
        plan: of an earlier result, or from :meth:`Plan.from_json`.
        calibration: as for :func:`prune`; for ``compensate`` and ``tune`` alone.
        options: see below.

    Raises:
        PlanError: the plan does not fit the model.
    """
    check_merged(model)
    if not isinstance(plan, Plan):
        raise refuse("plan", plan, "a Plan, as in fxprune.Plan.from_json(text)")
    if is_distributed(model):
        return _distributed(apply(whole_copy(model), plan, calibration, **options), model)
    values = resolve({"compensate": NONE, "tune": NONE, **_given(options)}, ApplyOptions)
    if plan.vocabulary:
        return _apply_vocabulary(model, plan, calibration, values)
    return _run(_pipeline(calibration, resolve(_given(values)), plan), model, values)


def prune_pipeline(calibration: Any = None, *, plan: Plan | None = None, **options: Unpack[Options]) -> Pipeline:
    """The passes that :func:`prune` runs with these options.

    ``Pipeline(str(it))`` reads it back, except for data in memory. Run it on ``fxprune.trace(model).graph_module``.

    Args:
        plan: a plan to carry out, in place of importance and selection.
    """
    values = resolve(options)
    if not has_vocab(values):
        return _pipeline(calibration, values, plan)
    if vocabulary.has_others(values):
        return _pipeline(calibration, vocabulary.without_vocab(values), plan)
    return _pipeline(None, _nothing_else(values), Plan())


def _distributed(result: Result, dense: nn.Module) -> Result:
    """The result with its model distributed as the dense one is; the graph keeps whole weights."""
    if result.model is not None:
        distribute_like(result.model, dense)
    note = "the weights were gathered to prune them: each process held all of them"
    return replace(result, report=replace(result.report, notes=(*result.report.notes, note)))


def _check_place(name: str, value: Any, wanted: str) -> None:
    if not isinstance(value, str | os.PathLike):
        has_model = any(hasattr(value, part) for part in ("graph_module", "model"))
        raise refuse(name, value, "its .model" if has_model else wanted)


def _prune_vocabulary(model: Any, calibration: Any, values: Mapping[str, Any]) -> Result:
    """Prune the vocabulary, and then the other kinds of the trimmed model."""
    vocabulary.check_alone(values)
    if not isinstance(model, nn.Module):
        _check_place("model", model, "a torch.nn.Module, a folder, a GGUF file, or a hub id")
        model, words = load_model(model), values["tokenizer"] or load_tokenizer(model)
        values = {**values, "tokenizer": words}
    vocabulary.check_parts(model, values["tokenizer"])
    _check_target(values)
    reached = None if values["target"] is None else vocabulary.reach(model, values["target"])
    if reached is not None:
        values = {**values, "target": None, "ratio": 1 - reached.asked / reached.dense}
    prune_pipeline(calibration, **values).check_arguments()
    calibration = vocabulary.as_rows(model, calibration, values["tokenizer"])
    if str(getattr(calibration, "text", None)) == str(values["eval_text"]):  # all of it is counted
        values = {**values, "eval_text": None}
    found, others = vocabulary.trim_first(model, calibration, values)
    ratio = DEFAULT_RATIO if values["ratio"] is None else values["ratio"]
    rest = {**_nothing_else(values), "tokenizer": found.tokenizer} if others is None else others
    samples = teacher = None
    if others is not None or rest["tune"] != NONE:
        teacher = DenseTeacher.of(token_twin(model), values["tokenizer"], found)
        samples = vocabulary.samples_with(found, calibration)
    pipeline = _pipeline(samples, rest, Plan() if others is None else None, teacher)
    result = _run(pipeline, found.model, {**rest, "eval": False})
    return _with_vocabulary(result, found, ratio, model, values, reached)


def _nothing_else(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the vocabulary alone: no weight is scored or fitted, or tuned unless that is asked for."""
    of_selection = {name: option_table()[name][1].default for name in _OF_SELECTION}
    rest = {**vocabulary.without_vocab(values), **of_selection, "kinds": None, "compensate": NONE}
    if values["tune"] in (None, NONE):
        return {**rest, "tune": NONE}
    return {**rest, "recipe": "balanced" if values["recipe"] is None else values["recipe"]}


def _apply_vocabulary(model: Any, plan: Plan, calibration: Any, values: Mapping[str, Any]) -> Result:
    options = resolve(_given(values))
    vocabulary.check_alone({**options, "compensate": None, "tune": None})
    tokenizer = values["tokenizer"]
    vocabulary.check_parts(model, tokenizer)
    tokens = read_tokens(specification(tokenizer))
    found = carry_out(model, tokenizer, plan.vocabulary, tokens, Use({}), share=True)
    options["tokenizer"] = found.tokenizer
    samples = vocabulary.samples_with(found, vocabulary.as_rows(model, calibration, tokenizer))
    pipeline = _pipeline(samples, options, replace(plan, vocabulary=()))
    result = _run(pipeline, found.model, {**options, "eval": False})
    return _with_vocabulary(result, found, None, model, {**options, "tokenizer": tokenizer})


def _with_vocabulary(
    result: Result, found: PrunedVocabulary, ratio: Any, dense: Any, values: Mapping[str, Any], reached: Any = None
) -> Result:
    """The result with the tokens that stay in its plan, its report, its tokenizer, and its quality."""
    plan = replace(result.plan, vocabulary=found.report.kept)
    if result.model is not None:
        vars(result.model)[PLAN_DIGEST] = plan.digest
    report = vocabulary.report_with(result.report, found, ratio, reached)
    result = replace(result, plan=plan, report=report, tokenizer=found.tokenizer)
    return _with_quality(result, token_twin(dense), dense, values)


def _pipeline(
    calibration: Any, values: Mapping[str, Any], plan: Any = None, teacher: DenseTeacher | None = None
) -> Pipeline:
    """The recipe with validated options applied stage by stage; ``teacher`` is that of a pruned vocabulary."""
    if plan is not None and not isinstance(plan, Plan):
        raise refuse("plan", plan, "a Plan, as in fxprune.Plan.from_json(text), or None")
    values = _without_deprecated(values)
    default = "balanced" if plan is None else "llm-pruner"  # a plan is carried out without fits and tuning
    recipe = as_recipe(default if values["recipe"] is None else values["recipe"])
    choices = {stage: values[stage] for stage in ("importance", "select", "compensate", "tune")}
    if plan is not None:
        values = {**values, "norm": values["norm"] or plan.norm}
        recipe["importance"] = None
        choices |= {"importance": None, "select": load_pass("plan-from-json", text=plan.to_json())}
    _check_target(values)
    arguments = _stage_arguments(values)
    arguments["teach"]["dense"] = teacher
    for stage in recipe:
        recipe.set_arguments(stage, arguments[stage])
    for stage, choice in choices.items():
        if choice is not None:
            recipe.replace_stage(stage, choice, arguments[stage])
    has_data = calibration is not None or values["tokenizer"] is not None or recipe.reads_samples()
    fits = any(choices[stage] not in (None, NONE) for stage in ("compensate", "tune"))
    if not (has_data or fits or any(map(needs_samples, recipe["importance"]))):
        # Criteria that need no data are used without any: nothing is fitted, tuned, searched or measured.
        _leave_width_whole(recipe, named="kinds" in arguments["select"])
        for stage in ("teach", "compensate", "tune"):
            recipe[stage] = None
        if any(map(needs_samples, recipe["select"])) and choices["select"] is None:
            recipe.replace_stage("select", "select-by-ratio", arguments["select"])
    selected = {**arguments["select"], "target": values["target"], "ratio": values["ratio"]}
    _check_taken(recipe, _given({name: selected.get(name) for name in _OF_SELECTION}))
    _complete(recipe, values["steps"], arguments["teach"])
    _read_samples(recipe, calibration, values["tokenizer"])
    recipe["report"] = recipe["report"] or "make-report"  # a recipe of one's own may leave it out
    if not values["verify"]:
        recipe.set_arguments("shrink", {"verify": False})
    return Pipeline(recipe.passes, track=values["track"])


def _leave_width_whole(recipe: Recipe, *, named: bool) -> None:
    """Take residual width out of a selection that would measure how far it goes, which takes samples.

    ``named`` says whether options name the kinds that shrink, which then all do.
    """
    for step in recipe["select"]:
        if getattr(step, "width", ()):
            before = step.kinds  # type: ignore[attr-defined]
            stay = tuple(kind for kind in before if named or bare_kind(kind) != "channel")
            recipe.set_arguments("select", {"kinds": stay, "width": (), "compensate": None})
            recipe["importance"] = [
                changed(one, {"kinds": stay}) if getattr(one, "kinds", ()) == before else one
                for one in recipe["importance"]
            ]


def _complete(recipe: Recipe, steps: int, arguments: Mapping[str, Any]) -> None:
    """Add the teacher if tuning reads one, and hand the recipe's selection and fit to passes that run them."""
    read = {kind for step in recipe["tune"] for kind in (*step.needs, *step.wants)}
    teach = recipe["teach"] or [changed(load_pass("record-teacher"), arguments)]
    recipe["teach"] = [step for step in teach if read.intersection(step.gives)]
    if steps > 1 and recipe["importance"]:
        recipe["importance"] = load_pass("score-in-steps", importance=recipe["importance"][0], steps=steps)
    others = {stage: recipe[stage][0] for stage in ("select", "compensate") if recipe[stage]}
    recipe["importance"] = [
        changed(step, {name: one for name, one in others.items() if getattr(step, name, one) is None})
        for step in recipe["importance"]
    ]


def _read_samples(recipe: Recipe, calibration: Any, tokenizer: Any) -> None:
    """Let the recipe read the samples given, in place of those it reads itself."""
    prepare = recipe["prepare"]
    others = [step for step in prepare if Calibration not in step.gives]
    given = _given({"data": calibration, "tokenizer": tokenizer})
    needed = calibration is not None or any(map(needs_samples, recipe.passes))
    if needed and calibration is None and any(getattr(step, "file", "") for step in prepare):
        return  # the samples are those of the recipe's file
    if not (needed and given):
        recipe["prepare"] = others
    elif len(others) == len(prepare):
        recipe["prepare"] = [load_pass("calibrate", **given), *others]
    else:
        given |= {"file": "", "written": 0} if calibration is not None else {}
        recipe["prepare"] = [changed(step, given) if Calibration in step.gives else step for step in prepare]


def _stage_arguments(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    ratio, kinds = values["ratio"], values["kinds"]
    if isinstance(ratio, Mapping):
        kinds = tuple(ratio) or kinds
    widths: dict[str, Any] = {"kinds": kinds, "group_ratio": values["group_ratio"]}
    for name in _OF_SELECTION:
        default = option_table()[name][1].default
        if type(values[name]) is not type(default) or values[name] != default:
            widths[name] = values[name]
    if values["target"] is not None:  # those of the recipe give way to it
        widths |= {"context": values["context"] or 0, "ratio": DEFAULT_RATIO, "budget": "params"}
    elif ratio is not None:
        widths |= {"target": "", "context": 0}
    if values["uniform"]:
        widths.setdefault("protect", ())
    everywhere = {"seed": values["seed"] or None, "tokenizer": values["tokenizer"]}
    arguments: dict[str, dict[str, Any]] = {
        "discover": {"norm": values["norm"] or ("sliced" if values["uniform"] else None)},
        "importance": {
            "kinds": kinds,
            "reduction": values["reduction"],
            "memory": values["memory"] or ("low" if values["inplace"] else None),
        },
        "select": widths,
        "tune": {"memory": values["memory"]},
        "shrink": {"by_block": values["memory"] == "low" or None},
    }
    return {stage: _given({**everywhere, **arguments.get(stage, {})}) for stage in STAGES}


def _check_target(values: Mapping[str, Any]) -> None:
    """Refuse a target beside what contradicts it, and a context without one."""
    context, target = values["context"], values["target"]
    if target is None:
        if context is not None:
            what = "$context is for a target of memory, and there is none"
            raise invalid("context", context, what, "Give $target too, as in '6GB'")
        return
    for name in ("ratio", "group_ratio"):
        if values[name] is not None:
            raise _conflict("target", target, name, "both say how much goes")
    if values["budget"] != option_table()["budget"][1].default:
        raise _conflict("target", target, "budget", "a target states its quantity")


_OF_SELECTION = ("target", "ratio", "budget", "uniform", "ranking", "protect", "part", "round_to", "tensor_parallel")
"""Options of the selection alone."""


def _check_taken(recipe: Recipe, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the selection that it would not read; an empty one asks for nothing."""
    for name, value in arguments.items():
        if value == () or any(hasattr(step, name) for step in recipe["select"]):
            continue
        if not recipe["select"]:
            what = f"${name}={value!r}: the recipe has no selection"
            raise invalid(name, value, what, f"Leave ${name} out, or name a selection")
        chosen = ", ".join(step.name for step in recipe["select"])
        raise _conflict(name, value, "select", f"{chosen} takes none")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _without_deprecated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options with spellings of passes in place of deprecated words; contradictions are refused."""
    values = dict(values)
    taylor, ratio, scores = values.pop("taylor"), values["group_ratio"], values.pop("scores")
    if ratio is not None and values["ratio"] is not None:
        raise _conflict("ratio", values["ratio"], "group_ratio", "both name the fraction to remove")
    by_kind, kinds = values["ratio"] if isinstance(values["ratio"], Mapping) else ratio, values["kinds"]
    if isinstance(by_kind, Mapping) and kinds is not None and set(as_kinds("kinds", kinds)) != set(by_kind):
        raise _conflict("kinds", kinds, "ratio", "a ratio by kind names the kinds that may go")
    if taylor is not None:
        spelled = f"taylor{{order={taylor}}}"
        if values["importance"] not in (None, "taylor", spelled):
            what = f"$taylor={taylor!r} beside $importance={str(values['importance'])!r}"
            raise invalid("taylor", taylor, what, f"Leave $taylor out; $importance={spelled!r} says both")
        values["importance"] = spelled
        _warn("taylor", f"importance={spelled!r}")
    if scores is not None:
        given = {"scores": scores} if isinstance(scores, Scores) else {"file": scores}
        values["importance"] = load_pass("load-scores", **given)
        _warn("scores", "importance='load-scores{file=...}', or importance=load_pass('load-scores', scores=...)")
    if ratio is not None:
        values["kinds"] = tuple(ratio) or values["kinds"] if isinstance(ratio, Mapping) else values["kinds"]
        values["select"] = "select-by-group-ratio" if values["select"] is None else values["select"]
        _warn("group_ratio", "select='select-by-group-ratio{group_ratio=...}'")
    if values["steps"] > 1:
        _warn("steps", "importance='score-in-steps{steps=...}'")
    return values


def _conflict(name: str, value: Any, other: str, why: str) -> ArgumentError:
    return invalid(name, value, f"${name}={value!r} beside ${other}: {why}", f"Leave ${name} or ${other} out")


def _warn(name: str, instead: str) -> None:
    message = f"{name}= is deprecated and goes with the next release: write {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=5)


def _prune_offloaded(
    source: Any, folder: Path, calibration: Any, options: Any, finish: Callable[[Result], None], *, force: bool = False
) -> Result:
    """Prune with weights on disk; ``finish`` is called while the intermediate results are still there."""
    values = resolve({"memory": "low", **_given(options)})
    source = as_path("model", source)
    if has_vocab(values):
        vocabulary.check_alone({**values, "offload": folder})
    pipeline = _pipeline(calibration, values)
    key = request_key(source, calibration, str(pipeline), values["tokenizer"])
    with resumable_folder(folder, key, force=force) as work:
        result = _run(pipeline, load_mapped(source, work), {**values, "inplace": False})
        finish_writes()
        finish(result)
    return result


@default_modes()
def _check_samples(pipeline: Pipeline, model: Any) -> None:
    """Refuse samples that a model of token ids cannot read, before it is traced."""
    embedding = attempt(model.get_input_embeddings)
    whole = model.config.get_text_config() is model.config  # others give ids of images a meaning
    rows = len(embedding.weight) if whole and isinstance(embedding, nn.Embedding) else None
    readers: list[Any] = [step for step in pipeline.leaves() if Calibration in step.gives]
    for step in readers:
        data, file = getattr(step, "data", None), getattr(step, "file", "")
        if is_text(data):
            most = most_positions(model) or step.tokens
            data = replace(step, tokens=min(step.tokens, most)).given()
        if data is not None or file:
            check_tokens(read_token_rows(file) if data is None else data, rows, can_generate(model))


def prune_traced(graph_module: fx.GraphModule, model: nn.Module, calibration: Any, options: Options) -> Result:
    """Prune as :func:`prune` a model whose graph was traced before; both stay as they are."""
    values = resolve(options)
    return _run(_pipeline(calibration, values), model, values, graph_module)


def trace_for(model: nn.Module, example_inputs: Mapping[str, Any] | None, pipeline: Pipeline) -> fx.GraphModule:
    """The graph of a model for inputs like the samples of a pipeline, unless the caller gives others."""
    readers: list[Any] = [step for step in pipeline.leaves() if Calibration in step.gives]
    data = next((step.data for step in readers if getattr(step, "data", None) is not None), None)
    like = inputs_like(model, data) if example_inputs is None else None
    try:
        traced = trace(model, example_inputs if like is None else like).graph_module
    except ArgumentError as error:
        if like is None:
            raise
        remedy = "Pass samples that the model itself runs on"
        raise CalibrationError(error.what, where="calibration sample 0", remedy=remedy) from error
    fixed = fixed_tokens(traced)
    if fixed is None or example_inputs is not None or not readers:
        return traced
    tokens = _sample_tokens(readers[0], most_positions(model)) or fixed
    return traced if tokens == fixed else trace(model, {"input_ids": torch.zeros(BATCH, tokens).long()}).graph_module


def _sample_tokens(step: Any, most: int | None) -> int | None:
    """Tokens of the first sample that a pass reads, of a model of ``most`` positions; None if it is not known yet."""
    data, file = getattr(step, "data", None), getattr(step, "file", "")
    if is_text(data) or (data is None and not file):
        tokens = getattr(step, "tokens", None)
    else:
        data = read_token_rows(file) if data is None else data
        tokens = next(token_rows(data, None, next_token=False)).shape[1] if is_in_memory(data) else None
    return tokens if tokens is None or most is None else min(tokens, most)


def _run(
    pipeline: Pipeline, model: nn.Module, values: Mapping[str, Any], graph_module: fx.GraphModule | None = None
) -> Result:
    """Run a pipeline on a model; if it fails in place, restore the tensors cut off the model."""
    pipeline.check_arguments()
    if values["example_inputs"] is None and getattr(model, "main_input_name", "") == "input_ids":
        _check_samples(pipeline, model)
    if is_hugging_face(model):
        for step in pipeline.leaves():
            step.foresee_model(model)
    measured = ["quality"] if values["eval"] and values["tokenizer"] is not None else []
    shows = values["progress"] and values["track"] is None
    with run_bar(pipeline.passes, ["trace"], measured) if shows else nullcontext() as bar:
        if bar is None:
            return _run_passes(pipeline, model, values, graph_module)
        bar.begin("trace")
        pipeline = Pipeline(pipeline.passes, on_pass=lambda step: bar.begin(step.name), track=bar.track)
        return _run_passes(pipeline, model, {**values, "track": bar.track}, graph_module, bar.begin)


def _run_passes(
    pipeline: Pipeline, model: nn.Module, values: Mapping[str, Any], graph_module: Any, begin: Any = lambda _: None
) -> Result:
    start = time.perf_counter()
    if graph_module is None:
        graph_module = trace_for(model, values["example_inputs"], pipeline)
        release_freed()
        _LOGGER.info("trace: %.1f s", time.perf_counter() - start)
    try:
        home = device_of(graph_module)
        with offer_prefetcher(prefetcher_to(values["device"], home, in_files=is_offloading())):
            result = Result.of(pipeline(graph_module, inplace=values["inplace"]).graph_module)
            if not has_meta_weights(result.graph_module):
                # processes that loaded other weights, or round in another way, end with different ones
                check_same(
                    lambda: {"the slim weights": [(n, digest_of(t)) for n, t in weights(result.graph_module)]},
                    where="the end of the prune",
                )
            begin("quality")
            return _with_quality(result, graph_predictor(graph_module, shared=True), model, values)
    except BaseException:  # an interrupt too: the model must not be left half cut
        source = facts_of(graph_module).get(Source)
        if source is not None and source.cut:
            restore_cut(source)
        raise


def _with_quality(result: Result, dense: Callable[..., Any], model: nn.Module, values: Mapping[str, Any]) -> Result:
    """The result with its quality in the report, or with the reason why it was not measured.

    ``dense`` gives the logits of the dense model for ``input_ids=``, and ``model`` generates.
    """
    start = time.perf_counter()
    why = _unmeasured(result.graph_module, values)
    quality = None
    if not why:
        try:
            quality = measure_quality(
                dense,
                graph_predictor(result.graph_module),
                values["tokenizer"] if result.tokenizer is None else result.tokenizer,
                values["eval_text"],
                dense_tokenizer=None if result.tokenizer is None else values["tokenizer"],
                speakers=None if result.model is None or values["device"] else (model, result.model),
                pruned=result.graph_module,
                window=window_of(model, result.graph_module),
                track=values["track"] or no_progress,
            )
        except (FxpruneError, MemoryError, torch.OutOfMemoryError) as error:  # the prune itself is done
            why = str(error)
    _LOGGER.info("quality: %.1f s", time.perf_counter() - start)
    return replace(result, report=result.report.with_quality(quality, why))


def _unmeasured(slim: fx.GraphModule, values: Mapping[str, Any]) -> str:
    """The reason why the quality of a prune is not measured; empty if it is."""
    if not values["eval"]:
        return "it was not asked for"
    if values["tokenizer"] is None:
        return "there was no tokenizer"
    if values["inplace"]:
        return "the model was pruned in place, and the dense one is gone"
    if is_offloading():
        return "the weights are on disk, and each batch would read them all"
    if has_meta_weights(slim):
        return "the model has no weights"
    form = facts_of(slim).get(Objective)
    if not (predicts_next(slim) if form is None else form.next_token):
        return "the model does not predict next tokens"
    return ""
