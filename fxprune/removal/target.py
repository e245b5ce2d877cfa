"""Targets: the size or speed that a model is to have after a prune; types and bytes of its tensors in a GGUF format.

A mixture of K-quants follows the quantiser of ggml's own project: products with values and with the inner channels of
an MLP get more bits in some blocks, the output most, and rows that are not a multiple of 256 another type of about the
same size. Exceptions for single architectures are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from torch import fx

from fxprune.axes import factors
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Consumer, find_consumers
from fxprune.errors import ArgumentError, RatioError, UnknownNameError
from fxprune.pipeline.arguments import refuse, whole_number

Type = gguf.GGMLQuantizationType

TOKENIZER = 30
"""Bytes of a file for each token of its tokenizer, about: 25 for one with scores, and 36 for one with merges."""

_PLAIN = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_MIXTURES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")

FORMATS = (*_PLAIN, *_MIXTURES, *_ALIASES)
"""Formats of files, by name."""

_COARSE = 6.5 / 8
"""Bytes of a weight below which plain formats keep embedding and output at 8 bits; see :mod:`fxprune.export.gguf`."""

_FALLBACKS = {Type.Q2_K: Type.IQ4_NL, Type.Q3_K: Type.IQ4_NL, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1}
_FALLBACKS |= {Type.Q6_K: Type.Q8_0}
"""Types with blocks of 32 in place of those with blocks of 256, for rows that are not a multiple of 256."""


_PARTS = ("other", "value", "fused", "output", "down", "embedding", "head")


@dataclass(frozen=True)
class Place:
    """The place of a matrix in a model, as far as its type depends on it.

    Args:
        part: ``value``, ``fused`` queries, keys and values, attention's ``output``, ``down`` for the products that end
            an MLP, ``embedding`` or ``head`` outside blocks, or ``other``.
        row: its axis along which blocks of values are stored.
        block: the number of its block.
        depth: the number of blocks.
    """

    part: str = "other"
    row: int = -1
    block: int = 0
    depth: int = 1


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
    """The type of a matrix in a format, with ``row`` values in a row."""
    name = _ALIASES.get(name, name)
    if name in _PLAIN:
        kind: Type = getattr(Type, name.upper())
        outer = place.part in ("embedding", "head")
        return Type.Q8_0 if outer and bytes_each(kind) < _COARSE else kind
    kind = _in_mixture(name, place)
    if row % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACKS.get(kind, kind)
    return Type.F16 if row % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _in_mixture(name: str, place: Place) -> Type:
    kind: Type = getattr(Type, name[: len("q4_k")].upper())
    part, block, depth = place.part, place.block, place.depth
    favoured = block < depth // 8 or block >= 7 * depth // 8 or (block - depth // 8) % 3 == 2
    if part == "head":
        return Type.Q6_K
    if name == "q2_k" and part in ("value", "down", "output"):
        return Type.Q3_K
    if name in ("q4_k_m", "q5_k_m") and part in ("value", "down") and favoured:
        return Type.Q6_K
    special: Mapping[tuple[str, str], Type] = {
        ("q3_k_m", "value"): Type.Q5_K if block < 2 else Type.Q4_K,
        ("q3_k_m", "down"): Type.Q5_K if block < depth // 16 else Type.Q4_K if favoured else Type.Q3_K,
        ("q3_k_m", "output"): Type.Q4_K,
        ("q3_k_m", "fused"): Type.Q4_K,
        ("q3_k_l", "value"): Type.Q5_K,
        ("q3_k_l", "down"): Type.Q5_K,
        ("q3_k_l", "output"): Type.Q5_K,
        ("q3_k_l", "fused"): Type.Q4_K,
        ("q4_k_s", "value"): Type.Q5_K if block < 4 else Type.Q4_K,
        ("q4_k_s", "down"): Type.Q5_K if block < depth // 8 else Type.Q4_K,
        ("q4_k_m", "fused"): Type.Q5_K,
        ("q5_k_m", "fused"): Type.Q6_K,
    }
    return special.get((name, part), kind)


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


DEFAULT_RATIO = 0.2
"""The fraction to remove where neither a ratio nor a target is given."""

WANTED = (
    "a size as in '100M' (parameters), '80MB' (bytes of weights), '80MB@q4_k_m' (bytes of a GGUF file), '6GB' with a "
    "context (memory), or a part of the dense model as in '0.8x params', '0.5x macs', '0.5x kv', '1.3x decode'"
)

_WORDS = re.compile(r"([\d._]+)\s*([a-zA-Z]*)\s*(.*)")

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_BYTES |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_FACTOR = "x"

PHASES = ("prefill", "decode")
"""Timed phases: reading a prompt, and generating one token."""


@dataclass(frozen=True)
class Target:
    """A size or speed that a model is to have after a prune.

    Args:
        text: as it was asked for.
        budget: the quantity, by the name of a budget; a phase alone where no table of times is named.
        amount: the wanted amount, in the unit of the budget; 0 if it is a part of the dense model's.
        part: the wanted part of the dense model's amount; 0 if it is an amount.
    """

    text: str
    budget: str
    amount: float = 0.0
    part: float = 0.0

    def of(self, dense: float) -> float:
        """The wanted amount, given that of the dense model."""
        return self.amount or self.part * dense


@dataclass(frozen=True)
class Reached:
    """The outcome of a target.

    Args:
        target: as it was asked for.
        word: the quantity and its unit.
        asked: the amount asked for.
        dense: that of the dense model.
        slim: that of the slim model.
    """

    target: str
    word: str
    asked: float
    dense: float
    slim: float

    def __str__(self) -> str:
        off = self.slim / self.asked - 1
        sizes = f"{self.dense:,.0f} to {self.slim:,.0f} {self.word}"
        return f"Target {self.target}: {sizes}, {self.asked:,.0f} asked for ({off:+.1%})"


def parse_target(value: Any, context: int | None = None) -> Target:
    """The target that a text states, or a number of parameters.

    Args:
        context: tokens; bytes are then those of memory in use with so many.

    Raises:
        ArgumentError: it is no target, or cannot be one of a smaller model.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found = _WORDS.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or not _is_number(found[1]):
        raise refuse("target", value, WANTED)
    number, unit, rest = float(found[1]), found[2].lower(), " ".join(found[3].split())
    if unit == _FACTOR:
        target = _of_dense(text, number, rest)
    elif unit in _BYTES:
        target = _of_bytes(text, number * _BYTES[unit], rest)
    elif unit in _COUNTS and rest in ("", "params", "macs"):
        target = Target(text, rest or "params", number * _COUNTS[unit])
    elif unit in ("params", "macs", "kv") and not rest:
        target = Target(text, unit, number)
    else:
        raise refuse("target", value, WANTED)
    if number == 0:
        raise refuse("target", value, "a target above 0")
    if context is None:
        return target
    whole_number("context", context, least=1)
    name, _, file_format = target.budget.partition("@")
    if name != "bytes":
        what = f"$context={context} beside $target={target.text!r}, which is no amount of memory"
        remedy = "Leave $context out, or ask for memory, as in '6GB'"
        raise ArgumentError(what, where="context", remedy=remedy, argument="context", value=context)
    budget = f"memory@{context}" + (f":{file_format}" if file_format else "")
    return Target(f"{target.text} at {context:,} tokens", budget, target.amount, target.part)


