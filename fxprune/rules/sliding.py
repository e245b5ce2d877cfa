"""Products of activations with a weight that has taps, such as a convolution's, for any op that says it multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.axes import UNIT
from fxprune.graph.compat import UNKNOWN_SIZE
from fxprune.rules.product import contractions, lone_parameters, reads_weight

__all__ = ["SlidingProduct", "lone_sliding_products", "sliding_product"]


@dataclass(frozen=True)
class SlidingProduct:
    """``out[.., o, ..] = sum over i and taps of weight[o, i, taps..] * inputs[.., i, taps..]``, plus something.

    The inputs are those numbers of ``source``, or zeros, that the op multiplies with each entry of the weight; each has
    all channels, which are summed over as one axis. The axes of the weight may be in any order.

    Args:
        node: the product.
        source: what makes the activations.
        channel: the axis of the activations that is summed over.
        weight: what reads the weight, of three axes or more.
        order: all axes of the weight, that of outputs first, that of inputs second, taps last.
        outputs: the axis of the result that has the outputs.
        added: what makes the tensor that is added; None if none is.
        bias: whether that is a parameter with one axis that nothing else reads.
    """

    node: fx.Node
    source: fx.Node
    channel: int
    weight: fx.Node
    order: tuple[int, ...]
    outputs: int
    added: fx.Node | None
    bias: bool = False

    def inputs(self, env: Mapping[fx.Node, Any], kept: torch.Tensor) -> torch.Tensor:
        """What the op multiplies with each entry of its weight: ``(.., kept * taps)``, axes as those of the result.

        The op itself says it, given a weight with an output for each entry that takes in this entry alone.

        Args:
            env: values of the nodes that the product reads.
            kept: which channels are wanted, ``(kept,)``.
        """
        weight, x = env[self.weight], env[self.source]
        sizes = [len(kept), *(weight.shape[i] for i in self.order[2:])]
        units = torch.eye(torch.Size(sizes).numel(), dtype=x.dtype, device=x.device)
        own = sorted(range(len(self.order)), key=self.order.__getitem__)
        given = {
            self.source: x.index_select(self.channel, kept),
            self.weight: units.view(-1, *sizes).permute(own),
            self.added: None,
        }
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: given[n] if n in given else env[n])
        found: torch.Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return found.movedim(self.outputs, -1)


def sliding_product(node: fx.Node) -> SlidingProduct | None:
    """The parts of ``node`` if it multiplies activations by a weight with taps, every output all channels."""
    for found in contractions(node) if reads_weight(node) else ():
        x, w, out = (found.axes(tensor) for tensor in (found.x, found.w, found.out))
        free = [j for j in range(len(w)) if j != found.axis]
        passed = [j for j in free if w[j] is not UNIT and out.count(w[j]) == 1 and w[j] not in x]
        taps = [j for j in free if j not in passed]
        if found.weight.op != "get_attr" or found.source.op == "get_attr" or len(w) < 3 or len(passed) != 1:
            continue
        if w[found.axis] is UNIT or x[found.i] != w[found.axis] or UNKNOWN_SIZE in found.x.sizes:
            continue
        if any(w[j] is not UNIT and w[j] in (*x, *out) for j in taps):
            continue
        order = (passed[0], found.axis, *taps)
        outputs = out.index(w[passed[0]])
        return SlidingProduct(node, found.source, found.i, found.weight, order, outputs, found.added)
    return None


def lone_sliding_products(graph_module: fx.GraphModule) -> Iterator[SlidingProduct]:
    """Yield the products, in order of execution, whose weight may be changed without anything else changing."""
    alone = lone_parameters(graph_module)
    for node in graph_module.graph.nodes:
        found = sliding_product(node)
        if found is not None and alone(found.weight, len(found.order)):
            bias = found.added is not None and alone(found.added, 1)
            parts = (found.source, found.channel, found.weight, found.order, found.outputs, found.added)
            yield SlidingProduct(node, *parts, bias)
