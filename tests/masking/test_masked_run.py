"""Interpreters that run a graph dense, masked or gated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.axes import Keep
from fxprune.discovery.groups import consumers_of, find_consumers, units_at
from fxprune.graph.facts import fork
from fxprune.graph.tensors import weights
from fxprune.masking.compare import compare, masked_outputs
from fxprune.masking.masked_run import GatedRun, MaskedRun, PreciseRun, UntouchedRun, spread_gates
from fxprune.pipeline.pipeline import Pipeline
from fxprune.rules import picked
from tests.models import token_ids
from tests.oracle import Net, axes_of, decide, discover, groups_of, removal_of
from tests.zoo import tiny_model

UNITS = np.array([True, False, True, True, False, True])


def test_narrow_weights_are_run_in_float32() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(3, 4))
    graph_module = discover(net, {"x": torch.randn(2, 3)}).bfloat16()
    x = torch.randn(2, 3)
    found = PreciseRun(graph_module).run(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, F.linear(x, net.a.weight.float(), net.a.bias.float()))
    assert graph_module.a.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_matrices_of_experts_are_not_copied_for_each_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values and gradients are those of products with copies; GPT-OSS's weights are the second factor."""
    dense, runs = discover(tiny_model(family), {"input_ids": token_ids(2, 5)}), []
    weight = next(tensor for name, tensor in weights(dense) if name.endswith("experts.down_proj"))
    for least, count in ((1 << 40, 0), (0, 4)):
        monkeypatch.setattr(picked, "_LARGE", least)
        run, values = UntouchedRun(dense), []
        value = run.run_nodes((token_ids(3, 7),), lambda _, value, kept=values: (kept.append(value), value)[1])
        (found,) = torch.autograd.grad(value.logits.square().sum(), weight)
        runs.append((value.logits, found))
        assert sum(isinstance(value, tuple) and picks_size(value) for value in values) == count
    for plain, other in zip(*runs, strict=True):
        assert compare([plain], [other]) < 1e-5


def picks_size(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and all(isinstance(one, torch.Tensor) for one in value) and value[0].dim() == 3


def test_a_statistic_is_taken_at_other_sizes_than_the_traced_ones() -> None:
    """A mean over tokens and units joined to one axis was taken over the units of as many tokens as were traced."""
    net = Net(lambda m, x: m.b(m.a(x).flatten(1).mean(1, keepdim=True).exp()), a=nn.Linear(3, 6), b=nn.Linear(1, 2))
    dense = discover(net, {"x": torch.randn(2, 5, 3)})
    (group,) = (group for group in groups_of(dense) if group.size == 6)
    assert group.factor is not None and group.renormalised
    x = torch.randn(3, 4, 3)
    by_hand = net.b(net.a(x)[..., torch.from_numpy(UNITS)].mean((1, 2))[:, None].exp())
    found = MaskedRun(dense, removal_of(dense, Keep({group.factor: UNITS}))).run(x)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_an_axis_of_which_code_took_the_first_entries_has_the_size_of_the_run() -> None:
    """The tokens were one and a rest of unknown size; more of them were taken for units than there are."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        first, second = h[..., :3], h[..., 3:]
        both = torch.cat((second, first), -1).flatten(1).std(1, keepdim=True)
        return m.b(both.exp()) + h[:, :1].mean() + m.c(second).mean()

    net = Net(body, a=nn.Linear(3, 6), b=nn.Linear(1, 2), c=nn.Linear(3, 2))
    dense = discover(net, {"x": torch.randn(2, 3, 3)})
    halves = [group for group in groups_of(dense) if group.size == 3 and group.renormalised]
    for group in halves:
        assert group.factor is not None
        keep = Keep({group.factor: np.array([True, True, False])})
        x = torch.randn(3, 4, 3)
        work = fork(dense)
        decide(work, keep)
        slim = Pipeline("shrink")(work).graph_module
        assert torch.allclose(MaskedRun(dense, removal_of(dense, keep)).run(x), slim(x), atol=1e-6)
    assert halves


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_gates_mask_units_and_take_the_gradients() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()) + m.c(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    net.c = nn.Linear(4, 2)
    dense = discover(net, {"x": X})
    (group,) = groups_of(dense)
    assert group.factor is not None
    consumers = consumers_of(group, find_consumers(dense.graph, axes_of(dense)))
    assert [c.name for c in consumers] == ["b.weight", "c.weight"]
    units = np.array([True, False, True, False])
    gates = torch.from_numpy(units).float().requires_grad_()
    spread = {c: spread_gates(gates, units_at(group, c, axes_of(dense))) for c in consumers}
    found = GatedRun(dense, spread).run(X)
    assert compare(masked_outputs(dense, removal_of(dense, Keep({group.factor: units})), {"x": X}), [found]) < 1e-6
    found.sum().backward()
    hidden = net.a(X).relu()
    slope = (hidden * (net.b.weight.sum(0) + net.c.weight.sum(0))).sum(0)
    torch.testing.assert_close(gates.grad, slope.detach())
    assert all(p.grad is None for p in net.parameters())
    ones = {c: torch.ones(4) for c in consumers}
    assert torch.equal(GatedRun(dense, ones).run(X), net(X))
    spread = spread_gates(torch.tensor([0.5, 0.25]), np.array([1, -1, 0, 0]))
    assert spread.tolist() == [0.25, 1, 0.5, 0.5]
