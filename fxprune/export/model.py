"""A model as one file, of the kind that its suffix names."""

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
    """Write a model, pruned or not, as one file that runs without this package.

    Args:
        model: for instance what :func:`fxprune.from_pretrained` returns.
        path: where to. ``.pt2`` writes a ``torch.export`` program and ``.onnx`` an ONNX model, see
            :func:`fxprune.export_graph`; ``.gguf`` a GGUF file. Folders are made; what was there is replaced when the
            new file is complete.
        tokenizer: of the model, for a GGUF file.
        like: a GGUF file with the same tokens, the dense model's, to copy the tokenizer from instead.
        quantization: of a GGUF file: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1``, ``q4_0``, ...;
            ``f16`` by default. Vectors stay in float32; embedding and output are at least ``q8_0``.
        cache: of a program, whether past keys and values go in and present ones come out; a GGUF file has it always.
        verify: run what was exported and compare. What a GGUF file says is always compared.

    Returns:
        The path.

    Raises:
        UnknownNameError: there is no such suffix, or no such quantisation.
        ExportError: the model cannot be said in the format, with the reason; or an argument belongs to another one.
        VerificationError: the program computes something else; nothing is written.
    """
    path = Path(path)
    check_options(path, tokenizer=tokenizer, like=like, quantization=quantization, cache=cache)
    if path.suffix == ".gguf":
        return export_gguf(model, path, tokenizer=tokenizer, like=like, quantization=quantization or "f16")
    if cache:
        return export_decoder(model, path, verify=verify)
    return export_graph(trace(model).graph_module, path, verify=verify)


def check_options(path: Path, *, cache: bool, **of_gguf: Any) -> None:
    """Refuse arguments that mean nothing to the kind of file that a suffix names.

    Args:
        path: where to.
        cache: whether a program keeps keys and values.
        of_gguf: what GGUF files alone take; a tokenizer may be given for any file.

    Raises:
        UnknownNameError: there is no such suffix.
        ExportError: an argument belongs to another kind of file.
    """
    if path.suffix not in SUFFIXES:
        raise UnknownNameError("suffix", path.suffix, SUFFIXES)
    if path.suffix == ".gguf":
        if cache:
            raise ExportError("a GGUF file has no forward pass of its own", where="cache", remedy="Leave cache out")
        return
    for name in ("like", "quantization"):
        if of_gguf.get(name) is not None:
            raise ExportError(f"{name} is for GGUF files", where=path.name, remedy=f"Leave {name} out")
