"""Reading checkpoints: verified against their manifest, loaded by transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from fxprune.checkpoint.exchange import heal, identity, snapshot
from fxprune.checkpoint.manifest import MANIFEST, Manifest, check_files, check_weights, read_manifest
from fxprune.checkpoint.structure import parse_config, pruned_class, stock_config
from fxprune.emit.snapshot import Shape, on_meta, shapes_of, slim_name
from fxprune.errors import CheckpointError, PlanError
from fxprune.graph.context import Refusal, attempt, clear_errors
from fxprune.modelling.layerwise import SECTION, overrides_in
from fxprune.pipeline.arguments import as_path, flag, refuse
from fxprune.removal.plan import Plan

__all__ = ["LOADING", "build_empty", "from_pretrained", "require_whole"]

LOADING: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What ``from_pretrained`` of transformers is told, so that it gives what :func:`require_whole` looks at."""


def require_whole(source: str | os.PathLike[str], found: Mapping[str, Any]) -> None:
    """Refuse a model that transformers filled up.

    Args:
        source: where it is from.
        found: what transformers says of its loading.

    Raises:
        CheckpointError: weights are missing, or of another shape than the config says.
    """
    for what, key in (("missing", "missing_keys"), ("of another shape than its config says", "mismatched_keys")):
        names = sorted(name if isinstance(name, str) else name[0] for name in found.get(key) or ())
        if names:
            others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            told = f"cannot be loaded: {names[0]}{others} {'are' if others else 'is'} {what}"
            remedy = "Fetch it or save it again, with all its weights"
            raise CheckpointError(told, where=os.fspath(source), remedy=remedy)


_TURNS = 20
"""A turn is lost where another process takes the folder away within the moment in which its files are linked."""


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    verify: bool = False,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return the slim model in a folder, an instance of the class that was pruned.

    The model is built on ``meta`` and given the weights as they are read, by transformers' own loader: memory for one
    model and one file.

    Args:
        folder: what :func:`fxprune.save_pretrained` wrote, or the id of such a repository on the hub.
        verify: compare every byte of the weights with what was written; else sizes, names and shapes alone.
        model_class: the class, where it is not one of transformers' own.
        options: options for ``from_pretrained`` of that class: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; its name is in the message.
    """
    name, verify = as_path("folder", folder, error=CheckpointError), flag("verify", verify)
    chosen: Any = model_class
    if chosen is not None and not (isinstance(chosen, type) and issubclass(chosen, PreTrainedModel)):
        raise refuse("model_class", model_class, "a class of models of transformers, or None", CheckpointError)
    with clear_errors(name, "Check the options, and copy the folder again or save the model again", CheckpointError):
        path = _local(name)
        heal(path)
        before = identity(path)
        try:
            model = _loaded(path, verify, model_class, options)
        except Exception:  # files of two checkpoints, read as one, may fail anywhere
            if identity(path) == before:
                raise
        else:
            if identity(path) == before:
                return model
        return _loaded_beside_writers(path, verify, model_class, options)


def _loaded_beside_writers(
    path: Path, verify: bool, model_class: type[PreTrainedModel] | None, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Return the model in a folder that others replace meanwhile: one of theirs, whole."""
    for _ in range(_TURNS):
        try:
            with snapshot(path) as copy:
                model = _loaded(copy, verify, model_class, options)
        except FileNotFoundError:
            continue
        vars(model.config)["_name_or_path"] = vars(model)["name_or_path"] = str(path)
        return model
    raise CheckpointError("others keep replacing it", where=str(path), remedy="Load it when they are done")


def _loaded(
    path: Path, verify: bool, model_class: type[PreTrainedModel] | None, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Return the model in a folder that nobody replaces meanwhile."""
    manifest = read_manifest(path)
    check_weights(path, manifest.weights, digests=verify)
    check_files(path, manifest)
    stock, config = _classes(path, model_class)
    slim = pruned_class(stock, type(config))
    _check_plan(path, slim, manifest)
    read: Any = slim.from_pretrained
    model, told = read(path, config=config, **LOADING, **options)
    require_whole(path, told)
    return _as_stock(model, stock)


def build_empty(folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Return the model of a folder that :func:`~fxprune.save_pretrained` wrote, on ``meta``; no weight is read.

    Raises:
        CheckpointError: the config in the folder is not one that can be loaded.
    """
    stock, config = _classes(_local(folder), None)
    with on_meta():
        return _as_stock(pruned_class(stock, type(config))(config), stock)


def _as_stock(model: PreTrainedModel, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """Make a loaded model what was emitted: of its stock class, with a plain config."""
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

    found = attempt(snapshot_download, name)
    if isinstance(found, Refusal):
        raise CheckpointError(
            f"neither a folder nor on the hub: {found}",
            where=name,
            remedy="Pass a folder that save_pretrained wrote, or the id of a repository that can be reached",
        ) from found.error
    return Path(found)


def _classes(path: Path, model_class: type[PreTrainedModel] | None) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the stock model class, and the config with all widths allowed."""
    file = path / "config.json"
    try:
        data = parse_config(file.read_text(encoding="utf-8"))
        name = data.get(SECTION, {}).get("class") or data["architectures"][0]
        stock = model_class or getattr(transformers, name)
        own: Any = stock.config_class
        relaxed: Any = pruned_class(stock, own).config_class
        config: PreTrainedConfig = relaxed.from_dict(data)
        overrides_in(config)
        return stock, config
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"not a config that can be loaded: {error!r}",
            where=str(file),
            remedy="Pass model_class= where the class is not one of transformers' own",
        ) from error


def _check_plan(path: Path, slim: type[PreTrainedModel], manifest: Manifest) -> None:
    """Check that the plan left as many indices as the model has.

    Raises:
        CheckpointError: it is the plan of another model.
    """
    where, remedy = str(path / MANIFEST), "Save the model again"
    try:
        plan = manifest.read_plan()
    except PlanError as error:
        raise CheckpointError(str(error), where=where, remedy=remedy) from error
    if plan is None:
        return
    misfit = next(_misfits(plan, _built_shapes(path / "config.json", slim)), None)
    if misfit is not None:
        raise CheckpointError(f"the plan is of another model: {misfit}", where=where, remedy=remedy)


def _misfits(plan: Plan, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Yield in words the axes of which a plan leaves another number of indices than a model has."""
    for name, by_axis in plan.kept.items():
        new = slim_name(name, plan.removed_blocks)
        shape = None if new is None else shapes.get(new)
        if new is None or (shape is None and "." not in name):
            continue  # gone as a whole, or a table that the graph reads and the model's code makes
        for axis, index in by_axis.items():
            if shape is None or axis >= len(shape) or shape[axis] != len(index):
                yield f"it leaves {len(index)} of {name}[{axis}], the model has {shape}"


_DAMAGE = (LookupError, TypeError, ValueError, AttributeError)
"""What our own code raises over a config that someone has edited: the fault of the file."""


def _built_shapes(file: Path, slim: type[PreTrainedModel]) -> dict[str, Shape]:
    """Return the shapes of the model that a config describes.

    Raises:
        CheckpointError: none can be built from it.
    """
    data = parse_config(file.read_text(encoding="utf-8"))

    def build() -> PreTrainedModel:
        config: Any = slim.config_class
        return slim(config.from_dict(data))

    with on_meta():
        model = attempt(build, refusals=_DAMAGE)
    if isinstance(model, Refusal):
        raise CheckpointError(
            f"no model can be built from it: {model}", where=str(file), remedy="Save the model again"
        ) from model.error
    return shapes_of(model)
