"""Models that commands read: a folder, a hub id, a GGUF file or the demo model, checked and then loaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fxprune.cli.console import notes, working
from fxprune.cli.demo import DEMO, demo_checkpoint, demo_gguf
from fxprune.errors import FxpruneError, UnsupportedModelError
from fxprune.pipeline.arguments import MANIFEST

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_REMEDY = "Pass a folder that save_pretrained wrote, a GGUF file, a hub id, or 'demo'"

_PATIENCE = 5.0
"""Seconds to wait for a connection to a hub; HF_HUB_ETAG_TIMEOUT sets another number."""


def is_gguf(model: str) -> bool:
    """Whether the user named a GGUF file."""
    return Path(model).suffix == ".gguf" and Path(model).expanduser().is_file()


def is_config_alone(model: str, gguf_file: str | None) -> bool:
    """Whether the user named a folder without weights, which is enough for a dry run."""
    path = Path(model).expanduser()
    return model != DEMO and gguf_file is None and path.is_dir() and not _has_weights(path)


def check_model(
    model: str, gguf_file: str | None = None, *, with_weights: bool = False, any_class: bool = False
) -> None:
    """Refuse a model that does not exist, lacks weights that are needed, or is no language model unless any will do."""
    path = Path(model).expanduser()
    if model == DEMO or path.is_file():
        if gguf_file is not None:
            remedy = f"Leave it out with {model}"
            raise FxpruneError("it names a file inside a folder", where="--gguf-file", remedy=remedy)
        demo_gguf() if model == DEMO else _check_file(path)
    elif not model or not path.is_dir():
        if path.exists() and model:
            raise FxpruneError("it is neither a folder nor a file", where=model, remedy=_REMEDY)
        if path.is_symlink() or _is_path(model):
            raise FxpruneError("no such folder or file", where=model or "MODEL", remedy=_REMEDY)
        check_hub(model)
    elif gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise FxpruneError(f"there is no {gguf_file} in it", where=str(path), remedy=_advice(path))
        _check_file(path / gguf_file)
    else:
        _check_folder(path, any_class=any_class)
        if with_weights and not _has_weights(path):
            raise FxpruneError("there is a config, but no file of weights", where=str(path), remedy=_REMEDY)


def check_models(models: Sequence[str], *, any_class: bool = False) -> dict[str, str]:
    """Check all models before the first is loaded; by the last part of their paths, or by all if two are equal."""
    places = list(dict.fromkeys(models))
    for place in places:
        check_model(place, with_weights=True, any_class=any_class)
    short = [Path(place).name for place in places]
    return dict(zip(short if len({*short}) == len(short) else places, places, strict=True))


def locate_model(model: str) -> str:
    """The folder, GGUF file or hub id of a model: that of the demo model is a folder."""
    return str(demo_checkpoint()) if model == DEMO else model


def load(
    model: str,
    gguf_file: str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    sharded: bool = False,
) -> Any:
    """Load a model, dense or slim; ``dtype`` by its name in torch, None for that of the files."""
    import torch

    from fxprune.checkpoint.read import load_model
    from fxprune.graph.context import silence_stderr
    from fxprune.offload.prefetch import as_device

    as_device(device)
    hide_bars()
    named = None if dtype is None else getattr(torch, dtype)
    bars = silence_stderr() if notes.quiet else contextlib.nullcontext()  # of the conversion of GGUF tensors
    with working(f"loading {model}"), bars:
        return load_model(locate_model(model), gguf_file, dtype=named, device=device, sharded=sharded)


def hide_bars() -> None:
    """Hide the progress bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_words(model: str, gguf_file: str | None = None, *, needed: bool = True, instead: str = "") -> Any:
    """Load the tokenizer of a model; None if there is none and none is needed."""
    from fxprune.checkpoint.read import load_tokenizer

    return load_tokenizer(locate_model(model), gguf_file, needed=needed, instead=instead)


def model_class(model: str) -> Any:
    """The class of transformers that the config of a model names, where it is no causal language model; else None."""
    from transformers import AutoModelForCausalLM

    from fxprune.checkpoint.read import class_of
    from fxprune.graph.context import Refusal, attempt

    if _is_of_gguf(model):
        return None
    config = attempt(_read_config, model)
    found = None if isinstance(config, Refusal) else class_of(config)
    return None if found is AutoModelForCausalLM else found


def load_samples(source: str, model: str, most: int | None = None) -> tuple[list[dict[str, Any]], Any]:
    """Read samples with the processor of a model, or with its tokenizer if it has none; return both."""
    from fxprune.checkpoint.read import load_processor
    from fxprune.data.processed import processed_samples

    processor = load_processor(locate_model(model)) or load_words(model, needed=False)
    classes = {} if _is_of_gguf(model) else dict(_read_config(model).get("label2id") or {})
    return processed_samples(source, processor, classes, most), processor


def _is_of_gguf(model: str) -> bool:
    """Whether a model is a GGUF file, or made of one as the demo model is: a causal language model without classes."""
    return model == DEMO or is_gguf(model)


