"""Runs of a sweep: shared work is done once, and a stopped sweep resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from fxprune.api import prune_pipeline, prune_traced, trace_for
from fxprune.checkpoint.manifest import MANIFEST
from fxprune.checkpoint.read import load_model, load_tokenizer
from fxprune.data.named import is_data_set
from fxprune.data.samples import is_in_memory
from fxprune.data.text import TOKENS, calibration_text, is_text, text_samples
from fxprune.errors import ArgumentError, CheckpointError, EvaluationError
from fxprune.evaluation.speed import check_generates, measure_speed
from fxprune.graph.compat import tree_leaves
from fxprune.offload.atomic import LOCK, atomic_path, holds_files, locked, made_folder, wrap_disk_errors, write_file
from fxprune.offload.ranks import check_unsharded, decide_on_first, run_on_first
from fxprune.pipeline.arguments import as_path, flag, invalid, number, one_of, refuse
from fxprune.pipeline.contract import digest_of, sharing
from fxprune.recipes import Options, Recipe, as_recipe
from fxprune.report.report import package_versions
from fxprune.result import Result
from fxprune.sweep.table import Sweep, SweepRow, row_of

TABLE = "sweep.json"
"""The rows that are done, in the folder of the sweep."""

RATIOS = (0.1, 0.2, 0.35)
RECIPES = ("fast", "balanced")

Keep = Literal["all", "best", "none"]
KEEP = ("all", "best", "none")


def sweep(  # type: ignore[misc]  # lists of ratios and of recipes, in place of one
    model: nn.Module | str | os.PathLike[str],
    calibration: Any = None,
    *,
    out: str | os.PathLike[str],
    ratio: float | Sequence[float] = RATIOS,
    recipe: str | Recipe | Sequence[str | Recipe] = RECIPES,
    keep: Keep = "best",
    bench: bool = False,
    force: bool = False,
    **options: Unpack[Options],
) -> Sweep:
    """Prune a model by several recipes and ratios, and compare the results by their quality.

    The trace, the samples, the groups, scores by the same criterion and the teacher's logits are shared. The row of
    each prune is written to ``sweep.json`` once it is done: a sweep that was stopped goes on when it is repeated, and
    later calls with the same model and samples add rows.

    Args:
        model: as for :func:`fxprune.prune`; it stays as it is, and its weights are in memory.
        calibration: as for :func:`fxprune.prune`, in memory: it is read more than once.
        out: the folder for ``sweep.json``, ``sweep.md``, ``sweep.svg`` where matplotlib is installed, and the models.
        ratio: fractions of the parameters to remove.
        recipe: recipes, as for :func:`fxprune.prune`.
        keep: the slim models that stay on disk, each in a folder named after its recipe and ratio: ``all`` of them,
            ``best``, those that nothing else beats, or ``none``.
        bench: measure the time of a generated token as well, dense and slim side by side.
        force: replace the table of another model or of other samples.
        options: as for :func:`fxprune.prune`, for all of them.

    Raises:
        FxpruneError: as for :func:`fxprune.prune`; rows that are done stay.
    """
    asked = check_sweep(ratio, recipe, keep, options)
    folder = Path(as_path("out", out))
    bench, force = flag("bench", bench), flag("force", force)
    model, calibration, given = _read_inputs(model, calibration, options)
    if bench:
        check_generates("dense", model)
    source = _digest(model, calibration)
    read = partial(_read, folder, source, force=force)
    decide_on_first(read, CheckpointError)  # a folder of something else is refused before it is locked
    keys = {name: _key(source, calibration, {**given, **own}) for name, own in asked.items()}
    with wrap_disk_errors(folder, CheckpointError), ExitStack() as stack, sharing():
        run_on_first(partial(_reserve, folder, stack), CheckpointError)
        found = decide_on_first(read, CheckpointError)
        rows, made = {row.name: row for row in found}, set[str]()
        known = Sweep(folder, tuple(found))
        todo = decide_on_first(partial(_missing, keys, known, keep=keep, bench=bench), CheckpointError)
        own = {name: asked[name] for name in todo}
        for row, result in _prunes(own, keys, model, calibration, given, bench=bench):
            rows[row.name] = row
            done = Sweep(folder, tuple(rows.values()))
            if keep == "all" or (keep == "best" and row in done.best):
                result.save_pretrained(folder / row.name, given["tokenizer"])
            made.add(row.name)
            run_on_first(partial(_write, done, source, made if keep == "best" else ()), CheckpointError)
            del result  # before the next one is made
        done = Sweep(folder, tuple(rows[name] for name in (*asked, *(name for name in rows if name not in asked))))
        run_on_first(partial(_write_pages, done, source), CheckpointError)
    return done


def _read_inputs(
    model: nn.Module | str | os.PathLike[str], calibration: Any, options: Mapping[str, Any]
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model, the samples and the options of all prunes, with a tokenizer."""
    given = {**options}
    if calibration is not None and not is_text(calibration) and not is_in_memory(calibration):
        raise refuse("calibration", calibration, "samples in memory, as in list(loader): a sweep reads them repeatedly")
    if not isinstance(model, nn.Module):
        if given.get("tokenizer") is None:
            given["tokenizer"] = load_tokenizer(model)
        model = load_model(model)
    if given.get("tokenizer") is None:
        raise invalid("tokenizer", None, "quality cannot be measured without one", "Pass the tokenizer of the model")
    check_unsharded(model)
    if is_text(calibration):
        calibration = text_samples(calibration, given["tokenizer"], None, TOKENS)
    return model, calibration, given


