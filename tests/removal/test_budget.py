"""What a model costs; tests/passes/select/ compares budgets with the slim graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.errors import PassError
from fxprune.graph.counting import count_macs
from fxprune.removal.budget import make_budget
from tests.models import tiny
from tests.oracle import Net, axes_of, discover


def test_work_of_experts_is_that_of_the_tokens_routed_to_them() -> None:
    graph = discover(tiny("mixtral", num_hidden_layers=1))
    assert make_budget("macs", graph, axes_of(graph)).total == pytest.approx(count_macs(graph), rel=1e-6)


def test_a_model_without_a_cache_has_none_to_count() -> None:
    plain = discover(Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)), {"x": torch.randn(2, 3)})
    with pytest.raises(PassError, match="no bytes of the key-value cache"):
        make_budget("kv", plain, axes_of(plain))
