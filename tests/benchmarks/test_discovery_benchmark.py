"""The discovery benchmark measures both tools on the same shape and counts what they find; no times are asserted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import fxprune
from benchmarks import discovery
from benchmarks.discovery import SHAPES, Measurement, Shape, compare, measure_apart, summarise

TINY = Shape("tiny", hidden=32, ffn=48, layers=2, heads=4, kv_heads=4)


def _made_up(trace: float, groups: int = 3, nodes: int = 100) -> Measurement:
    return Measurement({"trace": trace, "graph": 0.5, "groups": 0.25}, nodes, groups, start_gb=0.1, peak_gb=0.2)


def test_ours_counts_every_group_of_every_layer():
    found = discovery.measure_ours(TINY)
    with torch.device("meta"):
        model = discovery._llama(TINY)
    graph = fxprune.dependency_graph(fxprune.trace(model, dynamic=False))
    kinds = Counter(group.kind for group in fxprune.find_groups(graph))
    assert list(found.seconds) == ["trace", "graph", "groups"]
    assert found.groups == kinds.total()
    assert kinds["mlp"] == kinds["head"] == kinds["layer"] == TINY.layers
    assert kinds["channel"] == 1
    assert found.peak_gb >= found.start_gb > 0


def test_theirs_counts_attention_and_mlp_of_every_layer_and_the_width():
    pytest.importorskip("torch_pruning")
    found = discovery.measure_theirs(TINY)
    assert list(found.seconds) == ["graph", "groups"]
    assert found.groups == 2 * TINY.layers + 1
    assert found.nodes > 0


def test_a_whole_prune_is_told_from_its_trace():
    found = discovery.measure_prune(TINY)
    assert list(found.seconds) == ["trace", "removal"] and found.groups == 2 * TINY.layers


def test_a_layer_more_adds_the_same_nodes_and_groups():
    found = [discovery.measure_ours(replace(TINY, layers=n)) for n in (2, 3, 4)]
    nodes = [m.nodes for m in found]
    groups = [m.groups for m in found]
    assert nodes[2] - nodes[1] == nodes[1] - nodes[0] > 0
    assert groups[2] - groups[1] == groups[1] - groups[0] > 0


def test_a_measurement_apart_finds_what_one_here_finds():
    apart, here = measure_apart("ours", TINY, threads=1, timeout_s=200), discovery.measure_ours(TINY)
    assert (apart.nodes, apart.groups) == (here.nodes, here.groups)
    assert list(apart.seconds) == list(here.seconds)


def test_a_measurement_apart_says_why_it_failed():
    with pytest.raises(RuntimeError, match="nobody"):
        measure_apart("nobody", TINY, threads=1, timeout_s=200)


def test_tools_take_turns_and_so_does_the_first():
    calls = []

    def measure(tool, shape):
        calls.append(tool)
        return _made_up(trace=len(calls))

    rows = compare([TINY], ("ours", "theirs"), 3, measure)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert [row.tool for row in rows] == ["ours", "theirs"]
    assert (rows[0].seconds["trace"], rows[0].total_s, rows[0].least_s, rows[0].repeats) == (4, 4.75, 1.75, 3)


def test_compare_needs_a_repeat():
    with pytest.raises(ValueError, match="repeats=0"):
        compare([TINY], ("ours",), 0, lambda tool, shape: _made_up(1))


def test_repeats_that_found_different_things_are_refused():
    with pytest.raises(ValueError, match="tiny"):
        summarise("ours", TINY, [_made_up(1), _made_up(1, groups=4)])


def _run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(discovery, "RESULTS", tmp_path / "discovery.json")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    seen = []

    def measure(tool, shape, threads):
        seen.append((tool, shape.name, shape.layers))
        return _made_up(1.5 if tool == "ours" else 3.75, nodes=100 * shape.layers)

    monkeypatch.setattr(discovery, "measure_apart", measure)
    result = CliRunner().invoke(discovery.app, ["--repeats", "1", *arguments])
    return result, seen


def test_the_command_prints_a_line_for_each_tool_and_writes_json(monkeypatch, tmp_path):
    monkeypatch.setattr(discovery, "find_spec", lambda name: True)
    monkeypatch.setattr(discovery, "version", lambda name: "1")
    result, seen = _run(monkeypatch, tmp_path, "--shapes", "7b,70b", "--json")
    assert result.exit_code == 0, result.output
    tools = ("ours", "theirs", "prune")
    assert seen == [(tool, *shape) for shape in (("7b", 32), ("70b", 80)) for tool in tools]
    content = json.loads((tmp_path / "discovery.json").read_text())
    assert [(row["tool"], row["shape"]["name"], row["total_s"]) for row in content["rows"]] == [
        ("ours", "7b", 2.25),
        ("theirs", "7b", 4.5),
        ("prune", "7b", 4.5),
        ("ours", "70b", 2.25),
        ("theirs", "70b", 4.5),
        ("prune", "70b", 4.5),
    ]
    assert content["environment"]["torch"] == torch.__version__
    assert "2.0" in result.output


def test_without_torch_pruning_theirs_is_left_out_with_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    result, seen = _run(monkeypatch, tmp_path, "--shapes", "7b")
    assert seen == [("ours", "7b", 32), ("prune", "7b", 32)]
    assert "not installed" in result.output


def test_scaling_runs_one_shape_at_growing_depth(monkeypatch, tmp_path):
    result, seen = _run(monkeypatch, tmp_path, "--scaling", "--json")
    assert result.exit_code == 0, result.output
    assert seen == [("ours", "7b", n) for n in (2, 8, 20, 40, 80)]
    content = json.loads((tmp_path / "discovery_scaling.json").read_text())
    assert [row["shape"]["layers"] for row in content["rows"]] == [2, 8, 20, 40, 80]


def test_an_unknown_shape_is_named(monkeypatch, tmp_path):
    result, seen = _run(monkeypatch, tmp_path, "--shapes", "7b,8b")
    assert result.exit_code != 0
    assert "8b" in result.output
    assert not seen
    assert set(SHAPES) == {"125m", "7b", "70b", "405b"}
