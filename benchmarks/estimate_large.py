"""Cost estimates of pruning very large models, for one of many processes: bytes read, sent and held, and hours.

`python -m benchmarks.estimate_large`: the passes of a recipe up to tuning run with all layers at their true widths on
`meta`, as one of 8 or 64 processes of torch's fake process group, with weights in files. Nothing is computed, and what
values decide is stood in for: scores are random, nothing fails, each measurement is better than the last, other
processes gather what this one does, and every expert gets the same number of tokens. The second step of tuning
and its first measurement count for all after them. Of each pass are counted:

- *calls* of collectives, and a digest of the *order* of their kinds and sizes, the same in all processes;
- *read*: bytes that ops take from weights in files;
- *sent*: bytes that leave the process on a ring: of an all-reduce of `n` processes, `2 (n - 1) / n` times its own;
- *held*: the most bytes of tensors in memory; and *aside*, of values in files, such as those between parts;
- hours that *link* and *disk* take for these; and *on cards*, op by op, for the longer of its operations (torch's
  `flop_registry`) and its bytes. Nothing overlaps. torch's `RuntimeEstimator` needs a card, and halves the operations.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle, islice, pairwise
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3MoeConfig

import fxprune
from benchmarks.common import SHAPES
from benchmarks.several_processes import COLLECTIVES, counted
from fxprune.graph import tensors
from fxprune.offload import files, prefetch, ranks
from fxprune.offload.prefetch import GatheringPrefetcher, offer_prefetcher
from fxprune.rules import picked

aten = torch.ops.aten
META = torch.device("meta")

_PLACES = "prepare", "compensate.fits", "importance.base", "select.base", "select.ratio", "shrink.shrink", "tune.tune"
prepare, fits, scores, select, ratio, shrink, tune = (
    importlib.import_module(f"fxprune.passes.{name}") for name in _PLACES
)

CARDS: dict[str, dict[Any, float]] = {
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12, "memory": 3.35e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float32: 82.6e12, torch.float64: 1.29e12, "memory": 1.008e12},
}
"""Dense operations a second by dtype, and bytes a second of the memory, by NVIDIA's data sheets (H100 SXM)."""

CARD_MEMORY = 80e9
"""Bytes of memory of an H100, by which passes choose their parts."""

LINKS = {8: 450e9, math.inf: 50e9}
"""Bytes a second that leave a card, by the most processes: NVLink in a machine, else 400 Gb/s of InfiniBand a card."""

DISK = 3e9
"""Bytes a second that a process reads from files."""

QWEN: dict[str, Any] = {
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}
QWEN |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "70b": SHAPES["70b"].config,
    "405b": SHAPES["405b"].config,
    "qwen3-235b": lambda: Qwen3MoeConfig(**QWEN, tie_word_embeddings=False),
}

_NO_ANSWER: Any = object()


