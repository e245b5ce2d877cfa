"""The types of GGUF files that weights can be written in. It needs no torch."""

from __future__ import annotations

import gguf
import numpy as np

from fxprune.errors import UnknownNameError

__all__ = ["Type", "can_write", "type_named"]

Type = gguf.GGMLQuantizationType

_PLAIN = (Type.F32, Type.F16)


def can_write(kind: Type) -> bool:
    """Return whether the package that writes the format quantises to a type."""
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def type_named(quantization: str) -> Type:
    """Return a type of the format by its name, in letters of any case.

    Raises:
        UnknownNameError: there is none, or none that can be written here.
    """
    known = {
        kind.name.lower(): kind
        for kind in Type
        if kind.name.startswith(("F", "BF", "Q", "TQ", "MX")) and can_write(kind)
    }
    if str(quantization).lower() not in known:
        raise UnknownNameError("quantization", quantization, known)
    return known[quantization.lower()]
