"""What commands share that take models as they are, one or several: names, checks, and where they run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxprune.cli.load import load_either, readable

__all__ = ["check_places", "named", "opened"]


def named(models: Sequence[str]) -> dict[str, str]:
    """Return what a user named, each by the last part of its path, or by all of it where two end alike."""
    short = [Path(model).name for model in models]
    return dict(zip(short if len({*short}) == len({*models}) else models, models, strict=True))


def check_places(*models: str | None) -> None:
    """Refuse models that are nowhere, before the first of several is read.

    Args:
        models: what a user named; None for what was not asked for.

    Raises:
        FxpruneError: there is no such folder.
    """
    for model in models:
        if model is not None:
            with readable(model):
                pass


def opened(model: str, gguf_file: str | None = None, *, device: str | None, with_tokenizer: bool) -> tuple[Any, Any]:
    """Return a model, dense or slim, on a device and ready to run, and its tokenizer.

    Args:
        model: what a user named.
        gguf_file: in the folder.
        device: where it runs; None for a GPU where there is one.
        with_tokenizer: whether it is an error that there is no tokenizer.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    loaded, tokenizer = load_either(model, gguf_file, with_tokenizer=with_tokenizer)
    return loaded.to(device or found or "cpu").eval(), tokenizer
