"""Writing checkpoints: all of one, or nothing."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from fxprune.checkpoint.classes import pruned_class, stock_class, stock_config
from fxprune.checkpoint.exchange import put_in_place, real_target, staged
from fxprune.checkpoint.manifest import MANIFEST, Manifest, other_files, strangers, weight_files
from fxprune.checkpoint.structure import Structure, describe
from fxprune.emit.load import has_odd_experts
from fxprune.errors import CheckpointError
from fxprune.modelling import block_config, blocks, layerwise, overrides, table_rows
from fxprune.removal.plan import Plan
from fxprune.removal.report import Report

__all__ = ["MODELLING", "save_pretrained"]

MODELLING = "modeling_fxprune"
"""Name of the module saved beside weights that no stock class builds."""

_TEXTS = (table_rows, block_config, blocks, overrides, layerwise)
"""Modules whose text makes up that module, each behind those it imports from."""


def save_pretrained(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    plan: Plan | None = None,
    report: Report | None = None,
    max_shard_size: int | str = "5GB",
) -> Structure:
    """Save a slim model: it is written beside the folder and takes its place in one step, or not at all.

    In it: safetensors, ``config.json``, the generation config, the tokenizer, ``fxprune.json``, and, where stock
    classes do not build the model from its config, a modelling file with which they do (``trust_remote_code=True``).

    Args:
        model: an emitted model, also after training; adapters merged.
        folder: where to, or a link to it; replaced where it is empty or holds an earlier checkpoint of ours. Files that
            someone else put into that one are kept.
        tokenizer: saved with it.
        plan: what was removed.
        report: what that did.
        max_shard_size: the largest file of weights, in bytes or as text such as ``"5GB"``.

    Returns:
        How the model differs from what its stock class builds.

    Raises:
        CheckpointError: the folder holds something else, or the model cannot be built from plain data.
    """
    target = real_target(folder)
    _refuse_foreign(target)
    structure = describe(model)
    with staged(target) as work:
        _write_model(model, work, structure, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        manifest = Manifest(
            source=_source(model, report),
            stock=structure.is_stock,
            weights=weight_files(work),
            files=other_files(work),
            plan=None if plan is None else json.loads(plan.to_json()),
            report=None if report is None else report.to_dict(),
        )
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        _open_to_readers(work)
        _keep_others(target, work)
        put_in_place(work, target)
    return structure


def _keep_others(target: Path, work: Path) -> None:
    """Copy what someone put into an earlier checkpoint, beside what we wrote, into the new one."""
    for path in strangers(target) if (target / MANIFEST).is_file() else ():
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        if not (work / path.name).exists():
            copy(path, work / path.name)


def _refuse_foreign(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
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
    stock, config = stock_class(model), stock_config(type(model.config))
    more: dict[str, Any] = {}
    if getattr(transformers, stock.__name__, None) is stock and hasattr(transformers, config.__name__):
        text = _modelling(stock.__name__, config.__name__)
        (work / f"{MODELLING}.py").write_text(text, encoding="utf-8")
        more["auto_map"] = {
            "AutoConfig": f"{MODELLING}.{config.__name__}",
            "AutoModelForCausalLM": f"{MODELLING}.{stock.__name__}",
        }
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


def _modelling(model: str, config: str) -> str:
    source = "\n\n".join(_standing_alone(module) for module in _TEXTS)
    return f'''from __future__ import annotations

{source}

from transformers import {config} as StockConfig  # noqa: E402
from transformers import {model} as StockModel  # noqa: E402


class {config}(AnyWidths, StockConfig):
    """The config of a pruned model."""


class {model}(Layerwise, StockModel):
    """A pruned model; named like its stock class, by which names of weights on disk are looked up."""

    config_class = {config}
'''


def _standing_alone(module: ModuleType) -> str:
    """Return the text of a module of ours, without imports from the package: it stands behind what it imports."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("__future__", "fxprune"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)


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
