"""Text from saved models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import fxprune
from tests.cli.running import run


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """What a slim model goes on with."""
    model: Any = fxprune.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(("options", "prompt"), [(("--raw",), "so it"), ((), "<u>so it</s><a>")])
def test_the_likeliest_text_comes_after_the_prompt_or_the_turn(
    models: Path, options: tuple[str, ...], prompt: str
) -> None:
    more = (models / "slim", "so it", "--max-new-tokens", 6, *options)
    code, output, line = run("generate", *more, "--json")
    assert code == 0, line
    want = greedy(models / "slim", prompt, 6)
    assert json.loads(output) == {"slim": want} or " ".join(want.split()) in output
    assert run("generate", *more)[1] == " ".join(want.split())


def test_two_models_answer_one_after_the_other(models: Path) -> None:
    code, output, _ = run("generate", models / "slim", "so it", "--compare", models / "dense", "--max-new-tokens", 4)
    assert code == 0 and output.startswith("dense:") and "slim:" in output


def test_samples_follow_their_seed(models: Path) -> None:
    more = ("generate", models / "slim", "so it", "--temperature", 2, "--max-new-tokens", 8)
    first, again, other = (run(*more, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other
