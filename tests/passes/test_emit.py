"""Groups, the slim model, the report and the checkpoint as passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fxprune.passes.emit import EmitModelPass, MakeReportPass, SaveCheckpointPass, Saved
from torch import nn

from fxprune.emit.emitted import Emitted
from fxprune.errors import CheckpointError, PassError
from fxprune.graph.facts import Source, facts_of
from fxprune.pipeline.pipeline import Pipeline
from fxprune.report.report import Report
from fxprune.trace import trace
from tests.models import tiny
from tests.oracle import Net

SHRINK = "find-groups, l2, select-by-ratio{ratio=0.25, protect=()}, shrink"


def test_model_report_and_checkpoint_come_one_after_the_other(tmp_path: Path) -> None:
    slim = Pipeline(SHRINK)(trace(tiny("llama")).graph_module).graph_module
    with pytest.raises(PassError, match=r"the fact Emitted is not known. Run emit-model first"):
        SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    EmitModelPass()(slim)
    facts = facts_of(slim)
    assert Source not in facts
    model = facts[Emitted].require_model()
    assert {id(p) for p in model.parameters()} == {id(p) for p in slim.parameters()}
    MakeReportPass()(slim)
    report = facts[Report]
    assert report.ratio == 0.25 and report.verification_error is None
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    with pytest.raises(CheckpointError, match=r"save-checkpoint\{folder=slim\}"):
        SaveCheckpointPass()(slim)
    SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    assert facts[Saved].folder == tmp_path / "slim"
    assert json.loads((tmp_path / "slim/report.json").read_text())["ratio"] == 0.25


def test_what_is_no_hugging_face_model_gets_none_and_the_reason(tmp_path: Path) -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5))
    slim = Pipeline(SHRINK)(trace(net, {"x": torch.randn(2, 10)}).graph_module).graph_module
    Pipeline([EmitModelPass(), MakeReportPass()])(slim)
    assert facts_of(slim)[Report].model_reasons == ("the model passed is not a Hugging Face model",)
    with pytest.raises(CheckpointError, match="not a Hugging Face model"):
        SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    assert list(tmp_path.iterdir()) == []


def test_what_no_example_input_reaches_is_noted_and_what_does_not_apply_is_left_out() -> None:
    """Such parameters were left out of the ratio without a word, and images had tokens and a cache."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5), other=nn.Linear(3, 3))
    slim = Pipeline(SHRINK)(trace(net, {"x": torch.randn(2, 10)}).graph_module).graph_module
    Pipeline([EmitModelPass(), MakeReportPass()])(slim)
    report = facts_of(slim)[Report]
    assert any(note.startswith("12 parameters of the model (5.7%)") for note in report.notes)
    assert [size.name for size in report.headlines()] == ["parameters", "MACs of a sample", "bytes of weights"]


def test_groups_under_a_norm_are_named_and_can_be_left_out() -> None:
    """They were taken like others, and called exact: the norm runs over fewer units afterwards."""
    parts = {"a": nn.Linear(10, 16), "b": nn.Linear(16, 10), "c": nn.Linear(10, 16), "d": nn.Linear(16, 10)}
    net = Net(lambda m, x: m.b(m.norm(m.a(x))) + m.d(m.c(x).relu()), norm=nn.LayerNorm(16), **parts)
    graph = trace(net, {"x": torch.randn(2, 10)}).graph_module
    shrink = "find-groups, l2{kinds=[%s]}, select-by-group-ratio{%s, group_ratio=%s, protect=()}"
    shrink += ", shrink{verify}, make-report"
    reports = []
    for scored, shrunk, ratio in (
        ("mlp", "mlp", "0.25"),
        ("exact-mlp", "exact-mlp", "0.25"),
        ("exact-mlp", "mlp", "[[exact-mlp, 0.25]]"),
    ):
        slim = Pipeline(shrink % (scored, f"kinds=[{shrunk}]", ratio))(graph).graph_module
        reports.append(facts_of(slim)[Report])
    assert [len(report.widths) for report in reports] == [2, 1, 1]
    (nodes,) = reports[0].renormalised.values()
    assert any("norm" in node for node in nodes) and set(reports[0].renormalised) < set(reports[0].widths)
    assert reports[1].renormalised == reports[2].renormalised == {} and reports[1].widths == reports[2].widths
    assert max(report.verification_error or 0 for report in reports) < 1e-5
