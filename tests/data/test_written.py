"""Samples that a model writes itself."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.data.written import can_write, write_samples
from tests.models import tiny, token_ids

STARTS = token_ids(3, 2)


def _write(seed: int, samples: int = 5) -> torch.Tensor:
    return write_samples(tiny("llama"), STARTS, samples, 7, seed, lambda batches, _: batches)


def test_samples_begin_as_they_are_told_in_turn_and_are_all_as_long() -> None:
    written = _write(0)
    assert written.shape == (5, 7) and written.dtype == torch.int64
    assert torch.equal(written[:, :2], STARTS[[0, 1, 2, 0, 1]])


def test_the_same_seed_writes_the_same_and_another_does_not() -> None:
    assert torch.equal(_write(0), _write(0))
    assert not torch.equal(_write(0), _write(1))


def test_the_draws_of_the_caller_and_the_mode_of_the_model_stay() -> None:
    model = tiny("llama").train()
    state = torch.random.get_rng_state()
    write_samples(model, STARTS, 2, 5, 0, lambda batches, _: batches)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and all(module.training for module in model.modules())


def test_tokens_are_drawn_by_what_the_model_says() -> None:
    """With a readout of zeros all tokens are as likely."""
    model = tiny("llama", tie_word_embeddings=False)
    readout = model.get_output_embeddings().weight
    with torch.no_grad():
        readout.zero_()
    written = write_samples(model, STARTS, 64, 34, 0, lambda batches, _: batches)[:, 2:]
    assert len(written.unique()) > len(readout) // 2


def test_only_what_continues_token_ids_can_write() -> None:
    assert can_write(tiny("llama"))
    assert not can_write(nn.Linear(2, 2))
    encodes = tiny("llama")
    encodes.config.is_encoder_decoder = True
    assert not can_write(encodes)
