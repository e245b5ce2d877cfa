"""Writing checkpoints: complete or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from fxprune.checkpoint.exchange import put_in_place, real_target, staged
from fxprune.checkpoint.manifest import (
    CARD,
    MANIFEST,
    PAGE,
    Manifest,
    has_own_card,
    other_files,
    strangers,
    weight_files,
)
from fxprune.checkpoint.structure import Structure, describe, pruned_class, stock_class, write_modelling
from fxprune.emit.load import has_odd_experts
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, quiet
from fxprune.modelling import layerwise
from fxprune.offload.files import written_through
from fxprune.offload.ranks import first_alone
from fxprune.pipeline.arguments import as_path, refuse, whole_number
from fxprune.removal.plan import Plan
from fxprune.report.page import headlines, kinds_of
from fxprune.report.report import Report

__all__ = ["check_place", "check_request", "model_card", "save_pretrained", "write_folder"]

_TEMPLATE = Path(__file__).with_name("card.md")

_ON_A_HUB = re.compile(r"[\w.-]+/[\w.-]+")
"""What the id of a model on a hub looks like."""

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What holds of the slim model too, where the card of the dense one says it."""


def model_card(model: PreTrainedModel, work: Path, folder: Path, manifest: Manifest, report: Report | None) -> str:
    """Return the text of the card.

    Args:
        model: the slim model.
        work: where its files were written.
        folder: what the reader will know the checkpoint by.
        manifest: of the checkpoint.
        report: what was done; None where it is not known.
    """
    source = str(getattr(model.config, "_name_or_path", "") or "")
    base = source if _ON_A_HUB.fullmatch(source) and not Path(source).exists() else None
    data = ModelCardData(
        library_name="transformers", base_model=base, tags=["fxprune", "pruned"], **_from_dense(Path(source))
    )
    classes = json.loads((work / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        name=base or Path(source).name,
        kind=stock_class(model).__name__,
        folder=folder.name,
        stock=manifest.stock,
        auto_class=next((name for name in reversed(classes) if name != "AutoConfig"), None),
        serves=report is None or not report.removed_blocks,
        plan=manifest.plan is not None,
        versions=manifest.versions,
        report=report,
        headlines=() if report is None else headlines(report),
        kinds=() if report is None else tuple(kinds_of(report)),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card).rstrip()) + "\n"  # what was left out leaves its blank lines


def _from_dense(folder: Path) -> dict[str, Any]:
    """Return what the card in the dense model's folder says of license and language; nothing where there is none."""
    file = folder / "README.md"
    if not folder.name or not file.is_file():
        return {}
    with quiet(logging.WARNING):  # one without a head is no card, and no reason to warn
        card = attempt(ModelCard.load, file, ignore_metadata_errors=True)
    if isinstance(card, Refusal):
        return {}
    said = card.data.to_dict()
    return {name: said[name] for name in _KEPT if name in said}


_SIZE = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
"""What transformers reads as a size."""


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    plan: Plan | None = None,
    report: Report | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    also: Callable[[Path], object] | None = None,
) -> Structure:
    """Save a slim model: it is written beside the folder and takes its place in one step, or not at all.

    Where several processes of torch call it, the first one writes and the others wait.

    In it: safetensors, ``config.json``, the generation config, the tokenizer, ``fxprune.json``, a model card
    ``README.md``, the report as a page ``report.html``, and, where stock classes do not build the model from its
    config, a modelling file with which they do (``trust_remote_code=True``).

    Args:
        model: an emitted model, also after training; adapters merged.
        folder: where to, or a link to it; replaced where it is empty or holds an earlier checkpoint of ours. Files that
            someone else put into that one are kept, and so is a model card that was written or edited by hand.
        tokenizer: saved with it.
        plan: what was removed.
        report: what that did.
        max_shard_size: the largest file of weights, in bytes or as text such as ``"5GB"``.
        force: replace the model in a folder that holds something else, too; other files are kept.
        also: is called with the new folder before it takes its place, to write more files into it.

    Returns:
        How the model differs from what its stock class builds.

    Raises:
        CheckpointError: the folder holds something else, or the model cannot be built from plain data.
    """
    check_request(folder, tokenizer, max_shard_size)
    _check_parts(model, plan, report)
    check_place(folder, force=force)
    structure = describe(model)

    def fill(work: Path) -> None:
        _fill(work, Path(folder), model, structure, tokenizer, plan, report, max_shard_size)
        if also is not None:
            also(work)

    first_alone(lambda: write_folder(folder, fill, force=force), CheckpointError)
    return structure


def write_folder(folder: str | os.PathLike[str], fill: Callable[[Path], object], *, force: bool = False) -> None:
    """Fill a new folder and put it in the place of ``folder``, in one step, with what someone else put there.

    Args:
        folder: where to.
        fill: is called with the new folder.
        force: whether ``folder`` may hold something else.

    Raises:
        CheckpointError: it holds something else, or nothing can be written there.
    """
    target = check_place(folder, force=force)
    with _on_disk(folder), staged(target) as work:
        with written_through(work):
            fill(work)
        _open_to_readers(work)
        _keep_others(target, work)
        put_in_place(work, target)


