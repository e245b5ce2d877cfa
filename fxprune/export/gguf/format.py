"""The GGUF format: types, architectures and headers."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, BinaryIO

import gguf
import numpy as np

from fxprune.errors import UnknownNameError

__all__ = [
    "Arch",
    "Type",
    "arch_named",
    "can_write",
    "candidates",
    "file_type",
    "general_archs",
    "joined",
    "layers_differ",
    "name_elsewhere",
    "names_in_format",
    "place_of",
    "read_header",
    "type_named",
]

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


_BLOCK = "blk.{bid}."


@dataclass(frozen=True)
class Arch:
    """An architecture of the format: what its graph computes, as far as it is not told by which tensors are there.

    Args:
        name: as the format spells it.
        arrays: whether numbers of heads and widths may differ from block to block.
        no_attention: whether a block may be without attention.
        rotary: ``halves`` or ``pairs``: which channels of a head are turned together; ``none``.
        factors: whether a tensor may divide the frequencies of the rotation.
        partial: whether a part of each head may be left as it is.
        biases: tensors of a block that may come with a bias.
        requires: tensors that every block has.
        fused: whether queries, keys and values are one tensor.
        stacked: whether the gate of an MLP stands above what it gates, in one tensor.
        tied_only: whether the output is always the embedding.
        norm: ``rms`` or ``layer``.
        offset: what is added to the weights of normalisations.
        activation: of the MLP.
        parallel: whether attention and MLP read the same.
        unturned_every: of so many blocks the last turns nothing; 0 where all do.
        window_every: of so many blocks the last sees everything, and the others a window; 0 where all do.
        keys: further entries of the file: the field of the config, and the value where the config has none.
        scales: what is multiplied, ``embedding`` or ``output``, by which entry.
    """

    name: str
    arrays: bool = False
    no_attention: bool = False
    rotary: str = "halves"
    factors: bool = False
    partial: bool = True
    biases: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    fused: bool = False
    stacked: bool = False
    tied_only: bool = False
    norm: str = "rms"
    offset: float = 0.0
    activation: str = "silu"
    parallel: bool = False
    unturned_every: int = 0
    window_every: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)
    scales: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def tensors(self) -> frozenset[gguf.MODEL_TENSOR]:
        """The tensors that it has."""
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return frozenset(gguf.MODEL_TENSORS[number])


@functools.cache
def _data() -> Any:
    return json.loads(resources.files("fxprune.export.gguf").joinpath("archs.json").read_text(encoding="utf-8"))


def joined(part: str) -> tuple[str, ...]:
    """Return the name of a tensor that is several in one, and the names of these, in their order.

    Args:
        part: of a block: ``attention`` or ``mlp``.
    """
    return tuple(_data()["joined"][part])


def file_type(quantization: str) -> int:
    """Return the number that a file has for the type of most of its weights."""
    numbers: dict[str, int] = _data()["file_types"]
    return numbers.get(quantization, numbers["other"])


@functools.cache
def arch_named(name: str) -> Arch:
    """Return an architecture by its name in the format."""
    told: dict[str, Any] = _data()["archs"][name]
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    return Arch(name, **options)


def candidates(model_type: str) -> list[Arch]:
    """Return the architectures that may say a model, the one of its own type first."""
    data = _data()
    own = data["model_types"].get(model_type)
    return [arch_named(name) for name in dict.fromkeys([*([own] if own else []), *data["general"]])]


def general_archs() -> tuple[str, ...]:
    """Return the names of the architectures whose blocks may differ, which say models of several types."""
    return tuple(_data()["general"])


@functools.cache
def _known_modules() -> dict[str, tuple[gguf.MODEL_TENSOR, ...]]:
    """What the modules of every model that the format knows are in it, by path."""
    found: dict[str, list[gguf.MODEL_TENSOR]] = {}
    tables = gguf.TensorNameMap
    for table in (tables.mappings_cfg, tables.block_mappings_cfg):
        for tensor, modules in table.items():
            for module in modules:
                found.setdefault(module, []).append(tensor)
    return {module: tuple(dict.fromkeys(tensors)) for module, tensors in found.items()}


def place_of(parameter: str) -> tuple[int | None, str]:
    """Return the number of the block that a parameter is in, None outside blocks, and the path of its module there.

    Args:
        parameter: its name in the model.
    """
    module = parameter.rpartition(".")[0]
    number = re.search(r"\.(\d+)\.", parameter)
    return (None if number is None else int(number[1])), re.sub(r"\.\d+\.", ".{bid}.", f"{module}.", count=1)[:-1]


def names_in_format(module: str, arch: Arch) -> tuple[str, ...]:
    """Return what the tensors of a module are called in a block of the format, or outside blocks.

    Args:
        module: its path, with ``{bid}`` for the number of the block.
        arch: names of tensors that it has come last, since the last one is meant; tensors that can be split or joined
            to such count as well.

    Returns:
        As ``attn_q``; none where the format knows no such tensor.
    """
    known = _known_modules().get(module, ())
    others = set(joined("attention"))
    return tuple(_name(tensor) for tensor in known if tensor in arch.tensors or _name(tensor) in others)


def name_elsewhere(module: str) -> str:
    """Return what a module is called in some architecture of the format; empty where there is none."""
    return next((_name(tensor) for tensor in _known_modules().get(module, ())), "")


def _name(tensor: gguf.MODEL_TENSOR) -> str:
    return str(gguf.TENSOR_NAMES[tensor]).removeprefix(_BLOCK)


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values in the format, as `struct` spells them."""

_TEXT, _ARRAY = 8, 9

_VERSIONS = (2, 3)
"""Of the format, that begin alike."""

_LAST = "tokenizer."
"""How the names of the first entries begin that are of no interest here, and long."""

_WIDTHS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
"""Entries that are one number for all blocks, or a list with one for each."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the entries of a GGUF file up to those of its tokenizer; none of a version that is not known.

    Raises:
        ValueError: the file ends before they do, or is no GGUF file.
    """
    found: dict[str, Any] = {}
    with open(path, "rb") as file:
        try:
            if _bytes(file, 4) != b"GGUF":
                raise ValueError("it does not begin as a GGUF file does")
            if _number(file, "I") not in _VERSIONS:
                return {}
            _number(file, "Q")
            for _ in range(_number(file, "Q")):
                name = _value(file, _TEXT)
                if name.startswith(_LAST):
                    break
                found[name] = _value(file, _number(file, "I"))
        except (EOFError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise ValueError("it ends too early, or is damaged") from error
    return found


def layers_differ(header: dict[str, Any]) -> bool:
    """Return whether the blocks of a file differ in width or in numbers of heads."""
    prefix = f"{header.get('general.architecture')}."
    widths = (header.get(prefix + name) for name in _WIDTHS)
    return any(len(set(numbers)) > 1 for numbers in widths if isinstance(numbers, list))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _bytes(file, _number(file, "Q")).decode("utf-8")
    if kind == _ARRAY:
        inner = _number(file, "I")
        return [_value(file, inner) for _ in range(_number(file, "Q"))]
    return _number(file, _NUMBERS[kind])


def _number(file: BinaryIO, spelled: str) -> Any:
    form = "<" + spelled
    return struct.unpack(form, _bytes(file, struct.calcsize(form)))[0]


def _bytes(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise EOFError
    return found
