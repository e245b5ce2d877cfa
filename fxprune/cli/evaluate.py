"""The command that says what saved models are worth, side by side."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune.cli.allocator import keep_freed
from fxprune.cli.console import (
    Device,
    Dtype,
    Json,
    QuietButResult,
    app,
    clear_errors,
    console,
    print_json,
    progress,
    set_output,
)
from fxprune.cli.load import load_either, load_on_disk
from fxprune.cli.several import checked
from fxprune.errors import EvaluationError

if TYPE_CHECKING:
    from fxprune.evaluation.comparison import Column

__all__ = ["evaluate"]

_BUILT_IN = "docstrings of Python"
_FILES = (".txt", ".jsonl", ".json")

_WINDOWS = 64
"""Of the built-in text: a minute or less with a small model on a processor."""


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders, ids on a hub, or GGUF files.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to predict: a .txt, .jsonl or .json file, wikitext2 or ptb; may be given again."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated tasks of lm-eval, as in 'piqa,arc_easy', or .jsonl files.")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Model to compare with, as a rule the dense one.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that a model sees at once.")] = 256,
    windows: Annotated[
        int | None, typer.Option(min=1, help=f"The most windows of a text; all, and {_WINDOWS} of the built-in text.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="The most questions of a task.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows or questions in one call.")] = 8,
    dtype: Dtype = None,
    device: Device = None,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Weights stay on disk, and are read once for each text.")
    ] = False,
    quiet: QuietButResult = False,
    as_json: Json = False,
) -> None:
    """Measure MODELS, dense or slim: their size, their perplexity on a text, their accuracy on tasks."""
    with clear_errors():
        set_output(quiet=quiet, as_json=as_json, results=True)
        _check_low_memory(low_memory, {"--dtype": dtype, "--device": device, "--tasks": tasks})
        compared = checked([*([compare] if compare else []), *models], dtype, device)
        _check_files(text, tasks)
        options: dict[str, Any] = {"window": window, "windows": windows, "questions": questions, "batch": batch}
        options |= {"texts": _texts(text, tasks), "tasks": _tasks(tasks), "track": progress}
        options["memory"] = "low" if low_memory else "fast"
        if not text:
            options["windows"] = windows or _WINDOWS
        loading = {"dtype": dtype, "device": device}
        if not low_memory:
            keep_freed()
        with tempfile.TemporaryDirectory() if low_memory else nullcontext() as place:
            columns = _measured(compared, loading, options, None if place is None else Path(place))
        from fxprune.evaluation.comparison import Comparison
        from fxprune.offload.ranks import is_first

        if not is_first():  # processes that share the windows come to the same
            return
        settings = {"window": window, "windows": options["windows"], "questions": questions}
        comparison = Comparison(columns, settings)
        if as_json:
            print_json(comparison.to_dict())
        else:
            console.print(comparison.table())


def _check_files(texts: list[str] | None, tasks: str | None) -> None:
    """Refuse files that are not there or not of their kind, before anything is imported.

    Raises:
        EvaluationError: says which.
    """
    for task in _named(tasks):
        if Path(task).suffix in _FILES and Path(task).suffix != ".jsonl":
            raise EvaluationError("it is no file of questions", where=task, remedy="Give a .jsonl file, one a line")
    for file in (*(texts or ()), *_named(tasks)):
        if Path(file).suffix in _FILES and not Path(file).is_file():
            raise EvaluationError("it cannot be read: there is no such file", where=file, remedy="Give the path of one")


def _check_low_memory(low_memory: bool, others: dict[str, str | None]) -> None:
    """Refuse what does not go with weights on disk.

    Raises:
        EvaluationError: says which option.
    """
    reasons = {
        "--dtype": "weights on disk are used in the dtype of their files",
        "--device": "weights on disk are used on the processor",
        "--tasks": "each question would read all weights",
    }
    for name, reason in reasons.items() if low_memory else ():
        if others[name] is not None:
            raise EvaluationError(reason, where=f"--low-memory with {name}", remedy="Leave one of the two out")


def _measured(
    models: dict[str, str], loading: dict[str, Any], options: dict[str, Any], work: Path | None
) -> tuple[Column, ...]:
    """Measure one model after the other; one that was saved without a tokenizer has that of the one before.

    Args:
        models: what the user named, by the name of the column.
        loading: dtype and device.
        options: of :func:`fxprune.evaluate`.
        work: a folder for what GGUF files hold, where weights stay on disk; else None.
    """
    from fxprune.evaluation.comparison import measure_model

    columns, tokenizer = [], None
    for number, (name, place) in enumerate(models.items()):
        if work is None:
            model, own = load_either(place, None, with_tokenizer=tokenizer is None, **loading)
        else:
            model, own = load_on_disk(place, work / str(number), with_tokenizer=tokenizer is None)
        tokenizer = own or tokenizer
        columns.append(measure_model(name, model, tokenizer, **options))
    return tuple(columns)


def _texts(given: list[str] | None, tasks: str | None) -> dict[str, str | Path]:
    """Return texts by name, read once to see that they are there.

    Raises:
        EvaluationError: one is empty.
    """
    from fxprune.data.built_in import offline_docstrings
    from fxprune.evaluation.perplexity import load_corpus, named_corpora

    if not given:
        return {} if tasks else {_BUILT_IN: offline_docstrings()}
    texts = named_corpora(given)
    for name, source in texts.items():
        if not load_corpus(source).strip():
            raise EvaluationError("the text is empty", where=name, remedy="Give a file with text in it")
    return texts


def _tasks(given: str | None) -> list[str]:
    """Return the names of tasks.

    Raises:
        UnknownNameError: there is no such task.
    """
    names = _named(given)
    if names:
        from fxprune.evaluation.tasks import check_tasks

        check_tasks(names)
    return names


def _named(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]
