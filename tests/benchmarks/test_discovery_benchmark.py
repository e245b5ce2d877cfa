"""Test the discovery benchmark: counts of both tools, summaries and the command; no times are asserted."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

import fxprune
from benchmarks import discovery
from benchmarks.common import Shape
from benchmarks.discovery import Discovery, compare, measure_in_process, summarise
from tests.benchmarks.command import run_main

TINY = Shape("tiny", hidden=32, ffn=48, layers=2, heads=4, kv_heads=4)


def made_up(trace: float, groups: int = 3, nodes: int = 100) -> Discovery:
    return Discovery({"trace": trace, "graph": 0.5, "groups": 0.25}, nodes, groups, start_gb=0.1, peak_gb=0.2)


@pytest.mark.slow
def test_ours_counts_every_group_and_grows_by_layers():
    found = [discovery.measure_ours(replace(TINY, layers=n)) for n in (2, 3, 4)]
    with torch.device("meta"):
        model = LlamaForCausalLM(TINY.config())
    graph = fxprune.dependency_graph(fxprune.trace(model, dynamic=False))
    kinds = Counter(group.kind for group in fxprune.find_groups(graph))
    assert list(found[0].seconds) == ["trace", "graph", "groups"] and found[0].groups == kinds.total()
    assert kinds["mlp"] == kinds["head"] == kinds["layer"] == TINY.layers and kinds["channel"] == 1
    assert found[0].peak_gb >= found[0].start_gb > 0
    for counts in ([m.nodes for m in found], [m.groups for m in found]):
        assert counts[2] - counts[1] == counts[1] - counts[0] > 0


@pytest.mark.slow
def test_a_process_measures_the_same_counts_and_reports_failures():
    apart = measure_in_process("theirs", TINY, threads=1, timeout_s=200)
    assert apart.groups == 2 * TINY.layers + 1 and list(apart.seconds) == ["graph", "groups"]
    with pytest.raises(RuntimeError, match="nobody"):
        measure_in_process("nobody", TINY, threads=1, timeout_s=200)


def test_tools_alternate_in_changing_order():
    calls = []

    def measure(tool, shape):
        calls.append(tool)
        return made_up(trace=len(calls))

    rows = compare([TINY], ("ours", "theirs"), 3, measure)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert [row.tool for row in rows] == ["ours", "theirs"]
    assert (rows[0].seconds["trace"], rows[0].total_s, rows[0].least_s, rows[0].repeats) == (4, 4.75, 1.75, 3)


def test_no_repeats_and_differing_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        compare([TINY], ("ours",), 0, lambda tool, shape: made_up(1))
    with pytest.raises(ValueError, match="tiny"):
        summarise("ours", TINY, [made_up(1), made_up(1, groups=4)])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command with made-up measurements; returns the result, what was measured, and the folder of results."""
    monkeypatch.setattr(discovery, "RESULTS", tmp_path / "discovery.json")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    seen = []

    def measure(tool, shape, threads):
        seen.append((tool, shape.name, shape.layers))
        return made_up(1.5 if tool == "ours" else 3.75, nodes=100 * shape.layers)

    monkeypatch.setattr(discovery, "measure_in_process", measure)
    return lambda *arguments: (run_main(discovery.main, "--repeats", "1", *arguments), seen, tmp_path)


def test_the_command_prints_a_row_for_each_tool_and_writes_json(run, monkeypatch):
    monkeypatch.setattr(discovery, "find_spec", lambda name: True)
    monkeypatch.setattr(discovery, "version", lambda name: "1")
    result, seen, folder = run("--shapes", "7b,70b", "--json")
    assert result.exit_code == 0, result.output
    tools = ("ours", "theirs", "prune")
    assert seen == [(tool, *shape) for shape in (("7b", 32), ("70b", 80)) for tool in tools]
    content = json.loads((folder / "discovery.json").read_text())
    rows = [(row["tool"], row["shape"]["name"], row["total_s"]) for row in content["rows"]]
    assert rows == [(t, s, 2.25 if t == "ours" else 4.5) for s in ("7b", "70b") for t in tools]
    assert content["environment"]["torch"] == torch.__version__ and "2.0" in result.output


def test_without_torch_pruning_theirs_is_left_out_with_a_note(run, monkeypatch):
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    result, seen, _ = run("--shapes", "7b")
    assert seen == [("ours", "7b", 32), ("prune", "7b", 32)] and "not installed" in result.output


@pytest.mark.parametrize(
    ("how", "tool", "shape", "depths"),
    [
        ("scaling", "ours", "7b", (2, 8, 20, 40, 80)),
        ("passes", "passes", "narrow", (4, 8, 16, 32, 64, 128)),
    ],
)
def test_shapes_of_growing_depth_are_measured(how, tool, shape, depths, run):
    result, seen, folder = run(f"--{how}", "--json")
    assert result.exit_code == 0 and seen == [(tool, shape, n) for n in depths], result.output
    rows = json.loads((folder / f"discovery_{how}.json").read_text())["rows"]
    assert [row["shape"]["layers"] for row in rows] == list(depths)
    result, seen, _ = run("--shapes", "7b,8b")
    assert result.exit_code != 0 and "8b" in result.output and len(seen) == len(depths)


@pytest.mark.slow
def test_a_prune_and_each_of_its_passes_are_timed():
    found = discovery.measure_prune(TINY)
    assert list(found.seconds) == ["trace", "removal"] and found.groups == 2 * TINY.layers
    found = discovery.measure_passes(TINY).seconds
    assert {"trace", "find-groups", "l2", "select-by-ratio", "slice-parameters", "emit-model"} <= found.keys()