def amount_below(value: str, target: Target, dense: float, word: str) -> float:
    """The amount that a target asks for, which must be below that of the dense model.

    Args:
        value: the target as the argument was given.
        word: names what is counted.

    Raises:
        RatioError: the dense model has no more.
    """
    if target.of(dense) >= dense:
        what = f"$target is {value!r}: the dense model is no larger: it has {dense:,.0f} {word}"
        raise RatioError(what, where="target", remedy="Ask for a smaller one", argument="target", value=value)
    return target.of(dense)


def check_target(name: str, value: Any) -> str:
    """Return ``value``, the argument ``name``, as text; empty for no target."""
    return "" if value == "" else parse_target(value).text


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _of_dense(text: str, number: float, quantity: str) -> Target:
    name, at, place = quantity.partition("@")
    if name in PHASES and (place or not at):
        if number <= 1:
            raise _refuse(text, f"{number:g} times the speed is no gain", f"Ask for more than 1, as in '1.3x {name}'")
        return Target(text, quantity, part=1 / number)
    if quantity not in ("params", "macs", "kv", "bytes") and not (name == "bytes" and place):
        raise refuse("target", text, WANTED)
    if number >= 1:
        remedy = "Ask for less than 1, as in '0.8x params'; a speed is above 1, as in '1.3x decode'"
        raise _refuse(text, f"{number:g} times the dense model is nothing to remove", remedy)
    return Target(text, _bytes_in(place, text) if name == "bytes" else quantity, part=number)


def _of_bytes(text: str, amount: float, rest: str) -> Target:
    if rest == "kv":
        return Target(text, "kv", amount)
    if rest and not (rest.startswith("@") and rest[1:]):
        raise refuse("target", text, WANTED)
    return Target(text, _bytes_in(rest[1:], text), amount)


def _bytes_in(file_format: str, text: str) -> str:
    """The name of the budget of bytes, in a format if one is named."""
    if file_format and file_format.lower() not in FORMATS:
        raise _refuse(text, f"{file_format!r} is no format of GGUF files", f"Known: {', '.join(FORMATS)}")
    return f"bytes@{file_format.lower()}" if file_format else "bytes"


def _refuse(text: str, what: str, remedy: str) -> ArgumentError:
    return ArgumentError(f"$target is {text!r}: {what}", where="target", remedy=remedy, argument="target", value=text)
