"""Writing checkpoints: complete or not at all; and their upload to a hub of models."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from fxprune.checkpoint.manifest import (
    CARD,
    MANIFEST,
    PAGE,
    PLAN,
    REPORT,
    Manifest,
    check_files,
    check_written,
    foreign_files,
    has_user_card,
    other_files,
    read_manifest,
    result_files,
    run_forward,
    weight_files,
)
from fxprune.checkpoint.read import read_model
from fxprune.data.named import CORPORA, is_data_set
from fxprune.emit.emitted import PLAN_DIGEST
from fxprune.emit.layout import stock_class, stock_config
from fxprune.emit.snapshot import has_unaligned_experts, part_of
from fxprune.emit.structure import Structure, describe_structure, pruned_class
from fxprune.errors import CheckpointError
from fxprune.graph.context import Refusal, attempt, default_modes, quiet, replaced
from fxprune.graph.tensors import names_by_identity
from fxprune.modelling import blocks, layerwise, table_rows
from fxprune.offload.atomic import (
    finish_files,
    holds_files,
    replace_folder,
    resolve_target,
    staging_folder,
    wrap_disk_errors,
)
from fxprune.offload.files import offload_large, sync_writes
from fxprune.offload.ranks import decide_on_first, gathered, is_sharded, rank, run_on_first, world_size
from fxprune.pipeline.arguments import as_path, flag, refuse, whole_number
from fxprune.removal.plan import Plan
from fxprune.report.report import Report
from fxprune.trace.inputs import check_merged

MODELLING = "modeling_fxprune"
"""Name of the module."""


def write_modelling(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write the modelling file of a model; return its classes by the Auto class of transformers that loads each.

    Besides the model's own class it has that of the inner model without a head, since serving engines build their own
    models around that one. Nothing is written for a class that is not one of transformers'.
    """
    stock, config = stock_class(model), stock_config(type(model.config))
    if getattr(transformers, stock.__name__, None) is not stock or not hasattr(transformers, config.__name__):
        return {}
    base = type(model.base_model)
    is_known = getattr(transformers, base.__name__, None) is base
    has_inner = is_known and model.base_model is not model
    has_inner = has_inner and getattr(base, "config_class", None) is stock.config_class
    inner = base.__name__ if has_inner else None
    text = _modelling(stock.__name__, config.__name__, inner)
    (folder / f"{MODELLING}.py").write_text(text, encoding="utf-8")
    loaders = []  # the one for its task last
    for name, auto in vars(transformers.models.auto.modeling_auto).items():
        mapping = getattr(getattr(auto, "_model_mapping", None), "_model_mapping", None)
        if isinstance(auto, type) and isinstance(mapping, dict):  # names, where a lazy mapping would import every class
            named = (names if isinstance(names, tuple | list) else (names,) for names in mapping.values())
            loaders += [name] if any(stock.__name__ in names for names in named) else []
    classes = {"AutoConfig": config.__name__}  # engines read the first entry
    classes |= {} if inner is None else {"AutoModel": inner}
    tasks = [name for name in loaders if name != "AutoModelForPreTraining"]
    classes |= dict.fromkeys(tasks or loaders, stock.__name__)
    return {loader: f"{MODELLING}.{name}" for loader, name in classes.items()}


def _modelling(model: str, config: str, base: str | None = None) -> str:
    """Return the text of a modelling file for a stock class, its config class, and the class of the inner model."""
    # each module behind those it imports from
    source = "\n\n".join(_without_own_imports(module) for module in (table_rows, blocks, layerwise))
    text = f'''from __future__ import annotations

{source}

from transformers import {config} as StockConfig  # noqa: E402
from transformers import {model} as StockModel  # noqa: E402


class {config}(AnyWidths, StockConfig):
    """The config of a pruned model."""


class {model}(Layerwise, StockModel):
    """A pruned model; named like its stock class, by which names of weights on disk are looked up."""

    config_class = {config}
'''
    if base is None:
        return text
    return f'''{text}

from transformers import {base} as StockBase  # noqa: E402


class {base}(Layerwise, StockBase):
    """The pruned model without its head."""

    config_class = {config}
'''


