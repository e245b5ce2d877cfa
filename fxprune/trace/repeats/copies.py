"""Blocks skipped during export: copies of the first block of their group.

Of each group of blocks that are alike, the code of the first and the last is run. What the first became in the graph is
copied for all after it, with their own weights, inputs and names; and it is what the last has to become, or nothing of
it counts. If the second is not called as the first (it may have gradients), it is what is copied.
Copies are made while the export goes on, so that nodes are numbered as they would have been.
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
    known_of_sizes,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from fxprune.graph.context import current_tracer, node_of, track, unseen, untraced
from fxprune.graph.shapes import same_shapes
from fxprune.graph.tensors import base_name
from fxprune.trace.repeats.grouping import Repeats

__all__ = ["stand_in"]

aten = torch.ops.aten


def stand_in(twin: nn.Module, repeats: Repeats) -> None:
    """Let most of the blocks of a copy of a model that are alike be copied when it is exported.

    Args:
        twin: the copy, changed in place.
        repeats: the blocks that are alike.
    """
    for paths in repeats.groups:
        group = _Group()
        for place, path in enumerate(paths):
            block: Any = twin.get_submodule(path)
            roles = {0: "source", len(paths) - 1: "check"}
            block.forward = _Forward(block, group, roles.get(place, "copy"))


@dataclass
class _Traced:
    """A block as it was traced."""

    tracer: Any
    stack: list[tuple[str, str]]
    inputs: list[Any]
    input_spec: str
    weights: dict[str, fx.Node | None]
    nodes: list[fx.Node] = field(default_factory=list)
    leaves: list[Any] = field(default_factory=list)
    spec: Any = None
    results: list[fx.Node | None] = field(default_factory=list)

    def made(self) -> list[fx.Node]:
        """The nodes, but for those that work out sizes, of which lowering keeps one of a kind."""
        return [node for node in self.nodes if not is_size(node)]

    def input_nodes(self) -> list[fx.Node | None]:
        return [_node(leaf, self.tracer) for leaf in self.inputs]


@dataclass
class _Group:
    """Blocks that are alike; ``source`` is what is copied, once it is there, None if it cannot be."""

    source: _Traced | None = None
    copies: int = 0


class _Forward:
    """Takes the place of the forward of a block."""

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
            with unseen():
                here = _begin(tracer, self.block, args, kwargs)
                if _same_inputs(source, here):
                    group.copies += 1
                    return _copy(source, here)
            return self._run(args, kwargs) if group.copies else self._become_source(tracer, args, kwargs)
        return self._check(source, args, kwargs)

    def _become_source(self, tracer: Any, args: Any, kwargs: Any) -> Any:
        traced, result = self._trace(tracer, args, kwargs)
        with unseen():
            self.group.source = traced if _can_be_copied(traced) else None
        return result

    def _run(self, args: Any, kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)

    def _trace(self, tracer: Any, args: Any, kwargs: Any) -> tuple[_Traced, Any]:
        with unseen():
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

    def _check(self, source: _Traced, args: Any, kwargs: Any) -> Any:
        """The last block becomes what copying would have made of it, and finds out nothing more about sizes."""
        mode = next((leaf.fake_mode for leaf in source.leaves if isinstance(leaf, FakeTensor)), None)
        before = None if mode is None else known_of_sizes(mode)
        traced, result = self._trace(source.tracer, args, kwargs)
        if mode is not None and known_of_sizes(mode) != before:
            raise _unlike(traced, "asks about sizes what others do not")
        with unseen():
            if self.group.copies and not (_same_inputs(source, traced) and _same_nodes(source, traced)):
                raise _unlike(traced, "is not traced to what others are")
        return result


def _unlike(traced: _Traced, why: str) -> TraceError:
    return TraceError(f"it {why}", where=traced.stack[-1][0], remedy="Export every block")


def _begin(tracer: Any, block: nn.Module, args: Any, kwargs: Any) -> _Traced:
    inputs, spec = tree_flatten((args, kwargs))
    named = (*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False))
    weights = {name: _node(tensor, tracer) for name, tensor in named}
    stack = [(str(key), str(path)) for key, (path, _) in tracer.module_stack.items()]
    return _Traced(tracer, stack, inputs, repr(spec), weights)


def _node(value: Any, tracer: Any) -> fx.Node | None:
    return node_of(value, tracer) if isinstance(value, torch.Tensor) else None


def _can_be_copied(traced: _Traced) -> bool:
    """Whether what a block became is made of its inputs, its weights and sizes alone, and returns nothing else."""
    own = {*traced.nodes, *traced.input_nodes(), *traced.weights.values()}
    for node in traced.nodes:
        outer = [source for source in node.all_input_nodes if source not in own]
        if node.op != "call_function" or has_unbacked_sizes(node.meta.get("val")) or not all(map(is_size, outer)):
            return False
    returned = zip(traced.leaves, traced.results, strict=True)
    return all(_can_be_returned(leaf, node, traced) for leaf, node in returned)


def _can_be_returned(leaf: Any, node: fx.Node | None, traced: _Traced) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return not isinstance(leaf, SIZE)
    if any(leaf is given for given in traced.inputs):
        return True
    return type(leaf) is FakeTensor and node is not None and node in traced.nodes


def _same_inputs(source: _Traced, here: _Traced) -> bool:
    """Whether a block is called as the source was, and its tensors stand for as many nodes in the same places."""
    if source.input_spec != here.input_spec or len(source.stack) != len(here.stack):
        return False
    if not all(_same_leaf(a, b) for a, b in zip(source.inputs, here.inputs, strict=True)):
        return False
    return source.weights.keys() == here.weights.keys() and _images(source, here) is not None


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.requires_grad != other.requires_grad:
        return False
    return one is other or same_shapes(one, other)


def _images(source: _Traced, here: _Traced) -> dict[fx.Node, fx.Node] | None:
    """Return the nodes of inputs and weights of a block for those of the source; None where they do not match."""
    mine = [*source.input_nodes(), *source.weights.values()]
    others = [*here.input_nodes(), *here.weights.values()]
    images: dict[fx.Node, fx.Node] = {}
    for one, other in zip(mine, others, strict=True):
        if (one is None) != (other is None):
            return None
        if one is not None and other is not None and images.setdefault(one, other) is not other:
            return None
    return images


def _copy(source: _Traced, here: _Traced) -> Any:
    """Copy the nodes of the source for another block; return what that block returns."""
    images = _images(source, here)
    assert images is not None
    graph = here.tracer.graph
    for node in source.made():
        args = fx.map_arg(node.args, lambda old: images.get(old, old))
        kwargs = fx.map_arg(node.kwargs, lambda old: images.get(old, old))
        new = graph.create_node(node.op, node.target, args, kwargs, name=base_name(node))
        new.meta = {**node.meta, "nn_module_stack": _renamed(node, source, here)}
        images[node] = new
    given = {id(leaf): place for place, leaf in enumerate(source.inputs) if isinstance(leaf, torch.Tensor)}
    made: dict[int, Any] = {}
    for leaf, result in zip(source.leaves, source.results, strict=True):
        if id(leaf) in made:
            continue
        if not isinstance(leaf, torch.Tensor):
            made[id(leaf)] = leaf
        elif id(leaf) in given:
            made[id(leaf)] = here.inputs[given[id(leaf)]]
        else:
            assert result is not None
            made[id(leaf)] = _another(leaf)
            track(made[id(leaf)], images[result], here.tracer)
    return tree_unflatten([made[id(leaf)] for leaf in source.leaves], source.spec)


def _another(tensor: Any) -> torch.Tensor:
    """Return a tensor without storage that is to the code of a model what ``tensor`` is."""
    with untraced(), tensor.fake_mode:
        return aten.alias.default(tensor)  # type: ignore[no-any-return]


def _renamed(node: fx.Node, source: _Traced, here: _Traced) -> dict[str, tuple[str, str]]:
    """Return in which modules the copy of a node is: those of the other block."""
    own = len(source.stack)
    (old_key, old_path), (new_key, new_path) = source.stack[-1], here.stack[-1]
    renamed: dict[str, tuple[str, str]] = {}
    for place, (key, (path, kind)) in enumerate((node.meta.get("nn_module_stack") or {}).items()):
        if place < own - 1:
            renamed[here.stack[place][0]] = (here.stack[place][1], kind)
        else:
            renamed[_moved(str(key), old_key, new_key)] = (_moved(str(path), old_path, new_path), kind)
    return renamed


def _moved(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name == old or name.startswith((f"{old}.", f"{old}@")) else name


def _same_nodes(source: _Traced, traced: _Traced) -> bool:
    """Whether a block became what a copy of the source would be."""
    images = _images(source, traced)
    mine, others = source.made(), traced.made()
    if images is None or len(mine) != len(others):
        return False
    for one, other in zip(mine, others, strict=True):
        if not _same_node(one, other, images) or _renamed(one, source, traced) != other.meta.get("nn_module_stack"):
            return False
        images[one] = other
    return repr(source.spec) == repr(traced.spec) and all(
        _same_result(*pair, source, traced, images)
        for pair in zip(source.leaves, source.results, traced.leaves, traced.results, strict=True)
    )


def _same_node(one: fx.Node, other: fx.Node, images: Mapping[fx.Node, fx.Node]) -> bool:
    mine = fx.map_arg((one.args, one.kwargs), lambda old: _told(images.get(old, old)))
    others = fx.map_arg((other.args, other.kwargs), _told)
    alike = one.target == other.target and base_name(one) == base_name(other)
    return bool(alike and mine == others and _same_values(one, other))


def _told(node: fx.Node) -> Any:
    """Return a node as an argument: a size as what it is made of."""
    return str(node.meta["val"].node.expr) if is_size(node) else node


def _same_values(one: fx.Node, other: fx.Node) -> bool:
    mine, others = (tree_leaves(node.meta.get("val")) for node in (one, other))
    return same_shapes(mine, others)


def _same_result(
    leaf: Any,
    node: fx.Node | None,
    other: Any,
    other_node: fx.Node | None,
    source: _Traced,
    traced: _Traced,
    images: Mapping[fx.Node, fx.Node],
) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return bool(leaf is other or leaf == other)
    mine, others = _places(leaf, source), _places(other, traced)
    return mine == others and node is not None and images.get(node, node) is other_node


def _places(leaf: torch.Tensor, traced: _Traced) -> list[int]:
    """Return which inputs of a block ``leaf`` is."""
    return [place for place, given in enumerate(traced.inputs) if given is leaf]
