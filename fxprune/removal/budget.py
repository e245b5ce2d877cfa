"""Cost of a model by its numbers of units: parameters, MACs, cache, bytes, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import fx

from fxprune.axes import Concat, Expr, Factor, factors
from fxprune.discovery.dependency import AxisMap
from fxprune.discovery.groups import Group, takes_parameter
from fxprune.errors import FxpruneError, PassError, UnknownNameError
from fxprune.graph.compat import is_free, size_hint
from fxprune.graph.facts import owner_block
from fxprune.graph.tensors import tensor_name
from fxprune.pipeline.arguments import one_of
from fxprune.rules.apply import run_alone
from fxprune.rules.registry import Values, find_rule

__all__ = [
    "BUDGETS",
    "PHASES",
    "Budget",
    "ParameterBudget",
    "Term",
    "Timing",
    "by_kind",
    "check_budget",
    "make_budget",
    "read_timing",
]

PHASES = ("prefill", "decode")
"""What is timed: reading a prompt, and giving one more token."""

_FORMS = "the table that `make bench` writes, or what `fxprune bench DENSE SLIM --json` prints"


@dataclass(frozen=True)
class Timing:
    """How long a model takes that has to do a share of the work of the dense one.

    That is ``seconds * (fixed + (1 - fixed) * share)``: what every call costs whatever the widths, and what goes with
    them.

    Args:
        seconds: of the dense model, in the first case measured.
        fixed: the part of them that no narrower model saves, 0 to 1.
        what: what was measured, in words.
    """

    seconds: float
    fixed: float
    what: str


def read_timing(phase: str, place: str) -> Timing:
    """Read how time follows work from models that were measured, the dense one and slim ones.

    Times and work are in units of the dense model's, case by case; the fixed part is what fits all of them best in the
    least squares sense.

    Args:
        phase: one of :data:`PHASES`.
        place: a JSON file, and behind a colon the engine where the file tells of several.

    Raises:
        FxpruneError: no such file, or no such table in it; or no slim model in it, without which there is no telling.
        UnknownNameError: it tells of other engines, or of several and none is named.
    """
    path, engine = _parts(place)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error}"
        raise FxpruneError(what, where=str(path), remedy=f"Name {_FORMS}") from error
    if not isinstance(table, Mapping):
        raise FxpruneError("it holds no measurements", where=str(path), remedy=f"Name {_FORMS}")
    try:
        rows = list(_of_bench(table, phase, engine) if "rows" in table else _of_command(table, phase))
    except UnknownNameError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FxpruneError("it holds no measurements", where=str(path), remedy=f"Name {_FORMS}") from error
    slim = [(1 - work, 1 - time) for work, time, _ in rows if work < 1]
    if not slim:
        raise FxpruneError(
            f"there is no slim model with a {phase} time in it: how time follows work cannot be told",
            where=str(path),
            remedy="Measure the dense model and one that was pruned by any recipe",
        )
    slope = sum(work * time for work, time in slim) / sum(work * work for work, _ in slim)
    dense = next((seconds for work, _, seconds in rows if work == 1), rows[0][2])
    return Timing(dense, 1 - min(max(slope, 0.0), 1.0), f"{phase} time{f' in {engine}' if engine else ''}")


def _parts(place: str) -> tuple[Path, str]:
    """The file, and the engine if one is named; a colon may be part of the file's own name."""
    whole = Path(place)
    if whole.is_file() or ":" not in place:
        return whole, ""
    path, _, engine = place.rpartition(":")
    return Path(path), engine.strip()


def _of_bench(table: Mapping[str, Any], phase: str, engine: str) -> Iterator[tuple[float, float, float]]:
    """Shares of work and of time, and seconds, of each row of a phase."""
    rows = [row for row in table["rows"] if row["case"]["phase"] == phase]
    engines = sorted({row["engine"] for row in rows})
    if engine not in engines and (engine or len(engines) > 1):
        raise UnknownNameError("engine", engine, engines)
    rows = [row for row in rows if row["engine"] == (engine or row["engine"])]
    dense = {str(row["case"]): row["seconds"] for row in rows if row["candidate"] == "dense"}
    for row in rows:
        yield 1 / row["ideal"], row["seconds"] / dense[str(row["case"])], row["seconds"]


def _of_command(table: Mapping[str, Any], phase: str) -> Iterator[tuple[float, float, float]]:
    """The same of models side by side, the dense one first; work is taken to go with the parameters."""
    models = list(table.values())
    for model in models:
        seconds, first = model[f"{phase}_ms"] / 1000, models[0][f"{phase}_ms"] / 1000
        yield model["parameters"] / models[0]["parameters"], seconds / first, seconds


