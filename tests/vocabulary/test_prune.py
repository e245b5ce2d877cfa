"""The kind ``vocab`` in a prune, and the primitive beside it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxprune
from fxprune.errors import ArgumentError, PlanError, RatioError
from fxprune.pipeline.arguments import VOCAB
from tests.models import tiny
from tests.vocabulary.small import ENGLISH, lines, tokenizer

TEXT = " ".join(ENGLISH)
PADDING = 5
"""Rows behind the tokens, as many models have."""


def model_for(kind: str, family: str = "llama", **changes: Any) -> Any:
    """A tiny model with rows for a tokenizer and some more."""
    rows = len(tokenizer(kind)) + PADDING
    return tiny(family, **{"vocab_size": rows, "num_hidden_layers": 1, "tie_word_embeddings": True, **changes})


FAST = {"recipe": "fast", "importance": "l2", "compensate": "none", "tune": "none"}


def pruned(kind: str = "gpt2", **options: Any) -> tuple[Any, Any, fxprune.Result]:
    """A tiny model, its tokenizer, and a prune of them on English words."""
    model, words = model_for(kind), tokenizer(kind)
    samples = torch.tensor(words([TEXT] * 3)["input_ids"])
    return model, words, fxprune.prune(model, samples, tokenizer=words, **options)


def test_the_vocabulary_is_pruned_to_a_size() -> None:
    model, words = model_for("gpt2"), tokenizer("gpt2")
    slim, fewer, report = fxprune.prune_vocabulary(model, words, [TEXT], size=400, round_to=64)
    assert len(fewer) == slim.config.vocab_size == len(report.kept) == 448
    assert report.rows == (len(words) + PADDING, 448)
    (used,), (ids,) = words([TEXT])["input_ids"], fewer([TEXT])["input_ids"]
    assert [report.kept[number] for number in ids] == used and report.tokens[0] == report.tokens[1]
    with torch.no_grad():
        want = model(input_ids=torch.tensor([used])).logits[..., list(report.kept)]
        torch.testing.assert_close(slim(input_ids=torch.tensor([ids])).logits, want, rtol=1e-4, atol=1e-4)
    assert "448 tokens" in str(report) and "0.00% more tokens" in str(report)


def test_without_a_size_the_corpus_is_written_as_it_was(tmp_path: Path) -> None:
    model, words = model_for("llama"), tokenizer("llama")
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT, encoding="utf-8")
    _, fewer, report = fxprune.prune_vocabulary(model, words, file)
    assert report.tokens[0] == report.tokens[1] and len(fewer) < len(words)
    _, _, shorter = fxprune.prune_vocabulary(model, words, [TEXT], size=len(fewer) - 5)
    assert shorter.tokens[1] > shorter.tokens[0] and len(shorter.kept) == len(fewer) - 5


def test_by_a_ratio_rows_without_a_token_go_first() -> None:
    """They are for nothing: no text uses them."""
    model, words = model_for("gpt2"), tokenizer("gpt2")
    part = 3 * 48 / model.num_parameters()
    slim, fewer, report = fxprune.prune_vocabulary(model, words, [TEXT], ratio=part)
    assert len(report.kept) == len(words) == len(fewer) == slim.config.vocab_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 10}, "10 of .* tokens would stay, and .* must"),
        ({"ratio": 0.99}, "0 of .* tokens would stay"),
        ({"ratio": 0.1, "size": 400}, "both say how many stay"),
        ({"ratio": 1}, "ratio"),
        ({"size": 0}, "size"),
        ({"round_to": 0}, "round_to"),
        ({"corpus": "missing.txt"}, "there is no such file"),
        ({"corpus": []}, "no text"),
        ({"corpus": [3]}, "or texts"),
        ({"corpus": None}, "or texts"),
        ({"tokenizer": None}, "the tokenizer of the model"),
        ({"model": torch.nn.Linear(2, 2)}, "a Hugging Face model"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], words: str) -> None:
    given = {"model": model_for("gpt2"), "tokenizer": tokenizer("gpt2"), "corpus": [TEXT], **changes}
    with pytest.raises(fxprune.FxpruneError, match=words):
        fxprune.prune_vocabulary(**given)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"tokens 0 to \d+ stay, the model has 0 to 130"):
        fxprune.prune_vocabulary(tiny("llama", num_hidden_layers=1), tokenizer("gpt2"), [TEXT])


def test_a_plan_that_leaves_out_a_token_of_a_sibling_is_refused() -> None:
    """An end of text that was added to the sibling kept an id that no token had any more."""
    model, words = model_for("gpt2"), copy.deepcopy(tokenizer("gpt2"))
    plan = fxprune.Plan(vocabulary=tuple(range(len(words))))
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    model.config.eos_token_id = words.convert_tokens_to_ids("<end>")
    with pytest.raises(PlanError, match="it leaves out '<end>', a token of this model that must stay"):
        fxprune.apply(model, plan, tokenizer=words)


@pytest.mark.slow
def test_the_vocabulary_alone_is_pruned_by_a_ratio(tmp_path: Path) -> None:
    model, words, result = pruned(kinds=VOCAB, ratio=0.25)
    assert result.report.parameters[0] == model.num_parameters() and abs(result.report.achieved - 0.25) < 0.005
    assert result.report.vocabulary == (len(words) + PADDING, len(result.tokenizer))
    result.save_pretrained(tmp_path / "slim", words)
    slim, fewer = (one.from_pretrained(tmp_path / "slim") for one in (AutoModelForCausalLM, AutoTokenizer))
    for line in lines(50):
        ids = fewer(line)["input_ids"]
        assert ids == result.tokenizer(line)["input_ids"] and fewer.decode(ids[1:]) == line
    kept = json.loads((tmp_path / "slim" / "plan.json").read_text())["vocabulary"]
    ids = torch.randint(len(kept), (1, 9))
    with torch.no_grad():
        want = model(input_ids=torch.tensor(kept)[ids]).logits[..., kept]
        torch.testing.assert_close(slim(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert fxprune.from_pretrained(tmp_path / "slim", verify=True).config.vocab_size == len(kept)


@pytest.mark.slow
def test_other_kinds_make_up_for_the_rest(tmp_path: Path) -> None:
    """Unused tokens go first; the plan of both is carried out on the dense model again."""
    model, words, result = pruned("qwen", kinds=[VOCAB, "mlp"], ratio=0.4, **FAST)
    assert abs(result.report.achieved - 0.4) < 0.005
    assert set(words(TEXT)["input_ids"]) <= set(result.plan.vocabulary)
    assert len(result.report.widths) == 1
    assert result.report.quality is not None and result.report.quality.texts[0].ratio[0] > 0
    again = fxprune.apply(model, fxprune.Plan.from_json(result.plan.to_json()), tokenizer=words)
    ids = torch.randint(len(result.plan.vocabulary), (1, 9))
    assert torch.equal(again(input_ids=ids).logits, result(input_ids=ids).logits)
    assert again.plan == result.plan and again.tokenizer(TEXT) == result.tokenizer(TEXT)
    with pytest.raises(ArgumentError, match="needed for the kind vocab"):
        fxprune.apply(model, result.plan)


@pytest.mark.slow
def test_a_ratio_for_each_kind_is_of_its_own_parameters() -> None:
    model, words = model_for("gpt2"), tokenizer("gpt2")
    result = fxprune.prune(model, tokenizer=words, ratio={VOCAB: 0.4, "mlp": 0.25}, **FAST)
    rows, left = result.report.vocabulary or (0, 0)
    assert left == rows - -(-2 * rows // 5) and list(result.report.widths.values()) == [(88, 66)]


@pytest.mark.parametrize("kinds", [VOCAB, (VOCAB, "mlp")])
def test_a_target_of_parameters_is_reached(kinds: Any) -> None:
    """It was ignored with the vocabulary alone, and beside other kinds refused for a ratio that nobody gave."""
    model, _, result = pruned(kinds=kinds, target="0.8x params", **FAST)
    reached = result.report.reached
    assert reached is not None and (reached.dense, reached.slim) == result.report.parameters
    assert reached.asked == 0.8 * model.num_parameters() and abs(reached.slim / reached.asked - 1) < 0.005


@pytest.mark.parametrize("tune", [None, "tune{epochs=1}"])
def test_the_vocabulary_alone_is_rounded(tune: str | None) -> None:
    _, _, result = pruned(kinds=VOCAB, ratio=0.2, round_to=64, tune=tune)
    assert result.model.config.vocab_size % 64 == 0 and list(result.report.widths) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": None}, "needed for the kind vocab"),
        ({"inplace": True}, "cut in a copy"),
        *(({name: value}, "sized in parameters") for name, value in (("budget", "macs"), ("target", "0.8x macs"))),
        ({"target": "1000K"}, "the dense model is no larger"),
        ({"target": "60K", "ratio": 0.2}, "both say how much goes"),
        ({"compensate": "least-squares"}, "only rows of the vocabulary go"),
        ({"ratio": 0.99}, "tokens would stay"),
        ({"calibration": torch.full((1, 5), 10_000)}, "holds 10000, the model knows 0 to"),
        ({"calibration": torch.full((1, 5), len(tokenizer("gpt2")))}, "for which the tokenizer has no token"),
        ({"ratio": {VOCAB: 2}}, "vocab"),
        ({"kinds": [VOCAB, "mpl"]}, "unknown kind 'mpl'"),
    ],
)
def test_what_the_kind_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    options = {"kinds": VOCAB, "tokenizer": tokenizer("gpt2"), **changes}
    if isinstance(options.get("ratio"), dict):
        del options["kinds"]
    with pytest.raises(fxprune.FxpruneError, match=words):
        fxprune.prune(model_for("gpt2"), options.pop("calibration", torch.zeros(1, 5, dtype=torch.long)), **options)


def test_more_tokens_than_can_go_name_the_ratio_that_can() -> None:
    with pytest.raises(RatioError) as found:
        fxprune.prune_vocabulary(model_for("gpt2"), tokenizer("gpt2"), [TEXT], ratio=0.9)
    assert found.value.reachable and 0 < found.value.reachable < 0.9
