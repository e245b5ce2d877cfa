"""Test that what is counted on meta is what real processes give to collectives, in one order, and ops by hand."""

from pathlib import Path

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import several_processes
from benchmarks.estimate_large import CARDS, META, Meter, count_passes, main, trace_empty
from fxprune.recipes.texts import recipe_text
from tests.benchmarks.command import run_main

RECIPE = (
    recipe_text("balanced")
    .replace("ranking=auto", "ranking=local")
    .replace(", added=200, programs=0.25, languages=0.5", "")
)
"""As the default, with widths that do not depend on scores, and without text that the model generates."""

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
)


@pytest.fixture(scope="module")
def graph_module() -> fx.GraphModule:
    return trace_empty(CONFIG)


IDS = torch.arange(24 * 16).view(24, 16)


@pytest.mark.slow
def test_all_processes_have_one_order_and_steps_that_are_not_run_count(
    graph_module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = (count_passes(graph_module, RECIPE, 3, IDS, rank=rank) for rank in (0, 2))
    assert [(cost.calls, cost.order) for cost in first] == [(cost.calls, cost.order) for cost in last]
    monkeypatch.setattr(Meter, "repeated", lambda self, true, result, times: true)
    for cost, whole in zip(first, count_passes(graph_module, RECIPE, 3, IDS), strict=True):
        assert (cost.calls, cost.order) == (whole.calls, whole.order)
        assert cost.held == pytest.approx(whole.held, rel=0.1)  # without the best numbers so far
        assert all(cost.sums[name] == pytest.approx(whole.sums[name]) for name in ("sent", "read"))
        assert cost.sums["H100"] == pytest.approx(whole.sums["H100"], rel=0.15)


@pytest.mark.slow
def test_calls_and_bytes_are_those_of_real_processes(
    graph_module: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    real = several_processes.measure(2, None, IDS, RECIPE, tmp_path / "dense")
    monkeypatch.setattr(Meter, "answer", lambda _: 0.0)  # this model has nothing to learn, so nothing is broadcast
    for (name, _, calls, given, _), cost in zip(real, count_passes(graph_module, RECIPE, 2, IDS), strict=True):
        assert (name, calls) == (cost.name, sum(cost.calls.values()))
        assert cost.sums["sent"] == pytest.approx(given, rel=0.02, abs=5000), name  # objects differ in their numbers


def test_an_op_takes_the_longer_of_its_operations_and_its_bytes() -> None:
    card = CARDS["H100"]
    with Meter(8, 0.5) as meter:
        a, b = (torch.empty(size, dtype=torch.float64, device=META) for size in ((4096, 4096), (4096, 1)))
        made = meter.sums["H100"]
        c = a @ a
        assert meter.sums["H100"] - made == pytest.approx(2 * 4096**3 / (0.5 * card[torch.float64]))
        before = meter.sums["H100"]
        a @ b
        assert meter.sums["H100"] - before == pytest.approx((a.nbytes + 2 * b.nbytes) / card["memory"])
        held = a.nbytes + b.nbytes + c.nbytes
        assert (meter.held["memory"], meter.peak["memory"]) == (held, held + b.nbytes)
        c = meter.offload(c)
        assert (meter.held["memory"], meter.held["values"]) == (a.nbytes + b.nbytes, c.nbytes)


@pytest.mark.slow
def test_the_command_counts_a_mixture_too() -> None:
    sizes = ["--models", "qwen3-235b", "--layers", "1", "--samples", "80", "--tokens", "16"]
    done = run_main(main, *sizes)
    assert done.exit_code == 0 and "least-squares" in done.output and "tune" in done.output
    assert run_main(main, "--models", "8t").exit_code == 2
