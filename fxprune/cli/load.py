"""Models read from what a user names: a folder, an id on a hub, a GGUF file, or the demo model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path
from typing import Any

from fxprune.cli.console import notes, working
from fxprune.cli.demo import DEMO, demo_checkpoint
from fxprune.cli.interrupts import at_once
from fxprune.cli.naming import check_model, is_gguf
from fxprune.errors import ArgumentError, FxpruneError
from fxprune.pipeline.arguments import MANIFEST

__all__ = [
    "check_device",
    "is_gguf",
    "load_either",
    "load_empty",
    "load_model",
    "load_on_disk",
    "load_tokenizer",
    "readable",
    "source_of",
    "where_and_file",
]

_REMEDY = "Pass a folder that save_pretrained wrote, a GGUF file, or an id on a hub that can be reached"


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


def load_either(
    model: str,
    gguf_file: str | None,
    *,
    with_tokenizer: bool,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """Return a model, dense or slim, and its tokenizer; None where there is none and none is needed.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
        with_tokenizer: whether one is needed.
        dtype: of the weights, by its name in torch; None for that of the files.
        device: where the model is put.
    """
    tokenizer = load_tokenizer(model, gguf_file, needed=with_tokenizer)
    return load_model(model, gguf_file, dtype=dtype, device=device), tokenizer


def load_model(model: str, gguf_file: str | None, *, dtype: str | None = None, device: str | None = None) -> Any:
    """Return a model, dense or slim; see :func:`load_either`."""
    check_model(model, gguf_file, with_weights=True)
    with at_once():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import fxprune.checkpoint
        from fxprune.checkpoint.read import LOADING, require_whole
        from fxprune.graph.context import quiet, unprinted
    logging.disable_progress_bar()
    check_device(device)
    folder = Path(model).expanduser()
    with working(f"loading {model}"), readable(model):
        if (folder / MANIFEST).is_file():
            loaded: Any = fxprune.checkpoint.from_pretrained(folder)
            return loaded.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
        read: Any = AutoModelForCausalLM.from_pretrained
        options: dict[str, Any] = {**LOADING, **({} if dtype is None else {"dtype": dtype})}
        bars = unprinted() if notes.quiet else contextlib.nullcontext()
        with quiet(WARNING), bars:  # what is left at random is refused below, in one line
            loaded, found = read(**where_and_file(model, gguf_file), **options)
        require_whole(model, found)
        return loaded if device is None else loaded.to(device)


def load_on_disk(model: str, work: Path, *, with_tokenizer: bool) -> tuple[Any, Any]:
    """Return a model whose weights stay in their files, and its tokenizer, where one is needed.

    Args:
        model: what the user named.
        work: a folder, made here, for what a GGUF file holds.
        with_tokenizer: whether one is needed.
    """
    tokenizer = load_tokenizer(model, None, needed=with_tokenizer)
    check_model(model, None, with_weights=True)
    with at_once():
        from fxprune.checkpoint.low_memory import load_mapped
    with working(f"loading {model}"), readable(model):
        work.mkdir()
        return load_mapped(source_of(model, None), work), tokenizer


def source_of(model: str, gguf_file: str | None) -> str | Path:
    """Return the folder, the GGUF file or the id on a hub that a user named.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
    """
    folder, file = where_and_file(model, gguf_file).values()
    return str(folder) if file is None else Path(folder) / file


def load_empty(model: str, gguf_file: str | None) -> Any:
    """Return a model without weights, dense or slim, built on ``meta`` from its config alone."""
    check_model(model, gguf_file)
    with at_once():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from fxprune.checkpoint.read import build_empty
    folder = Path(model).expanduser()
    if (folder / MANIFEST).is_file():
        return build_empty(folder)
    with readable(model):
        config = AutoConfig.from_pretrained(**where_and_file(model, gguf_file))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def load_tokenizer(model: str, gguf_file: str | None, *, needed: bool, otherwise: str = "") -> Any:
    """Return the tokenizer of a model; None where there is none and none is needed.

    Args:
        model: what the user named.
        gguf_file: inside the folder.
        needed: whether one is.
        otherwise: what does without, for the message.
    """
    check_model(model, gguf_file)
    with at_once():
        from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

        from fxprune.graph.context import quiet
    if model != DEMO and not Path(model).expanduser().exists():  # a hub that cannot be reached is asked once
        with readable(model):
            AutoConfig.from_pretrained(model)
    tokenizer = None
    options: dict[str, Any] = {}
    # whatever keeps a tokenizer from being read: there is none, and nothing asked for one
    # and what transformers warns of the config of a slim model says nothing of its tokenizer
    remedy = "Save its tokenizer beside it" + otherwise
    with (
        readable(model, "its tokenizer cannot be read", remedy) if needed else contextlib.suppress(Exception),
        quiet(WARNING),
    ):
        if (Path(model).expanduser() / MANIFEST).is_file():  # stock classes refuse the config of some slim models
            options["config"] = PreTrainedConfig.from_pretrained(Path(model).expanduser())
        tokenizer = AutoTokenizer.from_pretrained(**where_and_file(model, gguf_file), **options)
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
def readable(model: str, what: str = "cannot be loaded", remedy: str = _REMEDY) -> Iterator[None]:
    """Say in one line what transformers says of a model that it cannot read.

    Args:
        model: what the user named.
        what: is wrong, in front of the reason.
        remedy: what to do.
    """
    try:
        yield
    except (FxpruneError, MemoryError):
        raise
    except Exception as error:  # a config or a file of weights may be wrong in any way, and stop any line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        kind = "" if isinstance(error, OSError | ValueError | KeyError) else f"{type(error).__name__}: "
        raise FxpruneError(f"{what}: {kind}{reason.rstrip(',:')}", where=model, remedy=remedy) from error
