"""The output of a command: checked before any work, then written and printed."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.cli.config import is_file, run_file
from fxprune.cli.console import console, is_first, notes, print_json, print_lines, warnings_as_notes, working
from fxprune.cli.demo import demo_entry
from fxprune.cli.models import is_gguf
from fxprune.errors import ArgumentError, CheckpointError, ExportError, FxpruneError, UnknownNameError
from fxprune.pipeline.arguments import MANIFEST, SUFFIXES

if TYPE_CHECKING:
    import fxprune

OURS = "fxprune.from_pretrained loads it, and transformers with trust_remote_code=True"

_FILES = (".bin", ".ckpt", ".h5", ".json", ".pt", ".pth", ".safetensors", ".tar", ".txt", ".yaml", ".zip")
"""Suffixes of files that this package does not write; names of folders may have dots in them."""


def check_output(out: Path, model: str, *, force: bool) -> bool:
    """Refuse an output that is not writable, is the model itself or, without ``force``, holds other files.

    Returns ``force``, or True for what an earlier run wrote.
    """
    near = out.suffix[1:].isalpha() and difflib.get_close_matches(out.suffix.lower(), SUFFIXES, cutoff=0.7)
    if not is_file(out) and (out.suffix.lower() in (*SUFFIXES, *_FILES) or near):
        raise UnknownNameError("suffix", out.suffix, SUFFIXES)
    _check_name(out)
    if out.exists() and Path(model).exists() and out.samefile(Path(model)):
        raise CheckpointError("it is the model itself", where=str(out), remedy="Choose another place")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is a file", where=str(out), remedy="Choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} is not writable", where=str(out), remedy="Choose another folder")
    if not is_file(out):
        _check_folder(out, force=force)
    elif out.is_dir():
        raise CheckpointError("it is a folder", where=str(out), remedy="Name a file in it")
    elif out.exists() and not run_file(out).exists() and not force:
        what = "the file is there, without a run of this command beside it"
        raise CheckpointError(what, where=str(out), remedy="Choose another name, or replace it with --force")
    return force or run_file(out).is_file()


def _check_name(out: Path) -> None:
    """Refuse an impossible file name, and links in a circle."""
    if str(out).startswith("-"):
        remedy = "Give --out a name before it, or a path such as ./-slim if that is meant"
        raise CheckpointError("it looks like an option", where=str(out), remedy=remedy)
    try:
        out.stat()
    except (FileNotFoundError, NotADirectoryError):  # a parent that is a file is refused by its own name
        return
    except (OSError, ValueError) as error:
        what = f"it cannot be written: {getattr(error, 'strerror', '') or error}"
        raise CheckpointError(what, where=str(out), remedy="Choose another place") from error
    if not out.is_dir() and not out.is_file():
        raise CheckpointError("it is neither a folder nor a file", where=str(out), remedy="Choose another place")


def _check_folder(out: Path, *, force: bool) -> None:
    if out.is_file():
        raise CheckpointError("is a file", where=str(out), remedy="Choose a folder, or a name that ends in .gguf")
    from fxprune.checkpoint.manifest import result_files
    from fxprune.offload.atomic import holds_files

    if (out / MANIFEST).is_file() and not force:
        from fxprune.checkpoint.write import check_place

        check_place(out)
    if not out.is_dir() or result_files(out) or run_file(out).is_file() or not holds_files(out):
        return
    if not force:
        remedy = "Choose a new folder, or write into this one with --force"
        raise CheckpointError("it holds files that no earlier run wrote", where=str(out), remedy=remedy)
    if out.resolve() == Path.cwd() or any(path.is_dir() for path in out.iterdir()):
        what = "it holds folders or is the current folder, and is not replaced with --force either"
        raise CheckpointError(what, where=str(out), remedy="Choose a new folder")


def check_quantization(quantization: str | None, out: Path | None) -> None:
    """Refuse a quantisation of anything but a GGUF file, and one that cannot be written."""
    if quantization is None:
        return
    if out is None or out.suffix != ".gguf":
        remedy = "Leave it out, or let --out end in .gguf"
        raise ArgumentError("is for GGUF files", where="--quantization", remedy=remedy)
    from fxprune.export.gguf.quantization import quantization_named

    quantization_named(quantization)


def gguf_options(source: str, tokenizer: Any, quantization: str | None) -> dict[str, Any]:
    """Options for writing a GGUF file: like the one that the model was read from, if it was."""
    from fxprune.export.gguf.write import most_common_type

    if is_gguf(source):
        return {"like": source, "quantization": quantization or most_common_type(source)}
    return {"tokenizer": tokenizer, "quantization": quantization or "f16"}


def runners(out: Path) -> str:
    """The programs that run a file, by its suffix."""
    return {
        ".gguf": "`fxprune serve` and programs that read GGUF files run it",
        ".onnx": "onnxruntime runs it",
        ".pt2": "torch.export.load runs it",
    }[out.suffix]


def write_result(
    result: fxprune.Result, out: Path, tokenizer: Any, options: dict[str, Any], *, run: str | None, force: bool
) -> str:
    """Write the result of a prune to a folder or a file, atomically; return how to load it.

    ``options`` are of :func:`fxprune.export_model`, for a file; ``run`` is by :func:`~fxprune.cli.config.format_run`.
    """
    from fxprune.checkpoint.manifest import GRAPH
    from fxprune.checkpoint.write import write_folder
    from fxprune.export.program import COMPANIONS
    from fxprune.offload.atomic import atomic_path
    from fxprune.offload.ranks import run_on_first

    def write_beside(model: Path, named: Callable[[str], Path], **options: Any) -> None:
        result.export(model, **options)
        named("plan.json").write_text(result.plan.to_json(), encoding="utf-8")
        named("report.json").write_text(result.report.to_json(), encoding="utf-8")
        result.write_report(named("report.html"))
        write_run(run, named("run.yaml"))

    def write_file() -> None:
        with atomic_path(out, ExportError, parents=True, companions=COMPANIONS) as path:
            write_beside(path, lambda name: path.with_suffix(f".{name}"), **options)

    if is_file(out):
        with warnings_as_notes():
            run_on_first(write_file, FxpruneError)
        return runners(out)
    if result.model is None:
        write = partial(write_folder, out, lambda work: write_beside(work / GRAPH, work.joinpath), force=force)
        run_on_first(write, FxpruneError)
        return "there is no slim model, torch.export.load runs model.pt2"
    structure = result.save_pretrained(
        out, tokenizer, force=force, also=lambda folder: write_run(run, folder / "run.yaml")
    )
    return "any transformers loads it" if structure.is_stock else OURS


def check_push(repository: str, out: Path | None) -> None:
    """Refuse an invalid repository name, and an upload of anything but a folder."""
    from fxprune.checkpoint.write import check_repository

    check_repository("push_to_hub", repository)
    if out is None or is_file(out):
        remedy = "Let --out name a folder, or leave it out"
        raise ArgumentError("uploads a folder", where="--push-to-hub", remedy=remedy)


def push(folder: Path, repository: str) -> None:
    """Upload a folder to a repository, and print its address."""
    from fxprune.checkpoint.write import push_folder

    if is_first():
        with working(f"uploading to {repository}"):
            address = push_folder(folder, repository)
        notes.print(f"uploaded to {address}")


def write_run(run: str | None, file: Path) -> None:
    """Write a run beside its result, if there is one."""
    if run is not None:
        file.write_text(run, encoding="utf-8")


def print_result(result: fxprune.Result, out: Path, loading: str, *, as_json: bool) -> None:
    """Print the numbers, the widths that changed, and how to load the model."""
    from fxprune.report.quality import figures_table

    if as_json:
        print_json({"out": str(out), "loading": loading, **result.report.to_dict()})
        return
    console.print(result.report.table())
    if result.report.quality is not None:
        console.print(result.report.quality.table())
    elif result.report.measured:
        head, *rows = result.report.measured
        console.print(figures_table(head, rows))
    print_lines(_lines(result.report, out, loading))


def _lines(report: Any, out: Path, loading: str) -> Iterator[str]:
    shrunk = Counter((name.rpartition("/")[2], *width) for name, width in report.widths.items())
    for (kind, before, after), count in shrunk.items():
        yield f"{kind}: {before:,} to {after:,} units in {count:,} group{'s' if count > 1 else ''}"
    yield from (f"layer removed: {block}" for block in report.removed_blocks)
    if report.reached is not None:
        yield str(report.reached)
    if is_file(out):
        yield f"{out.name}: {out.stat().st_size:,} bytes"
    if report.calibration is not None:
        yield f"calibrated on {report.calibration}"
    yield from _quality_lines(report)
    yield from (f"note: {note}" for note in (*report.model_reasons, *report.notes))
    if report.verification_error is not None:
        over = ", with statistics over the units that stay" if report.renormalised else ""
        yield f"verified: masked and slim outputs differ by at most {report.verification_error:.1e}{over}"
    yield f"{report.achieved:.2%} of the parameters removed; model, plan and report written to {out}: {loading}"
    if loading == OURS and report.widths and not report.measured:
        price = f"for {demo_entry()['uniform']} (docs/quality.md)"
        yield f"with --uniform, layers have the same widths and any transformers loads it, {price}"


def _quality_lines(report: Any) -> Iterator[str]:
    if report.quality is None and report.measured:
        return
    if report.quality is None:
        yield f"quality not measured: {report.unmeasured}" if report.unmeasured else "quality not measured"
        return
    yield from (f"measured on {text.data}" for text in report.quality.texts)
    for answer in report.quality.answers:
        yield f"{answer.question} dense: {answer.dense!r} slim: {answer.slim!r}"
    if report.advice:
        yield f"warning: {report.advice}"
