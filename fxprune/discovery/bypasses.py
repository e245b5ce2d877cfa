"""Where a model adds to what came in: which blocks only do that and can go as a whole, and which sums are residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxprune.graph.names import tensor_name
from fxprune.rules.registry import is_sum

__all__ = ["Bypass", "find_bypasses", "find_residuals"]


@dataclass(frozen=True)
class Bypass:
    """A residual block: its output is its input plus what it computes.

    Args:
        source: name of the node that goes in.
        target: name of the node that comes out, to be replaced by ``source``.
    """

    source: str
    target: str


def find_bypasses(graph: fx.Graph, blocks: tuple[str, ...]) -> dict[str, Bypass]:
    """For each block that is a residual one, how to go around it.

    The only value that leaves the block has to be reached from a value that enters it through additions alone.
    """
    owner = _owners(graph, frozenset(blocks))
    leaving: dict[str, list[fx.Node]] = {block: [] for block in blocks}
    for node, block in owner.items():
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and any(owner.get(user) != block for user in node.users):
            leaving[block].append(node)
    found: dict[str, Bypass] = {}
    for block, targets in leaving.items():
        source = _residual_source(targets[0], block, owner) if len(targets) == 1 else None
        if source is not None:
            found[block] = Bypass(source.name, targets[0].name)
    return found


def _owners(graph: fx.Graph, blocks: frozenset[str]) -> dict[fx.Node, str]:
    """The block each operation was made in, for those in one."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") if node.op == "call_function" else None
        block = next((path for path, _ in (stack or {}).values() if path in blocks), None)
        if block is not None:
            found[node] = block
    return found


def _residual_source(target: fx.Node, block: str, owner: dict[fx.Node, str]) -> fx.Node | None:
    """The value outside ``block`` that ``target`` is a sum with, if there is exactly one."""
    outside: list[fx.Node] = []
    pending = [target]
    while pending:
        node = pending.pop()
        if not is_sum(node):
            continue
        for term in node.args[:2]:
            if not isinstance(term, fx.Node) or term.op == "get_attr":
                continue
            (pending if owner.get(term) == block else outside).append(term)
    same = [node for node in outside if node.meta["val"].shape == target.meta["val"].shape]
    return same[0] if len(outside) == len(same) == 1 else None


def find_residuals(graph: fx.Graph) -> dict[str, str]:
    """For each node that adds to a value what was computed from it with weights, the name of that value's tensor.

    Complexity: linear in the number of nodes between a value and where it is added to.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[str, str] = {}
    for node in graph.nodes:
        terms = [term for term in node.args[:2] if isinstance(term, fx.Node)] if node.op == "call_function" else []
        if len(terms) == 2 and is_sum(node):
            stream, branch = sorted(terms, key=place.__getitem__)
            if _is_branch(branch, stream, place):
                found[node.name] = tensor_name(stream)
    return found


def _is_branch(branch: fx.Node, stream: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether ``branch`` is computed from ``stream``, and a matrix of weights takes part in it."""
    between, pending = {branch}, [branch]
    reached = weighed = False
    while pending:
        node = pending.pop()
        for source in node.all_input_nodes:
            reached = reached or source is stream
            weighed = weighed or (source.op == "get_attr" and source.meta["val"].ndim > 1)
            if source not in between and place[source] > place[stream]:
                between.add(source)
                pending.append(source)
    return reached and weighed