@dataclass(frozen=True)
class Cost:
    """Cost of a pass: peak bytes in memory and in files, a digest of the order of collectives, and other totals."""

    name: str
    order: str
    held: float
    aside: float
    sums: Any

    @property
    def calls(self) -> dict[str, int]:
        return {name: int(self.sums[name]) for name in COLLECTIVES}


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _spec(value: Any) -> Any:
    """Cache key of an argument of an op on ``meta``: shape, strides, dtype and device of a tensor, else its value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_spec, value)) if isinstance(value, list | tuple) else (type(value), value)


def _has_hash(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _kind_of(func: Any) -> str:
    """Whether an op gives a view, asks for values, writes in place or elsewhere, or makes a tensor like another one."""
    asks = (aten._local_scalar_dense, aten.equal, aten._to_copy)
    if func._overloadpacket in asks or func in (aten.any.default, aten.index.Tensor):
        return "asks"
    name, aliases = func._schema.name, [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    if aliases and any(alias.is_write for alias in aliases):
        return "in place" if name.endswith("_") else "writes"
    return "view" if aliases or func.namespace == "c10d" else "new" if "::new_" in name or "_like" in name else "other"


class Meter(TorchDispatchMode):
    """Dispatch mode that counts the cost of ops on ``meta``, and answers for values that are not there."""

    def __init__(self, processes: int, sustained: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.processes, self.sustained = processes, sustained
        self.log = list[tuple[str, int]]()
        self.sums: Any = Counter()
        """Calls, bytes and seconds; a counter whose values need not be whole."""
        self.held, self.peak = Counter[str](), Counter[str]()
        self.answers, self.paused, self.writes = 0, False, False
        self.pieces: Sequence[Any] = ()
        self.in_files = dict[int, str]()
        """By address of a storage in files, whether it has weights or values."""
        self.kinds, self.known = dict[int, str](), dict[Any, tuple[Any, tuple[float, ...]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = self.kinds.get(id(func)) or self.kinds.setdefault(id(func), _kind_of(func))
        if kind == "view":
            return func(*args, **kwargs)
        given = _tensors((*args, *kwargs.values()))
        if kind == "asks" and any(tensor.is_meta for tensor in given):
            answer = self._answered(func, args, kwargs)
            if answer is not _NO_ANSWER:
                return answer
        key = (id(func), _spec(args), _spec((*kwargs.items(),)))
        if self.paused or not _has_hash(key):  # as symbolic sizes of a pass that infers shapes have not
            return func(*args, **kwargs)
        return self._run(key, kind, func, args, kwargs, [] if kind == "new" else given)

    def _run(self, key: Any, kind: str, func: Any, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> Any:
        """Run an op, or repeat its result for the same key, and count its cost."""
        out, cost = self.known.get(key, (None, None))
        if kind == "in place" and all(tensor.is_meta for tensor in given):
            found = args[0] if func._schema.returns else None
        else:
            found = func(*args, **kwargs) if out is None else torch.empty_strided(*out[:2], dtype=out[2], device=META)
        made = [] if kind in ("in place", "writes") else [tensor for tensor in _tensors((found,)) if tensor.is_meta]
        if cost is None:
            there = any(tensor.is_meta for tensor in (*made, *given))
            cost = self._seconds(func, args, kwargs, found, [*given, *made]) if there else (0.0,) * len(CARDS)
            self.known[key] = _spec(found) if made and isinstance(found, torch.Tensor) else None, cost
        for name, seconds in zip(CARDS, cost, strict=True):
            self.sums[name] += seconds
        for tensor in given:
            if self.in_files.get(tensor.untyped_storage()._cdata) == "weights":
                rows = func._overloadpacket in (aten.index, aten.index_select, aten.embedding)  # reads these alone
                self.sums["read"] += min(tensor.nbytes, made[0].nbytes) if rows and made else tensor.nbytes
        for tensor in made:
            self._hold(tensor)
        return found

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Stand-in for a result that depends on values, or that would leave ``meta``."""
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else self.answer() if kind.is_floating_point else 1
        if func is aten._to_copy.default and kwargs.get("device", META) != META:
            return func(*args, **{**kwargs, "device": META})
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            rows, mask = args[0], args[1][0]  # of a mask and of its complement, half the rows each
            found = rows.new_empty(max(1, mask.numel() // 2), *rows.shape[mask.dim() :], device=META)
            self._hold(found)
            return found
        return {aten.equal.default: True, aten.any.default: torch.tensor(False)}.get(func, _NO_ANSWER)

    def answer(self) -> float:
        """A measurement: near 0, and less than all before."""
        self.answers += 1
        return -1e-9 * self.answers

    def _seconds(self, func: Any, args: Any, kwargs: Any, found: Any, used: list[torch.Tensor]) -> tuple[float, ...]:
        """Seconds of an op, by card."""
        moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in used)
        done, packet = 0.0, func._overloadpacket
        if packet in flop_registry:
            done = flop_registry[packet](*args, **kwargs, out_val=found)
        elif packet is aten.linalg_cholesky_ex:
            done = args[0].shape[-1] ** 3 / 3
        elif packet is aten.cholesky_solve:
            done = 2.0 * args[0].numel() * args[1].shape[-1]
        speeds = ((self.sustained * card.get(used[0].dtype, math.inf), card["memory"]) for card in CARDS.values())
        return tuple(max(done / fast, moved / memory) for fast, memory in speeds)

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size, place = storage.nbytes(), storage._cdata
        kind = self.in_files.get(place, "memory")
        self.held[kind] += size
        self.peak[kind] = max(self.peak[kind], self.held[kind])
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self.held[self.in_files.pop(place, "memory")] -= size

    def offload(self, tensor: torch.Tensor, own: slice | None = None) -> torch.Tensor:
        """Stand-in for a tensor in a file; ``own`` elements of it are those of trained weights."""
        if not tensor.is_meta or tensor.nbytes < files.SMALLEST:
            return tensor
        self.paused = True
        mapped = torch.empty_like(tensor)
        self.paused = False
        self.in_files[mapped.untyped_storage()._cdata] = "values" if own is None and not self.writes else "weights"
        self._hold(mapped)
        return mapped

    def note(self, kind: str, size: int) -> None:
        """A collective that is given ``size`` bytes."""
        others = self.processes - 1
        times = 2 * others / self.processes if kind == "all_reduce" else 1 if "broadcast" in kind else others
        self.sums.update({kind: 1, "sent": size * times})
        self.log.append((kind, 0 if "object" in kind else size))

    def repeated(self, true: Callable[..., Any], result: Callable[[], Any], times: int) -> Callable[..., Any]:
        """A function that runs a number of times, and after that counts as it did the last time."""
        runs: list[tuple[Any, list[tuple[str, int]]]] = []

        def call(*args: Any) -> Any:
            if len(runs) == times:
                self.sums.update(runs[-1][0])
                self.log += runs[-1][1]
                return result()
            before, begin = self.sums.copy(), len(self.log)
            found = true(*args)
            runs.append((_difference(before, self.sums), self.log[begin:]))
            return found

        return call

    def measured(self, true: Callable[..., Any], *args: Any) -> Callable[[Any], float]:
        """Measurements of widths, each above the last: the first share that is tried is no better than none."""
        measure, numbers = true(*args), count()

        def call(removal: Any) -> float:
            measure(removal)
            return float(next(numbers))

        return call

    def during(self, state: str, true: Callable[..., Any]) -> Callable[..., Any]:
        """A function while which the meter is ``paused``, as values are at hand, or ``writes`` weights to files."""

        def call(*args: Any) -> Any:
            setattr(self, state, True)
            found = true(*args)
            setattr(self, state, False)
            return found

        return call

    def dealt(self, true: Callable[..., Any], pieces: Sequence[Any]) -> Any:
        """This process's pieces, as always; all are remembered until the results are gathered."""
        self.pieces = pieces
        return true(pieces)

    def gathered(self, true: Callable[..., Any], mine: Sequence[Any]) -> list[Any]:
        """Results of this process in place of those of others."""
        true(mine)
        pairs = zip(islice(cycle(mine), len(self.pieces)), self.pieces, strict=False)
        return [
            list(islice(cycle(one), len(piece))) if isinstance(one, list) and isinstance(piece, list | tuple) else one
            for one, piece in pairs
        ]

    def stands_in(self, experts: int) -> ExitStack:
        """A context in which passes run on ``meta`` as if there were values; of experts in one tensor, so many."""
        stack = ExitStack()
        others: dict[Any, Any] = {
            files.offloaded: self.offload,
            prefetch.free_bytes: lambda _: CARD_MEMORY,
            files.write_values: self.during("writes", files.write_values),
            tensors.has_meta_weights: lambda _: False,
            ranks.deal: partial(self.dealt, ranks.deal),
            ranks.gathered: partial(self.gathered, ranks.gathered),
        }
        patches = list[tuple[Any, str, Any]]()
        for true, other in others.items():
            name = str(true.__name__)
            patches += [(module, name, other) for module in [*sys.modules.values()] if vars(module).get(name) is true]
        as_array, call, empty = torch.Tensor.numpy, fx.Interpreter.call_function, fx.GraphModule({}, fx.Graph())
        patches += [
            (shrink, "offloaded", self.during("writes", self.offload)),
            (scores, "check_positions", lambda *_: None),
            (scores, "score_groups", lambda groups, *_: scores.RandomImportancePass().score(empty, groups)),
            (torch, "autocast", lambda *_, **__: nullcontext()),  # weights in bfloat16 keep their precision
            (torch.Tensor, "numpy", lambda t: np.zeros(t.shape) if t.is_meta else as_array(t)),
            (fx.Interpreter, "call_function", lambda run, *given: _call_function(call, run, *given)),
            (ranks, "_waiting_group", lambda: None),
            (select, "inexpressible", self.during("paused", select.inexpressible)),
            (ratio, "divergence_by_removal", partial(self.measured, ratio.divergence_by_removal)),
            (fits, "_stacked_data", _even_data),
            (picked, "_is_large", lambda weight, index: index.numel() * weight[0].nbytes >= picked._LARGE),
            (picked, "_rows_by_number", lambda index: _even_rows(index, experts)),
            (prepare, "can_generate", lambda _: False),
            (tune, "free_disk", lambda: math.inf),
            (tune.Training, "_step", self.repeated(tune.Training._step, lambda: None, 2)),
            (tune.Training, "_measure", self.repeated(tune.Training._measure, self.answer, 1)),
            (dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine] * len(found))),
            (dist, "broadcast_object_list", lambda *_, **__: None),
        ]
        with stack:  # none stays if a name is gone
            for place, name, other in patches:
                stack.enter_context(mock.patch.object(place, name, other))
            for name in COLLECTIVES:
                stack.enter_context(mock.patch.object(dist, name, counted(name, self.note)))
            return stack.pop_all()


