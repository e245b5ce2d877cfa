"""Models and tokenizers by folder, GGUF file or hub id, dense or slim; code in a folder is never run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from fxprune.checkpoint.manifest import MANIFEST
from fxprune.checkpoint.read import LOADING, build_empty, from_pretrained, require_all_weights
from fxprune.errors import CheckpointError, FxpruneError
from fxprune.graph.context import quiet

__all__ = ["load_config_only", "load_model", "load_tokenizer", "locate", "readable"]

_REMEDY = "Pass a folder that save_pretrained wrote, a GGUF file, or a hub id that can be reached"

_SAFE: dict[str, Any] = {"trust_remote_code": False}
"""Without it transformers asks on a terminal, and a "y" on standard input runs the code of the folder."""


def locate(source: str | os.PathLike[str], gguf_file: str | None = None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a folder, a GGUF file, or a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    name = str(path) if path.exists() else os.fspath(source)
    return {"pretrained_model_name_or_path": name, **({} if gguf_file is None else {"gguf_file": gguf_file})}


def load_model(
    source: str | os.PathLike[str],
    gguf_file: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> PreTrainedModel:
    """Load a causal language model, dense or slim, in evaluation mode.

    Args:
        source: a folder, a GGUF file, or a hub id.
        gguf_file: the GGUF file inside the folder or repository.
        dtype: of the weights; None for that of the files.
        device: where the model is put.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing.
    """
    if _is_slim(source):
        slim: Any = from_pretrained(source)
        return slim.to(device=device, dtype=dtype) if dtype is not None or device is not None else slim  # type: ignore[no-any-return]
    read: Any = AutoModelForCausalLM.from_pretrained
    options = {**LOADING, **_SAFE, "dtype": "auto" if dtype is None else dtype}
    with readable(source), quiet(WARNING):  # weights left at random are refused below, in one line
        model, found = read(**locate(source, gguf_file), **options)
    require_all_weights(source, found, model)
    return model if device is None else model.to(device)  # type: ignore[no-any-return]


def load_config_only(source: str | os.PathLike[str], gguf_file: str | None = None) -> PreTrainedModel:
    """Build a model on ``meta`` from its config; no weight is read."""
    if _is_slim(source):
        return build_empty(source)
    with readable(source):
        config = AutoConfig.from_pretrained(**locate(source, gguf_file), **_SAFE)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **_SAFE)  # type: ignore[no-any-return]


def load_tokenizer(
    source: str | os.PathLike[str], gguf_file: str | None = None, *, needed: bool = True, instead: str = ""
) -> Any:
    """Load the tokenizer of a model; None if there is none and it is not ``needed``.

    ``instead`` names an alternative to a tokenizer, for the message.

    Raises:
        CheckpointError: it is needed and cannot be loaded.
    """
    options = dict(_SAFE)
    tokenizer = None
    missing = readable(source, "its tokenizer cannot be read", f"Save its tokenizer beside it{instead}")
    with missing if needed else contextlib.suppress(Exception), quiet(WARNING):
        if not Path(source).expanduser().exists():  # a hub that cannot be reached is asked once
            AutoConfig.from_pretrained(source, **_SAFE)
        if _is_slim(source):  # stock classes refuse the config of some slim models
            options["config"] = PreTrainedConfig.from_pretrained(Path(source).expanduser())
        tokenizer = AutoTokenizer.from_pretrained(**locate(source, gguf_file), **options)
    return tokenizer


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


def _is_slim(source: str | os.PathLike[str]) -> bool:
    return (Path(source).expanduser() / MANIFEST).is_file()
