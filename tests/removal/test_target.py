"""Targets and budgets."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from fxprune.errors import ArgumentError, FxpruneError, UnknownNameError
from fxprune.graph.counting import count_macs
from fxprune.removal.budget import FileBudget, check_budget, make_budget, read_timing
from fxprune.removal.formats import FORMATS, Place, check_format, least_each, type_of
from fxprune.removal.target import Reached, parse_target
from tests.models import tiny
from tests.oracle import Net, axes_of, discover
from tests.remembered import grouped, pruned


@pytest.mark.parametrize(
    ("text", "budget", "amount", "part"),
    [
        ("100M", "params", 100e6, 0),
        ("1.5b", "params", 1.5e9, 0),
        (90_000, "params", 90_000, 0),
        ("5G macs", "macs", 5e9, 0),
        ("80MB", "bytes", 80e6, 0),
        ("80 MiB@Q4_K_M", "bytes@q4_k_m", 80 * 2**20, 0),
        ("12KB kv", "kv", 12e3, 0),
        ("0.8x params", "params", 0, 0.8),
        ("0.5x  kv", "kv", 0, 0.5),
        ("0.5x bytes@q8_0", "bytes@q8_0", 0, 0.5),
        ("2x decode", "decode", 0, 0.5),
        ("2x prefill@a b.json:llama.cpp", "prefill@a b.json:llama.cpp", 0, 0.5),
    ],
)
def test_a_target_states_a_quantity_and_an_amount(text: str | int, budget: str, amount: float, part: float) -> None:
    target = parse_target(text)
    assert (target.budget, target.amount, target.part) == (budget, amount, part)
    assert target.of(200.0) == (amount or part * 200)


def test_bytes_with_a_context_are_memory() -> None:
    assert parse_target("6GB", 8192).budget == "memory@8192"
    assert parse_target("0.5x bytes@q4_k_m", 10).budget == "memory@10:q4_k_m"
    with pytest.raises(ArgumentError, match="no amount of memory"):
        parse_target("100M", 8192)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "target is ''"),
        ("small", "Pass a size as in"),
        ("-5M", "Pass a size as in"),
        ("1.2.3M", "Pass a size as in"),
        ("0M", "a target above 0"),
        (True, "Pass a size as in"),
        (0.5, "Pass a size as in"),
        ("0.5x speed", "Pass a size as in"),
        ("80MB of weights", "Pass a size as in"),
        ("100M tokens", "Pass a size as in"),
        ("1.3x kv", "a speed is above 1"),
    ],
)
def test_what_is_no_target_is_refused(value: object, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        parse_target(value)


def test_what_was_reached_is_a_line() -> None:
    line = str(Reached("80MB", "bytes of weights", 80e6, 538e6, 80.4e6))
    assert line == "Target 80MB: 538,000,000 to 80,400,000 bytes of weights, 80,000,000 asked for (+0.5%)"


FAVOURED = (0, 1, 4, 7, 10, 13, 15, 16, 17)
"""Blocks of Gemma 3 270M in whose file by llama.cpp in Q4_K_M some tensors have more bits."""


def test_types_are_those_of_a_file_that_llama_cpp_wrote() -> None:
    """Those of Gemma 3 270M: 18 blocks, 640 channels, queries of 1,024, MLPs of 2,048, and tied ends."""
    for block in range(18):
        found = {
            part: type_of("q4_k_m", Place(part, -1, block, 18), row).name
            for part, row in (("other", 640), ("value", 640), ("output", 1024), ("down", 2048))
        }
        more = block in FAVOURED
        assert found["other"] == "Q5_0" and found["output"] == "Q4_K"
        assert (found["value"], found["down"]) == (("Q8_0", "Q6_K") if more else ("Q5_0", "Q4_K"))
    assert type_of("q4_k_m", Place("head"), 640).name == "Q8_0"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_type_for_every_row(name: str) -> None:
    for part in ("other", "value", "fused", "output", "down", "embedding", "head"):
        for block in range(9):
            for row in (256, 96, 77):
                kind = type_of(name, Place(part, -1, block, 9), row)
                size, stored = gguf.GGML_QUANT_SIZES[kind]
                assert stored / size >= least_each(name)
                assert name[1:2].isdigit() is False or name[2:4] != "_k" or row % size == 0


def test_a_name_that_is_no_format_is_refused() -> None:
    assert check_format("Q4_K_M") == "q4_k_m"
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_k_m'"):
        check_format("q4km")


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", {"other": 12, "value": 3, "output": 3, "down": 3, "embedding": 1, "head": 1}),
        ("phi3", {"other": 3, "fused": 3, "output": 3, "down": 3, "embedding": 1, "head": 1}),
    ],
)
def test_places_of_matrices_are_found_in_the_graph(family: str, parts: dict[str, int]) -> None:
    graph = grouped(family)
    budget = make_budget("bytes@q4_k_m", graph, axes_of(graph))
    assert isinstance(budget, FileBudget)
    assert Counter(place.part for place in budget.places.values()) == parts


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
    seconds, fixed, what = read_timing("decode", str(bench_table(tmp_path)))
    assert (seconds, fixed, what) == (1.0, pytest.approx(0.25), "decode time")
    speeds = {"dense": {"parameters": 100, "prefill_ms": 8.0, "decode_ms": 4.0}}
    speeds["slim"] = {"parameters": 50, "prefill_ms": 4.0, "decode_ms": 3.0}
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps(speeds))
    assert read_timing("prefill", str(path))[1] == pytest.approx(0)
    assert read_timing("decode", str(path))[1] == pytest.approx(0.5)


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
