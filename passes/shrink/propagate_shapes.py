"""Work out the shape of every value again."""

from __future__ import annotations

from collections.abc import Sequence, Set
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
from fxprune.graph.context import tidy_later
from fxprune.graph.facts import Change, Fact, Runnable, Shaped, facts_of
from fxprune.graph.shapes import ShapedCalls, calls_of, described, same_shapes, usable
from fxprune.graph.tensors import device_of, example_of
from fxprune.pipeline.contract import Pass, PassResult

__all__ = ["PropagateShapesPass"]


@dataclass(frozen=True, eq=False)
class PropagateShapesPass(Pass):
    """Works out ``node.meta["val"]`` of every node again, symbolic where it was.

    Only nodes that are called in another way than before, or on values of other shapes, are looked at, and of those
    that are called alike, as in blocks that lost as much as others, one. A shape that does not fit shows here, at the
    node where it arises, before anything is run.
    """

    name: ClassVar[str] = "propagate-shapes"
    stage: ClassVar[str] = "shrink"
    changes: ClassVar[Change] = "nothing"
    needs: ClassVar[tuple[type[Fact], ...]] = (Runnable,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Shaped, ShapedCalls)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the graph on fake tensors."""
        inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
        leaves = tree_leaves(inputs)
        mode = next((value.fake_mode for value in leaves if hasattr(value, "fake_mode")), None) or fake_mode()
        mode.allow_non_fake_inputs = True
        device = _place(graph_module, leaves)
        with mode:
            inputs = [example_of(v, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device)) for v in inputs]
        facts = facts_of(graph_module)
        known = facts.get(ShapedCalls)
        calls = calls_of(graph_module.graph)
        alike = {name for name, call in calls.items() if known is not None and known.calls.get(name) == call}
        # symbolic sizes are only understood by the Python side of torch's dispatcher
        with tidy_later(), enable_python_dispatcher():
            _Shapes(graph_module, mode, alike, device).propagate_dont_convert_inputs(*inputs)
        facts.put(ShapedCalls(calls))
        facts.put(Shaped())
        return PassResult(graph_module, False)


class _Shapes(FakeTensorProp):
    """Works out what changed; reads weights as fake tensors, so that an op that writes to one does not write to it.

    Args:
        graph_module: the graph.
        mode: of its fake tensors.
        alike: the names of the nodes that are called as they were.
        device: where weights without storage are said to be.
    """

    def __init__(
        self, graph_module: fx.GraphModule, mode: FakeTensorMode, alike: Set[str], device: torch.device
    ) -> None:
        super().__init__(graph_module, mode)
        self._alike = alike
        self._device = device
        self._weights: dict[object, torch.Tensor] = {}
        self._changed = set[fx.Node]()
        self._made: dict[object, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return what was known of ``n`` if that still holds, or what a node made that is called alike."""
        before = n.meta.get("val")
        if self._stands(n, before):
            return before
        call = self._call(n)
        if call is not None and call in self._made:
            result, n.meta["val"] = self._made[call]
        else:
            result = super().run_node(n)
            if call is not None and not has_unbacked_sizes(result):
                self._made[call] = result, n.meta.get("val")
        after = n.meta.get("val")
        if before is None or after is None or not same_shapes(before, after):
            self._changed.add(n)
        return result

    def _call(self, n: fx.Node) -> object:
        """What decides the shape of the result; None where that is more than the shapes of what goes in."""
        if n.op != "call_function" or not isinstance(n.target, OpOverload) or n.target._schema.is_mutable:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            return n.target, described(args), tuple((name, described(value)) for name, value in kwargs.items())
        except TypeError:
            return None

    def _stands(self, n: fx.Node, known: Any) -> bool:
        if n.op in ("placeholder", "output") or n.name not in self._alike or not usable(known, self._mode):
            return False
        if n.op == "get_attr":
            value = self.fetch_attr(str(n.target))
            return isinstance(value, torch.Tensor) and _is_of(value, known, self._seen_on(value))
        return self._changed.isdisjoint(n.all_input_nodes)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a weight without its values."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        if self._seen_on(value) == value.device:
            return self._mode.from_tensor(value, static_shapes=True)
        traits = value.shape, value.stride(), value.dtype
        if traits not in self._weights:
            with self._mode:
                self._weights[traits] = torch.empty_strided(*traits[:2], dtype=value.dtype, device=self._device)
        return self._weights[traits]

    def _seen_on(self, weight: torch.Tensor) -> torch.device:
        return self._device if weight.is_meta else weight.device


def _place(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> torch.device:
    """Return where the graph computes: where its weights are, or where it was traced if they have no storage.

    Values of a trace are said to be on the CPU. If they were looked for on ``meta``, none of them would stand.
    """
    device = device_of(graph_module)
    if device.type != "meta":
        return device
    return next((leaf.device for leaf in inputs if isinstance(leaf, torch.Tensor)), device)


def _is_of(weight: torch.Tensor, known: Any, device: torch.device) -> bool:
    """Whether what is known is the shape of this very weight, which is said to be on ``device``."""
    return (
        isinstance(known, torch.Tensor)
        and (weight.shape, weight.dtype, device) == (known.shape, known.dtype, known.device)
        and weight.stride() == known.stride()
    )
