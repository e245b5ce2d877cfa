"""Rules of complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from tests.oracle import Net, axes_of, check_removes_exactly, discover, groups_of, shape_of
from tests.rules.test_rules import Middle, between


def pairs(h: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)))


def back(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z).flatten(-2)


COMPLEX: dict[str, tuple[Middle, int, list[int]]] = {
    "there-and-back": (lambda h: back(pairs(h)), 12, [6]),
    "turned": (lambda h: back(pairs(h) * torch.polar(torch.ones(6), torch.arange(6.0))), 12, [6]),
    "of-a-cut": (lambda h: torch.cat((h[..., :6].exp(), back(pairs(h[..., 6:]))), -1), 12, [6, 3]),
    "in-a-head": (lambda h: back(pairs(h.unflatten(-1, (3, 4)))).flatten(-2), 12, [3, 2]),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name: str) -> None:
    middle, width, groups = COMPLEX[name]
    check_removes_exactly(*between(middle, width), groups)


def test_a_product_with_an_imaginary_number_is_not_zero() -> None:

    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(torch.zeros(12), torch.ones(12)) * torch.exp(m.a(x))
        return m.b(z.imag.sum(-1, keepdim=True).expand(2, 7, 5))  # type: ignore[no-any-return]

    dense = check_removes_exactly(Net(body, a=nn.Linear(10, 12), b=nn.Linear(5, 9)), {"x": torch.randn(2, 7, 10)})
    group = next(group for group in groups_of(dense) if group.size == 12)
    assert group.renormalised == ("sum_1",)


def test_rotary_pairs_are_units_of_the_frequencies() -> None:
    def body(m: Net, x: torch.Tensor) -> torch.Tensor:
        turns = torch.outer(torch.arange(x.shape[1]).float(), m.frequencies)
        by = torch.polar(torch.ones_like(turns), turns)[:, None]
        q, k = (back(pairs(part(x).unflatten(-1, (3, 8))) * by).transpose(1, 2) for part in (m.q, m.k))
        return m.b((q @ k.mT).softmax(-1).sum(1))  # type: ignore[no-any-return]

    parts = {"q": nn.Linear(10, 24), "k": nn.Linear(10, 24), "b": nn.Linear(7, 9)}
    dense = discover(Net(body, **parts, frequencies=torch.rand(4)), {"x": torch.randn(2, 7, 10)})
    assert shape_of(dense, "q.weight") == ["(a:3 * b:4 * c:2)", "d:10"]
    heads, turned, parts_of_one = axes_of(dense).tensors["q.weight"][0].parts  # type: ignore[union-attr]
    assert axes_of(dense).tensors["frequencies"] == (turned,)
    assert axes_of(dense).frozen[parts_of_one].reason == "the real and the imaginary part of a number"
    assert heads not in axes_of(dense).frozen


def test_the_input_of_view_as_complex_is_copied() -> None:
    dense = discover(*between(lambda h: back(pairs(h)), 12))
    viewed = [node for node in dense.graph.nodes if node.target is torch.ops.aten.view_as_complex.default]
    sources = [node.args[0] for node in viewed]
    assert sources and all(isinstance(node, fx.Node) for node in sources)
    assert {node.target for node in sources} == {torch.ops.aten.clone.default}
