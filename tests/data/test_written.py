"""Samples that a model writes itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxprune.data.built_in import can_write, chat_start, own_samples, write_samples
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer

STARTS = token_ids(3, 2)


def _write(seed: int, samples: int = 5) -> torch.Tensor:
    return write_samples(tiny("llama"), STARTS, samples, 7, seed)


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
    write_samples(model, STARTS, 2, 5, 0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and all(module.training for module in model.modules())


def test_settings_of_the_model_do_not_change_what_is_written() -> None:
    """transformers fills in from them whatever a call leaves open."""
    model = tiny("llama")
    own = model.generation_config
    own.update(return_dict_in_generate=True, num_return_sequences=2, max_time=0.0, num_beams=2, suppress_tokens=[3])
    assert torch.equal(write_samples(model, STARTS, 5, 7, 0), _write(0))
    assert model.generation_config is own and own.num_beams == 2


def test_tokens_are_drawn_by_what_the_model_says() -> None:
    """With a readout of zeros all tokens are as likely."""
    model = tiny("llama", tie_word_embeddings=False)
    readout = model.get_output_embeddings().weight
    with torch.no_grad():
        readout.zero_()
    written = write_samples(model, STARTS, 64, 34, 0)[:, 2:]
    assert len(written.unique()) > len(readout) // 2


def test_only_what_continues_token_ids_can_write() -> None:
    assert can_write(tiny("llama"))
    assert not can_write(nn.Linear(2, 2))
    encodes = tiny("llama")
    encodes.config.is_encoder_decoder = True
    assert not can_write(encodes)


def test_a_chat_begins_with_what_stands_before_the_user() -> None:
    chats = character_tokenizer(chat=True)
    assert chats.decode(chat_start(chats)) == "<u>"
    assert chat_start(character_tokenizer()) == chat_start(None) == []
    chats.chat_template = "{{ raise_exception('no') }}"
    assert chat_start(chats) == []
    chats.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert chat_start(chats) == [], "it leaves out what the user says"


def _own(tokenizer: Any, samples: int = 8, tokens: int = 16, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    shown: list[str] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        shown.append(f"{what} {total}")
        return items

    return own_samples(tiny("llama"), tokenizer, torch.tensor([7, 9]), samples, tokens, seed, track), shown


def test_without_a_chat_each_sample_begins_with_a_token_of_the_vocabulary() -> None:
    written, shown = _own(character_tokenizer())
    assert written.shape == (8, 16) and set(written[:, 0].tolist()) == {7, 9} and shown == ["the model writes 1"]
    assert torch.equal(written, _own(None)[0]) and not torch.equal(written, _own(None, seed=1)[0])


def test_half_of_the_samples_of_a_model_that_chats_are_chats() -> None:
    chats = character_tokenizer(chat=True)
    start = torch.tensor(chat_start(chats))
    written, shown = _own(chats)
    begun = (written[:, : len(start)] == start).all(-1)
    assert int(begun.sum()) == 4 and set(written[~begun, 0].tolist()) <= {7, 9}
    assert not bool(begun[:4].all()) and not bool(begun[4:].all()), "they take turns, so that a part has both"
    assert shown == ["the model writes 1", "the model chats 1"]
    short, _ = _own(chats, samples=3, tokens=4)
    assert short.shape == (3, 4) and int((short[:, 0] == start[-1]).sum()) == 1, "a long start loses its own"
    assert _own(chats, samples=1)[1] == ["the model writes 1"]
