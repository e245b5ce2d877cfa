"""Values are shown as they come, batch by batch, and the graph is run no further than is watched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.data.calibration import Sample
from fxprune.errors import CalibrationError
from fxprune.masking.parts import observe
from tests.oracle import Net, discover


def test_what_is_watched_is_seen_and_nothing_after_it_runs() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, {"x": torch.randn(2, 3)})
    nodes = {node.name: node for node in dense.graph.nodes}
    samples = [Sample({"x": torch.randn(2, 3)}, torch.zeros(1, 2)) for _ in range(3)]
    seen: list[torch.Tensor] = []
    totals: list[int] = []

    def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
        totals.append(total)
        return batches

    with torch.no_grad():
        net.b.weight.fill_(float("nan"))
    observe(dense, samples, {nodes["relu"]: seen.append}, 2, track)
    expected = [net.a(sample.inputs["x"]).relu() for sample in samples]
    assert totals == [2] and [len(value) for value in seen] == [4, 2]
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected).detach())
    assert not any(value.requires_grad for value in seen)


def test_samples_that_cannot_be_computed_are_refused() -> None:
    dense = discover(Net(lambda m, x: m.a(x), a=nn.Linear(3, 4)), {"x": torch.randn(2, 3)})
    last = next(node for node in reversed(dense.graph.nodes) if node.op == "call_function")
    with pytest.raises(CalibrationError, match="cannot compute a sample"):
        observe(dense, [Sample({"x": torch.randn(2, 5)}, torch.zeros(1, 2))], {last: print}, 1, lambda x, _: x)
