"""Where a product of activations with a weight has its parts, for any op that says it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from fxprune.axes import Expr
from fxprune.graph.names import tensor_name
from fxprune.graph.tensors import get_tensor
from fxprune.rules.apply import run_alone
from fxprune.rules.registry import Values, find_rule
from fxprune.rules.statements import Statements, TensorAxes
from fxprune.rules.write import Arguments

__all__ = [
    "Contraction",
    "LoneProduct",
    "WeightProduct",
    "contractions",
    "lone_parameters",
    "lone_products",
    "reads_weight",
    "weight_product",
]


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


@dataclass(frozen=True)
class Contraction:
    """An op multiplies two tensors and adds up over one axis, and does nothing else to them.

    Args:
        x: one tensor.
        source: what makes it.
        i: which of its axes is summed over.
        w: the other one.
        weight: what makes that.
        axis: which of its axes is summed over.
        out: the result.
        stated: all that the rule of the op says.
        added: what makes the tensor that is added; None if none is.
    """

    x: TensorAxes
    source: fx.Node
    i: int
    w: TensorAxes
    weight: fx.Node
    axis: int
    out: TensorAxes
    stated: Statements
    added: fx.Node | None

    def axes(self, tensor: TensorAxes) -> list[Expr]:
        """The axes of a tensor as they were solved."""
        return [self.stated.solver.resolve(axis) for axis in tensor.axes]


def contractions(node: fx.Node) -> Iterator[Contraction]:
    """The parts of ``node`` if it multiplies two tensors and sums over one axis, with either tensor as the weight."""
    rule = find_rule(node.target) if node.op == "call_function" else None
    if rule is None or rule.values is not Values.PRODUCT:
        return
    arguments = Arguments(node)
    if any(arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
        return
    site, stated = run_alone(node)
    if len(stated.sums) != 1 or len(stated.sums[0].places) != 2 or len(site.outs) != 1:
        return
    nodes = {tensor_name(source): source for source in node.all_input_nodes}
    found = arguments.get(rule.added) if rule.added else None
    added = found if isinstance(found, fx.Node) else None
    places = stated.sums[0].places
    for a, b in (places, places[::-1]):
        x, w = site.of(nodes[a.tensor]), site.of(nodes[b.tensor])
        if x is not None and w is not None:
            yield Contraction(x, nodes[a.tensor], a.dim, w, nodes[b.tensor], b.dim, site.out, stated, added)


def weight_product(node: fx.Node) -> WeightProduct | None:
    """The parts of ``node`` if it multiplies activations by a weight of two axes, and does nothing else to them."""
    for found in contractions(node) if reads_weight(node) else ():
        x, out = found.x, found.out
        if found.weight.op != "get_attr" or found.source.op == "get_attr" or found.w.rank != 2:
            continue
        passed = found.axes(found.w)[1 - found.axis]
        if found.i == x.rank - 1 and out.rank == x.rank and found.axes(out)[-1] == passed:
            return WeightProduct(found.source, found.weight, found.axis, found.added)
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
    alone = lone_parameters(graph_module)
    for node in graph_module.graph.nodes:
        found = weight_product(node)
        if found is not None and alone(found.weight, 2) and found.source.meta["val"].dim() >= 2:
            bias = str(found.added.target) if found.added is not None and alone(found.added, 1) else None
            yield LoneProduct(found.source, found.weight, found.axis, found.added, node, bias)


def lone_parameters(graph_module: fx.GraphModule) -> Callable[[fx.Node, int], bool]:
    """Whether a node reads a parameter of so many axes that nothing else reads, under this name or another."""
    uses: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(graph_module, str(node.target))
            uses[id(tensor)] = uses.get(id(tensor), 0) + len(node.users)

    def alone(node: fx.Node, rank: int) -> bool:
        tensor = get_tensor(graph_module, str(node.target)) if node.op == "get_attr" else None
        return isinstance(tensor, nn.Parameter) and tensor.dim() == rank and uses[id(tensor)] == 1

    return alone


def reads_weight(node: fx.Node) -> bool:
    """Whether one of the inputs of ``node`` is a parameter or a buffer."""
    return any(source.op == "get_attr" for source in node.all_input_nodes)