def _without_own_imports(module: ModuleType) -> str:
    """Return the text of a module of ours without imports from the package: it stands behind the imported text."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("__future__", "fxprune"):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)


def model_card(model: PreTrainedModel, work: Path, folder: Path, manifest: Manifest, report: Report | None) -> str:
    """Return the text of the model card for files written to ``work``, which the reader will name ``folder``."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    base = source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not os.path.exists(source) else None
    generates = model.can_generate() and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"
    data_set = "" if report is None or report.calibration is None else report.calibration.source
    datasets = None
    if is_data_set(data_set):
        datasets = [CORPORA[data_set]["path"] if data_set in CORPORA else data_set.partition(":")[0]]
    entries = {"pipeline_tag": "text-generation" if generates else None, **_from_dense(Path(source))}
    tags = ["fxprune", "pruned"]
    data = ModelCardData(library_name="transformers", base_model=base, tags=tags, datasets=datasets, **entries)
    return _card_text(data, base or Path(source).name, stock_class(model).__name__, work, folder, manifest, report)


def _card_text(
    data: ModelCardData, name: str, kind: str, work: Path, folder: Path, manifest: Manifest, report: Report | None
) -> str:
    classes = json.loads((work / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    can_generate = getattr(getattr(transformers, kind, None), "can_generate", None)
    shrunk = [] if report is None else [one for one in report.kinds() if one.shrunk]
    has_tokens = report is not None and report.vocabulary is not None
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_name("card.md")),
        name=name,
        kind=kind,
        in_python=lambda ending="": json.dumps(folder.name + ending, ensure_ascii=False),
        in_shell=lambda ending="": shlex.quote(folder.name + ending),
        stock=manifest.stock,
        generates=can_generate is None or bool(can_generate()),  # perhaps, if the class is unknown
        auto_class=next((name for name in reversed(classes) if name != "AutoConfig"), None),
        serves=report is None or not report.removed_blocks,
        plan=(work / PLAN).is_file(),
        versions=manifest.versions,
        report=report,
        headlines=() if report is None else report.headlines(),
        kinds=shrunk,
        units=[*(one.units for one in shrunk), *(["tokens of the vocabulary"] if has_tokens else [])],
        has_tokens=has_tokens,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card).rstrip()) + "\n"  # sections that are left out leave blank lines


