"""A checkpoint is read: refused where it is not what was written, else loaded by transformers' own loader."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.checkpoint.manifest import MANIFEST, check_weights, read_manifest
from fxprune.checkpoint.structure import parse_config, pruned_class, stock_config
from fxprune.emit.layout import on_meta, survey
from fxprune.emit.snapshot import shapes_of
from fxprune.errors import CheckpointError, PlanError
from fxprune.layerwise import SECTION
from fxprune.plan import Plan

__all__ = ["from_pretrained"]


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    verify: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The slim model in ``folder``, an instance of the class that was pruned.

    The model is built on ``meta`` and given the weights as they are read, by transformers' own loader: memory for one
    model and one file.

    Args:
        folder: that :func:`fxprune.save_pretrained` wrote, or the id of such a repository on the hub.
        verify: compare every byte of the weights with what was written; else sizes, names and shapes alone.
        model_class: where the class is not one of transformers' own.
        options: for ``from_pretrained`` of that class: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; its name is in the message.
    """
    path = _local(folder)
    manifest = read_manifest(path)
    check_weights(path, manifest.weights, digests=verify)
    stock, config = _classes(path, model_class)
    slim = pruned_class(stock, type(config))
    _check_plan(path, slim, manifest.plan)
    loaded: Any = slim.from_pretrained(path, config=config, output_loading_info=True, **options)
    model, info = loaded
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys") or ())
    if lost:
        raise CheckpointError(f"no weights for {lost[0]} and {len(lost) - 1} more", where=str(path))
    return _as_stock(model, stock)


def _as_stock(model: PreTrainedModel, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """The model is as it was emitted: of its stock class, with a plain config."""
    model.__class__ = stock
    model.config.__class__ = stock_config(type(model.config))
    vars(model.config).pop("auto_map", None)
    section = vars(model.config).pop(SECTION, None) or {}
    for name in section.get("buffers", {}):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    return model


def _local(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    name = os.fspath(folder)
    if path.exists() or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise CheckpointError(f"neither a folder nor on the hub: {error}", where=name) from error


def _classes(path: Path, model_class: type[PreTrainedModel] | None) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The stock model class, and the config with all widths allowed."""
    file = path / "config.json"
    try:
        data = parse_config(file.read_text(encoding="utf-8"))
        name = data.get(SECTION, {}).get("class") or data["architectures"][0]
        stock = model_class or getattr(transformers, name)
        own: Any = stock.config_class
        relaxed: Any = pruned_class(stock, own).config_class
        return stock, relaxed.from_dict(data)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"not a config that can be loaded: {error!r}",
            where=str(file),
            remedy="Pass model_class= where the class is not one of transformers' own",
        ) from error


def _check_plan(path: Path, slim: type[PreTrainedModel], data: Mapping[str, Any] | None) -> None:
    """The plan left as many indices as the model has.

    Raises:
        CheckpointError: it is the plan of another model.
    """
    if data is None:
        return
    where, remedy = str(path / MANIFEST), "Save the model again"
    try:
        plan = Plan.from_json(json.dumps(data))
    except PlanError as error:
        raise CheckpointError(str(error), where=where, remedy=remedy) from error
    try:
        with on_meta():
            config: Any = slim.config_class
            model = slim(config.from_dict(parse_config((path / "config.json").read_text(encoding="utf-8"))))
    except Exception as error:
        raise CheckpointError(
            f"no model can be built from it: {type(error).__name__}: {error}", where=str(path / "config.json")
        ) from error
    shapes = shapes_of(model)
    for name, by_axis in plan.kept.items():
        shape = shapes.get(_renamed(name, plan.removed_blocks, model))
        if shape is None and "." not in name:
            continue  # a table that the graph reads and the model's code makes
        for axis, index in by_axis.items():
            if shape is None or axis >= len(shape) or shape[axis] != len(index):
                raise CheckpointError(
                    f"the plan is of another model: it leaves {len(index)} of {name}[{axis}], the model has {shape}",
                    where=where,
                    remedy=remedy,
                )


def _renamed(name: str, removed: tuple[str, ...], model: nn.Module) -> str:
    """The slim name of a dense tensor: blocks after a removed one move up."""
    for stack in survey(model).stacks if removed else ():  # type: ignore[arg-type]
        prefix = f"{stack.path}."
        index, dot, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and index.isdigit():
            gone = sum(block.startswith(prefix) and int(block[len(prefix) :]) < int(index) for block in removed)
            return f"{prefix}{int(index) - gone}{dot}{rest}"
    return name
