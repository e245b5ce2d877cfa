"""Models read from what a user names: a folder, an id on a hub, a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxprune.errors import FxpruneError

__all__ = ["is_gguf", "load", "load_either", "load_tokenizer", "readable", "where_and_file"]


def is_gguf(model: str) -> bool:
    """Return whether a user named a GGUF file."""
    return Path(model).suffix == ".gguf" and Path(model).is_file()


def where_and_file(model: str, gguf_file: str | None) -> dict[str, Any]:
    """Return the folder that transformers reads, and the GGUF file in it, as its arguments."""
    if is_gguf(model):
        return {"pretrained_model_name_or_path": str(Path(model).parent), "gguf_file": Path(model).name}
    return {"pretrained_model_name_or_path": model, "gguf_file": gguf_file}


def load(model: str, gguf_file: str | None, *, with_tokenizer: bool) -> tuple[Any, Any]:
    """Return the dense model, and its tokenizer; None where there is none and none is needed."""
    from transformers import AutoModelForCausalLM

    with readable(model):
        dense = AutoModelForCausalLM.from_pretrained(**where_and_file(model, gguf_file))
    return dense, load_tokenizer(model, gguf_file, needed=with_tokenizer)


def load_either(model: str, gguf_file: str | None, *, with_tokenizer: bool) -> tuple[Any, Any]:
    """Return a model, dense or slim, and its tokenizer; None where there is none and none is needed."""
    from fxprune.checkpoint.manifest import MANIFEST

    if not (Path(model) / MANIFEST).is_file():
        return load(model, gguf_file, with_tokenizer=with_tokenizer)
    import fxprune

    return fxprune.from_pretrained(model), load_tokenizer(model, None, needed=with_tokenizer)


def load_tokenizer(model: str, gguf_file: str | None, *, needed: bool) -> Any:
    """Return the tokenizer of a model; None where there is none and none is needed."""
    from transformers import AutoTokenizer

    tokenizer = None
    with readable(model) if needed else contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(**where_and_file(model, gguf_file))
    return tokenizer


@contextlib.contextmanager
def readable(model: str) -> Iterator[None]:
    """Say in one line what transformers says of a folder that it cannot read."""
    remedy = "Pass a folder that save_pretrained wrote, or a hub id"
    if model.startswith(("/", ".", "~")) and not Path(model).exists():
        raise FxpruneError("no such folder", where=model, remedy=remedy)
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FxpruneError(f"cannot be loaded: {reason}", where=model, remedy=remedy) from error
