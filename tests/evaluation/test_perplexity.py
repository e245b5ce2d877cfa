"""Perplexity on windows of tokens, and greedy answers."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fxprune.data.text import opening_tokens
from fxprune.errors import EvaluationError, UnknownNameError
from fxprune.evaluation import Evaluation
from fxprune.evaluation.comparison import Reference, evaluate
from fxprune.evaluation.generation import Answers, answer_questions, compare_answers, word_overlap
from fxprune.evaluation.perplexity import load_corpus, named_corpora, perplexity, sliding_windows, text_perplexity
from fxprune.pipeline.contract import no_progress
from tests.evaluation.samples import TEXT, TOKENIZER
from tests.models import tiny
from tests.tokens import character_tokenizer


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


def opening_tokenizer() -> PreTrainedTokenizerFast:
    made = character_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize("opening", [[], [1]], ids=["bare", "opening"])
@pytest.mark.parametrize(("window", "stride"), [(20, None), (20, 7), (16, 1)])
def test_perplexity_predicts_each_token_once_with_as_much_context_as_there_is(
    model: PreTrainedModel, window: int, stride: int | None, opening: list[int]
) -> None:
    """Windows begin as the tokenizer begins a text, and after its opening token the first token is predicted, too."""
    tokenizer = opening_tokenizer() if opening else TOKENIZER
    assert opening_tokens(tokenizer) == opening
    ids, body = TOKENIZER(TEXT)["input_ids"], window - len(opening)
    losses, done = [], 0
    for start in range(0, len(ids) - body + 1, stride or body):
        part = torch.tensor([[*opening, *ids[start : start + body]]])
        with torch.no_grad():
            logits = model(part).logits[0].double().log_softmax(-1)
        first = max(1, len(opening) + done - start)
        losses.append([-float(logits[i - 1, part[0, i]]) for i in range(first, window)])
        done = start + body
    flat = [loss for part in losses for loss in part]
    seen: list[tuple[int, str, int]] = []

    def track(items: list[object], what: str, total: int) -> list[object]:
        seen.append((len(items), what, total))
        return items

    found = text_perplexity(model, tokenizer, TEXT, window=window, stride=stride, batch=3, track=track)
    assert found.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert (found.window, found.stride) == (window, stride or body)
    assert (found.windows, found.predicted) == (len(losses), len(flat)) and (not opening or len(flat) == done)
    assert seen == [(-(-found.windows // 3), "perplexity", -(-found.windows // 3))]
    if stride is None:  # the standard error is that of the means of the windows
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
    assert named_corpora(["a/b.txt", "c/b.txt", "A page of\ntext"]) == {
        "b": "a/b.txt",
        "b (2)": "c/b.txt",
        "text": "A page of\ntext",
    }
    (tmp_path / "a b.txt").write_text("from the file")
    assert load_corpus(tmp_path / "a b.txt") == "from the file"
    (tmp_path / "my notes.md").write_text("from the notes")
    assert load_corpus(str(tmp_path / "my notes.md")) == "from the notes"
    assert load_corpus("two words") == "two words"
    for unknown in ("word", "no such.txt", "no such.parquet"):
        with pytest.raises(UnknownNameError, match=unknown):
            load_corpus(unknown)


def test_bits_per_byte_count_the_bytes_of_what_is_predicted(model: PreTrainedModel) -> None:
    """Of characters of one to four bytes, each one token; a tokenizer without offsets shares the text out evenly."""
    text = "ab\u00e9\u20ac\U0001f600c" * 4
    found = text_perplexity(model, TOKENIZER, text, window=6)
    size = 4 * (len("b\u00e9\u20ac\U0001f600c".encode()))
    assert found.bits_per_byte == pytest.approx(math.log2(found.value) * 20 / size)
    found = text_perplexity(model, opening_tokenizer(), text, window=7)
    assert found.bits_per_byte == pytest.approx(math.log2(found.value) * 24 / len(text.encode()))


def test_divergence_is_that_of_whole_distributions(model: PreTrainedModel, one_block: PreTrainedModel) -> None:
    window, ids = 20, torch.tensor(TOKENIZER(TEXT)["input_ids"])
    rows = ids[: len(ids) // window * window].view(-1, window)
    with torch.no_grad():
        ours, theirs = (m(rows).logits[:, :-1].double().log_softmax(-1) for m in (model, one_block))
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double()
    found = text_perplexity(model, TOKENIZER, TEXT, window=window, batch=3, reference=one_block).divergence
    assert found is not None and found.mean == pytest.approx(float(each.mean()), rel=1e-4)
    assert found.mean_error == pytest.approx(float(each.mean(1).std() / len(rows) ** 0.5), rel=1e-3)
    assert found.percentile_99 == pytest.approx(float(each.flatten().sort().values[int(0.99 * each.numel())]), rel=1e-4)
    assert found.agreement == pytest.approx(float(same.mean()))
    accepted = torch.minimum(ours, theirs).exp().sum(-1)
    assert found.acceptance == pytest.approx(float(accepted.mean()), rel=1e-4)
    assert found.acceptance_error == pytest.approx(float(accepted.mean(1).std() / len(rows) ** 0.5), rel=1e-3)
    lost = (theirs - ours).gather(2, rows[:, 1:, None]).squeeze(2).mean(1)
    assert found.ratio == pytest.approx(math.exp(float(lost.mean())), rel=1e-4)
    assert found.ratio_error == pytest.approx(found.ratio * float(lost.std() / len(rows) ** 0.5), rel=1e-3)
    alone = text_perplexity(model, TOKENIZER, TEXT, window=window, reference=model).divergence
    assert alone is not None and alone.mean < 1e-9 and alone.agreement == 1 and alone.ratio == 1
    assert alone.acceptance == pytest.approx(1)
    with pytest.raises(EvaluationError, match="the same tokens"):
        text_perplexity(model, TOKENIZER, TEXT, window=window, reference=tiny("llama", vocab_size=120))


def test_numbers_do_not_depend_on_how_many_logits_are_widened_at_once(
    model: PreTrainedModel, one_block: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a window of 2,048 tokens took more than ten gigabytes with a vocabulary of 262,000."""
    whole = text_perplexity(model, TOKENIZER, TEXT, window=20, stride=7, reference=one_block)
    monkeypatch.setattr(sys.modules[text_perplexity.__module__], "_WIDENED", 1000)
    parts = text_perplexity(model, TOKENIZER, TEXT, window=20, stride=7, reference=one_block)
    assert parts.losses == pytest.approx(whole.losses) and len(whole.losses) == whole.windows
    assert math.exp(sum(whole.losses) / whole.predicted) == pytest.approx(whole.value)
    assert parts.divergence is not None and whole.divergence is not None
    assert dataclasses.astuple(parts.divergence) == pytest.approx(dataclasses.astuple(whole.divergence))
    assert "losses" not in Evaluation({"text": whole}).to_dict()["perplexities"]["text"]


