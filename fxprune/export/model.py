"""Export of a model to one file, in the format of its suffix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.decode import export_decoder
from fxprune.export.gguf.write import export_gguf
from fxprune.export.program import export_graph
from fxprune.pipeline.arguments import SUFFIXES
from fxprune.trace import trace

__all__ = ["SUFFIXES", "check_options", "export_model"]


def export_model(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    cache: bool = False,
    verify: bool = True,
) -> Path:
    """Write a model, pruned or not, to one file that runs without this package.

    Args:
        model: a Hugging Face model, for instance from :func:`fxprune.from_pretrained`.
        path: the file to write. ``.pt2`` is a ``torch.export`` program and ``.onnx`` an ONNX model, see
            :func:`fxprune.export_graph`; ``.gguf`` a GGUF file. Folders are made; an existing file is replaced when
            the new one is complete.
        tokenizer: the tokenizer, for a GGUF file.
        like: a GGUF file with the same tokens, such as the dense model's, to copy the tokenizer from instead.
        quantization: type of the weights of a GGUF file: ``f32``, ``f16`` (the default), ``bf16``, ``q8_0``, ``q5_1``,
            ``q5_0``, ``q4_1``, ``q4_0``, ... Vectors stay in float32; embedding and output are at least ``q8_0``.
        cache: whether a program takes past keys and values and returns present ones; not for GGUF files.
        verify: run the exported file and compare. The logits of a GGUF file are always compared.

    Raises:
        UnknownNameError: the suffix or the quantisation is unknown.
        ExportError: the format cannot express the model, with the reason; or an argument belongs to another format.
        VerificationError: the program computes something else; nothing is written.
    """
    path = Path(path)
    check_options(path, tokenizer=tokenizer, like=like, quantization=quantization, cache=cache)
    if path.suffix == ".gguf":
        return export_gguf(model, path, tokenizer=tokenizer, like=like, quantization=quantization or "f16")
    if cache:
        return export_decoder(model, path, verify=verify)
    return export_graph(trace(model).graph_module, path, verify=verify)


def check_options(path: Path, *, cache: bool, **gguf_options: Any) -> None:
    """Refuse arguments that do not apply to the format of a file; a tokenizer may be given for any."""
    if path.suffix not in SUFFIXES:
        raise UnknownNameError("suffix", path.suffix, SUFFIXES)
    if path.suffix == ".gguf":
        if cache:
            what, remedy = "a GGUF file has no forward pass of its own", "Leave $cache out"
            raise ExportError(what, where="cache", remedy=remedy, argument="cache", value=cache)
        return
    for name in ("like", "quantization"):
        if gguf_options.get(name) is not None:
            what, remedy = f"${name} is for GGUF files", f"Leave ${name} out"
            raise ExportError(what, where=path.name, remedy=remedy, argument=name, value=gguf_options[name])
