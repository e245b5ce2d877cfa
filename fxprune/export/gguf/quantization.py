"""Quantisations of a GGUF file: one type for all matrices, or a mixture, by the quantiser of ggml."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from fxprune.errors import ExportError, UnknownNameError
from fxprune.export.gguf.format import Type, joined_names, load_data


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


_FALLBACKS = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
"""Types in blocks of 32, as the engine has them for rows that do not fill blocks of 256; IQ4_NL for those not here."""

_REACHES: Mapping[str, Callable[[int, int], bool]] = {
    "all": lambda number, count: True,
    "first sixteenth": lambda number, count: number < count // 16,
    "first eighth": lambda number, count: number < count // 8,
    "ends and every third": lambda number, count: (
        number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2
    ),
}
"""Whether a block, by its number and the number of blocks, is one of those whose tensors get more bits."""


@dataclass(frozen=True)
class Quantization:
    """A quantisation by its name.

    Args:
        base: type of most matrices.
        output: type of the output, and of an embedding that is the output as well.
        embedding: type of an embedding that is not the output.
        more: types of other tensors, by their names without the number of the block, for some of the blocks.
        by_engine: whether ggml writes it, which can weigh errors by an importance matrix.
    """

    name: str
    base: Type
    output: Type
    embedding: Type
    more: Mapping[str, Mapping[str, Type]] = field(default_factory=dict)
    by_engine: bool = False

    def types(self, shapes: Mapping[str, tuple[int, ...]], blocks: int) -> dict[str, Type]:
        """Type of each tensor of a file: float32 for vectors, and blocks of 32 where rows do not fill larger ones."""
        is_tied = "output.weight" not in shapes
        found: dict[str, Type] = {}
        for name, shape in shapes.items():
            if len(shape) < 2 or name.startswith(("position_embd", "rope_")):
                found[name] = Type.F32
                continue
            kind = self._wanted(name, blocks, is_tied)
            fits = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
            found[name] = kind if fits or not self.by_engine else _FALLBACKS.get(kind, Type.IQ4_NL)
        return found

    def _wanted(self, name: str, blocks: int, is_tied: bool) -> Type:
        if name == "output.weight" or (is_tied and name == "token_embd.weight"):
            return self.output
        if name == "token_embd.weight":
            return self.embedding
        _, number, part, _ = name.split(".")
        fused, _, _, value = joined_names("attention")
        kind = self.base
        for reach, types in self.more.items():
            if _REACHES[reach](int(number), blocks):
                kind = types.get(value if part == fused else part, kind)
        return kind

    def describe_fallbacks(self, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, Type], blocks: int) -> str:
        """Matrices that are of another type than wanted because of their rows, in words; empty if there are none."""
        is_tied = "output.weight" not in shapes
        matrices = [name for name, kind in types.items() if kind is not Type.F32]
        changed = [name for name in matrices if types[name] is not self._wanted(name, blocks, is_tied)]
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


def quantization_named(name: str) -> Quantization:
    """A quantisation by its name, in any case.

    Raises:
        UnknownNameError: there is none of this name.
        ExportError: ggml writes it, and is not installed.
    """
    mixtures, plain, given = _mixtures(), _plain(), str(name).lower()
    if given in plain:
        return plain[given]
    given = f"{given}_m" if given in ("q3_k", "q4_k", "q5_k") else given  # their other name
    if given not in mixtures:
        raise UnknownNameError("quantization", name, [*plain, *mixtures])
    if _library() is None:
        engine: dict[str, Any] = load_data("quantizations")["engine"]
        what = f"{given} is written by the code of {engine['name']}, which is not installed"
        remedy = f"{engine['install']}, or choose one of {', '.join(sorted(plain))}"
        raise ExportError(what, where="quantization", remedy=remedy, argument="quantization", value=name)
    return mixtures[given]


def row_multiple(name: str) -> int:
    """The multiple that rows should be rounded to for a quantisation."""
    return max(gguf.GGML_QUANT_SIZES[quantization_named(name).base][0], 32)


@functools.cache
def _plain() -> dict[str, Quantization]:
    """The types that the package ``gguf`` can write."""
    made = {}
    for kind in Type:
        size, stored = gguf.GGML_QUANT_SIZES[kind]
        if not kind.name.startswith(("F", "BF", "Q", "TQ", "MX")):
            continue
        try:
            gguf.quants.quantize(np.zeros((1, size), np.float32), kind)
        except (NotImplementedError, KeyError):
            continue
        # embedding and output at 8 bits save much quality at little cost where the others have fewer than 6.5
        outer = Type.Q8_0 if 8 * stored / size < 6.5 else kind
        made[kind.name.lower()] = Quantization(kind.name.lower(), kind, outer, outer)
    return made


@functools.cache
def _mixtures() -> dict[str, Quantization]:
    """K-quants and i-quants, in the mixtures that the engine's own tool makes."""
    table: dict[str, dict[str, Any]] = load_data("quantizations")["mixtures"]
    kinds = {kind.name: kind for kind in Type}
    return {
        name: Quantization(
            name,
            kinds[entry["base"]],
            kinds[entry.get("output", "Q6_K")],
            kinds[entry.get("embedding", entry["base"])],
            {reach: {part: kinds[kind] for part, kind in entry[reach].items()} for reach in _REACHES if reach in entry},
            by_engine=True,
        )
        for name, entry in table.items()
    }
