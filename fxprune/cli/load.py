"""Models read from what a user names: a folder, an id on a hub, a GGUF file, or the demo model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxprune.cli.console import working
from fxprune.cli.demo import DEMO, demo_checkpoint
from fxprune.cli.interrupts import at_once
from fxprune.cli.naming import check_model, is_gguf
from fxprune.errors import ArgumentError, FxpruneError
from fxprune.pipeline.words import MANIFEST

__all__ = ["is_gguf", "load", "load_either", "load_tokenizer", "readable", "where_and_file"]


def where_and_file(model: str, gguf_file: str | None) -> dict[str, Any]:
    """Return the folder that transformers reads, and the GGUF file in it, as its arguments.

    Raises:
        FxpruneError: there is no such model.
    """
    check_model(model, gguf_file)
    if model == DEMO:
        return {"pretrained_model_name_or_path": str(demo_checkpoint()), "gguf_file": None}
    path = Path(model).expanduser()
    if is_gguf(model):
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(path) if path.exists() else model, "gguf_file": gguf_file}


def load(
    model: str,
    gguf_file: str | None,
    *,
    with_tokenizer: bool,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """Return the dense model, and its tokenizer; None where there is none and none is needed.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
        with_tokenizer: whether one is needed.
        dtype: of the weights, by its name in torch; None for that of the files.
        device: where the model is put.
    """
    tokenizer = load_tokenizer(model, gguf_file, needed=with_tokenizer)
    with at_once():
        from transformers import AutoModelForCausalLM

    check_device(device)
    options = {} if dtype is None else {"dtype": dtype}
    with working(f"loading {model}"), readable(model):
        dense = AutoModelForCausalLM.from_pretrained(**where_and_file(model, gguf_file), **options)
    return (dense if device is None else dense.to(device)), tokenizer


def load_either(
    model: str,
    gguf_file: str | None,
    *,
    with_tokenizer: bool,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """Return a model, dense or slim, and its tokenizer; see :func:`load`."""
    if not (Path(model).expanduser() / MANIFEST).is_file():
        return load(model, gguf_file, with_tokenizer=with_tokenizer, dtype=dtype, device=device)
    with at_once():
        import fxprune.checkpoint
    check_device(device)
    with working(f"loading {model}"):
        slim: Any = fxprune.checkpoint.from_pretrained(Path(model).expanduser())
    tokenizer = load_tokenizer(model, None, needed=with_tokenizer, config=slim.config)
    return slim.to(device=device, dtype=None if dtype is None else _torch_dtype(dtype)), tokenizer


def load_tokenizer(model: str, gguf_file: str | None, *, needed: bool, config: Any = None) -> Any:
    """Return the tokenizer of a model; None where there is none and none is needed.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
        needed: whether it is an error that there is none.
        config: of the model where it was read already; stock classes refuse to read that of some slim ones.
    """
    check_model(model, gguf_file)
    with at_once():
        from transformers import AutoTokenizer

    tokenizer = None
    # whatever keeps a tokenizer from being read: there is none, and nothing asked for one
    with readable(model) if needed else contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(config=config, **where_and_file(model, gguf_file))
    return tokenizer


def check_device(device: str | None) -> None:
    """Refuse a device that is not there.

    Raises:
        ArgumentError: torch does not know it, or this machine has none.
    """
    import torch

    if device is None:
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(
            f"device {device} cannot be used: {reason}", where="device", remedy="Leave it out to compute on the CPU"
        ) from error


@contextlib.contextmanager
def readable(model: str) -> Iterator[None]:
    """Say in one line what transformers says of a model that it cannot read."""
    try:
        yield
    except FxpruneError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "Pass a folder that save_pretrained wrote, a GGUF file, or an id on a hub that can be reached"
        raise FxpruneError(f"cannot be loaded: {reason}", where=model, remedy=remedy) from error


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
