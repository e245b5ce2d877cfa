"""Cost of a model as a function of its unit counts: parameters, MACs, cache, bytes, time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, isfinite, lcm, prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import torch
from torch import fx

from fxprune.axes import Expr, Factor, factors, kept_size, unit_index
from fxprune.discovery.dependency import AxisMap, size_with
from fxprune.discovery.groups import Group, consumers_at
from fxprune.errors import ArgumentError, FxpruneError, PassError, UnknownNameError
from fxprune.graph.compat import UNKNOWN_SIZE, is_free, size_hint
from fxprune.graph.counting import TOKENS, SampleSizes
from fxprune.graph.facts import Fact
from fxprune.graph.tensors import tensor_name, weights
from fxprune.pipeline.arguments import one_of
from fxprune.removal.formats import TOKENIZER, Type, bytes_each, check_format, find_places, type_of
from fxprune.removal.removal import Removal
from fxprune.removal.target import PHASES
from fxprune.rules.apply import apply_rule_alone
from fxprune.rules.registry import Values, values_of

_FORMS = "the table that `make bench` writes, or the output of `fxprune bench DENSE SLIM --json`"


def read_timing(phase: str, place: str) -> tuple[float, float, str]:
    """The seconds of the dense model, the fraction of them that is fixed, and the name of the measured quantity.

    A model that does a share of the work takes ``seconds * (fixed + (1 - fixed) * share)``, by a least squares fit to
    measurements of the dense model and slim ones, case by case; the seconds are those of the first case. ``place`` is a
    JSON file, and after a colon the engine if the file covers several.
    """
    path, engine = Path(place), ""
    if not os.path.isfile(path) and ":" in place:  # a colon may also be part of the name of the file
        file, _, engine = place.rpartition(":")
        path, engine = Path(file), engine.strip()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # str(error) repeats the path
        what = "no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read: {reason}"
        raise FxpruneError(what, where=str(path), remedy=f"Name {_FORMS}") from error
    try:
        rows = list(_benchmark_rows(table, phase, engine) if "rows" in table else _command_rows(table, phase))
        if not all(isfinite(value) and value > 0 for row in rows for value in row):
            raise ValueError
    except UnknownNameError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FxpruneError("it holds no measurements", where=str(path), remedy=f"Name {_FORMS}") from error
    slim = [(1 - work, 1 - time) for work, time, _ in rows if work < 1]
    if not slim:
        raise FxpruneError(
            f"there is no slim model with a {phase} time in it, to fit time to work",
            where=str(path),
            remedy="Measure the dense model and one that was pruned by any recipe",
        )
    slope = sum(work * time for work, time in slim) / sum(work * work for work, _ in slim)
    dense = next((seconds for work, _, seconds in rows if work == 1), rows[0][2])
    return dense, 1 - min(max(slope, 0.0), 1.0), f"{phase} time{f' in {engine}' if engine else ''}"


def _benchmark_rows(table: Mapping[str, Any], phase: str, engine: str) -> Iterator[tuple[float, float, float]]:
    """Relative work, relative time and seconds of each row of a phase."""
    rows = [row for row in table["rows"] if row["case"]["phase"] == phase]
    engines = sorted({row["engine"] for row in rows})
    if engine not in engines and (engine or len(engines) > 1):
        raise UnknownNameError("engine", engine, engines)
    rows = [row for row in rows if row["engine"] == (engine or row["engine"])]
    dense = {str(row["case"]): row["seconds"] for row in rows if row["candidate"] == "dense"}
    for row in rows:
        yield 1 / row["ideal"], row["seconds"] / dense[str(row["case"])], row["seconds"]


def _command_rows(table: Mapping[str, Any], phase: str) -> Iterator[tuple[float, float, float]]:
    """The same for models side by side, the dense one first, with work proportional to parameters."""
    models = list(table.values())
    for model in models:
        seconds, first = model[f"{phase}_ms"] / 1000, models[0][f"{phase}_ms"] / 1000
        yield model["parameters"] / models[0]["parameters"], seconds / first, seconds


BUDGETS = ("params", "macs", "kv", "bytes")
"""Budgets by name; also ``bytes@`` with a format, ``memory@`` with a number of tokens and perhaps a format, and
``prefill@`` or ``decode@`` with a table of times."""

CHUNK = 512
"""The most tokens of a prompt that programs for GGUF files read at once by default."""

Counts = Mapping[Factor, float]


class Term(NamedTuple):
    """A term of the cost of a model: the cost of one element times the sizes of some axes, removed with its block."""

    exprs: tuple[Expr, ...]
    block: str | None
    each: float


class Budget:
    """Cost of a model as a function of unit counts.

    The cost is a polynomial: the sum of products of sizes of axes. Fractional counts are allowed, so that a ratio can
    be solved for before rounding. ``word`` names the counted quantity.
    """

    blocks: Mapping[Factor, int] = MappingProxyType({})
    """For factors whose units may only stay in multiples of a number, that number."""

    def __init__(self, terms: Iterable[Term], word: str) -> None:
        self.word = word
        self.terms = tuple(terms)
        self._sizes = [term.each * prod(expr.size for expr in term.exprs) for term in self.terms]
        self._places: dict[Factor | str, list[int]] = {}
        for place, term in enumerate(self.terms):
            keys: set[Factor | str] = {factor for expr in term.exprs for factor in factors(expr)}
            if term.block is not None:
                keys.add(term.block)
            for key in keys:
                self._places.setdefault(key, []).append(place)
        self.total = int(sum(self._sizes))

    def removed(self, counts: Counts, blocks: Mapping[str, float]) -> float:
        """The removed cost, given the units left of each factor that shrinks, and the removed fraction of blocks."""
        changed: list[Factor | str] = [*counts, *(block for block in blocks if blocks[block])]
        gone = 0.0
        for _, part in self.removed_terms(changed, counts, blocks):  # one by one, since sum() rounds otherwise
            gone += part
        return gone

    def removed_terms(
        self, changed: Iterable[Factor | str], counts: Counts, blocks: Mapping[str, float]
    ) -> Iterator[tuple[int, float]]:
        """Yield, in order, the index of each term that contains a changed factor or block, and its removed amount."""
        for place in sorted({place for key in changed for place in self._places.get(key, ())}):
            term = self.terms[place]
            share = blocks.get(term.block, 0.0) if term.block is not None else 0.0
            left = term.each * prod(size_with(expr, counts) for expr in term.exprs) * (1 - share)
            yield place, self._sizes[place] - left

    def left(self, removal: Removal) -> float:
        """The cost of what stays."""
        counts = {factor: float(removal.keep.count(factor)) for factor in removal.keep.units}
        return self.total - self.removed(counts, dict.fromkeys(removal.removed_blocks, 1.0))


class FileBudget(Budget):
    """The bytes of a GGUF file in a format, about; ``more`` terms are added to those of the tensors.

    Types are those of the dense model while units are counted, which holds as long as rows stay multiples of
    :attr:`blocks`; :meth:`left` takes types by the widths that are left.
    """

    def __init__(self, graph: fx.Graph, axes: AxisMap, file_format: str, more: Iterable[Term], word: str) -> None:
        self._axes, self._format = axes, file_format
        self.places = find_places(graph, axes, filter(_is_attention, graph.nodes))
        self._types = {name: self._type(name, [e.size for e in axes.tensors[name]]) for name in axes.parameters}
        tensors = _weights(axes, {name: bytes_each(kind) for name, kind in self._types.items()})
        outer = [name for name, place in self.places.items() if place.part in ("embedding", "head")]
        rows = max((axes.tensors[name][0].size for name in outer), default=0)
        super().__init__([*tensors, Term((), None, float(TOKENIZER * rows)), *more], word)
        self.blocks = blocks = dict[Factor, int]()
        for name, place in self.places.items():
            expr, block = axes.tensors[name][place.row], gguf.GGML_QUANT_SIZES[self._types[name]][0]
            for factor in factors(expr) if block > 1 else ():
                width = int((unit_index(expr, factor) == 0).sum())
                blocks[factor] = lcm(blocks.get(factor, 1), block // gcd(block, width))

    def left(self, removal: Removal) -> float:
        found, axes = super().left(removal), self._axes
        for name in axes.parameters:
            if name not in axes.tied and axes.block_of(name) not in removal.removed_blocks:
                slim = [kept_size(expr, removal.keep) for expr in axes.tensors[name]]
                found += prod(slim) * (bytes_each(self._type(name, slim)) - bytes_each(self._types[name]))
        return found

    def _type(self, name: str, shape: Sequence[int]) -> Type:
        place = self.places.get(name)
        return Type.F32 if place is None or len(shape) < 2 else type_of(self._format, place, shape[place.row])


def check_budget(name: str, value: Any) -> str:
    """Return ``value``, the argument ``name``, if it names a budget.

    That is one of :data:`BUDGETS`, ``bytes@`` and a format, ``memory@`` and a context, or a phase, ``@`` and a table.
    """
    if not isinstance(value, str):
        return one_of(name, value, BUDGETS)
    quantity, at, detail = value.partition("@")
    if at and quantity in PHASES:
        read_timing(quantity, detail)
    elif at and quantity == "bytes":
        check_format(detail)
    elif at and quantity == "memory":
        _context(value)
    else:
        one_of(name, value, (*BUDGETS, "bytes@q8_0"))
    return value


@dataclass(frozen=True)
class CacheSize(Fact):
    """Bytes of the key-value cache for one token, in half precision, before the removal and after it."""

    dense: int
    slim: int


def cache_size(graph_module: fx.GraphModule, removal: Removal) -> CacheSize | None:
    """Bytes of the key-value cache of a dense graph before and after a removal; None without attention."""
    try:
        budget = make_budget("kv", graph_module, removal.axes)
    except PassError:
        return None
    return CacheSize(budget.total, round(budget.left(removal)))


def make_budget(name: str, graph_module: fx.GraphModule, axes: AxisMap) -> Budget:
    """Return a budget by its name.

    Args:
        name: ``params``; ``macs`` of a sample of 64 tokens; ``kv``, bytes of key-value cache per token; ``bytes`` of
            the weights in their own dtype; ``bytes@q4_k_m``, of a GGUF file in a format of
            :data:`~fxprune.removal.formats.FORMATS`; ``memory@8192``, bytes of these weights, of the cache of so many
            tokens and of what a step computes, or ``memory@8192:q4_k_m`` with the weights in a format; or time, as
            ``decode@times.json`` or ``prefill@times.json:onnxruntime``, from measurements: a fixed part, and one
            proportional to weights in decoding and to multiply-accumulates in prefill.
    """
    graph = graph_module.graph
    quantity, at, detail = name.partition("@")
    weighed = quantity in ("bytes", "memory")
    own = {one: float(tensor.element_size()) for one, tensor in weights(graph_module)} if weighed else {}
    if name == "macs":
        found = Budget(_work(graph, axes), "multiply-accumulates")
    elif name == "kv":
        found = Budget(_cache(graph, axes), "bytes of the key-value cache")
    elif at and quantity in PHASES:
        work = _work(graph, axes) if quantity == PHASES[0] else _weights(axes)
        (seconds, fixed, what), budget = read_timing(quantity, detail), Budget(work, "work")
        microseconds = seconds * 1e6
        each = microseconds * (1 - fixed) / max(budget.total, 1)
        terms = [Term(term.exprs, term.block, term.each * each) for term in budget.terms]
        found = Budget([Term((), None, microseconds * fixed), *terms], f"microseconds of {what}")
    elif at and quantity == "bytes":
        file_format = check_format(detail)
        found = FileBudget(graph, axes, file_format, (), f"bytes of a file in {file_format}")
    elif name == "bytes":
        found = Budget(_weights(axes, own), "bytes of weights")
    elif at and quantity == "memory":
        context, file_format = _context(name)
        word = f"bytes of memory with {context:,} tokens of context"
        more = [*_in_use(graph, axes, context)]
        if file_format:
            found = FileBudget(graph, axes, file_format, more, f"{word} and weights in {file_format}")
        else:
            found = Budget([*_weights(axes, own), *more], word)
    else:
        found = Budget(_weights(axes), "parameters")
    if not found.total:
        raise PassError(f"the model has no {found.word}", where="budget", remedy="Choose another budget")
    return found


def _context(name: str) -> tuple[int, str]:
    """The tokens of a budget of memory, and the format of its weights; empty for their own dtype."""
    number, _, file_format = name.removeprefix("memory@").partition(":")
    if not number.isdecimal() or not int(number):
        remedy = "Write memory@8192 with a number of tokens, and perhaps a format as in memory@8192:q4_k_m"
        raise ArgumentError(f"$budget is {name!r}", where="budget", remedy=remedy, argument="budget", value=name)
    return int(number), check_format(file_format) if file_format else ""


def by_kind(budget: Budget, groups: Sequence[Group]) -> dict[str, float]:
    """Return the cost of each kind: that removed with all of its ``groups``."""
    found: dict[str, float] = {}
    for kind in {group.kind for group in groups}:
        alike = [group for group in groups if group.kind == kind]
        counts = {group.factor: 0.0 for group in alike if group.factor is not None}
        blocks = {group.block: 1.0 for group in alike if group.factor is None and group.block is not None}
        found[kind] = budget.removed(counts, blocks)
    return found


def _weights(axes: AxisMap, sizes: Mapping[str, float] = MappingProxyType({})) -> Iterator[Term]:
    """The elements of parameters, or their bytes, by name, given the size of each."""
    for name in axes.parameters:
        if name not in axes.tied:
            yield Term(axes.tensors[name], axes.block_of(name), sizes.get(name, 1.0))


def _in_use(graph: fx.Graph, axes: AxisMap, context: int) -> Iterator[Term]:
    """Bytes of the cache of a context, and of the activations of the op with the largest inputs and output.

    A prompt is read in chunks of :data:`CHUNK` tokens, in float32, without storing the products of queries and keys,
    and with the logits of its last token.
    """
    for term in _cache(graph, axes):
        yield Term(term.exprs, term.block, term.each * context)
    sizes, tokens = SampleSizes.of_sample(graph), min(context, CHUNK)
    largest: list[Term] = []
    for node in graph.nodes:
        read = [node, *node.all_input_nodes]
        if node.op == "call_function" and axes.block_of(axes.modules.get(node.name, "")) is not None:
            values = [(one, one.meta.get("val")) for one in read if one.op == "call_function"]
            floats = (one for one, value in values if isinstance(value, torch.Tensor) and value.is_floating_point())
            split = (_split_sizes(one, axes, sizes) for one in floats)
            terms = [Term(exprs, None, 4.0 * tokens) for exprs, each in split if each == TOKENS]
            largest = max(largest, terms, key=lambda found: sum(prod(e.size for e in term.exprs) for term in found))
    yield from largest


def _work(graph: fx.Graph, axes: AxisMap) -> Iterator[Term]:
    """MACs per sample: as many as are counted of each product, in proportion to its output and contracted sizes."""
    nodes, sizes = {tensor_name(node): node for node in graph.nodes}, SampleSizes.of_sample(graph)
    for node in graph.nodes:
        attends = _is_attention(node)
        if not (attends or values_of(node) is Values.PRODUCT) or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        block = axes.block_of(axes.modules.get(node.name, ""))
        exprs, each = _split_sizes(node, axes, sizes)
        if attends:
            each *= _number(sizes, node.args[1].meta["val"].shape[-2])
            yield Term(exprs, block, float(each))
            yield Term((*exprs[:-1], axes.tensors[tensor_name(node.args[0])][-1]), block, float(each))
            continue
        summed = [places[0] for places in apply_rule_alone(node)[1].sums.get(node.name, ()) if len(places) == 2]
        for place in summed:
            size = nodes[place.tensor].meta["val"].shape[place.dim]
            if is_free(size):
                each *= _number(sizes, size)
            else:
                exprs += (axes.tensors[place.tensor][place.dim],)
        if summed:
            try:  # torch knows the taps of a kernel
                counted = sizes.operations(node)
            except Exception:  # sizes that depend on data, or an op that cannot run on meta
                counted = 0
            yield Term(exprs, block, counted / 2 / prod(expr.size for expr in exprs) or float(each))


def _number(sizes: SampleSizes, size: int | torch.SymInt) -> int:
    """A size in one sample; one that depends on data counts as its tokens."""
    return TOKENS if size_hint(size) == UNKNOWN_SIZE else sizes.number(size)


def _cache(graph: fx.Graph, axes: AxisMap) -> Iterator[Term]:
    """Keys and values of a token, two bytes each, before heads are repeated."""
    sizes = SampleSizes.of_sample(graph)
    for node in graph.nodes:
        if not _is_attention(node):
            continue
        key, value = node.args[1], node.args[2]
        exprs, _ = _split_sizes(_smallest(value, axes), axes, sizes)
        block = axes.block_of(axes.modules.get(node.name, ""))
        yield Term(exprs, block, 2.0)
        width = axes.tensors[tensor_name(value)][-1]
        held = [factor for expr in exprs for factor in factors(expr) if factor not in set(factors(width))]
        yield Term((*held, axes.tensors[tensor_name(key)][-1]), block, 2.0)


def _is_attention(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.scaled_dot_product_attention.default


def _smallest(node: fx.Node, axes: AxisMap) -> fx.Node:
    """Return the first of the smallest values between the product with a weight and ``node``."""
    found = node
    while node.op == "call_function" and node.all_input_nodes and not any(consumers_at(node, axes)):
        node = node.all_input_nodes[0]
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.numel() <= found.meta["val"].numel():
            found = node
    return found


def _split_sizes(node: fx.Node, axes: AxisMap, sizes: SampleSizes) -> tuple[tuple[Expr, ...], int]:
    """The axes of a value with fixed sizes, and the product of the dynamic sizes for one sample."""
    value, exprs = node.meta["val"], axes.tensors[tensor_name(node)]
    fixed = tuple(expr for expr, size in zip(exprs, value.shape, strict=True) if not is_free(size))
    return fixed, prod(_number(sizes, size) for size in value.shape if is_free(size))
