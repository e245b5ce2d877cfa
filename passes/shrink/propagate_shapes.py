"""Shape propagation: the shape of every value, after sizes changed."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxprune.graph.compat import (
    FakeTensorMode,
    FakeTensorProp,
    OpOverload,
    enable_python_dispatcher,
    fake_mode,
    has_unbacked_sizes,
    tree_leaves,
)
from fxprune.graph.context import defer_gc
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.graph.shapes import ShapedCalls, calls_of, fits_mode, same_shapes, shape_key
from fxprune.graph.tensors import device_of, map_tensors
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["PropagateShapesPass"]


@dataclass(frozen=True, eq=False)
class PropagateShapesPass(Pass):
    """Recomputes ``node.meta["val"]`` of every node, symbolic where it was.

    Only nodes whose call changed, or whose inputs have other shapes, run again; and of those with the same call, as in
    blocks that lost the same number of units, only one. A shape that does not fit fails here, at the node where it
    arises, before any tensor is computed.
    """

    name: ClassVar[str] = "propagate-shapes"
    stage: ClassVar[str] = "shrink"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Shaped, ShapedCalls)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = tree_leaves(inputs)
        mode = next((value.fake_mode for value in leaves if hasattr(value, "fake_mode")), None) or fake_mode()
        mode.allow_non_fake_inputs = True
        device = device_of(graph_module)
        if device.type == "meta":
            # values of a trace without storage are fake tensors on the CPU: none would count as known on ``meta``
            device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), device)
        with mode:
            inputs = [map_tensors(v, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device)) for v in inputs]
        facts = facts_of(graph_module)
        known = facts.get(ShapedCalls)
        calls = calls_of(graph_module.graph)
        same = {name for name, call in calls.items() if known is not None and known.calls.get(name) == call}
        # symbolic sizes are only understood by the Python side of torch's dispatcher
        with defer_gc(), enable_python_dispatcher():
            _ShapeRun(graph_module, mode, same, device).propagate_dont_convert_inputs(*inputs)
        facts.put(ShapedCalls(calls))
        facts.put(Shaped())
        return PassResult(graph_module, False)


class _ShapeRun(FakeTensorProp):
    """Runs all nodes except those whose calls are the ``same``; weights without storage are fake on ``device``.

    It reads weights as fake tensors, so that an op that writes to one does not change it.
    """

    def __init__(
        self, graph_module: fx.GraphModule, mode: FakeTensorMode, same: Set[str], device: torch.device
    ) -> None:
        super().__init__(graph_module, mode)
        self._same = same
        self._device = device
        self._weights: dict[object, torch.Tensor] = {}
        self._changed = set[fx.Node]()
        self._results: dict[object, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The known value of ``n`` if it is still valid, or the result of a node with the same call."""
        before = n.meta.get("val")
        if self._is_valid(n, before):
            return before
        key = self._call_key(n)
        if key is not None and key in self._results:
            result, n.meta["val"] = self._results[key]
        else:
            result = super().run_node(n)
            if key is not None and not has_unbacked_sizes(result):
                self._results[key] = result, n.meta.get("val")
        after = n.meta.get("val")
        if before is None or after is None or not same_shapes(before, after):
            self._changed.add(n)
        return result

    def _call_key(self, n: fx.Node) -> object:
        """A key for all that the shape of the result depends on; None if that is more than shapes of inputs."""
        if n.op != "call_function" or not isinstance(n.target, OpOverload) or n.target._schema.is_mutable:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            return n.target, shape_key(args), tuple((name, shape_key(value)) for name, value in kwargs.items())
        except TypeError:
            return None

    def _is_valid(self, n: fx.Node, known: Any) -> bool:
        if n.op in ("placeholder", "output") or n.name not in self._same or not fits_mode(known, self._mode):
            return False
        if n.op != "get_attr":
            return self._changed.isdisjoint(n.all_input_nodes)
        value = self.fetch_attr(str(n.target))
        if not isinstance(value, torch.Tensor) or not isinstance(known, torch.Tensor):
            return False
        traits = value.shape, value.dtype, self._fake_device(value), value.stride()
        return traits == (known.shape, known.dtype, known.device, known.stride())

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        if self._fake_device(value) == value.device:
            return self._mode.from_tensor(value, static_shapes=True)
        traits = value.shape, value.stride(), value.dtype
        if traits not in self._weights:
            with self._mode:
                self._weights[traits] = torch.empty_strided(*traits[:2], dtype=value.dtype, device=self._device)
        return self._weights[traits]

    def _fake_device(self, weight: torch.Tensor) -> torch.device:
        return self._device if weight.is_meta else weight.device
