"""What the format calls things: architectures, what their graphs do and the tensors that they have, read from data."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import gguf

__all__ = [
    "Arch",
    "arch_named",
    "candidates",
    "file_type",
    "general_archs",
    "joined",
    "name_elsewhere",
    "names_in_format",
    "place_of",
]

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
