"""Perplexity on windows of tokens, on the paper's corpora or on files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fxprune.errors import UnknownNameError
from fxprune.evaluation.perplexity import load_corpus, named_corpora, perplexity, sliding_windows, text_perplexity
from tests.evaluation.samples import TEXT, TOKENIZER
from tests.models import tiny


@pytest.fixture(scope="module")
def one_block() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1)


def _brute_force_perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    """exp of the mean negative log-probability, one prediction at a time, each from its own prefix."""
    losses = []
    for window in ids:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1].double()
            losses.append(-logits.log_softmax(-1)[window[position]].item())
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_that_of_a_brute_force_computation(one_block: PreTrainedModel) -> None:
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    expected = pytest.approx(_brute_force_perplexity(one_block, ids), rel=1e-5)
    seen = []
    hook = one_block.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    one_block.train()
    try:
        assert [perplexity(one_block, ids, batch=batch) for batch in (1, 2, 5)] == [expected] * 3
        assert one_block.training and set(seen) == {False}, "it runs in evaluation mode and gives the mode back"
    finally:
        one_block.eval()
        hook.remove()
    assert perplexity(lambda input_ids: torch.zeros(*input_ids.shape, 50), ids) == pytest.approx(50), "uniform"


def test_perplexity_takes_every_form_of_output(one_block: PreTrainedModel) -> None:
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(2))
    expected = perplexity(one_block, ids)

    class Wrapped(nn.Module):
        def forward(self, input_ids):
            return one_block(input_ids=input_ids).logits

    exported = torch.export.export(Wrapped(), (), kwargs={"input_ids": ids}).module()
    forms = [
        exported,
        lambda input_ids: (one_block(input_ids=input_ids).logits, "cache"),
        lambda input_ids: {"logits": one_block(input_ids=input_ids).logits},
    ]
    assert [perplexity(form, ids) for form in forms] == [pytest.approx(expected, rel=1e-5)] * 3


@pytest.mark.parametrize(("window", "stride"), [(20, 20), (20, 7), (16, 1)])
def test_perplexity_predicts_each_token_once_with_as_much_context_as_there_is(
    model: PreTrainedModel, window: int, stride: int
) -> None:
    ids = TOKENIZER(TEXT)["input_ids"]
    losses, done = [], 0
    for start in range(0, len(ids) - window + 1, stride):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = model(part).logits[0].double().log_softmax(-1)
        first = max(1, done - start)
        losses.append([-float(logits[i - 1, part[0, i]]) for i in range(first, window)])
        done = start + window
    flat = [loss for part in losses for loss in part]
    seen: list[tuple[int, str, int]] = []

    def track(items: list[object], what: str, total: int) -> list[object]:
        seen.append((len(items), what, total))
        return items

    found = text_perplexity(model, TOKENIZER, TEXT, window=window, stride=stride, batch=3, track=track)
    assert found.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert (found.window, found.stride) == (window, stride)
    assert (found.windows, found.predicted) == (len(losses), len(flat))
    assert seen == [(-(-found.windows // 3), "perplexity", -(-found.windows // 3))]
    if stride == window:  # the standard error is that of the means of the windows
        means = torch.tensor(losses, dtype=torch.double).mean(dim=1)
        error = found.value * float(means.std() / len(means) ** 0.5)
        assert found.standard_error == pytest.approx(error, rel=1e-5)


def test_limited_windows_are_spread_over_the_text() -> None:
    windows, first = sliding_windows(torch.arange(100), window=10, stride=5, limit=3)
    assert windows[:, 0].tolist() == [0, 45, 90]
    assert first.tolist() == [1, 5, 5]


def test_a_source_is_a_corpus_a_file_or_text(tmp_path: Path) -> None:
    assert named_corpora(["ptb", "a/b.txt"]) == {"ptb": "ptb", "b": "a/b.txt"}
    assert named_corpora("wikitext2") == {"wikitext2": "wikitext2"}
    assert named_corpora({"mine": "some text"}) == {"mine": "some text"}
    (tmp_path / "a b.txt").write_text("from the file")
    assert load_corpus(tmp_path / "a b.txt") == "from the file"
    assert load_corpus("two words") == "two words"
    with pytest.raises(UnknownNameError, match="word"):
        load_corpus("word")
    with pytest.raises(UnknownNameError):
        load_corpus("no such.txt")