def check_sweep(ratio: Any, recipe: Any, keep: Any, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each prune by its name, which is that of its recipe and its ratio.

    Raises:
        FxpruneError: a ratio, a recipe or an option cannot be used.
    """
    one_of("keep", keep, KEEP)
    for name in ("inplace", "offload", "group_ratio"):  # it needs the dense model, in memory, and ratios of its own
        if options.get(name):
            remedy = f"Leave ${name} out, or prune without a sweep"
            raise invalid(name, options[name], f"a sweep does not take ${name}", remedy)
    if options.get("eval") is False:
        raise invalid("eval", False, "a sweep compares by quality", "Leave $eval out")
    ratios = ratio if isinstance(ratio, Sequence) and not isinstance(ratio, str) else (ratio,)
    recipes = recipe if isinstance(recipe, Sequence) and not isinstance(recipe, str) else (recipe,)
    found: dict[str, dict[str, Any]] = {}
    for one in recipes:
        made = as_recipe(one)
        for fraction in ratios:
            name = f"{made.name or 'recipe'}-{number('ratio', fraction, least=0, below=1):g}"
            if name in found:
                what, remedy = f"there are two prunes named {name}", "Give each ratio and each recipe once"
                raise ArgumentError(what, where="sweep", remedy=remedy)
            found[name] = {"recipe": made, "ratio": fraction}
    if not found:
        raise ArgumentError("there is nothing to prune", where="sweep", remedy="Give a ratio and a recipe")
    return found


def _reserve(folder: Path, stack: ExitStack) -> None:
    stack.enter_context(made_folder(folder))
    stack.enter_context(locked(folder / LOCK, CheckpointError))


def _digest(model: nn.Module, calibration: Any) -> str:
    values = [(list(t.shape), str(t.dtype), digest_of(t)) for t in _tensors((model.state_dict(), calibration))]
    config: Any = getattr(model, "config", None)
    kind = config.to_json_string() if hasattr(config, "to_json_string") else type(model).__qualname__
    return hashlib.sha256(json.dumps([values, kind, package_versions()]).encode()).hexdigest()


def _tensors(data: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(data):
        if isinstance(leaf, Mapping):  # of another class than dict, whose values are no leaves
            yield from _tensors(dict(leaf))
        elif leaf is not None:
            yield torch.as_tensor(leaf)


def _read(folder: Path, source: str, *, force: bool) -> list[SweepRow]:
    """The rows that an earlier call with the same model and samples left; none if there are none."""
    file = folder / TABLE
    if folder.exists() and not folder.is_dir():
        raise CheckpointError("is a file", where=str(folder), remedy="Choose a folder")
    if not file.is_file():
        if folder.is_dir() and holds_files(folder) and not force:
            remedy = "Choose a new folder, or write into this one with $force"
            raise CheckpointError("it holds files that are not of a sweep", where=str(folder), remedy=remedy)
        return []
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        rows = [row_of(row) for row in data["rows"]]
        same = data["source"] == source
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"it is not the table of a sweep: {type(error).__name__}: {error}", where=str(file), remedy="Delete it"
        ) from error
    if not same and not force:
        remedy = "Choose a new folder, or replace it with $force"
        raise CheckpointError("it is of another model, other samples or versions", where=str(file), remedy=remedy)
    return rows if same else []


def _key(source: str, calibration: Any, options: Mapping[str, Any]) -> str:
    """Fingerprint of a prune: its model and samples, its passes, which are checked, and the text it is measured on."""
    pipeline = prune_pipeline(calibration, **options)
    pipeline.check_arguments()
    text = options.get("eval_text")
    if text is not None and not is_data_set(text):
        text = calibration_text(Path(as_path("eval_text", text)))
    return hashlib.sha256(f"{source} {pipeline} {text}".encode()).hexdigest()


def _missing(keys: Mapping[str, str], table: Sweep, *, keep: Keep, bench: bool) -> list[str]:
    """The names of the prunes still to be made: of those without a complete row, or without a model that is kept."""
    done = {row.name for row in table.rows if row.key == keys.get(row.name) and not (bench and row.decode_ms is None)}
    kept = {"all": table.rows, "best": table.best, "none": ()}[keep]
    gone = {row.name for row in kept if not (table.folder / row.name / MANIFEST).is_file()}
    return [name for name in keys if name not in done or name in gone]


def _prunes(
    asked: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, str],
    model: nn.Module,
    calibration: Any,
    given: Mapping[str, Any],
    *,
    bench: bool,
) -> Iterator[tuple[SweepRow, Result]]:
    """Yield the row and the result of each prune asked for, all of one traced graph."""
    traced = None
    for name, own in asked.items():
        if traced is None:
            pipeline = prune_pipeline(calibration, **{**given, **own})
            traced = trace_for(model, given.get("example_inputs"), pipeline)
        start = time.perf_counter()
        result = prune_traced(traced, model, calibration, {**given, **own})  # type: ignore[typeddict-item]
        row = partial(_row, name, keys[name], own, result, model if bench else None, time.perf_counter() - start)
        yield decide_on_first(row, EvaluationError), result
        del result, row  # before the next one is made


def _row(
    name: str, key: str, own: Mapping[str, Any], result: Result, dense: nn.Module | None, seconds: float
) -> SweepRow:
    report = result.report
    if report.quality is None:
        remedy = "Prune it without a sweep"
        raise EvaluationError(f"its quality was not measured: {report.unmeasured}", where=name, remedy=remedy)
    (text,) = report.quality.texts
    found = None if dense is None else measure_speed({"dense": dense, "slim": result.model})
    assert report.memory is not None  # every prune counts it
    return SweepRow(
        name=name,
        key=key,
        recipe=own["recipe"].name,
        ratio=own["ratio"],
        parameters=report.parameters,
        memory=report.memory,
        ratio_of_perplexity=text.ratio,
        divergence=text.divergence,
        agreement=text.agreement,
        measured_on=text.data,
        decode_ms=None if found is None else (found["dense"].decode_ms, found["slim"].decode_ms),
        seconds=seconds,
    )


def _write(done: Sweep, source: str, made: Collection[str] = ()) -> None:
    """Write the rows, and delete those models made in this sweep that another one beats by now."""
    write_file(done.folder / TABLE, json.dumps({"source": source, **done.to_dict()}, indent=2))
    for row in done.rows:
        if row.name in made and row not in done.best and (done.folder / row.name / MANIFEST).is_file():
            shutil.rmtree(done.folder / row.name)


def _write_pages(done: Sweep, source: str) -> None:
    _write(done, source)
    write_file(done.folder / "sweep.md", done.to_markdown())
    with suppress(EvaluationError), atomic_path(done.folder / "sweep.svg") as picture:  # there may be no matplotlib
        done.plot(picture)
