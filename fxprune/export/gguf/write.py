"""GGUF files written, one quantised tensor at a time."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from fxprune.errors import ExportError
from fxprune.export.files import ROUGH, replacing
from fxprune.export.gguf.format import Type, can_write, file_type, type_named
from fxprune.export.gguf.layout import Contents, read_decoder
from fxprune.export.gguf.reference import contents_for
from fxprune.export.gguf.tokenizer import Entry, copy_tokenizer, describe_tokenizer
from fxprune.masking.compare import TOLERANCE

__all__ = ["check_gguf", "export_gguf", "require_rows", "type_in", "write_file"]

_NOT_FOR_WEIGHTS = {kind for kind in Type if kind.name.startswith("I") or kind is Type.F64}
_COARSE_BITS = 6.5
"""Types with fewer bits for each weight leave embedding and output at eight bits, which costs little and saves much."""


def _bits(kind: Type) -> float:
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    return 8 * stored / size


def type_in(path: str | os.PathLike[str]) -> str:
    """Return the type that most weights of a GGUF file have; ``q8_0`` for one that cannot be written here."""
    sizes: Counter[Type] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type] += int(tensor.n_elements)
    (kind, _) = sizes.most_common(1)[0]
    return kind.name.lower() if can_write(kind) else "q8_0"


def require_rows(contents: Contents, kind: Type) -> None:
    """Refuse rows that are no multiple of the blocks of a type.

    Raises:
        ExportError: which they are, and which ``round_to`` gives rows that are.
    """
    misfits: dict[str, tuple[str, int, int]] = {}
    for name, tensor in contents.tensors.items():
        size = gguf.GGML_QUANT_SIZES[_type_of(name, tensor, kind)][0]
        row = tensor.shape[-1]
        if row % size:
            step, what = _step(name, contents, size)
            misfits.setdefault(what, (name, row, step))
    if not misfits:
        return
    told = "; ".join(
        f"{name} has rows of {row:,}: {_advice(what, step)}" for what, (name, row, step) in misfits.items()
    )
    size = gguf.GGML_QUANT_SIZES[kind][0]
    raise ExportError(
        f"{kind.name.lower()} stores blocks of {size} values along a row. {told}",
        where="quantization",
        remedy="Or choose f16",
    )


def _step(name: str, contents: Contents, size: int) -> tuple[int, str]:
    """Return the multiple that the units behind a row have to be of, and the kind of these units."""
    if ".attn_output." in name:
        return size // math.gcd(size, contents.keys["attention.value_length"]), "head"
    return size, "mlp" if ".ffn_down." in name else "channel"


def _advice(what: str, step: int) -> str:
    heads = " counts query heads, so a kind with several to a key/value head may need less" if what == "head" else ""
    return f"round_to={step} for the kind {what} would do{',' + heads if heads else ''}"


def _type_of(name: str, tensor: torch.Tensor, kind: Type) -> Type:
    """Return the type that a tensor is stored in: vectors in float32, embedding and output never below eight bits."""
    if tensor.dim() < 2 or name.startswith(("position_embd", "rope_")):
        return Type.F32
    outer = name in ("token_embd.weight", "output.weight")
    return Type.Q8_0 if outer and _bits(kind) < _COARSE_BITS else kind


def write_file(contents: Contents, tokenizer: Iterable[Entry], path: Path, kind: Type, name: str) -> None:
    """Write a file.

    Args:
        contents: tensors, and entries about the model.
        tokenizer: entries about the tokenizer.
        path: where to.
        kind: type of matrices.
        name: of the model, for people.
    """
    writer = gguf.GGUFWriter(path, contents.arch.name)
    try:
        writer.add_name(name)
        writer.add_file_type(file_type(kind.name.lower()))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in contents.keys.items():
            _add(writer, f"{contents.arch.name}.{key}", value)
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
    for name, tensor in contents.tensors.items():
        values = tensor.detach().float().cpu().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, types[name]))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


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
