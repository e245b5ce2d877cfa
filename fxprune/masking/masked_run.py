"""Interpreters that run a graph dense, masked or gated; weights are read, cast and masked one at a time.

A statistic over a masked axis (a norm over fewer channels) is taken over the kept units, the only place where masking
is more than zeroing; a top-k never chooses removed experts. Norms with ``norm="masked"`` see the zeros; in half
precision their weights are read as the slim graph will have them, scaled for the missing units and then rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import fx

from fxprune.axes import UNIT, Expr, Factor, Keep, Product, concat, factors, kept_mask, kept_size, product, weight_mask
from fxprune.discovery.groups import Consumer
from fxprune.graph.tensors import map_tensors, masked, output_name, tensor_name, tensors_of, with_argument
from fxprune.offload.prefetch import current_prefetcher
from fxprune.removal.removal import Removal
from fxprune.rules.picked import PickingRun
from fxprune.rules.registry import written_sources


class UntouchedRun(PickingRun):
    """An interpreter that leaves weights and inputs unchanged: ops that write to them get copies."""

    def __init__(self, graph_module: fx.GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(graph_module, garbage_collect_values=garbage_collect_values)
        self.written = written_sources(graph_module.graph)
        self._copies: dict[str, Any] = {}
        prefetcher = current_prefetcher()
        self._prefetcher = None if prefetcher is None or prefetcher.gathers else prefetcher
        self._next_weight: dict[str, str] = {}
        if prefetcher is not None:
            read = list(dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"))
            self._next_weight = dict(itertools.pairwise(read))

    def in_step(self) -> Self:
        """Read weights together with the other processes, all of which make this run, over the same nodes."""
        self._prefetcher = current_prefetcher()
        return self

    def run_nodes(
        self, inputs: Iterable[Any], visit: Callable[[fx.Node, Any], Any], until: fx.Node | None = None
    ) -> Any:
        """Run node by node, up to ``until``, and return the last value; values are freed after their last use.

        ``visit`` is called with each node and its value, and returns the value that the run continues with. An error of
        an op names its node, as in ``run``.
        """
        self.args_iter = iter(inputs)
        value = None
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            try:
                found = self.run_node(node)
            except Exception as error:  # any of an op, which is raised again
                error.args = (f"{next(iter(error.args), '')}\n\nWhile executing {node.format_node()}", *error.args[1:])
                raise
            value = self.env[node] = visit(node, found)
            for used in self.user_to_last_uses.get(node, ()):
                del self.env[used]
            if node is until:
                break
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._copied(str(target), super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight, or a copy of it, the same at every place, if an op writes to it."""
        return self._copied(str(target), self.read(str(target)))

    def read(self, name: str) -> Any:
        """Return a weight on the device that the graph runs on, and start copying the next one there."""
        value = self.fetch_attr(name)
        if self._prefetcher is None or not isinstance(value, torch.Tensor):
            return value
        (there,) = self._prefetcher.fetch([value])
        following = self._next_weight.pop(name, None)  # a weight that is read again comes in no known order
        if following is not None:
            self._prefetcher.prefetch([self.fetch_attr(following)])
        return there

    def keep_until(self, value: fx.Node, user: fx.Node) -> None:
        last = next((node for node, freed in self.user_to_last_uses.items() if value in freed), None)
        if last is not None and last < user:
            self.user_to_last_uses[last].remove(value)
            self.user_to_last_uses.setdefault(user, []).append(value)

    def _copied(self, name: str, value: Any) -> Any:
        if name not in self.written:
            return value
        if name not in self._copies:
            self._copies[name] = map_tensors(value, torch.clone)
        return self._copies[name]


_NARROW = (torch.bfloat16, torch.float16)


class TrainingRun(UntouchedRun):
    """An interpreter for runs whose gradients are due: on a CPU attention is in float32.

    Its gradient takes twice as long there in bfloat16.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        attention = target is torch.ops.aten.scaled_dot_product_attention.default and args[0].device.type == "cpu"
        if not (attention and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().call_function(target, args, kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = map_tensors((args, kwargs), at_least_float32)
            return super().call_function(target, *wide).to(args[0].dtype)


class PreciseRun(UntouchedRun):
    """An interpreter that runs a graph in at least float32, whatever the dtypes of its weights and casts."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return map_tensors(super().placeholder(target, args, kwargs), at_least_float32)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return at_least_float32(value) if isinstance(value, torch.Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an op, with float32 for a narrower dtype among its arguments."""

        def widened(value: Any) -> Any:
            return torch.float32 if isinstance(value, torch.dtype) and value in _NARROW else value

        args, kwargs = fx.node.map_aggregate((args, kwargs), widened)
        return super().call_function(target, args, kwargs)


