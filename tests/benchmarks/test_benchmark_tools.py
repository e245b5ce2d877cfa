"""The benchmark tools measure what they say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import latency
from benchmarks.latency import LatencyRow, latency_rows, latency_table, write_json
from benchmarks.paired import Paired, paired_latency


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


# Latency


def test_paired_latency_interleaves_and_orders_its_interval():
    calls: list[str] = []
    dense, slim = (lambda name=name, **_: calls.append(name) for name in ("dense", "slim"))
    paired = paired_latency(dense, slim, {"input_ids": torch.zeros(1)}, rounds=3, min_run_s=0.0)
    assert isinstance(paired, Paired)
    assert paired.dense_ms > 0 and paired.slim_ms > 0
    assert 0 < paired.low <= paired.speedup <= paired.high
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    # The warm-up of both, then D S S D three times; equal neighbours are one run here.
    assert order == ["dense", "slim"] + ["dense", "slim"] * 3 + ["dense"]


def test_paired_latency_runs_in_inference_mode():
    modes = []

    def model(**_: object) -> None:
        modes.append(torch.is_inference_mode_enabled())

    paired_latency(model, model, {}, rounds=1, min_run_s=0.0)
    assert modes and all(modes)
    assert not torch.is_inference_mode_enabled()


def test_paired_latency_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds"):
        paired_latency(print, print, {}, rounds=0)


def test_latency_rows_leave_out_a_missing_model(tiny, tmp_path):
    pruned = SimpleNamespace(model=None, graph_module=tiny)
    rows = latency_rows(tiny, pruned, 50, shapes=[(1, 2), (2, 3)], rounds=1)
    assert [(row.output, row.batch, row.tokens) for row in rows] == [
        ("graph_module", 1, 2),
        ("graph_module", 2, 3),
    ]
    assert latency_table(rows, "title").row_count == 2
    write_json(tmp_path / "new" / "latency.json", rows, {"ratio": 0.2})
    content = json.loads((tmp_path / "new" / "latency.json").read_text())
    assert content["rows"][0]["latency"].keys() == {"dense_ms", "slim_ms", "speedup", "low", "high"}
    assert content["environment"]["threads"] == torch.get_num_threads()


def test_latency_table_shows_the_interval():
    row = LatencyRow("model", 1, 64, Paired(12.34, 10.0, 1.234, 1.1, 1.3))
    cells = [next(iter(column.cells)) for column in latency_table([row], "title").columns]
    assert cells == ["model", "1", "64", "12.3", "10.0", "1.23x", "1.10 to 1.30"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_latency_command_prints_and_writes_when_asked(tiny, tmp_path, monkeypatch, flags):
    asked = {}

    def prune(model, data, **options):
        asked.update(options, data=data)
        return SimpleNamespace(model=model, graph_module=model)

    monkeypatch.setattr("fxprune.prune", prune, raising=False)
    monkeypatch.setattr(latency, "load_demo_model", lambda: (tiny, None))
    monkeypatch.setattr(latency, "RESULTS", tmp_path / "latency.json")
    outcome = CliRunner().invoke(latency.app, ["--rounds", "1", "--ratio", "0.1", *flags], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert asked == {"data": None, "ratio": 0.1, "importance": "l2"}
    assert "torch:" in outcome.output and "10% of the parameters removed" in outcome.output
    assert (tmp_path / "latency.json").exists() == bool(flags)
    if flags:
        content = json.loads((tmp_path / "latency.json").read_text())
        assert len(content["rows"]) == 2 * len(latency.SHAPES)
        assert content["settings"]["ratio"] == 0.1
