"""Perplexity on windows of tokens, on the paper's corpora or on files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fxprune.errors import DataError, EvaluationError, UnknownNameError
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


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_is_that_of_a_brute_force_computation(one_block: PreTrainedModel, batch: int) -> None:
    ids = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    assert perplexity(one_block, ids, batch=batch) == pytest.approx(_brute_force_perplexity(one_block, ids), rel=1e-5)


def test_perplexity_of_uniform_logits_is_the_vocabulary_size() -> None:
    ids = torch.randint(50, (3, 4))
    assert perplexity(lambda input_ids: torch.zeros(*input_ids.shape, 50), ids) == pytest.approx(50)


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


def test_perplexity_runs_in_evaluation_mode_and_gives_the_mode_back(one_block: PreTrainedModel) -> None:
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(3))
    seen = []
    hook = one_block.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    one_block.train()
    try:
        perplexity(one_block, ids)
        assert one_block.training
    finally:
        one_block.eval()
        hook.remove()
    assert seen == [False]


def test_perplexity_refuses_what_has_no_next_token(one_block: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="next token"):
        perplexity(one_block, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(EvaluationError, match="logits"):
        perplexity(lambda input_ids: "text", torch.zeros(3, 2, dtype=torch.long))


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
    found = text_perplexity(model, TOKENIZER, TEXT, window=window, stride=stride)
    assert found.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert (found.window, found.stride) == (window, stride)
    assert (found.windows, found.predicted) == (len(losses), len(flat))


def test_standard_error_is_that_of_the_windows_means(model: PreTrainedModel) -> None:
    found = text_perplexity(model, TOKENIZER, TEXT, window=20)
    windows = torch.tensor(TOKENIZER(TEXT)["input_ids"])[: 20 * found.windows].view(-1, 20)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    means = -logits.gather(2, windows[:, 1:, None])[..., 0].mean(dim=1)
    expected = found.value * float(means.std() / len(means) ** 0.5)
    assert found.standard_error == pytest.approx(expected, rel=1e-5)


def test_limited_windows_are_spread_over_the_text() -> None:
    windows, first = sliding_windows(torch.arange(100), window=10, stride=5, limit=3)
    assert windows[:, 0].tolist() == [0, 45, 90]
    assert first.tolist() == [1, 5, 5]


@pytest.mark.parametrize(
    ("window", "stride", "limit", "tokens"),
    [(1, 1, None, 9), (4, 5, None, 9), (4, 0, None, 9), (4, 4, 0, 9), (9, 9, None, 8)],
)
def test_windows_that_predict_nothing_are_refused(window: int, stride: int, limit: int | None, tokens: int) -> None:
    with pytest.raises(EvaluationError, match=r"window|stride|limit"):
        sliding_windows(torch.arange(tokens), window, stride, limit)


def test_progress_is_shown_batch_by_batch(model: PreTrainedModel) -> None:
    seen: list[tuple[int, str, int]] = []

    def track(items: list[object], what: str, total: int) -> list[object]:
        seen.append((len(items), what, total))
        return items

    found = text_perplexity(model, TOKENIZER, TEXT, window=20, batch=3, track=track)
    batches = -(-found.windows // 3)
    assert seen == [(batches, "perplexity", batches)]


def test_texts_are_named_by_the_corpus_or_the_file() -> None:
    assert named_corpora(["ptb", "a/b.txt"]) == {"ptb": "ptb", "b": "a/b.txt"}
    assert named_corpora("wikitext2") == {"wikitext2": "wikitext2"}
    assert named_corpora({"mine": "some text"}) == {"mine": "some text"}


def test_a_source_is_a_file_or_text(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("from the file")
    assert load_corpus(tmp_path / "a b.txt") == "from the file"
    assert load_corpus("two words") == "two words"
    with pytest.raises(UnknownNameError, match="word"):
        load_corpus("word")
    with pytest.raises(UnknownNameError):
        load_corpus("no such.txt")


def test_a_hub_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match="ptb_text_only: cannot be loaded: ConnectionError: no network"):
        load_corpus("ptb")
