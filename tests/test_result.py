"""What a prune gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fxprune.errors import CheckpointError, PassError
from fxprune.pipeline.pipeline import Pipeline
from fxprune.result import Result
from fxprune.trace import trace
from tests.oracle import Net

STEPS = "find-groups, l2, select-by-ratio{ratio=0.25, protect=()}, shrink{verify}"


def test_a_result_is_read_from_the_facts_a_pipeline_left(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    x = torch.randn(2, 10)
    slim = Pipeline(STEPS)(trace(net, {"x": x}).graph_module).graph_module
    with pytest.raises(PassError, match="the fact Report is not known"):
        Result.of(slim)
    Pipeline("emit-model, make-report")(slim)
    result = Result.of(slim)
    assert result.model is None and result.plan.kept["a.weight"][0] == result.plan.kept["b.weight"][1]
    assert torch.equal(result(x), slim(x))
    with pytest.raises(CheckpointError, match="not a Hugging Face model"):
        result.save_pretrained(tmp_path / "slim")
    result.export(tmp_path / "slim.pt2")
    assert torch.allclose(torch.export.load(tmp_path / "slim.pt2").module()(x=x), result(x), atol=1e-6)
