"""Models and tokenizers by folder, GGUF file or hub id, dense or slim; code in a folder is never run."""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from logging import WARNING
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import gguf
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from fxprune.checkpoint.manifest import (
    MANIFEST,
    UNEVEN,
    Manifest,
    check_files,
    check_loaded,
    check_weights,
    read_manifest,
)
from fxprune.emit.emitted import PLAN_DIGEST
from fxprune.emit.layout import stock_class, stock_config
from fxprune.emit.snapshot import shapes_of, slim_name, without_storage
from fxprune.emit.structure import parse_config, pruned_class
from fxprune.errors import CheckpointError, FxpruneError
from fxprune.graph.context import Refusal, attempt, default_modes, quiet, wrap_errors
from fxprune.modelling.layerwise import SECTION, overrides_in
from fxprune.offload.atomic import folder_identity, linked_copy, restore_replaced
from fxprune.offload.distributed import sharding_plan
from fxprune.offload.files import offloaded
from fxprune.offload.ranks import world_size
from fxprune.pipeline.arguments import as_path, flag, refuse
from fxprune.removal.plan import kept_count

_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values in the format, as formats of ``struct``."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the entries of a GGUF file up to those of its tokenizer; empty for an unknown version.

    Raises:
        ValueError: the file is truncated, or not a GGUF file.
    """
    return _read(path, whole=False)[0]


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Refuse a file whose tensors overlap or are cut off, or that holds more blocks than its entries say.

    transformers reads such a file to other numbers, or without end.
    """
    fault = ""
    try:
        entries, spans = _read(path, whole=True)
        layers = entries.get(f"{entries.get('general.architecture')}.block_count", 0)
        blocks = [int(found[1]) for name in spans if (found := re.match(r"blk\.(\d+)\.", name))]
        if max((end for _, end in spans.values()), default=0) > os.stat(path).st_size:
            fault = "its tensors are cut off"
        elif any(end > start for (_, end), (start, _) in pairwise(sorted(spans.values()))):
            fault = "its tensors overlap"
        elif max(blocks, default=-1) >= layers:
            fault = f"it holds {max(blocks) + 1:,} blocks, and its header says {layers:,}"
    except (OSError, ValueError, TypeError) as error:
        fault = str(error)
    if fault:
        where = os.fspath(path)
        raise CheckpointError(f"cannot be loaded: {fault}", where=where, remedy="Download or export it again")


def _read(path: str | os.PathLike[str], *, whole: bool) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The entries of a GGUF file, and where the bytes of each tensor begin and end if it is read as a ``whole``."""
    found: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    with open(path, "rb") as file:
        try:
            if _take(file, "4s") != b"GGUF":
                raise ValueError("it does not begin as a GGUF file does")
            if _take(file, "I") not in (2, 3):  # versions with the same header
                return {}, {}
            count = _take(file, "Q")
            for _ in range(_take(file, "Q")):
                name = _value(file, _TEXT)
                if not whole and name.startswith("tokenizer."):  # such entries are long, and not needed
                    return found, {}
                found[name] = _value(file, _take(file, "I"))
            for _ in range(count if whole else 0):
                name = _value(file, _TEXT)
                axes = [_take(file, "Q") for _ in range(min(_take(file, "I"), 5))]  # it has four at most
                values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(_take(file, "I"))]
                begin = _take(file, "Q")
                spans[name] = begin, begin + math.prod(axes) // values * size
            start = -(-file.tell() // (step := found.get("general.alignment", 32))) * step
        except (struct.error, EOFError, KeyError, ArithmeticError, UnicodeError, MemoryError, RecursionError) as error:
            raise ValueError("it ends too early, or is damaged") from error
    return found, {name: (start + begin, start + end) for name, (begin, end) in spans.items()}


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        size = _take(file, "Q")
        text = file.read(size)
        if len(text) < size:
            raise EOFError
        return text.decode("utf-8")
    if kind == _ARRAY:
        inner = _take(file, "I")
        return [_value(file, inner) for _ in range(_take(file, "Q"))]
    return _take(file, _NUMBERS[kind])


def _take(file: BinaryIO, form: str) -> Any:
    """The next value of a file, in a format of ``struct``."""
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


LOADING: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which ``from_pretrained`` of transformers returns what :func:`require_all_weights` takes."""


