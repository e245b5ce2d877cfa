"""Sites of ops, aliases, spellings and products with weights."""

from __future__ import annotations

import torch
from torch import fx, nn

import fxprune
from fxprune.graph.compat import tree_leaves
from fxprune.rules.apply import apply_rule_alone, describe_once, describe_rule
from fxprune.rules.probing import constant_result
from fxprune.rules.products import weight_product
from fxprune.rules.registry import alias_roots, find_spelling, may_alias, regroups, writes
from fxprune.rules.site import OpArguments, op_name

aten = torch.ops.aten


def graph_of(module: nn.Module, *shape: int) -> fx.Graph:
    return fxprune.trace(module.eval(), {"x": torch.randn(shape)}).graph_module.graph


class Net(nn.Module):
    """Two weights, one of them transposed, and a view that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Parameter(torch.randn(12, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x).clone()
        h.transpose(0, 1)[0].mul_(2)
        return h @ self.down


def test_a_write_through_a_view_has_the_root_of_the_view() -> None:
    graph = graph_of(Net(), 2, 5)
    root = alias_roots(graph)
    (written,) = (node for node in graph.nodes if writes(node))
    assert root[written].target is aten.clone.default
    assert find_spelling(aten.view.default) is not None and find_spelling(aten.view.dtype) is None
    views = [node for node in graph.nodes if may_alias(node) and root[node] is root[written]]
    assert len(views) >= 2 and not any(regroups(node) for node in views)


def test_products_name_their_weight_and_bias() -> None:
    graph = graph_of(Net(), 2, 5)
    found = {str(p.weight.target): p for node in graph.nodes if (p := weight_product(node)) is not None}
    assert {name: product.axis for name, product in found.items()} == {"up.weight": 1, "down": 0}
    added = found["up.weight"].added
    assert added is not None and added.target == "up.bias" and found["down"].added is None


def test_a_rule_in_isolation_describes_itself() -> None:
    node = next(node for node in graph_of(Net(), 2, 5).nodes if node.target is aten.linear.default)
    site, stated = apply_rule_alone(node)
    assert str(site) == describe_rule(node) == describe_once(site, {})
    assert op_name(node.target) == "linear" and OpArguments(node).get("bias").target == "up.bias"
    assert not stated.unruled and len(tree_leaves(site.outs)) == 1
    assert constant_result(node, {}) is None