def at_least_float32(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of bfloat16 or float16 in float32, any other as it is."""
    return value.float() if value.dtype in _NARROW else value


class MaskedRun(PreciseRun):
    """An interpreter that runs the dense graph with removed units zeroed and removed blocks bypassed."""

    def __init__(self, graph_module: fx.GraphModule, removal: Removal, garbage_collect_values: bool = True) -> None:
        super().__init__(graph_module, garbage_collect_values=garbage_collect_values)
        self.axes, self.keep = axes, keep = removal.axes, removal.keep
        self.bypassed = {axes.bypasses[b].target: axes.bypasses[b].source for b in removal.removed_blocks}
        self.nodes = {node.name: node for node in graph_module.graph.nodes}
        self.constants = frozenset(axes.constants)
        self.sizes: dict[Factor, int] = {}
        self.statistics: dict[str, Keep] = {}
        for factor, nodes in axes.renormalised.items():
            for name in nodes if keep.touches(factor) else ():
                units = {**self.statistics.get(name, Keep()).units, factor: keep.units[factor]}
                self.statistics[name] = Keep(units)
        self.scaled = removal.scaled
        for target, source in self.bypassed.items() if garbage_collect_values else ():
            self.keep_until(self.nodes[source], self.nodes[target])  # the target's value is the source's

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an input, and note the sizes of its axes in this run: they may differ from the traced ones."""
        value = super().placeholder(target, args, kwargs)
        if isinstance(value, torch.Tensor):
            for expr, size in zip(self.axes.tensors.get(str(target), ()), value.shape, strict=False):
                found = set(factors(expr))
                if len(found) == 1:  # of several, the sizes of other axes tell more
                    solved = _solved(expr, found.pop(), size, Keep(), {})
                    self.sizes |= solved if _fits(expr, solved, size, Keep()) else {}
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight with the removed slices set to zero; constants of the code stay as they are."""
        value = super().get_attr(target, args, kwargs)
        if str(target) in self.constants:
            return value
        scaling = self.scaled.get(self.axes.tied.get(str(target), str(target)))
        if scaling is not None:
            stored = self.fetch_attr(str(target))
            value = scaling.rounded(stored).to(value.device, value.dtype) if stored.dtype in _NARROW else value
        return masked_weight(value, self.axes.tensors.get(str(target), ()), self.keep)

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of ``n``: the input of a bypassed block, a statistic over the kept units only."""
        if n.name in self.bypassed:
            return self.env[self.nodes[self.bypassed[n.name]]]
        if n.name in self.statistics:
            return self._run_on_kept(n, self.statistics[n.name])
        return super().run_node(n)

    def _run_on_kept(self, node: fx.Node, keep: Keep) -> Any:
        """Run ``node`` on the kept units of the axes it takes statistics over, with zeros elsewhere."""
        args = fx.map_arg(
            (node.args, node.kwargs), lambda source: self._moved(self.env[source], tensor_name(source), keep, True)
        )
        for literal in self.axes.size_arguments:
            if literal.node == node.name:
                size = kept_size(_resized(literal.expr, self.sizes), keep) + literal.offset
                args = with_argument(args, literal.path, size)
        value = node.target(*args[0], **args[1])  # type: ignore[operator]
        if isinstance(value, torch.Tensor):
            return self._moved(value, node.name, keep, False)
        return tuple(self._moved(v, output_name(node, i), keep, False) for i, v in enumerate(value))

    def _moved(self, value: Any, name: str, keep: Keep, to_kept: bool) -> Any:
        """The entries of the tensor ``name`` on kept units, taken from all units or put among them with zeros."""
        positions = self.axes.positions.get(name)
        value = value if to_kept else _renumber(value, positions, keep, to_kept=False)
        for axis, expr in enumerate(self.axes.tensors.get(name, ()) if to_kept else self.axes.tensors[name]):
            if keep.touches(expr):
                expr = _fitted(expr, value.shape[axis], Keep() if to_kept else keep, keep, self.sizes)
                index = _kept_positions(expr, keep, value.device)
                if to_kept:
                    value = value.index_select(axis, index)
                else:
                    shape = [*value.shape[:axis], expr.size, *value.shape[axis + 1 :]]
                    value = value.new_zeros(shape).index_copy(axis, index, value)
        return _renumber(value, positions, keep, to_kept=True) if to_kept else value


def masked_weight(value: torch.Tensor, exprs: Sequence[Expr], keep: Keep) -> torch.Tensor:
    """Return a weight with the axes ``exprs`` with zeros in place of removed units."""
    for axis, expr in enumerate(exprs):
        if keep.touches(expr):
            value = masked(value, axis, torch.from_numpy(weight_mask(exprs, axis, keep).copy()))
    return value


def output_tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """Return the floating point tensors in the output of a module, in order."""
    return tuple(tensor for tensor in tensors_of(output) if tensor.is_floating_point())


def _kept_positions(expr: Expr, keep: Keep, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(kept_mask(expr, keep))).to(device)


def _renumber(value: Any, expr: Expr | None, keep: Keep, *, to_kept: bool) -> Any:
    """Map positions along the axis ``expr`` to positions among the kept ones, or the other way round."""
    if expr is None or not keep.touches(expr):
        return value
    index = _kept_positions(expr, keep, value.device)
    if not to_kept:
        return index.to(value.dtype)[value.long()]
    return torch.searchsorted(index, value.long()).to(value.dtype)


def _fitted(expr: Expr, size: int, measure: Keep, keep: Keep, sizes: Mapping[Factor, int]) -> Expr:
    """Return ``expr`` with the sizes of this run, so that its units in ``measure`` have ``size`` positions.

    If the sizes of the inputs do not determine it, as for a number of tokens plus one, some whole factor takes the size
    that fits.
    """
    if kept_size(expr, measure) == size:
        return expr
    whole = [factor for factor in dict.fromkeys(factors(expr)) if not keep.touches(factor)]
    known = {factor: sizes[factor] for factor in whole if factor in sizes}
    tries = (known, *(_solved(expr, factor, size, measure, known) for factor in whole))
    return next((_resized(expr, tried) for tried in tries if _fits(expr, tried, size, measure)), expr)


def _solved(expr: Expr, factor: Factor, size: int, measure: Keep, known: Mapping[Factor, int]) -> dict[Factor, int]:
    """Sizes with that of a factor by which an axis may have ``size``, which is linear in it: ``1 + tokens``."""
    one, two = (kept_size(_resized(expr, {**known, factor: number}), measure) for number in (1, 2))
    return {**known, factor: 1 + (size - one) // max(two - one, 1)}


def _fits(expr: Expr, sizes: Mapping[Factor, int], size: int, measure: Keep) -> bool:
    return min(sizes.values(), default=1) > 0 and kept_size(_resized(expr, sizes), measure) == size


def _resized(expr: Expr, sizes: Mapping[Factor, int]) -> Expr:
    if isinstance(expr, Factor):
        size = sizes.get(expr, expr.size)
        return UNIT if size == 1 else Factor(size, expr.uid)
    parts = [_resized(part, sizes) for part in expr.parts]
    return product(*parts) if isinstance(expr, Product) else concat(*parts)


class GatedRun(UntouchedRun):
    """An interpreter that multiplies inputs of matrix products by gates ``(in,)``; only the gates get gradients."""

    def __init__(self, graph_module: fx.GraphModule, gates: Mapping[Consumer, torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.gates: dict[fx.Node, list[tuple[Consumer, torch.Tensor]]] = {}
        for consumer, gate in gates.items():
            self.gates.setdefault(consumer.node, []).append((consumer, gate))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of ``n``; the input of a gated product is multiplied for this product only."""
        if n not in self.gates:
            return super().run_node(n)
        before = {consumer.source: self.env[consumer.source] for consumer, _ in self.gates[n]}
        for consumer, gate in self.gates[n]:
            value = self.env[consumer.source]
            shaped = gate.view(-1, *[1] * (value.dim() - consumer.dim - 1))
            self.env[consumer.source] = value * shaped.to(value.dtype)
        found = super().run_node(n)
        self.env.update(before)
        return found


def spread_gates(gates: torch.Tensor, units: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
    """Return the gate of each position: that of its unit among ``(units,)``, or 1 if its unit is -1: ``(size,)``."""
    index = torch.from_numpy(np.where(units < 0, len(gates), units)).to(gates.device)
    return torch.cat((gates, gates.new_ones(1)))[index]
