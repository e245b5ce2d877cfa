"""Where a product of activations with a weight has its parts, for any op that says it multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from fxprune.graph.names import tensor_name
from fxprune.graph.tensors import get_tensor
from fxprune.rules.apply import run_alone
from fxprune.rules.registry import Values, find_rule
from fxprune.rules.write import Arguments

__all__ = ["LoneProduct", "WeightProduct", "lone_products", "weight_product"]


@dataclass(frozen=True)
class WeightProduct:
    """``out[.., o] = sum over i of source[.., i] * weight[..]``, plus something.

    Args:
        source: what makes the activations; their last axis is summed over.
        weight: what reads the weight, of two axes.
        axis: the axis of the weight that is summed over; the other one is the last of the output.
        added: what makes the tensor that is added; None if none is.
    """

    source: fx.Node
    weight: fx.Node
    axis: int
    added: fx.Node | None


def weight_product(node: fx.Node) -> WeightProduct | None:
    """The parts of ``node`` if it multiplies activations by a weight of two axes, and does nothing else to them."""
    rule = find_rule(node.target) if node.op == "call_function" else None
    if rule is None or rule.values is not Values.PRODUCT or not _reads_weight(node):
        return None
    arguments = Arguments(node)
    if any(arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    site, stated = run_alone(node)
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    pairs = [
        (nodes[a.tensor], a.dim, nodes[b.tensor], b.dim)
        for found in stated.sums
        if len(found.places) == 2
        for a, b in (found.places, found.places[::-1])
    ]
    added = arguments.get(rule.added) if rule.added else None
    for source, i, weight, axis in pairs if len(stated.sums) == 1 and len(site.outs) == 1 else ():
        x, w = site.of(source), site.of(weight)
        if x is None or w is None or weight.op != "get_attr" or source.op == "get_attr" or w.rank != 2:
            continue
        passed = stated.solver.resolve(w.axes[1 - axis])
        last = i == x.rank - 1 and site.out.rank == x.rank and stated.solver.resolve(site.out.axes[-1]) == passed
        if last:
            return WeightProduct(source, weight, axis, added if isinstance(added, fx.Node) else None)
    return None


@dataclass(frozen=True)
class LoneProduct(WeightProduct):
    """A product with a parameter of two axes that nothing else reads, under this name or another.

    Args:
        node: the product.
        bias: the name of what it adds, where that is a parameter that nothing else reads either; else None.
    """

    node: fx.Node
    bias: str | None

    @property
    def name(self) -> str:
        """The name of the weight."""
        return str(self.weight.target)


def lone_products(graph_module: fx.GraphModule) -> Iterator[LoneProduct]:
    """Yield the products, in order of execution, whose weight may be changed without anything else changing.

    Those that take one row of activations without a batch are left out.
    """
    uses: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(graph_module, str(node.target))
            uses[id(tensor)] = uses.get(id(tensor), 0) + len(node.users)

    def alone(node: fx.Node, rank: int) -> bool:
        tensor = get_tensor(graph_module, str(node.target)) if node.op == "get_attr" else None
        return isinstance(tensor, nn.Parameter) and tensor.dim() == rank and uses[id(tensor)] == 1

    for node in graph_module.graph.nodes:
        found = weight_product(node)
        if found is not None and alone(found.weight, 2) and found.source.meta["val"].dim() >= 2:
            bias = str(found.added.target) if found.added is not None and alone(found.added, 1) else None
            yield LoneProduct(found.source, found.weight, found.axis, found.added, node, bias)


def _reads_weight(node: fx.Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes)