def replace_report(folder: str | os.PathLike[str], report: Report) -> None:
    """Replace the report of a checkpoint, with its page and its card; the folder changes in one step, or not at all.

    A card that the user wrote or edited stays.

    Raises:
        CheckpointError: it is no checkpoint, one of its files was changed, or nothing can be written there.
    """
    target = resolve_target(folder)
    manifest = read_manifest(target)
    check_files(target, manifest)
    texts = {REPORT: report.to_json(), PAGE: report.to_html()}

    def fill(work: Path) -> None:
        shutil.copytree(target, work, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        if not has_user_card(target) and (work / CARD).is_file():
            data, source = ModelCard.load(work / CARD).data, manifest.source
            texts[CARD] = _card_text(data, source["name"], source["class"], work, target, manifest, report)
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        changed = replace(manifest, files={**manifest.files, **digests})
        for name, text in (*texts.items(), (MANIFEST, changed.to_json())):
            (work / name).unlink(missing_ok=True)  # a link to the file in use
            (work / name).write_text(text, encoding="utf-8")

    write_folder(folder, fill, force=True)


def _link(source: str, target: str) -> None:
    """Make a hard link to a file, or a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _from_dense(folder: Path) -> dict[str, Any]:
    """License and language from the card in the dense model's folder; empty if there is none."""
    file = folder / "README.md"
    if not folder.name or not file.is_file():
        return {}
    with quiet(logging.WARNING):  # a file without metadata is no card, and no reason to warn
        card = attempt(ModelCard.load, file, ignore_metadata_errors=True)
    if isinstance(card, Refusal):
        return {}
    data = card.data.to_dict()
    kept = ("license", "license_name", "license_link", "language", "pipeline_tag")  # these hold for the slim model too
    return {name: data[name] for name in kept if name in data}


@default_modes()
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
    verify: bool = True,
) -> Structure:
    """Save a slim model: it is written beside the folder and takes its place in one step, or not at all.

    Where several processes of torch call it, each writes its share of the files of weights, and the first one the rest.
    Weights that are sharded over the processes (``fully_shard``, tensor parallelism) are gathered on its CPU, and it
    writes them alone.

    In it: safetensors, ``config.json``, the generation config, the tokenizer, ``fxprune.json`` with digests of all
    files, ``plan.json``, ``report.json`` and the same as a page ``report.html``, a model card ``README.md``, and, where
    stock classes do not build the model from its config, a modelling file with which they do
    (``trust_remote_code=True``).

    Args:
        model: an emitted model, also after training; adapters merged.
        folder: where to, or a link to it; replaced if it is empty or holds an earlier checkpoint of ours. Files that
            you put into that one are kept, and so is a model card that you wrote or edited.
        tokenizer: saved with it.
        plan: of the removal.
        report: of the prune.
        max_shard_size: the largest file of weights, in bytes or as text such as ``"5GB"``.
        force: replace the model in a folder that holds something else, too; other files are kept.
        also: called with the new folder before it takes its place, to write more files into it.
        verify: load what was written, mapped into memory, and compare it with the model on a few tokens. A model whose
            inputs cannot be guessed is saved with a note in the manifest.

    Returns:
        How the model differs from what its stock class builds.

    Raises:
        CheckpointError: the folder holds something else, the model cannot be built from plain data, the plan is that
            of another model, or the checkpoint computes something else than the model.
    """
    verify = flag("verify", verify)
    folder = check_request(folder, tokenizer, max_shard_size)
    digest = _check_model(model, plan, report)
    check_place(folder, force=force)
    structure = describe_structure(model)
    forward = run_forward(model) if verify else None
    save_model = partial(_save_model, model, structure, max_shard_size)
    with _savable(model, structure):
        state = _gathered(model)

    def fill(work: Path) -> None:
        save_model(work, None if place is None else partial(_move_or_save, place), state)
        _add_settings(model, work, structure)
        record = None
        if forward is not None:
            record = check_written(model, forward, read_model(work, stock_class(model)))
        source = _source_of(model, report)
        manifest = Manifest(source, structure.is_stock, weight_files(work), plan_digest=digest, forward=record)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        if plan is not None:
            (work / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if report is not None:
            (work / REPORT).write_text(report.to_json(), encoding="utf-8")
            (work / PAGE).write_text(report.to_html(), encoding="utf-8")
        if not has_user_card(Path(folder)):
            card = model_card(model, work, Path(folder), manifest, report)
            (work / CARD).write_text(card, encoding="utf-8")
        manifest = replace(manifest, files=other_files(work))
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if also is not None:
            also(work)

    together = world_size() > 1 and not is_sharded(model)
    with _written_by_all(model, folder, save_model) if together else nullcontext() as place:
        run_on_first(lambda: write_folder(folder, fill, force=force), CheckpointError)
    return structure


def _move_or_save(place: Path, tensors: dict[str, torch.Tensor], file: str | os.PathLike[str], **options: Any) -> None:
    """Move a file of weights from ``place`` if another process wrote it there; else write it."""
    written = place / Path(file).name
    if written.is_file():
        os.replace(written, file)
    else:
        save_file(tensors, file, **options)


def _source_of(model: PreTrainedModel, report: Report | None) -> dict[str, Any]:
    """Class, name and number of parameters of the dense model, as far as they are known."""
    name = getattr(model.config, "_name_or_path", "")
    source = {"class": stock_class(model).__name__, "name": Path(name).name if os.path.isdir(name) else name}
    return source if report is None else source | {"parameters": report.parameters[0]}


@contextmanager
def _written_by_all(
    model: PreTrainedModel, folder: str | os.PathLike[str], save_model: Callable[..., None]
) -> Iterator[Path]:
    """Write the files of weights, each process its share, and yield the temporary folder with them.

    A process that does not see the folder writes none.
    """
    with ExitStack() as stack:
        staging = staging_folder(check_place(folder, force=True))
        with wrap_disk_errors(folder, CheckpointError):
            place = decide_on_first(lambda: stack.enter_context(staging), CheckpointError)
        failed = ""
        try:
            if place.is_dir():
                _write_share(model, place, save_model)
        except Exception as error:  # whatever it is, the others must not wait for ever
            failed = str(error)
            raise
        finally:
            reasons = [reason for reason in gathered([failed]) if reason]
        if reasons:
            remedy = "Choose a folder that each process can write to, or none but the first can see"
            raise CheckpointError(f"another process: {reasons[0]}", where=os.fspath(folder), remedy=remedy)
        yield place


def _write_share(model: PreTrainedModel, place: Path, save_model: Callable[..., None]) -> None:
    def save(tensors: dict[str, torch.Tensor], file: str | os.PathLike[str], **options: Any) -> None:
        number = re.search(r"-(\d+)-of-\d+\.safetensors$", Path(file).name)
        if (int(number[1]) - 1 if number else 0) % world_size() == rank():
            save_file(tensors, place / Path(file).name, **options)

    with wrap_disk_errors(place, CheckpointError), tempfile.TemporaryDirectory() as rest, sync_writes(place):
        vars(model)["should_save_on_this_rank"] = lambda *_: True  # transformers saves on the first rank alone
        try:
            save_model(Path(rest), save)
        finally:
            del vars(model)["should_save_on_this_rank"]


def _check_model(model: PreTrainedModel, plan: Plan | None, report: Report | None) -> str | None:
    """Refuse a model that cannot be saved, and a plan of another one; return the digest of the model's plan."""
    given: Any = model
    if not isinstance(given, PreTrainedModel):
        check_merged(given)
        raise refuse("model", given, "a Hugging Face model, as in result.model", CheckpointError)
    if (getattr(model, "_tp_size", None) or 1) > 1 and not is_sharded(model):
        what = "each process holds a part of its weights, as a plain tensor"
        raise CheckpointError(what, where="model", remedy="Load it without tp_plan to save it")
    meta = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if meta is not None:
        raise CheckpointError("is on meta and has no values", where=meta, remedy="Load the weights first")
    if plan is not None and not isinstance(plan, Plan):
        raise refuse("plan", plan, "a Plan, as in result.plan, or None", CheckpointError)
    if report is not None and not isinstance(report, Report):
        raise refuse("report", report, "a Report, as in result.report, or None", CheckpointError)
    digest: str | None = vars(model).get(PLAN_DIGEST) or (None if plan is None else plan.digest)
    if plan is not None and plan.digest != digest:
        remedy = "Pass the plan of the prune that gave this model, as in result.plan"
        raise CheckpointError("it is the plan of another model", where="plan", remedy=remedy)
    return digest


def write_folder(folder: str | os.PathLike[str], fill: Callable[[Path], object], *, force: bool = False) -> None:
    """Fill a new folder and put it in the place of ``folder`` in one step; files of the user are kept."""
    target = check_place(folder, force=force)
    with wrap_disk_errors(folder, CheckpointError), staging_folder(target) as work:
        with sync_writes(work):
            fill(work)
        finish_files(work)
        for path in [*foreign_files(target), *([target / CARD] if has_user_card(target) else [])]:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            if not os.path.lexists(work / path.name):
                copy(path, work / path.name)
        replace_folder(work, target)


def check_request(folder: Any, tokenizer: Any, max_shard_size: Any) -> str:
    """Check the arguments of :func:`save_pretrained` before anything is written; return the path of the folder."""
    path = as_path("folder", folder, error=CheckpointError)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise refuse("tokenizer", tokenizer, "a tokenizer of transformers, or None", CheckpointError)
    if isinstance(max_shard_size, str):
        # as transformers reads sizes
        if not re.fullmatch(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", max_shard_size, re.IGNORECASE):
            raise refuse("max_shard_size", max_shard_size, "a number of bytes, or text such as '5GB'", CheckpointError)
    else:
        whole_number("max_shard_size", max_shard_size, least=1, error=CheckpointError)
    return path


def check_place(folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Resolve the folder of a checkpoint, and check that it may be written; ``force`` allows other contents."""
    with wrap_disk_errors(folder, CheckpointError):
        target = resolve_target(folder)
        if target.exists() and not target.is_dir():
            raise CheckpointError("is a file", where=str(target), remedy="Choose a new folder")
        if force or not target.is_dir() or not holds_files(target):
            return target
        if not (earlier := result_files(target)):
            remedy = "Choose a new folder, or empty this one"
            raise CheckpointError("holds files that are not an fxprune checkpoint", where=str(target), remedy=remedy)
        try:
            if MANIFEST in earlier:
                read_manifest(target)
        except CheckpointError as error:
            what = f"holds an earlier checkpoint whose {MANIFEST} cannot be read: {error.what}"
            remedy = "Choose a new folder, or pass $force to write over this one"
            raise CheckpointError(what, where=str(target), remedy=remedy) from error
    return target


def _gathered(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Whole weights of a sharded model, on the CPU of the first process; None if it is not sharded."""
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    for names in names_by_identity(model).values():
        tied = [name for name in names if name in state]
        state.update(dict.fromkeys(tied, state[tied[0]]) if tied else {})
    return state


def _save_model(
    model: PreTrainedModel,
    structure: Structure,
    max_shard_size: int | str,
    work: Path,
    save_weights: Callable[..., None] | None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the config and the weights, by ``save_weights`` if given, as transformers does, which copies experts."""
    own = None if save_weights is None else replaced(transformers.modeling_utils, safe_save_file=save_weights)
    with own or nullcontext(), _savable(model, structure), offload_large():
        save = partial(stock_class(model).save_pretrained, model, work, max_shard_size=max_shard_size, state_dict=state)
        try:
            save()
        except RuntimeError:  # of a conversion that takes each layer to have as many heads as the config says
            if structure.is_stock:
                raise
            save(save_original_format=False)


def _add_settings(model: PreTrainedModel, work: Path, structure: Structure) -> None:
    """Add to a saved folder the implementation of experts, fields of single layers, and the code that reads them."""
    if has_unaligned_experts(model) and getattr(model.config, "_experts_implementation", None) == "eager":
        file = work / "config.json"  # grouped kernels do not accept their widths
        data = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**data, "experts_implementation": "eager"}, indent=2) + "\n", encoding="utf-8")
    if structure.is_stock:
        return
    auto_map = write_modelling(model, work)
    more = {"auto_map": auto_map} if auto_map else {}
    blocks = part_of(model.config, structure.where.get("part", ""))
    names = {name for own in structure.overrides.block_fields.values() for name in own}
    known = all(name in vars(blocks) or hasattr(blocks, name) for name in names)  # some can be read of a layer alone
    depth = getattr(blocks, "num_hidden_layers", None)
    counted = known and isinstance(depth, int)  # else transformers refuses values of single layers
    layerwise.amend_config(work, structure.overrides, structure.where, depth if counted else None, **more)


@contextmanager
def _savable(model: PreTrainedModel, structure: Structure) -> Iterator[None]:
    """Make stock code save a model without validating its config, and the buffers that its class makes differently."""
    config: Any = model.config
    own, kept = type(config), list[tuple[nn.Module, str]]()
    for name in structure.overrides.buffers:
        path, _, leaf = name.rpartition(".")
        kept.append((model.get_submodule(path), leaf))
        kept[-1][0]._non_persistent_buffers_set.discard(leaf)
    removed = {n: vars(config).pop(n) for n in (layerwise.SECTION, "distributed_config") if n in vars(config)}
    if not structure.is_stock:
        config.__class__ = pruned_class(stock_class(model), own).config_class
    try:
        yield
    finally:
        config.__class__ = own
        vars(config).update(removed)
        for owner, leaf in kept:
            owner._non_persistent_buffers_set.add(leaf)


def check_repository(name: str, value: Any) -> str:
    """Return ``value``, the argument ``name``: the id of a repository on a hub, ``owner/name``."""
    remedy = "Give owner/name, in letters, digits, '-', '_' and '.'"
    if not isinstance(value, str) or value.count("/") != 1:
        raise CheckpointError("is no id of a repository", where=name, remedy=remedy, argument=name, value=value)
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        what = f"is no id of a repository: {str(error).splitlines()[0]}"
        raise CheckpointError(what, where=name, remedy=remedy, argument=name, value=value) from error
    return value


def push_folder(folder: str | os.PathLike[str], repository: str, *, private: bool | None = None) -> str:
    """Upload a checkpoint to a repository of a hub, which is made if there is none; returns its address.

    The token is that of ``hf auth login`` or of the environment variable HF_TOKEN; HF_ENDPOINT names another hub.

    Args:
        repository: ``owner/name``.
        private: whether a new repository is private; None as its owner has it.

    Raises:
        CheckpointError: there is no such folder, or the hub refuses it or cannot be reached.
    """
    check_repository("repository", repository)
    if not Path(folder).is_dir():
        raise CheckpointError("there is no such folder", where=str(folder), remedy="Save the model first")
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        message = "Upload a model pruned by fxprune"
        api.upload_folder(repo_id=repository, folder_path=Path(folder), commit_message=message)
    except Exception as error:  # those of the hub and of the client that connects to it
        what = f"{api.endpoint} did not take it: {type(error).__name__}: {str(error).strip()[:300]}"
        remedy = f"The model stays in {folder}; check the name and the connection, and log in with `hf auth login`"
        raise CheckpointError(what, where=repository, remedy=remedy) from error
    return str(address)
