"""Blocks skipped during export: the nodes of the first block of a group (the *source*) are copied for those after it.

Only the code of the first and the last block of alike ones runs. The last must trace to what a copy would be; if it
does not, the export fails and is repeated without copies. If the second block is not called as the first (its inputs
may have gradients), the second is the source. Copies are made during the export, so that nodes are numbered as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.graph.compat import (
    SIZE,
    FakeTensor,
    has_unbacked_sizes,
    is_size,
    shape_env_state,
    tree_flatten,
    tree_unflatten,
)
from fxprune.graph.context import bind_node, current_tracer, disable_torch_function, node_of, pause_tracing
from fxprune.graph.shapes import same_shapes
from fxprune.graph.tensors import base_name, named_tensors
from fxprune.trace.repeats.grouping import Repeats

aten = torch.ops.aten


def skip_repeats(twin: nn.Module, repeats: Repeats) -> None:
    """Make the export of ``twin``, a copy of a model, copy nodes for all alike blocks but the first and the last."""
    for paths in repeats:
        group = _Group()
        for place, path in enumerate(paths):
            block: Any = twin.get_submodule(path)
            roles = {0: "source", len(paths) - 1: "check"}
            block.forward = _BlockForward(block, group, roles.get(place, "copy"))


@dataclass
class _TracedBlock:
    """A call of a block during export: its inputs and weights, and once it has run its nodes and results."""

    tracer: Any
    stack: list[tuple[str, str]]
    inputs: list[Any]
    input_spec: str
    weights: dict[str, fx.Node | None]
    nodes: list[fx.Node] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    spec: Any = None
    results: list[fx.Node | None] = field(default_factory=list)

    def without_sizes(self) -> list[fx.Node]:
        """The nodes except those that compute sizes, of which lowering keeps one for each expression."""
        return [node for node in self.nodes if not is_size(node)]

    def given_nodes(self) -> list[fx.Node | None]:
        """The nodes of its inputs and weights."""
        return [*(_node(leaf, self.tracer) for leaf in self.inputs), *self.weights.values()]


@dataclass
class _Group:
    """A group of alike blocks: the source (None before it was traced, and if it cannot be copied) and its copies."""

    source: _TracedBlock | None = None
    copies: int = 0


class _BlockForward:
    """Replaces the ``forward`` of a block."""

    def __init__(self, block: nn.Module, group: _Group, role: str) -> None:
        self.block = block
        self.group = group
        self.role = role

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer, group = current_tracer(), self.group
        if tracer is None:
            return self._run(args, kwargs)
        if self.role == "source":
            return self._become_source(tracer, args, kwargs)
        source = group.source
        if source is None or source.tracer is not tracer:
            return self._run(args, kwargs)
        if self.role == "copy":
            with disable_torch_function():
                here = _begin(tracer, self.block, args, kwargs)
                images = _match(source, here)
                if images is not None:
                    group.copies += 1
                    return _copy(source, here, images)
            return self._run(args, kwargs) if group.copies else self._become_source(tracer, args, kwargs)
        return self._check(source, args, kwargs)

    def _become_source(self, tracer: Any, args: Any, kwargs: Any) -> Any:
        traced, result = self._trace(tracer, args, kwargs)
        with disable_torch_function():
            self.group.source = traced if _can_be_copied(traced) else None
        return result

    def _run(self, args: Any, kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)

    def _trace(self, tracer: Any, args: Any, kwargs: Any) -> tuple[_TracedBlock, Any]:
        with disable_torch_function():
            traced = _begin(tracer, self.block, args, kwargs)
        last = next(reversed(tracer.graph.nodes))
        result = self._run(args, kwargs)
        node = last.next
        while node.op != "root":
            traced.nodes.append(node)
            node = node.next
        traced.leaves, traced.spec = tree_flatten(result)
        traced.results = [_node(leaf, tracer) for leaf in traced.leaves]
        return traced, result

    def _check(self, source: _TracedBlock, args: Any, kwargs: Any) -> Any:
        """Run the last block: it must trace to the same as a copy, and add no guards on sizes."""
        mode = next((leaf.fake_mode for leaf in source.leaves if isinstance(leaf, FakeTensor)), None)
        before = None if mode is None else shape_env_state(mode)
        traced, result = self._trace(source.tracer, args, kwargs)
        what = ""
        with disable_torch_function():
            if mode is not None and shape_env_state(mode) != before:
                what = "it branches on sizes and others do not"
            elif self.group.copies and not _is_copy(source, traced):
                what = "it does not trace to the same nodes as others"
        if what:
            raise TraceError(what, where=traced.stack[-1][0], remedy="Export every block")
        return result


def _begin(tracer: Any, block: nn.Module, args: Any, kwargs: Any) -> _TracedBlock:
    inputs, spec = tree_flatten((args, kwargs))
    weights = {name: _node(tensor, tracer) for name, tensor in named_tensors(block)}
    stack = [(str(key), str(path)) for key, (path, _) in tracer.module_stack.items()]
    return _TracedBlock(tracer, stack, inputs, repr(spec), weights)


def _node(value: Any, tracer: Any) -> fx.Node | None:
    return node_of(value, tracer) if isinstance(value, torch.Tensor) else None


def _can_be_copied(traced: _TracedBlock) -> bool:
    """Whether a block computes on its inputs, its weights and sizes alone, and returns only inputs and new tensors."""
    inside = {*traced.nodes, *traced.given_nodes()}
    for node in traced.nodes:
        outer = [source for source in node.all_input_nodes if source not in inside]
        if node.op != "call_function" or has_unbacked_sizes(node.meta.get("val")) or not all(map(is_size, outer)):
            return False
    for leaf, result in zip(traced.leaves, traced.results, strict=True):
        if isinstance(leaf, SIZE):
            return False
        passed_on = not isinstance(leaf, torch.Tensor) or any(leaf is given for given in traced.inputs)
        if not passed_on and (type(leaf) is not FakeTensor or result not in traced.nodes):
            return False
    return True


def _match(source: _TracedBlock, here: _TracedBlock) -> dict[fx.Node, fx.Node] | None:
    """The nodes of a block's inputs and weights by those of the source; None if it is called in another way."""
    if source.input_spec != here.input_spec or len(source.stack) != len(here.stack):
        return None
    for one, other in zip(source.inputs, here.inputs, strict=True):
        tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        if tensors and one.requires_grad != other.requires_grad:
            return None
        if one is not other and not same_shapes(one, other):
            return None
    if source.weights.keys() != here.weights.keys():
        return None
    images: dict[fx.Node, fx.Node] = {}
    for one, other in zip(source.given_nodes(), here.given_nodes(), strict=True):
        if one is None or other is None:
            if one is not other:
                return None
        elif images.setdefault(one, other) is not other:
            return None
    return images


