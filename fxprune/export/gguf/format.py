"""The GGUF format: types and architectures."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import gguf

Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Arch:
    """An architecture of the format: the properties of its graph that its tensors do not determine.

    Args:
        arrays: whether numbers of heads and widths may differ from block to block.
        no_attention: whether a block may be without attention.
        rotary: which channels of a head are rotated together: ``halves`` or ``pairs``; ``none`` without rotation.
        factors: whether a tensor may divide the frequencies of the rotation.
        partial: whether only a part of each head may be rotated.
        biases: tensors of a block that may have a bias.
        fused: whether queries, keys and values are one tensor.
        stacked: whether gate and up projection of an MLP are one tensor.
        tied_only: whether the output is always the embedding.
        offset: constant that is added to the weights of normalisations.
        unturned_every: period of the blocks without rotation, the last of each period; 0 if there are none.
        window_every: period of the blocks without a sliding window, the last of each period; 0 for no windows.
        keys: further entries of the file, each by a field of the config or a constant.
        scales: entry that scales the ``embedding``, the ``output`` or the ``residual``.
    """

    name: str
    arrays: bool = False
    no_attention: bool = False
    rotary: str = "halves"
    factors: bool = False
    partial: bool = True
    biases: Sequence[str] = ()
    requires: Sequence[str] = ()
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
        """The tensors of the architecture."""
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return frozenset(gguf.MODEL_TENSORS[number])


@functools.cache
def load_data(name: str) -> Any:
    """A JSON file of this package: ``archs``, ``quantizations`` or ``tokenizers``."""
    return json.loads(resources.files("fxprune.export.gguf").joinpath(f"{name}.json").read_text(encoding="utf-8"))


def joined_names(part: str) -> tuple[str, ...]:
    """Name of a fused tensor of a part of a block, ``attention`` or ``mlp``, and the names of its pieces in order."""
    return tuple(load_data("archs")["joined"][part])


@functools.cache
def arch_named(name: str) -> Arch:
    """An architecture by its name in the format."""
    return Arch(name, **load_data("archs")["archs"][name])


def candidate_archs(model_type: str) -> list[Arch]:
    """Architectures that may express a model: that of its type first, then the general ones."""
    own = load_data("archs")["model_types"].get(model_type)
    return [arch_named(name) for name in dict.fromkeys((own, *general_archs())) if name]


def general_archs() -> tuple[str, ...]:
    """Names of the architectures whose blocks may differ, which express models of several types."""
    return tuple(load_data("archs")["general"])


@functools.cache
def _known_modules() -> dict[str, tuple[gguf.MODEL_TENSOR, ...]]:
    """Tensors of the format by the path of a module, over all models that the package ``gguf`` knows."""
    found: dict[str, tuple[gguf.MODEL_TENSOR, ...]] = {}
    tables = gguf.TensorNameMap
    for tensor, modules in (*tables.mappings_cfg.items(), *tables.block_mappings_cfg.items()):
        for module in modules:
            found[module] = (*found.get(module, ()), tensor)
    return found


def place_of(parameter: str) -> tuple[int | None, str]:
    """Block number of a parameter (None outside blocks) and the path of its module, with ``{bid}`` for the number."""
    module = parameter.rpartition(".")[0]
    number = re.search(r"\.(\d+)\.", parameter)
    return (None if number is None else int(number[1])), re.sub(r"\.\d+\.", ".{bid}.", f"{module}.", count=1)[:-1]


def names_in_format(module: str, arch: Arch | None = None) -> tuple[str, ...]:
    """Names in the format of the tensors of a module, such as ``attn_q``, in one architecture or in any; else empty.

    Pieces of its fused tensors, and fused tensors of its pieces, count as well.
    """
    others = joined_names("attention")
    names = {t: str(gguf.TENSOR_NAMES[t]).removeprefix("blk.{bid}.") for t in _known_modules().get(module, ())}
    return tuple(name for t, name in names.items() if arch is None or t in arch.tensors or name in others)


def layers_differ(header: dict[str, Any]) -> bool:
    """Whether the blocks of a file differ in width or number of heads."""
    prefix = f"{header.get('general.architecture')}."
    names = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
    widths = (header.get(prefix + name) for name in names)  # a number for all blocks, or a list with one for each
    return any(len(set(numbers)) > 1 for numbers in widths if isinstance(numbers, list))
