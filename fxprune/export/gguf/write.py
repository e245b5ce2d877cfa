"""Writing of GGUF files, one quantised tensor at a time."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from fxprune.errors import ExportError
from fxprune.export.gguf.format import Type, can_quantize, load_data, type_named
from fxprune.export.gguf.layout import Contents, read_decoder
from fxprune.export.gguf.reference import find_contents
from fxprune.export.gguf.tokenizer import Entry, copy_tokenizer, describe_tokenizer
from fxprune.export.onnx import LOW_PRECISION_TOLERANCE, wrap_export_errors
from fxprune.masking.compare import TOLERANCE
from fxprune.offload.atomic import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_gguf", "export_gguf", "most_common_type"]

_COARSE_BITS = 6.5
"""Types with fewer bits per weight keep embedding and output at 8 bits, which saves much quality at little cost."""


def most_common_type(path: str | os.PathLike[str]) -> str:
    """Type of most weights of a GGUF file; ``q8_0`` if that type cannot be written here."""
    sizes: Counter[Type] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    (kind, _) = sizes.most_common(1)[0]
    return kind.name.lower() if can_quantize(kind) else "q8_0"


def check_row_sizes(contents: Contents, kind: Type) -> None:
    """Refuse rows that are not a multiple of the block size of a type, with the ``round_to`` that avoids them."""
    misfits: dict[str, tuple[str, int, int]] = {}
    for name, tensor in contents.tensors.items():
        size = gguf.GGML_QUANT_SIZES[_type_of(name, tensor, kind)][0]
        row = tensor.shape[-1]
        if row % size:
            step, kind_of_units = size, "mlp" if ".ffn_down." in name else "channel"
            if ".attn_output." in name:
                step, kind_of_units = size // math.gcd(size, contents.keys["attention.value_length"]), "head"
            misfits.setdefault(kind_of_units, (name, row, step))
    if not misfits:
        return
    found = []
    for kind_of_units, (name, row, step) in misfits.items():
        found.append(f"{name} has rows of {row:,}: round_to={step} for the kind {kind_of_units} would do")
        if kind_of_units == "head":
            found[-1] += " (in query heads; with several per key/value head, less may do)"
    size = gguf.GGML_QUANT_SIZES[kind][0]
    what = f"{kind.name.lower()} stores blocks of {size} values along a row. {'; '.join(found)}"
    raise ExportError(what, where="quantization", remedy="Or choose f16")


def _type_of(name: str, tensor: torch.Tensor, kind: Type) -> Type:
    """Type that a tensor is stored in: float32 for vectors, at least 8 bits for embedding and output."""
    if tensor.dim() < 2 or name.startswith(("position_embd", "rope_")):
        return Type.F32
    outer = name in ("token_embd.weight", "output.weight")
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    return Type.Q8_0 if outer and 8 * stored / size < _COARSE_BITS else kind


def write_gguf(contents: Contents, tokenizer: Iterable[Entry], path: Path, kind: Type, name: str) -> None:
    """Write a file with matrices of type ``kind``, and the ``name`` of the model for people."""
    writer = gguf.GGUFWriter(path, contents.arch.name)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    try:
        writer.add_name(name)
        numbers = load_data("archs")["file_types"]  # of the type of most weights
        writer.add_file_type(numbers.get(kind.name.lower(), numbers["other"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in contents.keys.items():
            adders[type(value)](f"{contents.arch.name}.{key}", value)
        for entry in tokenizer:
            writer.add_key_value(entry.key, entry.value, entry.kind, entry.inner)
        _write_tensors(writer, contents, kind)
    finally:
        writer.close()


def _write_tensors(writer: gguf.GGUFWriter, contents: Contents, kind: Type) -> None:
    types = {name: _type_of(name, tensor, kind) for name, tensor in contents.tensors.items()}
    for name, tensor in contents.tensors.items():
        size, stored = gguf.GGML_QUANT_SIZES[types[name]]
        bytes_ = tensor.numel() // size * stored
        writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), bytes_, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    for name, tensor in contents.tensors.items():
        values = gguf.quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), types[name])
        writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(values).data)  # the writer's own way loses the error of a disk full at the end
        writer.write_padding(file, values.nbytes)


def export_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
    quantization: str = "f16",
) -> Path:
    """Write a model as a GGUF file, with its tokenizer and chat template.

    Blocks may differ in numbers of heads and in width, and may lack attention or an MLP. The logits of the file in
    float32 are compared with the model's before anything is written.

    Args:
        model: a decoder-only language model.
        path: the file to write. Folders are made; an existing file is replaced when the new one is complete.
        tokenizer: the tokenizer of the model.
        like: a GGUF file with the same tokens, such as the dense model's, to copy the tokenizer from instead.
        quantization: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``, ``q4_1``, ``q4_0`` and others. Vectors
            stay in float32; embedding and output are at least ``q8_0``.

    Raises:
        UnknownNameError: the type is unknown.
        ExportError: the format cannot express the model or the tokenizer, with the reason; or rows are not a multiple
            of the block size of the type, with the ``round_to`` that avoids it.
    """
    path, kind = Path(path), type_named(quantization)
    if like is None and tokenizer is None:
        what = "a GGUF file holds its tokenizer, and none is given"
        raise ExportError(what, where="tokenizer", remedy="Pass tokenizer=, or like= and a GGUF file to copy from")
    contents, entries = _collect(model, tokenizer, like)
    check_row_sizes(contents, kind)
    with wrap_export_errors(path), atomic_path(path, ExportError, parents=True) as unfinished:
        write_gguf(contents, entries, unfinished, kind, path.stem)
    return path


def check_gguf(model: PreTrainedModel, *, tokenizer: Any = None, like: str | os.PathLike[str] | None = None) -> None:
    """Refuse a model or a tokenizer that the format cannot express, before the model is pruned for it.

    The widths and numbers of heads after a prune may still be refused later.
    """
    _collect(model, tokenizer, like)


def _collect(
    model: PreTrainedModel, tokenizer: Any, like: str | os.PathLike[str] | None
) -> tuple[Contents, list[Entry]]:
    decoder = read_decoder(model)
    narrow = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in decoder.tensors.values())
    contents = find_contents(decoder, LOW_PRECISION_TOLERANCE if narrow else TOLERANCE)
    rows = contents.keys["vocab_size"]
    entries = copy_tokenizer(like, rows) if like is not None else describe_tokenizer(tokenizer, rows)
    empty = [entry.key for entry in entries if entry.kind == gguf.GGUFValueType.ARRAY and not len(entry.value)]
    if empty:
        what = f"has no {empty[0].rpartition('.')[2]}, and an empty list cannot be written"
        raise ExportError(what, where="tokenizer", remedy="Pass a tokenizer, or a GGUF file, that has some")
    return contents, entries
