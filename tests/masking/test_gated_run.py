"""Gates of one change nothing, gates of zero mask, and gradients go to the gates alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fxprune.axes import Keep
from fxprune.discovery.groups import consumers_of, find_consumers, units_at
from fxprune.masking.compare import compare, masked_outputs
from fxprune.masking.masked_run import GatedRun, spread_gates
from tests.oracle import Net, axes_of, discover, groups_of

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
    assert compare(masked_outputs(dense, axes_of(dense), Keep({group.factor: units}), (), {"x": X}), [found]) < 1e-6
    found.sum().backward()
    hidden = net.a(X).relu()
    slope = (hidden * (net.b.weight.sum(0) + net.c.weight.sum(0))).sum(0)
    torch.testing.assert_close(gates.grad, slope.detach())
    assert all(p.grad is None for p in net.parameters())
    ones = {c: torch.ones(4) for c in consumers}
    assert torch.equal(GatedRun(dense, ones).run(X), net(X))


def test_positions_of_no_unit_have_a_gate_of_one() -> None:
    spread = spread_gates(torch.tensor([0.5, 0.25]), np.array([1, -1, 0, 0]))
    assert spread.tolist() == [0.25, 1, 0.5, 0.5]
