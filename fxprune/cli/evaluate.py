"""The command that measures the quality of saved models, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune.cli import options as flags
from fxprune.cli.console import (
    ONE_OF_TWO,
    MeasuringCommand,
    app,
    console,
    is_given,
    keep_freed,
    option_name,
    print_json,
    print_lines,
    progress,
    working,
)
from fxprune.cli.models import check_models, check_predicts, load_pair, load_words, locate_model
from fxprune.errors import EvaluationError

if TYPE_CHECKING:
    from fxprune.evaluation.comparison import Column


_TEXT = "Text for perplexity: a .txt, .jsonl or .json file, wikitext2, c4 or OWNER/NAME; may be repeated."
_TASKS = "Comma-separated tasks of lm-eval, as in 'piqa,arc_easy', .jsonl or .yaml files, or folders of these."
_COMPARE = "Model to compare predictions, choices and answers with, usually the dense one."
_DATA = (
    "In place of texts and tasks, for models of other classes, with --compare: a folder of images or .wav files, or "
    "rows in .jsonl, as `fxprune prune --calibration` takes them."
)
_ANSWERS = "Answer plain questions (default: with --compare)."
_WINDOWS = "Most windows of a text (default: all; 64 of the built-in text)."
_LOW_MEMORY = "Keep weights on disk, and read them once for each text."
_WRITE = "Write the figures into the folders of MODELS: report, its page, and model card."


@app.command("eval", cls=MeasuringCommand)
def evaluate(
    call: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Model folders, hub ids, or GGUF files.")],
    text: Annotated[list[str] | None, typer.Option(help=_TEXT)] = None,
    tasks: Annotated[str | None, typer.Option(help=_TASKS)] = None,
    compare: Annotated[str | None, typer.Option(help=_COMPARE)] = None,
    data: Annotated[str | None, typer.Option(help=_DATA)] = None,
    answers: Annotated[bool | None, typer.Option("--answers/--no-answers", help=_ANSWERS)] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that the model sees at once.")] = 256,
    windows: Annotated[int | None, typer.Option(min=1, help=_WINDOWS)] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Most questions of a task.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows or questions in a batch.")] = 8,
    dtype: flags.Dtype = None,
    device: flags.Device = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help=_LOW_MEMORY)] = False,
    write: Annotated[bool, typer.Option("--write", help=_WRITE)] = False,
    quiet: flags.QuietButResult = False,
    as_json: flags.Json = False,
) -> None:
    """Measure MODELS, dense or slim: size, perplexity on texts, accuracy on tasks, greedy answers."""
    from fxprune.checkpoint.write import replace_report
    from fxprune.evaluation.comparison import Comparison, quality_of
    from fxprune.evaluation.tasks import check_tasks
    from fxprune.offload.ranks import broadcast_object, is_first

    if low_memory:
        _check_low_memory(dtype, device, tasks, answers)
    loading: dict[str, Any] = {"dtype": dtype, "device": device}
    if data is not None:
        _check_data(call)
        _print_agreement(data, models, compare, loading, as_json=as_json)
        return
    compared = check_models([*([compare] if compare else []), *models])
    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if named:
        check_tasks(named)
    reports = _reports(models, compare, low_memory=low_memory) if write else {}
    windows = windows or (None if text else 64)  # a minute or less with a small model on a CPU
    settings = {"window": window, "windows": windows, "questions": questions}
    options: dict[str, Any] = {"batch": batch, "tasks": named, "track": progress, **settings}
    options |= {"texts": _texts(text or (), named), "memory": "low" if low_memory else "fast"}
    options["generate"] = (compare is not None if answers is None else answers) and not low_memory
    if not low_memory:
        keep_freed()
    with tempfile.TemporaryDirectory() if low_memory else nullcontext() as place:
        work = None if place is None else Path(broadcast_object(place))
        columns = _measure(compared, loading, options, work, has_reference=compare is not None)
        if low_memory and compare is not None:
            note = f"predictions and answers are not compared with those of {columns[0].name}: leave --low-memory out"
            noted = (replace(one, evaluation=replace(one.evaluation, notes=(note,))) for one in columns[1:])
            columns = (columns[0], *noted)
        comparison = Comparison(columns, settings)
    if write and is_first():  # processes that share the windows compute the same
        dense, *others = columns
        for column in others:
            folder, measured = compared[column.name], Comparison((dense, column), settings)
            report = reports[folder].with_quality(quality_of(dense.evaluation, column.evaluation))
            replace_report(folder, replace(report, measured=(("", "dense", "slim"), *measured.rows())))
    if as_json:
        print_json(comparison.to_dict())
    else:
        console.print(comparison.table())
        print_lines(f"note: {note}" for note in comparison.notes)


def _check_low_memory(dtype: str | None, device: str | None, tasks: str | None, answers: bool | None) -> None:
    """Refuse options that weights on disk cannot be used with."""
    for option, value, reason in (
        ("--dtype", dtype, "weights on disk are used in the dtype of their files"),
        ("--device", device, "weights on disk are used on the CPU"),
        ("--tasks", tasks, "each question would read all weights"),
        ("--answers", answers or None, "each token would read all weights"),
    ):
        if value is not None:
            raise EvaluationError(reason, where=f"--low-memory with {option}", remedy="Leave one of them out")


def _check_data(call: typer.Context) -> None:
    """Refuse options of texts, tasks and answers beside samples of a model of another class."""
    for name in ("text", "tasks", "answers", "window", "windows", "questions", "batch", "low_memory", "write"):
        if is_given(call, name):
            where = f"--data with {option_name(name)}"
            raise EvaluationError("models are compared on its samples alone", where=where, remedy=ONE_OF_TWO)


def _print_agreement(
    data: str, models: Sequence[str], compare: str | None, loading: Mapping[str, Any], *, as_json: bool
) -> None:
    """Compare models with the dense one on samples that its processor makes."""
    from fxprune.cli.models import load, load_samples
    from fxprune.evaluation.agreement import agreement
    from fxprune.report.quality import figures_table

    if compare is None:
        what = "models are compared on samples, and there is one side alone"
        raise EvaluationError(what, where="--data", remedy="Give --compare with the dense model")
    compared = check_models([compare, *models], any_class=True)
    samples, _ = load_samples(data, compare)
    dense = load(compare, **loading)
    samples = [{name: value.to(dense.device) for name, value in sample.items()} for sample in samples]
    others = {name: place for name, place in compared.items() if place != compare}
    if not others:
        remedy = "Name the dense model with --compare"
        raise EvaluationError("it would be compared with itself", where=compare, remedy=remedy)
    found = {name: agreement(dense, load(place, **loading), samples) for name, place in others.items()}
    if as_json:
        print_json({name: asdict(one) for name, one in found.items()})
        return
    for name, one in found.items():
        console.print(figures_table(("", next(iter(compared)), name), [*one.rows()][1:]))


def _reports(models: Sequence[str], compare: str | None, *, low_memory: bool) -> dict[str, Any]:
    """The reports of slim models by folder, to write figures into; an error without these or a dense model."""
    from fxprune.checkpoint.manifest import read_manifest

    if compare is None or low_memory:
        what = "they are compared with the dense model, which has to be in memory"
        remedy = "Leave --low-memory out" if low_memory else "Give --compare with the dense model"
        raise EvaluationError(what, where="--write", remedy=remedy)
    found = {}
    for model in models:
        if model == compare:
            remedy = "Name the dense model with --compare"
            raise EvaluationError("it would be compared with itself", where=model, remedy=remedy)
        found[model] = read_manifest(Path(model)).read_report(Path(model))
        if found[model] is None:
            raise EvaluationError("it was saved without a report", where=model, remedy="Leave --write out")
    return found


def _texts(given: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Texts by name; each is loaded once to check it."""
    from fxprune.data.built_in import offline_docstrings
    from fxprune.evaluation.perplexity import load_corpus, named_corpora

    if not given:
        return {} if tasks else {"docstrings of Python": offline_docstrings()}
    texts = named_corpora(given)
    for name, source in texts.items():
        if not load_corpus(source).strip():
            raise EvaluationError("the text is empty", where=name, remedy="Give a file with text in it")
    return texts


def _measure(
    models: Mapping[str, str], loading: Any, options: Mapping[str, Any], work: Path | None, *, has_reference: bool
) -> tuple[Column, ...]:
    """Measure the models in turn; one without a tokenizer uses that of the model before it.

    Weights stay on disk if there is a folder to unpack GGUF files in, ``work``. Else the first model may be the
    reference of the others; it then stays in memory.
    """
    from fxprune.checkpoint.low_memory import load_mapped
    from fxprune.evaluation.comparison import Reference, as_column, evaluate

    columns: list[Column] = []
    tokenizer = reference = None
    for name, place in models.items():
        if work is None:
            model, own = load_pair(place, needed=tokenizer is None, **loading)
        else:
            own = load_words(place, needed=tokenizer is None)
            folder = work / str(len(columns))
            folder.mkdir(exist_ok=True)  # processes share it
            with working(f"loading {place}"):
                model = load_mapped(locate_model(place), folder)
                check_predicts(place, model)
        tokenizer = own or tokenizer
        columns.append(as_column(name, model, evaluate(model, tokenizer, reference=reference, **options)))
        if has_reference and work is None and reference is None:
            reference = Reference(model, columns[0].evaluation.answers, tokenizer)
    return tuple(columns)
