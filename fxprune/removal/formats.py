"""Formats of GGUF files: the type of each matrix by its place in the model, and the bytes of a weight.

A mixture of K-quants or i-quants follows the quantiser of ggml's own project: products with values and with the inner
channels of an MLP get more bits in some blocks, the output most, and rows that are not a multiple of 256 another type
of about the same size. Exceptions for single architectures, model sizes and numbers of heads or experts are left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import gguf
import numpy as np
from torch import fx

from fxprune.axes import factors
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Consumer, find_consumers
from fxprune.errors import UnknownNameError

Type = gguf.GGMLQuantizationType

TOKENIZER = 30
"""Bytes of a file for each token of its tokenizer, about: 25 for one with scores, and 36 for one with merges."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""Other names of formats."""

FORMATS = (
    *("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *ALIASES,
)
"""Formats of files whose size is known before they are written, by name."""

_COARSE = 6.5 / 8
"""Bytes of a weight below which plain formats keep embedding and output at 8 bits: much quality for few bytes."""

_FALLBACKS = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K), Type.Q4_0),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
"""Types in blocks of 32, as the engine has them for rows that do not fill blocks of 256; IQ4_NL for those not here."""

_REACHES: Mapping[str, Callable[[int, int], bool]] = {
    "all": lambda number, count: True,
    "first two": lambda number, count: number < 2,
    "first four": lambda number, count: number < 4,
    "first sixteenth": lambda number, count: number < count // 16,
    "first eighth": lambda number, count: number < count // 8,
    "ends and every third": lambda number, count: (
        number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2
    ),
}
"""Whether a block, by its number and the number of blocks, is one of those whose matrices get more bits."""

_PARTS = ("other", "value", "fused", "output", "down", "embedding", "head")


@dataclass(frozen=True)
class Place:
    """The place of a matrix in a model, as far as its type depends on it.

    Args:
        part: ``value``, ``fused`` queries, keys and values, attention's ``output``, ``down`` for the products that end
            an MLP, ``embedding`` or ``head`` outside blocks, or ``other``; in a file also ``query`` and ``key``.
        row: its axis along which blocks of values are stored.
        block: the number of its block.
        depth: the number of blocks.
    """

    part: str = "other"
    row: int = -1
    block: int = 0
    depth: int = 1


@dataclass(frozen=True)
class Format:
    """A format of a file by its name.

    Args:
        base: type of most matrices.
        head: type of the output, and of an embedding that is the output as well.
        embedding: type of an embedding that is not the output.
        more: types of the matrices of other parts, for some of the blocks.
        by_engine: whether ggml writes it, which can weigh errors by an importance matrix.
    """

    name: str
    base: Type
    head: Type
    embedding: Type
    more: Mapping[str, Mapping[str, Type]] = field(default_factory=dict)
    by_engine: bool = False

    def wanted(self, place: Place) -> Type:
        """The type of a matrix whose rows fill the blocks of any type."""
        outer = {"head": self.head, "embedding": self.embedding}
        kind = outer.get(place.part, self.base)
        part = "value" if place.part == "fused" else place.part
        for reach, types in self.more.items():
            if _REACHES[reach](place.block, place.depth):
                kind = types.get(part, kind)
        return kind

    def type_of(self, place: Place, row: int) -> Type:
        """The type of a matrix with ``row`` values in a row; in blocks of 32 where a mixture has larger ones."""
        kind = self.wanted(place)
        fits = row % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if fits or not self.by_engine:
            return kind
        return Type.Q8_0 if place.part == "head" else _FALLBACKS.get(kind, Type.IQ4_NL)


@functools.cache
def plain_formats() -> dict[str, Format]:
    """One type for all matrices: those that the package ``gguf`` can write."""
    made = {}
    for kind in Type:
        if not kind.name.startswith(("F", "BF", "Q", "TQ", "MX")):
            continue
        try:
            gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
        except (NotImplementedError, KeyError):
            continue
        outer = Type.Q8_0 if bytes_each(kind) < _COARSE else kind
        made[kind.name.lower()] = Format(kind.name.lower(), kind, outer, outer)
    return made


@functools.cache
def mixtures() -> dict[str, Format]:
    """K-quants and i-quants, in the mixtures that the engine's own tool makes."""
    file = resources.files("fxprune.removal").joinpath("mixtures.json")
    table: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    kinds = {kind.name: kind for kind in Type}
    return {
        name: Format(
            name,
            kinds[entry["base"]],
            kinds[entry.get("head", "Q6_K")],
            kinds[entry.get("embedding", entry["base"])],
            {reach: {part: kinds[kind] for part, kind in entry[reach].items()} for reach in _REACHES if reach in entry},
            by_engine=True,
        )
        for name, entry in table.items()
    }


def check_format(name: str) -> str:
    """The name of a format in lower case."""
    if name.lower() not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return name.lower()


def bytes_each(kind: Type) -> float:
    """Bytes of a weight of a type."""
    block, stored = gguf.GGML_QUANT_SIZES[kind]
    return stored / block


def least_each(name: str) -> float:
    """The least bytes that a weight takes in a format."""
    return min(bytes_each(type_of(name, Place(part), 256)) for part in _PARTS)


def type_of(name: str, place: Place, row: int) -> Type:
    """The type of a matrix in a format of :data:`FORMATS`, with ``row`` values in a row; F16 for uneven rows."""
    name = ALIASES.get(name, name)
    found = plain_formats().get(name) or mixtures()[name]
    kind = found.type_of(place, row)
    return Type.F16 if found.by_engine and row % gguf.GGML_QUANT_SIZES[kind][0] else kind


def find_places(graph: fx.Graph, axes: AxisMap, attention: Iterable[fx.Node]) -> dict[str, Place]:
    """The place of each parameter that a product reads, and of each matrix outside blocks; others are not listed.

    ``attention`` are the nodes that take queries, keys and values.
    """
    by_node = {consumer.node: consumer for consumer in find_consumers(graph, axes)}
    values, keys, heads = {}, set(), set()
    for node in attention:
        value, key = (_product_before(source, by_node) for source in (node.args[2], node.args[1]))
        if value is not None:
            values[value.name] = axes.tensors[value.name][value.axis]
            rows = (expr for axis, expr in enumerate(axes.tensors[value.name]) if axis != value.axis)
            heads |= {factor for expr in rows for factor in factors(expr)}
        if key is not None:
            keys.add(key.name)
    outer = [name for name in axes.parameters if name not in axes.tied and axes.block_of(name) is None]
    found = {name: Place("embedding") for name in outer if len(axes.tensors[name]) == 2}
    stream = {*values.values()}
    for consumer in by_node.values():
        block, read = axes.block_of(consumer.name), axes.tensors[consumer.name][consumer.axis]
        if block is None:
            part = "head"
            stream.add(read)
        elif consumer.name in values:
            part = "fused" if consumer.name in keys else "value"
        elif read in stream:
            part = "other"
        else:
            part = "down" if heads.isdisjoint(factors(read)) else "output"
        number = 0 if block is None else axes.blocks.index(block)
        found[consumer.name] = Place(part, consumer.axis, number, len(axes.blocks))
    return found


def _product_before(node: object, products: Mapping[fx.Node, Consumer]) -> Consumer | None:
    """The product with a weight that a value comes from, through the first inputs of ops."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node in products:
            return products[node]
        node = next(iter(node.all_input_nodes), None)
    return None