_BLOCK = re.compile(r"\.\d+(?=\.)")
"""Number of a block in the name of a tensor."""


def require_all_weights(source: str | os.PathLike[str], info: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a model in which transformers initialised weights that the files lack, by its loading info."""
    loaded = {_BLOCK.sub(".*", name) for name in model.state_dict()}
    surplus = [name for name in info.get("unexpected_keys") or () if _BLOCK.sub(".*", name) in loaded]
    fault, remedy = "of another shape than its config says", "Save it again with its config"
    if model.config.to_dict().get("per_layer_config"):  # the stock class does not read it
        fault, remedy = "of another shape than its class builds", UNEVEN
    faults = (
        ("missing", info.get("missing_keys") or (), "Download it or save it again, with all its weights"),
        (fault, info.get("mismatched_keys") or (), remedy),
        ("of a block that its config does not have", surplus, "Correct the number of layers in its config.json"),
    )
    for fault, found, remedy in faults:
        names = sorted(name if isinstance(name, str) else name[0] for name in found)
        if names:
            others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            line = f"cannot be loaded: {names[0]}{others} {'are' if others else 'is'} {fault}"
            raise CheckpointError(line, where=os.fspath(source), remedy=remedy)


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load the slim model in a folder, an instance of the class that was pruned.

    The model is built on ``meta`` and given the weights as they are read, by transformers' own loader: memory for one
    model and one file.

    Args:
        folder: what :func:`fxprune.save_pretrained` wrote, or the id of such a repository on the hub.
        verify: compare every byte of the weights with the manifest, else only sizes, names and shapes. Without a word,
            what the model computes on a few tokens, or an image or a sound, is compared with what the saved one did,
            as with True; with False it is not run, nor where another dtype or weights left on disk are asked for.
        model_class: the class, if it is not one of transformers' own.
        options: options for ``from_pretrained`` of that class: ``dtype``, ``device_map``, ``attn_implementation``, ...;
            for an id also ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; its name is in the message.
    """
    name = as_path("folder", folder, error=CheckpointError)
    verify = None if verify is None else flag("verify", verify)
    if model_class is not None and not _is_model_class(model_class):
        raise refuse("model_class", model_class, "a class of models of transformers, or None", CheckpointError)
    with wrap_errors(name, "Check the options, and copy the folder again or save the model again", CheckpointError):
        of_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        path = _local(name, {key: options.pop(key) for key in of_hub if key in options})
        restore_replaced(path)
        before = folder_identity(path)
        try:
            model = _load(path, verify, model_class, options)
            if folder_identity(path) == before:
                return model
        except Exception:  # the files of two checkpoints, read as one, may fail anywhere
            if folder_identity(path) == before:
                raise
        # other processes replace the folder: load hard links to the files of one of theirs, unless it is replaced again
        for _ in range(20):
            with contextlib.suppress(FileNotFoundError), linked_copy(path) as copy:
                model = _load(copy, verify, model_class, options)
                vars(model.config)["_name_or_path"] = vars(model)["name_or_path"] = str(path)
                return model
        raise CheckpointError("other processes keep replacing it", where=str(path), remedy="Load it when they are done")


def _load(
    path: Path, verify: bool | None, model_class: type[PreTrainedModel] | None, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load the model in a folder that is not replaced meanwhile."""
    manifest = read_manifest(path)
    check_weights(path, manifest.weights, digests=verify is True)
    check_files(path, manifest)
    _check_plan(path, model_class, manifest)
    model = read_model(path, model_class, options)
    if manifest.plan_digest is not None:
        vars(model)[PLAN_DIGEST] = manifest.plan_digest
    is_dispatched = any("_hf_hook" in vars(module) for module in model.modules())
    if manifest.forward is not None and (verify or (verify is None and not is_dispatched)):
        check_loaded(model, manifest.forward, str(path))
    return model


def _is_model_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedModel)


def offloading_parameters() -> contextlib.AbstractContextManager[object]:
    """Move parameters made in memory into files, inside :func:`~fxprune.offload.files.offload_to`."""

    def offload(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.untyped_storage().resizable():  # those of files that are mapped are not
            parameter.data = offloaded(parameter.detach())

    return register_module_parameter_registration_hook(offload)


def read_model(
    path: Path, model_class: type[PreTrainedModel] | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> PreTrainedModel:
    """Load the model in a folder by its config and weights alone."""
    stock, pruned, config = _classes(path, model_class)
    with offloading_parameters():
        model, info = pruned.from_pretrained(path, config=config, **LOADING, **options)
    require_all_weights(path, info, model)
    return _as_stock(model, stock)


def _as_stock(model: PreTrainedModel, stock: type[PreTrainedModel]) -> PreTrainedModel:
    """Give a loaded model its stock class, if that builds it, and mark buffers that are not saved."""
    vars(model.config).pop("auto_map", None)
    section = vars(model.config).get(SECTION) or {}
    if not section:
        model.__class__ = stock
        model.config.__class__ = stock_config(type(model.config))
    for name in section.get("buffers", {}):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    return model


def _local(folder: str | os.PathLike[str], of_hub: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Path of a folder; one that looks like the id of a repository is downloaded, with these options."""
    name = os.fspath(folder)
    if not _is_hub_id(folder):
        return Path(folder).expanduser()
    found = attempt(snapshot_download, name, **of_hub)
    if isinstance(found, Refusal):
        remedy = "Pass a folder that save_pretrained wrote, or the id of a repository that can be reached"
        raise CheckpointError(f"neither a folder nor on the hub: {found}", where=name, remedy=remedy) from found.error
    return Path(found)


def _is_hub_id(source: str | os.PathLike[str]) -> bool:
    name = os.fspath(source)
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(source).exists()


def _classes(path: Path, model_class: type[PreTrainedModel] | None) -> tuple[type[PreTrainedModel], Any, Any]:
    """The stock model class, that of models with blocks of any widths, and the config for these."""
    file = path / "config.json"
    try:
        data = parse_config(file.read_text(encoding="utf-8"))
        name = data.get(SECTION, {}).get("class") or data["architectures"][0]
        stock = stock_class(model_class or getattr(transformers, name))
        own: Any = stock.config_class
        pruned: Any = pruned_class(stock, own)
        config = pruned.config_class.from_dict(data)
        overrides_in(config)
        return stock, pruned, config
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        what = f"not a config that can be loaded: {error!r}"
        remedy = "Pass model_class= where the class is not one of transformers' own"
        shell = "Copy the folder again; a class that is not one of transformers' own is loaded in Python alone"
        raise CheckpointError(what, where=str(file), remedy=remedy, shell=shell) from error


def _check_plan(path: Path, model_class: type[PreTrainedModel] | None, manifest: Manifest) -> None:
    _, pruned, config = _classes(path, model_class)
    plan = manifest.read_plan(path)
    if plan is None:
        return
    edited = (LookupError, TypeError, ValueError, AttributeError)  # of our own code: the fault is in the file
    with without_storage():
        model = attempt(pruned, config, refusals=edited)
    if isinstance(model, Refusal):
        where, remedy = str(path / "config.json"), "Save the model again"
        raise CheckpointError(f"no model can be built from it: {model}", where=where, remedy=remedy) from model.error
    shapes = shapes_of(model)
    for name, by_axis in plan.kept.items():
        new = slim_name(name, plan.removed_blocks)
        shape = None if new is None else shapes.get(new)
        if new is None or (shape is None and "." not in name):
            continue  # removed as a whole, or a table that the graph reads and the model's code makes
        for axis, index in by_axis.items():
            if shape is None or axis >= len(shape) or shape[axis] != kept_count(index):
                error = f"it leaves {kept_count(index)} of {name}[{axis}], the model has {shape}"
                where, remedy = str(path / MANIFEST), "Save the model again"
                raise CheckpointError(f"the plan is of another model: {error}", where=where, remedy=remedy)


_REMEDY = "Pass a folder that save_pretrained wrote, a GGUF file, or a hub id that can be reached"


def locate(source: str | os.PathLike[str], gguf_file: str | None = None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a folder, a GGUF file, or a hub id.

    Without ``trust_remote_code=False`` transformers asks on a terminal, and a "y" on standard input runs the code of
    the folder.
    """
    path = Path(as_path("model", source, error=CheckpointError))
    name = str(path) if path.exists() else os.fspath(source)
    if path.is_file():
        name, gguf_file = str(path.parent), path.name
    place = {"pretrained_model_name_or_path": name, "trust_remote_code": False}
    return place if gguf_file is None else {**place, "gguf_file": gguf_file}


@default_modes()
def load_model(
    source: str | os.PathLike[str],
    gguf_file: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    sharded: bool = False,
) -> PreTrainedModel:
    """Load a model, dense or slim, in evaluation mode: of the class that its config names, or a causal language model.

    Args:
        source: a folder, a GGUF file, or a hub id; ``gguf_file`` the GGUF file inside the folder or repository.
        dtype: of the weights; None for that of the files.
        sharded: shard it over processes by FSDP2, by transformers' own loader: each process reads its shards alone.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing.
    """
    place = Path(as_path("model", source, error=CheckpointError))
    # transformers would load an adapter and its model, unmerged
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        raise CheckpointError("cannot be loaded: there is no model in it", where=str(place), remedy=merge_advice(place))
    spread: dict[str, Any] = {}
    if sharded and world_size() > 1:
        plan = sharding_plan(load_config_only(source, gguf_file))
        spread = {"distributed_config": DistributedConfig(fsdp_size=world_size(), fsdp_plan=plan)}
        device = None  # that of its process
    if gguf_file is None and (slim_source := slim_folder(source)) is not None:
        if dtype is not None:  # a cast would round buffers as well, such as the frequencies of positions
            spread["dtype"] = dtype
        slim: Any = from_pretrained(slim_source, **spread)
        return slim if device is None else slim.to(device)  # type: ignore[no-any-return]
    options = {**LOADING, **spread, "dtype": "auto" if dtype is None else dtype}
    check_sizes(source, gguf_file)
    with readable(source), quiet(WARNING), _without_bars():  # weights left at random are refused below, in one line
        config = AutoConfig.from_pretrained(**locate(source, gguf_file))
        model, found = class_of(config.to_dict()).from_pretrained(**locate(source, gguf_file), **options)
    require_all_weights(source, found, model)
    return model if device is None else model.to(device)  # type: ignore[no-any-return]


def class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names; the Auto class of causal language models for these and others."""
    section = config.get(SECTION)
    names = [section.get("class") if isinstance(section, dict) else None, *(config.get("architectures") or ())]
    name = next((one for one in names if isinstance(one, str)), "")
    named = getattr(transformers, name, None)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    return named if _is_model_class(named) and name != causal else AutoModelForCausalLM


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, in a load that takes seconds."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def merge_advice(folder: Path) -> str:
    """The remedy for a folder with an adapter of PEFT and no model."""
    merge = f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()"
    return f"It is an adapter: merge it first, {merge}.save_pretrained('merged'), and name that folder"


def load_config_only(source: str | os.PathLike[str], gguf_file: str | None = None) -> PreTrainedModel:
    """Build a model on ``meta`` from its config; no weight is read.

    Raises:
        CheckpointError: the config is that of a model larger than the files beside it.
    """
    if gguf_file is None and (slim := slim_folder(source)) is not None:
        stock, pruned, config = _classes(slim, None)
        with without_storage():
            return _as_stock(pruned(config), stock)
    with readable(source):
        config = AutoConfig.from_pretrained(**locate(source, gguf_file))
        layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if not 1 <= layers <= 10_000:  # a damaged config; building them would take hours
            raise _size_error(source, f"of {layers:,} layers")
        with torch.device("meta"):
            kind = class_of(config.to_dict())
            is_auto = kind is AutoModelForCausalLM
            build = partial(kind.from_config, trust_remote_code=False) if is_auto else kind._from_config
            model: PreTrainedModel = build(config)
    place = Path(source).expanduser() / (gguf_file or "")
    files = [place] if place.is_file() else [*place.glob("*.safetensors"), *place.glob("*.bin")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    count = sum(parameter.numel() for parameter in model.parameters())
    if size and count > 8 * size:  # a weight takes a bit at least
        raise _size_error(source, f"of {count:,} parameters, and its files have {size:,} bytes")
    return model


def check_sizes(source: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Refuse a config whose model is larger than its weight files: transformers would allocate the rest.

    A GGUF file is checked by :func:`check_gguf` first.
    """
    place = Path(source).expanduser() / (gguf_file or "")
    if place.is_file():
        check_gguf(place)
    if place.is_file() or any(place.glob("*.safetensors")) or any(place.glob("*.bin")):
        load_config_only(source, gguf_file)


def _size_error(source: str | os.PathLike[str], of: str) -> CheckpointError:
    remedy = "Download it again, or correct its config.json"
    return CheckpointError(f"its config is that of a model {of}", where=os.fspath(source), remedy=remedy)


def load_tokenizer(
    source: str | os.PathLike[str], gguf_file: str | None = None, *, needed: bool = True, instead: str = ""
) -> Any:
    """Load the tokenizer of a model; None if there is none and it is not ``needed``.

    ``instead`` names an alternative to a tokenizer, for the message.

    Raises:
        CheckpointError: it is needed and cannot be loaded.
    """
    tokenizer, options = None, dict[str, Any]()
    missing = readable(source, "its tokenizer cannot be read", f"Save its tokenizer beside it{instead}")
    with missing if needed else contextlib.suppress(Exception), quiet(WARNING):
        if not Path(source).expanduser().exists():  # a hub that cannot be reached is asked once
            AutoConfig.from_pretrained(source, trust_remote_code=False)
        if (slim := slim_folder(source)) is not None:  # stock classes refuse the config of some slim models
            options["config"] = PreTrainedConfig.from_pretrained(slim)
        tokenizer = AutoTokenizer.from_pretrained(**locate(source, gguf_file), **options)
    return tokenizer


def load_processor(source: str | os.PathLike[str]) -> Any:
    """Load the processor of a model, which may be a tokenizer or for images or sounds alone; None if there is none."""
    with quiet(WARNING):
        found = attempt(transformers.AutoProcessor.from_pretrained, **locate(source))
    return None if isinstance(found, Refusal) else found


@contextlib.contextmanager
def readable(source: str | os.PathLike[str], what: str = "cannot be loaded", remedy: str = _REMEDY) -> Iterator[None]:
    """Turn the errors of transformers about a model into a ``CheckpointError`` of one line."""
    try:
        yield
    except (FxpruneError, MemoryError):
        raise
    except Exception as error:  # a config or a file of weights may be wrong in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        kind = "" if isinstance(error, OSError | ValueError | KeyError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{what}: {kind}{reason.rstrip(',:')}", where=os.fspath(source), remedy=remedy) from error


def slim_folder(source: str | os.PathLike[str]) -> Path | None:
    """Local folder of a slim model, downloaded if it is on the hub; None for a dense model."""
    if _is_hub_id(source):
        if isinstance(attempt(cached_file, os.fspath(source), MANIFEST), Refusal):
            return None
        return _local(source)
    folder = Path(source).expanduser()
    return folder if (folder / MANIFEST).is_file() else None