def test_more_tokens_than_a_model_has_positions_are_named() -> None:
    """It was an index error of torch, with the advice to pass a language model."""
    short = tiny("gpt2", n_layer=1, n_positions=32)
    with pytest.raises(EvaluationError, match=r"window: 64 tokens at once, .* 32 positions\. Give a shorter window"):
        text_perplexity(short, TOKENIZER, TEXT, window=64)
    with pytest.raises(EvaluationError, match=r"answers: \d+ tokens at once, and the model has 32 positions"):
        answer_questions(short, TOKENIZER, ["Why?"])
    assert len(answer_questions(short, TOKENIZER, ["Why?"], tokens=4).ids) == 1
    assert text_perplexity(short, TOKENIZER, TEXT, window=32).windows > 1


def test_a_question_that_is_too_long_is_left_out_alone() -> None:
    """It took all answers with it, and the perplexities measured before them."""
    short, long = tiny("gpt2", n_layer=1, n_positions=32), "Why, and since when, and for how long?"
    found = answer_questions(short, TOKENIZER, ["Why?", long, "How?"], tokens=4)
    assert found.questions == ("Why?", "How?") and len(found.ids) == len(found.texts) == 2 and found.too_long == (long,)
    alone = [answer_questions(short, TOKENIZER, [question], tokens=4).ids[0] for question in ("Why?", "How?")]
    assert list(found.ids) == alone
    (other,) = answer_questions(tiny("gpt2", n_layer=1), TOKENIZER, [long], tokens=4).ids
    whole = Answers(("Why?", long, "How?"), ("", "", ""), (alone[0], other, alone[1]))
    compared = Reference(None, whole).compare(found, TOKENIZER, 8, no_progress)
    assert (compared.questions, compared.same) == (2, 1.0)


