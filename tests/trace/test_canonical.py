"""Canonical form of a graph: position-dependent constants folded to buffers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.axes import Keep
from tests.oracle import Net, axes_of, check_removes_exactly, discover, groups_of, slim_graph

fold = importlib.import_module("fxprune.trace.canonical")  # the name ``trace`` of the package is the function

Body = Callable[[Any, torch.Tensor], torch.Tensor]

X = {"x": torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))}


def net(middle: Body, width: int = 12, out: int = 12, **parts: Any) -> Net:
    a, b = nn.Linear(10, width), nn.Linear(out, 9)
    return Net(lambda m, x: m.b(middle(m, m.a(x))), a=a, b=b, **parts)


def slopes(count: int) -> torch.Tensor:
    return 2.0 ** -torch.arange(1, count + 1, dtype=torch.float32)


def constants(dense: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in dense.named_buffers() if name.startswith("constant_")}


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (4, -1)).transpose(1, 2)


def alibi(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention whose scores fall with the distance, at a slope of its own for each head."""
    q, k, v = (heads(h) for h in m.a(x).chunk(3, -1))
    places = torch.arange(x.shape[1])
    bias = -slopes(4)[:, None, None] * (places[:, None] - places[None, :]).abs()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return m.b(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def retention(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Linear attention with a decay of its own for each head, as a table over a fixed chunk and as a scan."""
    q, k, v = (heads(h) for h in m.a(x).chunk(3, -1))
    decay = torch.log(1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float32)))
    place = torch.arange(7)
    distance = (place[:, None] - place[None, :]).float()
    table = torch.where(distance >= 0, torch.exp(distance * decay[:, None, None]), 0.0)
    out = (q @ k.mT * table) @ v
    return m.b(out.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [alibi, retention])
def test_heads_go_with_their_constants(body: Body) -> None:
    dense = check_removes_exactly(Net(body, a=nn.Linear(10, 36), b=nn.Linear(12, 9)), X, [4, 3, 3])
    head = next(group for group in groups_of(dense) if group.kind == "head")
    assert {member.name for member in head.members} > {"a.weight", "b.weight"}
    held = [member for member in head.members if member.name in constants(dense)]
    assert held and not any(member.trained for member in held)
    if body is alibi:
        slim = slim_graph(dense, Keep({head.factor: torch.tensor([True, False, False, True]).numpy()}))
        found = [value.flatten() for value in constants(slim).values() if value.numel() == 2]
        assert any(torch.equal(value.abs(), slopes(4)[[0, 3]]) for value in found)


def test_constants_made_of_several_ops_and_literals_are_one_buffer() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        numbers = torch.cat((torch.tensor([3.0, 1.0, 4.0]), torch.stack([torch.tensor(1.5)] * 2), slopes(7)))
        return h * numbers

    dense = check_removes_exactly(net(middle), X, [12])
    assert [tuple(value.shape) for value in constants(dense).values()] == [(12,)]
    assert axes_of(dense).buffers == ("constant_0",)


def test_uniform_constants_and_values_that_depend_on_the_length_stay_in_the_graph() -> None:
    dense = check_removes_exactly(net(lambda m, h: h * (torch.ones(12).cumsum(0) * 0 + 2) + torch.full((12,), 0.5)), X)
    assert constants(dense) == {}

    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h * torch.arange(h.shape[1])[:, None] + h.new_ones(h.shape[1], h.shape[1]).tril() @ h

    model, longer = net(middle), torch.randn(3, 5, 10)
    dense = check_removes_exactly(model, X, [12])
    assert constants(dense) == {}
    assert torch.allclose(dense(x=longer), model(longer), atol=1e-5)


def test_random_numbers_and_written_tensors_stay_in_the_graph() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        table = torch.arange(12.0)
        first = table[:4]
        first.add_(h.sum().round())
        return h * table + torch.rand(12) * 0

    model = net(middle)
    dense = discover(model, X)
    assert constants(dense) == {}
    assert torch.allclose(dense(**X), model(**X), atol=1e-5)


def test_large_constants_stay_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "MAX_CONSTANT_ELEMENTS", 11)
    assert constants(discover(net(lambda m, h: h * torch.arange(12)), X)) == {}
    monkeypatch.setattr(fold, "MAX_CONSTANT_ELEMENTS", 12)
    assert len(constants(discover(net(lambda m, h: h * torch.arange(12)), X))) == 1


def test_buffers_of_the_model_are_read_and_names_do_not_meet() -> None:
    model = net(lambda m, h: h * m.constant_0 * torch.arange(12) + m.plain * 2, constant_0=torch.randn(12))
    model.plain = torch.randn(12)
    dense = check_removes_exactly(model, X, [12])
    assert dense.get_buffer("constant_0") is model.constant_0
    assert torch.equal(dense.get_buffer("constant_1"), torch.arange(12))
    assert "plain" in axes_of(dense).buffers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constants_follow_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return h * (torch.arange(1, 13, device=h.device).to(h.dtype) / 3)

    model = net(middle)
    dense = discover(model, X)
    assert [value.dtype for value in constants(dense).values()] == [torch.float32]
    slim = dense.to(dtype)
    assert slim(x=X["x"].to(dtype)).dtype == dtype
    wide = discover(net(middle).double(), {"x": X["x"].double()})
    assert [value.dtype for value in constants(wide).values()] == [torch.float64]


def test_a_numbered_embedding_is_no_zero_where_its_number_is_masked() -> None:
    """Masking sets the number of a removed unit to zero, and row zero of the table is a row like any other."""

    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        weight = m.table(torch.arange(12)).squeeze(-1)
        return (h.sigmoid() * weight).sum(-1, keepdim=True).expand(2, 7, 12)

    dense = check_removes_exactly(net(middle, table=nn.Embedding(12, 1)), X)
    held = {group.name: group for group in groups_of(dense) if "constant_0" in {m.name for m in group.members}}
    assert [(group.size, len(group.renormalised)) for group in held.values()] == [(12, 1)]


def test_constants_are_where_the_model_is_and_groups_are_the_same_without_storage() -> None:
    def middle(m: Any, h: torch.Tensor) -> torch.Tensor:
        return (h * torch.arange(12, device=h.device))[..., torch.arange(3, 9)] + torch.tensor([1.0, 2, 3, 4, 5, 6])

    real, empty = net(middle, out=6), net(middle, out=6).to("meta")
    found = [discover(model, X) for model in (real, empty)]
    assert {value.device.type for value in found[0].buffers()} == {"cpu"}
    assert {value.device.type for value in found[1].buffers()} == {"meta"}
    sizes = [[(group.kind, group.size) for group in groups_of(dense)] for dense in found]
    assert sizes[0] == sizes[1] == [("mlp", 3), ("mlp", 6), ("mlp", 3)]
    keep = Keep({groups_of(found[1])[1].factor: torch.arange(6).numpy() > 1})
    assert slim_graph(found[1], keep).get_parameter("b.weight").shape == (9, 4)
