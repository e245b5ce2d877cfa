"""Copies of samples with some of their tokens replaced."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.data.calibration import IGNORED, Sample, noised, plain_tokens
from tests.tokens import character_tokenizer

NONE = torch.empty(0, dtype=torch.long)


def _samples(count: int, tokens: int, first: int = 1000) -> list[Sample]:
    """Samples in which no token is there twice."""
    ids = torch.arange(first, first + count * tokens).view(count, 1, tokens)
    return [Sample({"input_ids": one, "use_cache": False}, one) for one in ids]


def _ids(samples: tuple[Sample, ...]) -> torch.Tensor:
    return torch.cat([sample.inputs["input_ids"] for sample in samples])


def test_all_samples_come_once_and_then_again() -> None:
    samples = _samples(5, 40)
    made = noised(samples, "input_ids", 3, 0.2, NONE, 0)
    assert len(made) == 15
    assert torch.equal(_ids(made)[:, 0], _ids(tuple(samples))[:, 0].repeat(3)), "the first token stays"
    assert all(one.inputs.keys() == {"input_ids", "use_cache"} for one in made)
    assert torch.equal(_ids(tuple(samples)), torch.arange(1000, 1200).view(5, 40)), "the samples stay as they are"


def test_as_many_tokens_go_as_is_said() -> None:
    """None in a quarter of the copies; in the others half of the most, on average, and other parts in each."""
    samples = _samples(400, 100)
    changed = (_ids(noised(samples, "input_ids", 1, 0.4, NONE, 0)) != _ids(tuple(samples))).float().mean(1)
    assert 0.20 < float((changed == 0).float().mean()) < 0.32
    assert 0.13 < float(changed.mean()) < 0.17
    assert float(changed.max()) < 0.55 and len(changed.unique()) > 20


def test_tokens_are_replaced_by_those_of_the_samples_and_of_the_vocabulary() -> None:
    samples = _samples(100, 50)
    known = set(_ids(tuple(samples)).flatten().tolist())
    assert set(_ids(noised(samples, "input_ids", 2, 0.5, NONE, 0)).flatten().tolist()) <= known
    found = _ids(noised(samples, "input_ids", 2, 0.5, torch.tensor([3, 7]), 0))
    other, replaced = torch.isin(found, torch.tensor([3, 7])), found != _ids(tuple(samples)).repeat(2, 1)
    assert set(found[other].tolist()) == {3, 7}
    assert 0.4 < float(other.sum() / replaced.sum()) < 0.6


def test_what_was_put_in_is_no_label() -> None:
    for sample in noised(_samples(20, 30), "input_ids", 1, 0.5, torch.tensor([3]), 0):
        kept = sample.labels != IGNORED
        assert torch.equal(sample.inputs["input_ids"][kept], sample.labels[kept])
        assert not bool((sample.inputs["input_ids"] == 3)[kept].any())


def test_the_seed_decides() -> None:
    first, same, other = (_ids(noised(_samples(9, 30), "input_ids", 2, 0.3, NONE, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_no_other_input_is_touched() -> None:
    mask = torch.ones(1, 40, dtype=torch.long)
    made = noised([Sample({"mask": mask, **_samples(1, 40)[0].inputs}, mask)], "input_ids", 9, 0.9, NONE, 0)
    assert (
        all(sample.inputs["mask"] is mask for sample in made) and len({tuple(ids.tolist()) for ids in _ids(made)}) > 2
    )


def test_tokens_that_stand_for_text_are_told_from_special_ones() -> None:
    tokenizer = character_tokenizer()
    found = plain_tokens(tokenizer, 1000)
    assert sorted(found.tolist()) == sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    assert int(plain_tokens(tokenizer, 50).max()) == 49, "what the model has no embedding for is left out"
    assert len(plain_tokens(None, 1000)) == len(plain_tokens(nn.Identity(), 1000)) == 0
