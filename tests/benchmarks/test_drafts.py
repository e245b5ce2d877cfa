"""Benchmark of drafts: its figures, and continuations that a draft does not change."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.drafts import Continued, by_transformers, summary


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
