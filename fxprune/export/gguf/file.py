"""A model as a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fxprune.errors import ExportError
from fxprune.export.files import ROUGH, replacing
from fxprune.export.gguf.choose import contents_for
from fxprune.export.gguf.decoder import read_decoder
from fxprune.export.gguf.layout import Contents
from fxprune.export.gguf.tokenizer import Entry, copy_tokenizer, describe_tokenizer
from fxprune.export.gguf.types import type_named
from fxprune.export.gguf.write import require_rows, write_file
from fxprune.masking.compare import TOLERANCE

__all__ = ["check_gguf", "export_gguf"]


def export_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
    quantization: str = "f16",
) -> Path:
    """Write a model as a GGUF file, with its tokenizer and chat template.

    Blocks may differ in numbers of heads and in width, and may be without attention or without an MLP. What the file
    computes is compared with the model, in float32, before anything is written.

    Args:
        model: a decoder-only language model.
        path: where to. Folders are made; what was there is replaced when the new file is complete.
        tokenizer: of the model.
        like: a GGUF file with the same tokens, the dense model's, to copy the tokenizer from instead.
        quantization: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1``, ``q4_0`` and others. Vectors
            stay in float32; embedding and output are at least ``q8_0``.

    Returns:
        The path.

    Raises:
        UnknownNameError: there is no such type.
        ExportError: the format cannot say the model or the tokenizer, with the reason; or rows are no multiple of the
            blocks of the type, with the ``round_to`` that gives some that are.
    """
    path, kind = Path(path), type_named(quantization)
    if like is None and tokenizer is None:
        raise ExportError(
            "a GGUF file holds its tokenizer, and none is given",
            where="tokenizer",
            remedy="Pass tokenizer=, or like= and a GGUF file to copy from",
        )
    contents, entries = _said(model, tokenizer, like)
    require_rows(contents, kind)
    with replacing(path) as unfinished:
        write_file(contents, entries, unfinished, kind, path.stem)
    return path


def check_gguf(model: PreTrainedModel, *, tokenizer: Any = None, like: str | os.PathLike[str] | None = None) -> None:
    """Refuse a model that no GGUF file can say, or whose tokenizer none can, before it is pruned for one.

    What a prune changes, widths and numbers of heads, the format may refuse later on.

    Args:
        model: a decoder-only language model with its weights.
        tokenizer: of the model.
        like: a GGUF file with the same tokens to copy the tokenizer from instead.

    Raises:
        ExportError: the format cannot say the model or the tokenizer, with the reason.
    """
    _said(model, tokenizer, like)


def _said(model: PreTrainedModel, tokenizer: Any, like: str | os.PathLike[str] | None) -> tuple[Contents, list[Entry]]:
    """Return what a file holds of a model, and of its tokenizer."""
    decoder = read_decoder(model)
    narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in decoder.tensors.values())
    contents = contents_for(decoder, ROUGH if narrow else TOLERANCE)
    rows = contents.keys["vocab_size"]
    return contents, copy_tokenizer(like, rows) if like is not None else describe_tokenizer(tokenizer, rows)
