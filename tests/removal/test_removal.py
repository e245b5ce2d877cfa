"""A removal says what it leaves of every tensor, constants included, and goes stale with the graph."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fxprune.axes import Keep
from fxprune.graph.facts import facts_of
from fxprune.removal.plan import plan_of
from fxprune.removal.removal import Bypassed, Removal, Removed, Sliced
from tests.oracle import Net, axes_of, decide, discover, groups_of


def test_a_removal_knows_its_plan_and_what_stays_of_constants() -> None:
    net = Net(lambda net, x: net.b(net.a(x) * torch.arange(4)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    (group,) = groups_of(dense)
    assert group.factor is not None
    removal = decide(dense, Keep({group.factor: np.array([True, False, True, True])}))
    (constant,) = axes_of(dense).constants
    assert removal.plan == plan_of(axes_of(dense), removal.keep)
    assert removal.kept == {**removal.plan.kept, constant: {0: [0, 2, 3]}}
    facts = facts_of(dense)
    for step in (Bypassed(removal), Sliced(removal), Removed(removal)):
        facts.put(step)
        assert step.removal is removal
    facts.drop_about("graph", "some-pass")
    assert Removal not in facts and facts[Removed].removal is removal