def _even_data(site: Any, run: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs and targets of each expert's fit, with the tokens dealt evenly."""
    product = site.product
    count = product.weight.meta["val"].shape[product.order[0]]
    x = torch.cat([one.env[product.source].permute(product.source_order).flatten(0, -2) for one in run.masked])
    y = torch.cat([one.env[product.node].permute(product.out_order).flatten(0, -2) for one in run.dense])
    rows = max(1, len(x) // count)
    for matrix in range(count):
        yield matrix, x[:rows, site.channels_of(matrix)], y[:rows], torch.arange(rows) >= rows * 3 // 4


def _even_rows(index: torch.Tensor, experts: int) -> tuple[list[int], tuple[torch.Tensor, ...]]:
    """Numbers of experts and the rows of each, with the rows dealt evenly."""
    rows = torch.empty_like(index).tensor_split(min(experts, len(index)))
    return list(range(len(rows))), rows


def _call_function(true: Callable[..., Any], run: Any, target: Any, args: Any, kwargs: Any) -> Any:
    """Run an op; attention as on a card, where its matrix is never in memory."""
    if target is not aten.scaled_dot_product_attention.default:
        return true(run, target, args, kwargs)
    (q, k, v, mask), scale = (*args, None)[:4], kwargs.get("scale")
    bias = None if mask is None else mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), scale=scale)[0]


