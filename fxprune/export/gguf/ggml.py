"""The format's own quantiser, by the C interface of the library ggml in an installed package."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch

from fxprune.export.gguf.format import load_data

__all__ = ["is_installed", "needs_importance", "quantize"]


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


def is_installed() -> bool:
    """Whether a package with the library is installed."""
    return _library() is not None


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
