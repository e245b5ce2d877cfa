"""The benchmarks of engines, drafts and quantised files."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import benchmarks.equal_bytes as benchmark
import fxprune
from benchmarks.drafts import Continued, by_transformers, summary
from benchmarks.engines import llama_cpp, vllm
from benchmarks.engines.base import greedy_tokens
from tests.benchmarks.command import run_main
from tests.export.small import even, tokenizer
from tests.models import tiny


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_tokens_are_counted_up_to_the_first_that_differs() -> None:
    table = vllm.same_tokens(Letters(), [[0], [1]], [[2, 3], [4, 5]], [[2, 3], [4, 0]])
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["'a'", "'b'"] and cells[3] == ["2 of 2 the same", "1 of 2 the same"]
    Console(quiet=True).print(table)


def test_greedy_tokens_come_after_the_prompt() -> None:
    model = tiny("llama", num_hidden_layers=1)
    whole = greedy_tokens(model, [[1, 2, 3], [4]], 3)
    assert [len(tokens) for tokens in whole] == [3, 3]
    assert greedy_tokens(model, [[1, 2, 3, whole[0][0]]], 2) == [whole[0][1:]]


@pytest.mark.slow
def test_llama_cpp_is_compared_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = even("llama", hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    options = {"recipe": "llm-pruner", "importance": "l2", "round_to": {"mlp": 32}, "kinds": "mlp", "protect": ()}
    result = fxprune.prune(model, ratio=0.1, **options)
    result.save_pretrained(tmp_path / "slim", tokenizer())
    (tmp_path / "held.txt").write_text("abcdefgh " * 40)
    monkeypatch.setattr(llama_cpp, "load_demo_model", lambda: (model, tokenizer()))
    monkeypatch.setattr(llama_cpp, "PROMPTS", ("abc", "de"))
    monkeypatch.setattr(llama_cpp, "console", Console(width=110))
    asked = ["--slim", str(tmp_path / "slim"), "--text", str(tmp_path / "held.txt"), "--windows", "1", "--tokens", "16"]
    outcome = run_main(llama_cpp.main, *asked)
    assert outcome.exit_code == 0 and "q8_0" in outcome.output, outcome.output
    found = re.search(r"f16\D+[\d.]+[^\d+-]+([+-][\d.]+)%", outcome.output)
    assert found is not None, outcome.output
    assert abs(float(found[1])) < 0.5


def test_figures_of_continuations() -> None:
    alone = [Continued("a", 10, 2.0), Continued("b", 10, 3.0), Continued("c", 10, 5.0)]
    helped = [
        Continued("a", 10, 1.0, drafted=8, accepted=6, runs=4),
        Continued("b", 10, 2.0, drafted=8, accepted=2, runs=8),
        Continued("x", 10, 2.0, drafted=4, accepted=2, runs=3),
    ]
    found = summary(alone, helped)
    assert found["same"] == pytest.approx(2 / 3)
    assert found["tokens_per_s"] == pytest.approx([3, 6])
    assert found["speed_up"] == pytest.approx([2, 1.5, 2.5])
    assert found["accepted"] == pytest.approx(0.5) and found["tokens_per_run"] == pytest.approx(2)


def test_a_draft_changes_no_token_and_saves_runs() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=32, eos_token_id=None)
    dense = LlamaForCausalLM(config).eval()
    alone = by_transformers(dense, None, [1, 2, 3], 12)
    helped = by_transformers(dense, dense.__class__(config).eval(), [1, 2, 3], 12)
    itself = LlamaForCausalLM(config).eval()
    itself.load_state_dict(dense.state_dict())
    best = by_transformers(dense, itself, [1, 2, 3], 12)
    assert alone.continuation == helped.continuation == best.continuation and alone.runs == 12
    assert best.runs is not None and best.runs < 12


class Server:
    """Files that predict and decode as their size says."""

    asked: ClassVar[list[str]] = []

    def __init__(self, path: Path, **_: Any) -> None:
        self.path = path

    def log_probability(self, tokens: list[int], following: int) -> float:
        return -self.path.stat().st_size / 100

    def complete(self, tokens: list[int], **_: Any) -> dict[str, Any]:
        self.asked.append(self.path.name)
        return {"timings": {"predicted_per_token_ms": self.path.stat().st_size}}


def test_files_take_turns_and_are_set_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LlamaServer", Server)
    sizes = {"dense f16": 100, "dense q4_k_m": 40, "slim f16": 80, "slim q4_k_m": 20}
    files = {name: tmp_path / name for name in sizes}
    for name, path in files.items():
        path.write_bytes(bytes(sizes[name]))
    found = benchmark.measure(files, {"a text": [[1, 2, 3], [4, 5]]}, rounds=2)
    assert Server.asked == [*files, *files]
    rows = benchmark.rows_of(found, {"a text": 10})
    assert [(row["model"], row["type"]) for row in rows] == [tuple(name.split()) for name in
            ("dense f16", "slim f16", "dense q4_k_m", "slim q4_k_m")]  # fmt: skip
    last = rows[-1]["texts"]["a text"]
    assert last["over_dense"] == pytest.approx((0.2, 0)) and last["over_own"] == pytest.approx((0.25, 0))
    assert rows[-1]["speed_up"] == [5, 5, 5]