def _fill(
    work: Path,
    target: Path,
    model: PreTrainedModel,
    structure: Structure,
    tokenizer: Any,
    plan: Plan | None,
    report: Report | None,
    max_shard_size: int | str,
) -> None:
    """Write everything into an empty folder, which is to take the place of ``target``."""
    _write_model(model, work, structure, max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    manifest = Manifest(
        source=_source(model, report),
        stock=structure.is_stock,
        weights=weight_files(work),
        plan=None if plan is None else json.loads(plan.to_json()),
        report=None if report is None else report.to_dict(),
    )
    if report is not None:
        (work / PAGE).write_text(report.to_html(), encoding="utf-8")
    if not has_own_card(target):
        (work / CARD).write_text(model_card(model, work, target, manifest, report), encoding="utf-8")
    manifest = replace(manifest, files=other_files(work))
    (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


@contextmanager
def _on_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a disk refuses into an error that says where and why.

    Raises:
        CheckpointError: nothing can be written there; what was there is as it was.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(
            f"cannot be written: {reason}",
            where=os.fspath(folder),
            remedy="Choose a folder that can be written to, on a disk with room for the whole model",
        ) from error


def check_request(folder: Any, tokenizer: Any, max_shard_size: Any) -> None:
    """Refuse what :func:`save_pretrained` cannot work with, before anything is written.

    Raises:
        CheckpointError: the folder is no path, the tokenizer cannot be saved, or the size of a shard is no size.
    """
    as_path("folder", folder, error=CheckpointError)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise refuse("tokenizer", tokenizer, "a tokenizer of transformers, or None", CheckpointError)
    if isinstance(max_shard_size, str):
        if _SIZE.fullmatch(max_shard_size) is None:
            raise refuse("max_shard_size", max_shard_size, "a number of bytes, or text such as '5GB'", CheckpointError)
    else:
        whole_number("max_shard_size", max_shard_size, least=1, error=CheckpointError)


def check_place(folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return where a checkpoint for a folder really goes.

    Args:
        folder: as the caller names it.
        force: whether it may hold something else.

    Raises:
        CheckpointError: the folder holds something else, or is a file.
    """
    with _on_disk(folder):
        target = real_target(folder)
        _refuse_foreign(target, force=force)
    return target


def _check_parts(model: Any, plan: Any, report: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise refuse("model", model, "a Hugging Face model, as in result.model", CheckpointError)
    meta = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if meta is not None:
        raise CheckpointError("is on meta and has no values", where=meta, remedy="Load the weights first")
    if plan is not None and not isinstance(plan, Plan):
        raise refuse("plan", plan, "a Plan, as in result.plan, or None", CheckpointError)
    if report is not None and not isinstance(report, Report):
        raise refuse("report", report, "a Report, as in result.report, or None", CheckpointError)


def _keep_others(target: Path, work: Path) -> None:
    """Copy what someone put into the folder, beside what we wrote, or made of its model card, into the new one."""
    for path in [*strangers(target), *([target / CARD] if has_own_card(target) else [])]:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        if not (work / path.name).exists():
            copy(path, work / path.name)


def _refuse_foreign(target: Path, *, force: bool) -> None:
    if not force and target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        remedy = "Choose a new folder, or empty this one"
        raise CheckpointError("holds files that are not an fxprune checkpoint", where=str(target), remedy=remedy)
    if target.exists() and not target.is_dir():
        raise CheckpointError("is a file", where=str(target), remedy="Choose a new folder")


def _write_model(model: PreTrainedModel, work: Path, structure: Structure, max_shard_size: int | str) -> None:
    with _savable(model, structure):
        model.save_pretrained(work, max_shard_size=max_shard_size)
    _note_experts(model, work / "config.json")
    if structure.is_stock:
        return
    auto_map = write_modelling(model, work)
    more = {"auto_map": auto_map} if auto_map else {}
    layerwise.amend_config(work, structure.overrides, structure.where, **more)


def _note_experts(model: PreTrainedModel, file: Path) -> None:
    """Write into the config how experts run, where grouped kernels do not take their widths."""
    if has_odd_experts(model) and getattr(model.config, "_experts_implementation", None) == "eager":
        data = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**data, "experts_implementation": "eager"}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _savable(model: PreTrainedModel, structure: Structure) -> Iterator[None]:
    """Let stock code save a model without validating its config, with the buffers that its class makes otherwise."""
    config: Any = model.config
    own, kept = type(config), [_hold(model, name) for name in structure.overrides.buffers]
    section = vars(config).pop(layerwise.SECTION, None)
    if not structure.is_stock:
        config.__class__ = pruned_class(stock_class(model), own).config_class
    try:
        yield
    finally:
        config.__class__ = own
        if section is not None:
            vars(config)[layerwise.SECTION] = section
        for owner, leaf in kept:
            owner._non_persistent_buffers_set.add(leaf)


def _hold(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner._non_persistent_buffers_set.discard(leaf)
    return owner, leaf


def _source(model: PreTrainedModel, report: Report | None) -> dict[str, Any]:
    name = getattr(model.config, "_name_or_path", "")
    found = {"class": stock_class(model).__name__, "name": Path(name).name if os.path.isdir(name) else name}
    return found if report is None else {**found, "parameters": report.parameters[0]}


def _open_to_readers(folder: Path) -> None:
    """Let those read a folder whom umask lets: temporary folders and mapped files are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