BUDGETS = ("params", "macs", "kv")
"""What may be counted, beside ``bytes@`` with the name of a quantisation, and ``prefill@`` or ``decode@`` with a table
of measured times."""

_BYTES = "bytes@"
_TOKENS = 64
"""The length of a sample whose work is counted, as in the report."""

Counts = Mapping[Factor, float]


class Term(NamedTuple):
    """A part of what a model costs: a number times the sizes of some axes.

    Args:
        exprs: the axes.
        block: the block it goes with; None if it stays.
        each: what one element costs.
    """

    exprs: tuple[Expr, ...]
    block: str | None
    each: float


class Budget:
    """What a model costs as a function of unit counts.

    The cost is a polynomial: the sum of the products of the sizes of axes. Fractional counts are allowed, so that a
    ratio can be solved for before it is rounded.

    Args:
        terms: the parts.
        word: what is counted, in words.
    """

    def __init__(self, terms: Iterable[Term], word: str) -> None:
        self.word = word
        self._terms: list[tuple[Term, frozenset[Factor], float]] = []
        for term in terms:
            touched = frozenset(factor for expr in term.exprs for factor in factors(expr))
            self._terms.append((term, touched, term.each * prod(expr.size for expr in term.exprs)))
        self.total = int(sum(size for *_, size in self._terms))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parts."""
        return tuple(term for term, *_ in self._terms)

    def removed(self, counts: Counts, blocks: Mapping[str, float]) -> float:
        """What goes.

        Args:
            counts: units left of each factor that shrinks.
            blocks: for each block that goes, the fraction of it that goes (1, or less while solving).
        """
        gone = 0.0
        for term, touched, size in self._terms:
            share = blocks.get(term.block, 0.0) if term.block is not None else 0.0
            if share == 0.0 and touched.isdisjoint(counts):
                continue
            gone += size - term.each * prod(_size(expr, counts) for expr in term.exprs) * (1 - share)
        return gone


class ParameterBudget(Budget):
    """The number of parameters of a model; tied ones count once."""

    def __init__(self, axes: AxisMap) -> None:
        super().__init__(_weights(axes, lambda _: 1.0), "parameters")


def check_budget(name: str) -> str:
    """Return ``name``, which is one of :data:`BUDGETS`, ``bytes@`` and a quantisation, or a phase, ``@`` and a table.

    Raises:
        UnknownNameError: no such budget or quantisation, or no such engine in the table.
        FxpruneError: there is no table of times at that place.
    """
    if _timed(str(name)):
        read_timing(*_timed(name))
        return name
    if str(name).startswith(_BYTES):
        one_of("quantisation", name.removeprefix(_BYTES), [kind.name.lower() for kind in gguf.GGML_QUANT_SIZES])
        return name
    return one_of("budget", name, (*BUDGETS, f"{_BYTES}q8_0"))


def make_budget(name: str, graph_module: fx.GraphModule, axes: AxisMap) -> Budget:
    """Return what is counted, as a function of unit counts.

    Args:
        name: ``params``, ``macs`` of a sample of 64 tokens, bytes of key-value cache a token as ``kv``, or bytes on
            disk as ``bytes@q8_0``: weights of two and more axes at that quantisation, others in float32; or time, as
            ``decode@times.json`` or ``prefill@times.json:onnxruntime``, by models that were measured: it goes with
            the weights in decoding, with the multiply-accumulates in prefill, beside a part that stays.
        graph_module: the graph.
        axes: its solved axes.

    Raises:
        PassError: there is nothing to count.
    """
    if name == "macs":
        found = Budget(_work(graph_module.graph, axes), "multiply-accumulates")
    elif name == "kv":
        found = Budget(_cache(graph_module.graph, axes), "bytes of the key-value cache")
    elif _timed(name):
        work = _work(graph_module.graph, axes) if name.startswith(PHASES[0]) else _weights(axes, lambda _: 1.0)
        found = _time_budget(Budget(work, "work"), read_timing(*_timed(name)))
    elif name.startswith(_BYTES):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.removeprefix(_BYTES).upper()]]
        found = Budget(_weights(axes, lambda exprs: size / block if len(exprs) > 1 else 4.0), "bytes")
    else:
        found = ParameterBudget(axes)
    if not found.total:
        raise PassError(f"the model has no {found.word}", where="budget", remedy="Choose another budget")
    return found


def _timed(name: str) -> tuple[str, ...]:
    """The phase and the place of its table; empty if another budget is named."""
    phase, at, place = name.partition("@")
    return (phase, place) if at and phase in PHASES else ()


def _time_budget(work: Budget, timing: Timing) -> Budget:
    """Microseconds, in place of work: a part that stays, and one that goes with the work."""
    microseconds = timing.seconds * 1e6
    each = microseconds * (1 - timing.fixed) / max(work.total, 1)
    terms = [Term(term.exprs, term.block, term.each * each) for term in work.terms]
    return Budget([Term((), None, microseconds * timing.fixed), *terms], f"microseconds of {timing.what}")


def by_kind(budget: Budget, groups: Sequence[Group]) -> dict[str, float]:
    """Return what the structures of each kind cost: what would go with all of its ``groups``."""
    found: dict[str, float] = {}
    for kind in {group.kind for group in groups}:
        alike = [group for group in groups if group.kind == kind]
        counts = {group.factor: 0.0 for group in alike if group.factor is not None}
        blocks = {group.block: 1.0 for group in alike if group.factor is None and group.block is not None}
        found[kind] = budget.removed(counts, blocks)
    return found


def _size(expr: Expr, counts: Counts) -> float:
    if isinstance(expr, Factor):
        return counts.get(expr, expr.size)
    sizes = [_size(part, counts) for part in expr.parts]
    return sum(sizes) if isinstance(expr, Concat) else prod(sizes)


def _weights(axes: AxisMap, each: Callable[[tuple[Expr, ...]], float]) -> Iterator[Term]:
    for name in axes.parameters:
        if name not in axes.tied:
            exprs = axes.tensors[name]
            yield Term(exprs, owner_block(name, axes.blocks), each(exprs))


def _work(graph: fx.Graph, axes: AxisMap) -> Iterator[Term]:
    """The products of a sample: sizes of each output, times those of what is added up over."""
    nodes, traced = {tensor_name(node): node for node in graph.nodes}, _traced(graph)
    for node in graph.nodes:
        rule = find_rule(node.target) if node.op == "call_function" else None
        if rule is None or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        block = owner_block(axes.modules.get(node.name, ""), axes.blocks)
        exprs, tokens = _own(node, axes, traced)
        if _is_attention(node):
            yield Term(exprs, block, tokens * _TOKENS)
            yield Term((*exprs[:-1], axes.tensors[tensor_name(node.args[0])][-1]), block, tokens * _TOKENS)
            continue
        for found in run_alone(node)[1].sums if rule.values is Values.PRODUCT else ():
            if len(found.places) == 2:
                place = found.places[0]
                free = is_free(nodes[place.tensor].meta["val"].shape[place.dim])
                own = () if free else (axes.tensors[place.tensor][place.dim],)
                yield Term((*exprs, *own), block, tokens * (_TOKENS if free else 1))


def _cache(graph: fx.Graph, axes: AxisMap) -> Iterator[Term]:
    """Keys and values of a token, two bytes a number, before heads are repeated."""
    for node in graph.nodes:
        if not _is_attention(node):
            continue
        key, value = node.args[1], node.args[2]
        stored = _smallest(value, axes)
        exprs, _ = _own(stored, axes, (1, 1))
        block = owner_block(axes.modules.get(node.name, ""), axes.blocks)
        yield Term(exprs, block, 2.0)
        width = axes.tensors[tensor_name(value)][-1]
        held = [factor for expr in exprs for factor in factors(expr) if factor not in set(factors(width))]
        yield Term((*held, axes.tensors[tensor_name(key)][-1]), block, 2.0)


def _is_attention(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.scaled_dot_product_attention.default


def _smallest(node: fx.Node, axes: AxisMap) -> fx.Node:
    """Return the first value with the fewest numbers on the way from a product with a weight to ``node``."""
    found = node
    while node.op == "call_function" and node.all_input_nodes and not takes_parameter(node, axes):
        node = node.all_input_nodes[0]
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.numel() <= found.meta["val"].numel():
            found = node
    return found


def _own(node: fx.Node, axes: AxisMap, traced: tuple[int, int]) -> tuple[tuple[Expr, ...], float]:
    """The axes of a value that are the model's own, and the size of the others for one sample."""
    value, exprs = node.meta["val"], axes.tensors[tensor_name(node)]
    own = tuple(expr for expr, size in zip(exprs, value.shape, strict=True) if not is_free(size))
    return own, prod(_of_sample(size_hint(size), traced) for size in value.shape if is_free(size))


def _of_sample(size: int, traced: tuple[int, int]) -> float:
    """A size that varies, for one sample: of a batch, of tokens, or of both in one axis."""
    batch, tokens = traced
    if size == batch:
        return 1.0
    return size / (batch * tokens if size % (batch * tokens) == 0 else tokens) * _TOKENS


def _traced(graph: fx.Graph) -> tuple[int, int]:
    """The numbers of samples and of tokens that the graph was traced with."""
    shapes = [node.meta["val"].shape for node in graph.nodes if node.op == "placeholder" and "val" in node.meta]
    return next(((size_hint(shape[0]), size_hint(shape[1])) for shape in shapes if len(shape) > 1), (1, _TOKENS))