def test_questions_that_are_left_out_are_told() -> None:
    short = tiny("gpt2", n_layer=1, n_positions=110)
    options: dict[str, Any] = {"window": 32, "texts": {"text": TEXT}, "generate": True}
    found = evaluate(short, TOKENIZER, **options)
    assert found.answers is not None and 0 < len(found.answers.questions) < 60 and "text" in found.perplexities
    left = 60 - len(found.answers.questions)
    note = f"{left} of 60 questions are left out: the model has too few positions for them"
    assert found.notes == (note,) and found.to_dict()["notes"] == [note]
    none = evaluate(tiny("gpt2", n_layer=1, n_positions=32), TOKENIZER, **options)
    assert none.answers is None and "text" in none.perplexities
    (note,) = none.notes
    assert note.startswith("no question is answered: ") and note.endswith(
        "tokens at once, and the model has 32 positions"
    )


def answers(*rows: tuple[int, ...]) -> Answers:
    return Answers(tuple(map(str, range(len(rows)))), tuple(" ".join(map(str, row)) for row in rows), rows)


def test_words_overlap_as_often_as_they_occur() -> None:
    assert word_overlap("a a b", "a b c d") == pytest.approx(2 * 2 / 7)
    assert word_overlap("", "") == 1 and word_overlap("", "a") == 0 and word_overlap("The cat", "the CAT") == 1


def test_measures_of_answers_are_those_by_hand() -> None:
    """Five 4-grams of which two repeat; four of five tokens, an end included, before the first difference."""
    found = compare_answers(answers((1, 2, 3, 4, 1, 2, 3, 4), (5, 6, 7)), answers((1, 2, 3, 4), (5, 6, 7)))
    assert found.repetition == pytest.approx((1 / 5) / 2) and found.repetition_error == pytest.approx(0.1)
    assert found.distinct_1 == pytest.approx(7 / 11) and found.distinct_2 == pytest.approx(6 / 9)
    assert found.same_start == pytest.approx((4 / 5 + 1) / 2) and found.same == 0.5
    assert found.overlap == pytest.approx((2 * 4 / 12 + 1) / 2)
    assert compare_answers(answers((1, 2))).overlap is None
    with pytest.raises(EvaluationError, match="other questions"):
        compare_answers(answers((1,)), answers((1,), (2,)))


def test_answers_are_those_of_one_question_at_a_time(model: PreTrainedModel) -> None:
    """Padding on the left changes nothing, and the model's mode and settings are its own again."""
    questions = ["How many?", "Is it a long way to the sea from here?", "No."]
    model.train()
    own = model.generation_config
    together = answer_questions(model, TOKENIZER, questions, tokens=6)
    assert model.training and model.generation_config is own
    model.eval()
    for question, ids in zip(questions, together.ids, strict=True):
        row = torch.tensor([TOKENIZER(f"Question: {question}\nAnswer:")["input_ids"]])
        for token in ids:
            assert int(model(row).logits[0, -1].argmax()) == token
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
    with pytest.raises(EvaluationError, match="list of texts"):
        answer_questions(model, TOKENIZER, [])
    with pytest.raises(EvaluationError, match="generates no text"):
        answer_questions(model.model, TOKENIZER)


def test_a_model_agrees_with_itself_and_less_with_another(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.evaluation.generation.plain_questions", lambda: ["How many?", "Where?"])
    options: dict[str, Any] = {"texts": {"text": TEXT}, "window": 16, "generate": True}
    own = evaluate(model, TOKENIZER, reference=model, **options)
    assert own.generation is not None and own.generation.same == own.generation.overlap == 1
    other = evaluate(tiny("llama", num_hidden_layers=1), TOKENIZER, reference=Reference(model), **options)
    assert other.generation is not None and other.generation.same_start is not None
    assert other.generation.same_start < 1
    assert other.to_dict()["answers"].keys() == {"How many?", "Where?"}