def _difference(before: Any, after: Any) -> Any:
    return Counter({name: value - before[name] for name, value in after.items()})


def trace_empty(config: PretrainedConfig) -> fx.GraphModule:
    """The graph of a model of this config in bfloat16, without weights."""
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return fxprune.trace(model).graph_module


def count_passes(
    graph_module: fx.GraphModule, recipe: str, processes: int, ids: torch.Tensor, sustained: float = 0.4, rank: int = 0
) -> list[Cost]:
    """The cost of each pass of a recipe up to tuning, in one of several processes."""
    passes = fxprune.prune_pipeline(ids, recipe=recipe, ratio=0.2).passes
    meter, seen = Meter(processes, sustained), list[tuple[str, Any, int, Counter[str]]]()

    def mark(step: Any) -> None:
        seen.append((step.name if step else "", meter.sums.copy(), len(meter.log), meter.peak))
        meter.peak = meter.held.copy()

    pipeline = fxprune.Pipeline([p for p in passes if p.stage not in ("emit", "report")], on_pass=mark)
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        experts = max((len(weight) for _, weight in tensors.weights(graph_module) if weight.dim() == 3), default=1)
        with tempfile.TemporaryDirectory() as place, meter.stands_in(experts), files.offload_to(Path(place)):
            meter.in_files |= {w.untyped_storage()._cdata: "weights" for _, w in tensors.weights(graph_module)}
            with offer_prefetcher(GatheringPrefetcher(META)), meter:
                pipeline(graph_module)
                mark(None)
    finally:
        dist.destroy_process_group()
    return [
        Cost(name, _digest(meter.log[begin:end]), peak["memory"], peak["values"], _difference(before, after))
        for (name, before, begin, _), (_, after, end, peak) in pairwise(seen)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def sum_of(costs: Sequence[Cost]) -> Cost:
    """The cost of all passes."""
    sums: Any = sum((cost.sums for cost in costs), Counter())
    held, aside = (max(sizes) for sizes in zip(*((cost.held, cost.aside) for cost in costs), strict=True))
    return Cost("together", _digest([cost.order for cost in costs]), held, aside, sums)


def main(
    models: Annotated[str, typer.Option(help=f"Which of {','.join(MODELS)}, separated by commas.")] = ",".join(MODELS),
    processes: Annotated[str, typer.Option(help="Numbers of processes; the first alone for a mixture.")] = "8,64",
    layers: Annotated[int, typer.Option(help="Layers, 0 for all.")] = 0,
    recipe: Annotated[str, typer.Option(help="The recipe.")] = "balanced",
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 576,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 2048,
    sustained: Annotated[float, typer.Option(help="Fraction of a card's operations that is sustained.")] = 0.4,
    rank: Annotated[int, typer.Option(help="Which of the processes.")] = 0,
) -> None:
    """Estimate the cost of pruning very large models for one of several processes."""
    unknown = set(models.split(",")) - set(MODELS)
    if unknown:
        raise typer.BadParameter(f"no such model: {', '.join(sorted(unknown))}", param_hint="--models")
    ids, numbers = torch.zeros(samples, tokens, dtype=torch.long), [int(number) for number in processes.split(",")]
    for name in models.split(","):
        config = MODELS[name]()
        config.num_hidden_layers = layers or config.num_hidden_layers
        graph_module = trace_empty(config)
        whole = sum(weight.nbytes for _, weight in tensors.weights(graph_module)) / 1e9
        for number in numbers[:1] if hasattr(config, "num_experts") else numbers:
            costs = count_passes(graph_module, recipe, number, ids, sustained, rank)
            table = Table("pass", title=f"{name}, {whole:,.0f} GB of weights, {number} processes", box=SIMPLE)
            for heading in ("calls", "order", "GB read", "sent", "held", "aside", "link h", "disk h", *CARDS):
                table.add_column(heading, justify="right")
            speed = next(speed for most, speed in LINKS.items() if number <= most)
            for cost in [*costs, sum_of(costs)]:
                sums = cost.sums
                sizes = (f"{size / 1e9:,.1f}" for size in (sums["read"], sums["sent"], cost.held, cost.aside))
                times = (sums["sent"] / speed, sums["read"] / DISK, *(sums[card] for card in CARDS))
                hours = (f"{seconds / 3600:.2f}" for seconds in times)
                table.add_row(cost.name, f"{sum(cost.calls.values()):,}", cost.order, *sizes, *hours)
            Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
