"""Quantisations of a GGUF file: one type for all matrices, or a mixture, by the quantiser of ggml."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.gguf.format import Type, joined_names, load_data
from fxprune.removal.formats import ALIASES, Format, Place, mixtures, plain_formats


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library of the first package that carries one with the quantiser; None if there is none."""
    for package, pattern in load_data("quantizations")["engine"]["packages"].items():
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        for file in sorted(path for folder in folders for path in Path(folder).glob(pattern)):
            try:
                library = ctypes.CDLL(str(file))
                chunk, needs = library.ggml_quantize_chunk, library.ggml_quantize_requires_imatrix
            except (OSError, AttributeError):  # no library, or one that keeps its functions to itself
                continue
            chunk.restype, needs.restype = ctypes.c_size_t, ctypes.c_bool
            chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            return library
    return None


def needs_importance(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether a type can be written only with an importance of each input."""
    library = _library()
    return library is not None and bool(library.ggml_quantize_requires_imatrix(int(kind)))


def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantise a matrix by ggml, in as many threads as torch uses.

    Args:
        values: finite float32 numbers ``(rows, inputs)``, with a multiple of the block size of inputs.
        importance: weight of the squared error of each input, ``(inputs,)``, positive.

    Returns:
        Bytes ``(rows, bytes of a row)``.
    """
    library = _library()
    assert library is not None
    rows, inputs = values.shape
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    made = np.empty((rows, inputs // size * stored), np.uint8)

    def part(start: int) -> None:
        where = None if weights is None else weights.ctypes.data
        count = min(step, rows - start)
        library.ggml_quantize_chunk(  # it adds the start to both addresses
            int(kind), values.ctypes.data, made.ctypes.data, start * inputs, count, inputs, where
        )

    step = -(-rows // torch.get_num_threads())
    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, rows, step)))
    return made


_PARTS = {"attn_q": "query", "attn_k": "key", "attn_v": "value", "attn_output": "output", "ffn_down": "down"}
"""Parts of a block by the names of their tensors, as far as their types differ."""


def find_place(name: str, blocks: int, is_tied: bool) -> Place:
    """The place of a matrix by the name of its tensor."""
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return Place("head")
    if name == "token_embd.weight":
        return Place("embedding")
    _, number, part, _ = name.split(".")
    fused = part == joined_names("attention")[0]
    return Place("fused" if fused else _PARTS.get(part, "other"), -1, int(number), blocks)


def tensor_types(found: Format, shapes: Mapping[str, tuple[int, ...]], blocks: int) -> dict[str, Type]:
    """Type of each tensor of a file: float32 for vectors, and blocks of 32 where rows do not fill larger ones."""
    is_tied = "output.weight" not in shapes
    vectors = {name for name, s in shapes.items() if len(s) < 2 or name.startswith(("position_embd", "rope_"))}
    return {
        name: Type.F32 if name in vectors else found.type_of(find_place(name, blocks, is_tied), shape[-1])
        for name, shape in shapes.items()
    }


def describe_fallbacks(
    found: Format, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Type], blocks: int
) -> str:
    """Matrices that are of another type than wanted because of their rows, in words; empty if there are none."""
    is_tied = "output.weight" not in shapes
    matrices = [name for name, kind in types.items() if kind is not Type.F32]
    changed = [name for name in matrices if types[name] is not found.wanted(find_place(name, blocks, is_tied))]
    if not changed:
        return ""
    rows = sorted({shapes[name][-1] for name in changed})
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    counts = Counter(types[name].name.lower() for name in changed)
    instead = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return (
        f"{len(changed)} of {len(matrices)} matrices have rows that are not a multiple of 256 "
        f"({listed}), and are of a type with blocks of 32 instead: {instead}"
    )


def quantization_named(name: str) -> Format:
    """A quantisation by its name, in any case.

    Raises:
        UnknownNameError: there is none of this name.
        ExportError: ggml writes it, and is not installed.
    """
    plain, given = plain_formats(), str(name).lower()
    if given in plain:
        return plain[given]
    given = ALIASES.get(given, given)
    if given not in mixtures():
        raise UnknownNameError("quantization", name, [*plain, *mixtures()])
    if _library() is None:
        engine: dict[str, Any] = load_data("quantizations")["engine"]
        what = f"{given} is written by the code of {engine['name']}, which is not installed"
        remedy = f"{engine['install']}, or choose one of {', '.join(sorted(plain))}"
        raise ExportError(what, where="quantization", remedy=remedy, argument="quantization", value=name)
    return mixtures()[given]


def row_multiple(name: str) -> int:
    """The multiple that rows should be rounded to for a quantisation."""
    return max(gguf.GGML_QUANT_SIZES[quantization_named(name).base][0], 32)