def _read_config(model: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    path = Path(model).expanduser()
    return dict(PreTrainedConfig.get_config_dict(str(path) if path.is_dir() else model)[0])


def load_pair(model: str, *, needed: bool = True, **options: Any) -> tuple[Any, Any]:
    """Load a model that predicts the next token, and its tokenizer."""
    tokenizer = load_words(model, needed=needed)  # refused before the model is loaded
    return load_predictor(model, **options), tokenizer


def load_predictor(model: str, **options: Any) -> Any:
    """Load a model, and refuse one that does not predict the next token."""
    loaded = load(model, **options)
    check_predicts(model, loaded)
    return loaded


def check_predicts(model: str, loaded: Any) -> None:
    """Refuse a loaded model that does not predict the next token."""
    if loaded.config.is_encoder_decoder or not loaded.can_generate():
        raise _other_class(model, type(loaded).__name__)


@cache
def check_hub(model: str) -> None:
    """Refuse a hub id that is neither in the cache nor on the hub.

    huggingface_hub retries a hub that cannot be reached for half a minute; this asks once. A hub that is slow or busy
    is left to that package.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _PATIENCE
    missing = "there is no such folder, and it is not in the cache"
    remedy = "Check the name and the connection, or name a folder; HF_ENDPOINT names another hub"
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=patience)
    except OfflineModeIsEnabled as error:
        what = f"{missing}, and the hub is not asked"
        raise FxpruneError(what, where=model, remedy="Unset HF_HUB_OFFLINE, or name a folder") from error
    except RepositoryNotFoundError as error:  # or it is gated
        reason = str(error).strip().splitlines()[-1]
        raise FxpruneError(f"{constants.ENDPOINT} refuses it: {reason}", where=model, remedy=remedy) from error
    except Exception as error:  # connection errors are those of the client: httpx, or another
        if isinstance(error, HfHubHTTPError) or "ReadTimeout" in type(error).__name__:
            return
        what = f"{missing}, and {constants.ENDPOINT} cannot be reached: {error}"
        raise FxpruneError(what, where=model, remedy=remedy) from error


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.index.json"))


def _is_path(model: str) -> bool:
    """Whether the name of a missing model means a path rather than a hub id."""
    if not _HUB_ID.fullmatch(model) or len(model) > 96 or model.endswith((".gguf", ".safetensors")):
        return True
    owner, slash, _ = model.partition("/")
    return bool(slash) and Path(owner).is_dir()


def _check_file(path: Path) -> None:
    """Refuse a file that transformers cannot read: not GGUF, truncated, or with layers of different widths."""
    from fxprune.checkpoint.read import read_header
    from fxprune.export.gguf.format import general_archs, layers_differ

    if path.suffix != ".gguf":
        raise FxpruneError("it is a file, but not .gguf", where=str(path), remedy=_REMEDY)
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise FxpruneError(f"it is not a GGUF file: it starts with {start!r}", where=str(path), remedy=_REMEDY)
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        remedy = "Download or export it again"
        raise FxpruneError(f"the GGUF file is incomplete: {error}", where=str(path), remedy=remedy) from error
    name = header.get("general.architecture")
    if name in general_archs():
        what = "a GGUF file with uneven layers" if layers_differ(header) else f"a GGUF file of the architecture {name}"
        remedy = (
            "`fxprune serve` and programs that read GGUF files run it; for this command name the folder that it was "
            "exported from, or prune to a folder"
        )
        raise UnsupportedModelError(f"it is {what}, which transformers cannot read", where=str(path), remedy=remedy)


def _check_folder(folder: Path, *, any_class: bool) -> None:
    """Refuse a folder without a config, and a model that does not predict the next token unless any will do."""
    file = folder / "config.json"
    if not file.is_file():
        what = "cannot be loaded: there is no config.json in it"
        raise FxpruneError(what, where=str(folder), remedy=_advice(folder))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FxpruneError(f"it is not JSON: {error}", where=str(file), remedy=_REMEDY) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FxpruneError("it names no 'model_type'", where=str(file), remedy=_REMEDY)
    named = config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    other = classes and not any(name.endswith(causal) for name in classes)
    encodes = config.get("is_encoder_decoder") is True
    if any_class or (folder / MANIFEST).is_file() or config.get("auto_map") or not (other or encodes):
        return
    name = classes[0] if classes else "AutoModel"
    raise _other_class(str(folder), f"{name} ({config['model_type']})")


def _other_class(model: str, name: str) -> UnsupportedModelError:
    what = f"it holds a {name}; this command is for models that predict the next token"
    remedy = (
        "`fxprune prune` takes it with weights in memory, and `fxprune eval` compares it with its dense model: give "
        "--compare, and --data with images, sounds or rows in .jsonl"
    )
    return UnsupportedModelError(what, where=model, remedy=remedy)


def _advice(folder: Path) -> str:
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        return f"Name the file: {folder / found[0]}"
    if (folder / "adapter_config.json").is_file():
        from fxprune.checkpoint.read import merge_advice

        return merge_advice(folder)
    return _REMEDY
