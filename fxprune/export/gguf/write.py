"""Tensors and entries written to a GGUF file, quantised one tensor at a time."""

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

from fxprune.errors import ExportError
from fxprune.export.gguf.archs import file_type
from fxprune.export.gguf.layout import Contents
from fxprune.export.gguf.tokenizer import Entry
from fxprune.export.gguf.types import Type, can_write

__all__ = ["require_rows", "type_in", "write_file"]

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
