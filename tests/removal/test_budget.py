"""Budgets of a model; tests/passes/select/ compares them with the slim graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.errors import FxpruneError
from fxprune.graph.counting import count_macs
from fxprune.removal.budget import check_budget, make_budget, read_timing
from tests.models import tiny
from tests.oracle import Net, axes_of, discover
from tests.remembered import grouped, pruned


def test_work_of_experts_is_that_of_the_tokens_routed_to_them() -> None:
    graph = grouped("mixtral", num_hidden_layers=1)
    assert make_budget("macs", graph, axes_of(graph)).total == pytest.approx(count_macs(graph), rel=1e-6)


@pytest.mark.parametrize("quantity", ["macs", "kv", "memory@100"])
def test_budgets_do_not_depend_on_the_traced_sizes(quantity: str) -> None:
    """With as many samples as tokens in the example, work was that of one token."""
    model = tiny("llama", num_hidden_layers=1)
    graphs = [discover(model, {"input_ids": torch.zeros(shape, dtype=torch.long)}) for shape in ((2, 16), (3, 3))]
    one, other = (make_budget(quantity, graph, axes_of(graph)).total for graph in graphs)
    assert one == other


def test_work_of_convolutions_is_that_of_all_their_taps() -> None:
    """Convolutions counted as if their kernels had one tap, and those of a transposed one by its output."""

    def body(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.out(net.up(net.grouped(net.first(x).relu()).relu()).mean((2, 3)))

    parts = {"first": nn.Conv2d(3, 8, 3), "grouped": nn.Conv2d(8, 8, (3, 2), groups=4), "out": nn.Linear(6, 4)}
    net = Net(body, **parts, up=nn.ConvTranspose2d(8, 6, 3, stride=2))
    graph = discover(net, {"x": torch.zeros(2, 3, 9, 9)})
    by_hand = 8 * 7 * 7 * 3 * 9 + 8 * 5 * 6 * 2 * 6 + 8 * 5 * 6 * 6 * 9 + 6 * 4
    assert make_budget("macs", graph, axes_of(graph)).total == count_macs(graph) == by_hand


def bench_table(folder: Path, engines: tuple[str, ...] = ("transformers",), fixed: float = 0.25) -> Path:
    """A table as the benchmark of latency writes it: a fixed part, and one that goes with the work."""
    rows = [
        {
            "engine": engine,
            "case": {"phase": phase, "batch": batch, "tokens": 128},
            "candidate": "slim" if share < 1 else "dense",
            "seconds": batch * (fixed + (1 - fixed) * share),
            "ideal": 1 / share,
        }
        for engine in engines
        for phase in ("prefill", "decode")
        for batch in (1, 8)
        for share in (1.0, 0.8, 0.5)
    ]
    path = folder / "times.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_the_fixed_part_of_the_time_is_fitted(tmp_path: Path) -> None:
    timing = read_timing("decode", str(bench_table(tmp_path)))
    assert (timing.seconds, timing.fixed) == (1.0, pytest.approx(0.25))
    speeds = {"dense": {"parameters": 100, "prefill_ms": 8.0, "decode_ms": 4.0}}
    speeds["slim"] = {"parameters": 50, "prefill_ms": 4.0, "decode_ms": 3.0}
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps(speeds))
    assert read_timing("prefill", str(path)).fixed == pytest.approx(0)
    assert read_timing("decode", str(path)).fixed == pytest.approx(0.5)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_fraction_of_the_time_goes(tmp_path: Path, phase: str) -> None:
    place = f"{phase}@{bench_table(tmp_path, ('transformers', 'other: engine'))}:transformers"
    result = pruned("llama", importance="l2", recipe="llm-pruner", ratio=0.15, budget=place, kinds=["mlp"], protect=())
    work = {"decode": "parameters", "prefill": "macs"}[phase]
    before, after = getattr(result.report, work)
    assert after / before == pytest.approx(1 - 0.15 / 0.75, abs=0.02)
    assert any("microseconds of" in note for note in result.report.notes)


def test_a_file_without_times_is_refused(tmp_path: Path) -> None:
    table = bench_table(tmp_path, ("one", "two"))
    for place, said in (
        ("nowhere.json", "no such file"),
        (f"{table}:three", "unknown engine"),
        (str(table), "unknown engine"),
    ):
        with pytest.raises(FxpruneError, match=said):
            check_budget("budget", f"decode@{place}")
    for content, said in (("[]", "no measurements"), ('{"rows": [{}]}', "no measurements"), ("no", "cannot be read")):
        table.write_text(content)
        with pytest.raises(FxpruneError, match=said):
            check_budget("budget", f"decode@{table}")
    table.write_text(json.dumps({"dense": {"parameters": 9, "prefill_ms": 1.0, "decode_ms": 1.0}}))
    with pytest.raises(FxpruneError, match="no slim model"):
        check_budget("budget", f"prefill@{table}")