def _copy(source: _TracedBlock, here: _TracedBlock, images: dict[fx.Node, fx.Node]) -> Any:
    graph = here.tracer.graph
    for node in source.without_sizes():
        args = fx.map_arg(node.args, lambda old: images.get(old, old))
        kwargs = fx.map_arg(node.kwargs, lambda old: images.get(old, old))
        new = graph.create_node(node.op, node.target, args, kwargs, name=base_name(node))
        new.meta = {**node.meta, "nn_module_stack": _renamed_stack(node, source, here)}
        images[node] = new
    pairs = zip(source.inputs, here.inputs, strict=True)
    made = {id(leaf): image for leaf, image in pairs if isinstance(leaf, torch.Tensor)}
    for leaf, result in zip(source.leaves, source.results, strict=True):
        if not isinstance(leaf, torch.Tensor):
            made[id(leaf)] = leaf
        elif id(leaf) not in made:
            assert result is not None
            with pause_tracing(), leaf.fake_mode:  # type: ignore[attr-defined]
                made[id(leaf)] = aten.alias.default(leaf)
            bind_node(made[id(leaf)], images[result], here.tracer)
    return tree_unflatten([made[id(leaf)] for leaf in source.leaves], source.spec)


def _renamed_stack(node: fx.Node, source: _TracedBlock, here: _TracedBlock) -> dict[str, tuple[str, str]]:
    """The module stack for the copy of a node: that of the source with the path of the other block."""
    depth = len(source.stack) - 1
    (old_key, old_path), (new_key, new_path) = source.stack[-1], here.stack[-1]
    renamed: dict[str, tuple[str, str]] = {}

    def replaced(name: str, old: str, new: str) -> str:
        return new + name.removeprefix(old) if name == old or name.startswith((f"{old}.", f"{old}@")) else name

    for place, (key, (path, kind)) in enumerate((node.meta.get("nn_module_stack") or {}).items()):
        if place < depth:
            renamed[here.stack[place][0]] = (here.stack[place][1], kind)
        else:
            renamed[replaced(str(key), old_key, new_key)] = (replaced(str(path), old_path, new_path), kind)
    return renamed


def _is_copy(source: _TracedBlock, traced: _TracedBlock) -> bool:
    """Whether a block traced to the nodes and results that a copy of the source has."""
    images = _match(source, traced)
    nodes, others = source.without_sizes(), traced.without_sizes()
    if images is None or len(nodes) != len(others) or repr(source.spec) != repr(traced.spec):
        return False
    for node, other in zip(nodes, others, strict=True):
        stack = _renamed_stack(node, source, traced)
        if not _same_node(node, other, images) or stack != other.meta.get("nn_module_stack"):
            return False
        images[node] = other
    results = zip(source.leaves, source.results, traced.leaves, traced.results, strict=True)
    for mine, result, theirs, image in results:
        if isinstance(mine, torch.Tensor):
            passed_on = [[given is leaf for given in b.inputs] for leaf, b in ((mine, source), (theirs, traced))]
            same = result is not None and images.get(result, result) is image and passed_on[0] == passed_on[1]
        else:
            same = mine is theirs or mine == theirs
        if not same:
            return False
    return True


def _same_node(one: fx.Node, other: fx.Node, images: Mapping[fx.Node, fx.Node]) -> bool:
    def comparable(node: fx.Node) -> Any:
        return str(node.meta["val"].node.expr) if is_size(node) else node

    arguments = fx.map_arg((one.args, one.kwargs), lambda old: comparable(images.get(old, old)))
    if one.target != other.target or base_name(one) != base_name(other):
        return False
    if arguments != fx.map_arg((other.args, other.kwargs), comparable):
        return False
    return same_shapes(one.meta.get("val"), other.meta.get("val"))
