"""Groups of units that are removed together, and the products that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.discovery.groups import (
    DEFAULT_KINDS,
    as_kinds,
    bare_kind,
    consumers_of,
    find_consumers,
    read_weight,
    units_at,
)
from fxprune.errors import FxpruneError
from fxprune.graph.facts import facts_of
from fxprune.pipeline.registry import load_pass
from fxprune.removal.removal import Scores
from tests.oracle import Net, axes_of, discover, groups_of


def test_kinds_are_checked_and_one_may_stand_alone() -> None:
    assert as_kinds("kinds", "mlp") == ("mlp",) and as_kinds("kinds", ["head", "layer"]) == ("head", "layer")
    assert as_kinds("kinds", DEFAULT_KINDS) == DEFAULT_KINDS
    assert as_kinds("kinds", ["exact-mlp", "exact-layer"]) == ("exact-mlp", "layer")
    for kinds, words in (("exact-mpl", "Did you mean 'mlp'"), (("heads",), "Did you mean 'head'"), ((), "is empty")):
        with pytest.raises(FxpruneError, match=words):
            as_kinds("kinds", kinds)
    assert bare_kind("exact-mlp") == bare_kind("mlp") == "mlp" and bare_kind(None) is None


def test_products_with_parameters_are_found() -> None:
    again = torch.nn.functional.linear
    net = Net(lambda m, x: again(m.b(m.a(x).relu()), m.a.weight.T), a=nn.Linear(3, 4), b=nn.Linear(4, 4))
    dense = discover(net, {"x": torch.randn(2, 3)})
    found = find_consumers(dense.graph, axes_of(dense))
    assert [(c.name, c.axis, c.source.name, c.dim) for c in found] == [
        ("a.weight", 1, "x", 1),
        ("b.weight", 1, "relu", 1),
        ("a.weight", 0, "linear_1", 1),
    ]
    assert [read_weight(node) for node in found[2].node.all_input_nodes] == [None, "a.weight"]
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu())), a=nn.Linear(3, 4), b=nn.Linear(4, 5), c=nn.Linear(5, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    found = find_consumers(dense.graph, axes_of(dense))
    names = {group.size: [c.name for c in consumers_of(group, found)] for group in groups_of(dense)}
    assert names == {4: ["b.weight"], 5: ["c.weight"]}, "consumers of a group contract its units"
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Conv1d(4, 6, 3), b=nn.Conv1d(6, 6, 3, groups=3))
    dense = discover(net, {"x": torch.randn(1, 4, 9)})
    assert [(c.name, c.axis, c.dim) for c in find_consumers(dense.graph, axes_of(dense))] == [("a.weight", 1, 1)]


def test_rows_that_tokens_look_up_are_what_a_product_reads() -> None:
    """They counted as a weight, so a layer that reads an embedding as it is had no inputs to be scored by."""

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(m.a(m.table(x)).relu(), m.pair[0] @ m.pair[1])

    parts = {"table": nn.Embedding(9, 3), "a": nn.Linear(3, 4), "pair": nn.Parameter(torch.randn(2, 4, 4))}
    dense = discover(Net(body, **parts), {"x": torch.zeros(2, 5, dtype=torch.long)})
    found = find_consumers(dense.graph, axes_of(dense))
    assert [(c.name, c.axis, c.source.name, c.dim) for c in found] == [("a.weight", 1, "embedding", 2)]
    width = next(group for group in groups_of(dense) if group.size == 3)
    load_pass("calibrate", data=torch.tensor([[1, 2, 2, 5]]))(dense)
    load_pass("wanda", kinds=(width.kind,), readers_only=True)(dense)
    table, weight = parts["table"].weight.detach(), parts["a"].weight.detach()
    rms = table[[1, 2, 2, 5]].square().mean(0).sqrt()
    expected = (weight.abs().sum(0) * rms).double().numpy()
    np.testing.assert_allclose(facts_of(dense)[Scores].units[width.name], expected, rtol=1e-5)


def test_units_inside_outer_ones_count_through() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        q, k = m.q(x).view(5, 2, 3, 4), m.k(x).view(5, 2, 4)
        scores = torch.einsum("tghd,sgd->ghts", q, k).softmax(-1)
        return m.o(torch.einsum("ghts,sgd->tghd", scores, k).reshape(5, 24))  # type: ignore[no-any-return]

    net = Net(body, q=nn.Linear(6, 24), k=nn.Linear(6, 8), o=nn.Linear(24, 6))
    dense = discover(net, {"x": torch.randn(5, 6)})
    (inner,) = (g for g in groups_of(dense) if g.outer is not None and g.size == 3)
    found = find_consumers(dense.graph, axes_of(dense))
    (consumer,) = consumers_of(inner, found)
    assert consumer.name == "o.weight"
    assert units_at(inner, consumer, axes_of(dense)).tolist() == [unit for unit in range(6) for _ in range(4)]
