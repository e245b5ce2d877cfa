"""A model with fewer tokens, compared with others on the same text, and in the engine."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

import fxprune
from benchmarks.engines.llama_cpp import LlamaServer
from fxprune.data.text import opening_tokens
from fxprune.emit.structure import describe_structure
from fxprune.errors import EvaluationError, RecoveryError, UnsupportedModelError
from fxprune.evaluation.comparison import BUILT_IN, Reference, evaluate
from fxprune.evaluation.perplexity import text_perplexity
from fxprune.recovery import Distillation
from fxprune.recovery.data import Example, collate
from fxprune.vocabulary.alignment import align, common_ids, retokenised
from fxprune.vocabulary.model import find_rows, ids_in_settings, trimmed_model
from fxprune.vocabulary.prune import DenseTeacher, measure_use, size_after, trim
from tests.models import VOCABULARY, tiny
from tests.tiers import tiers
from tests.tokens import character_tokenizer
from tests.vocabulary.small import ENGLISH, lines, tokenizer
from tests.vocabulary.test_prune import TEXT, model_for

ENGLISH_LINE = " ".join(ENGLISH[:8])
KEPT = (0, 1, 2, *range(5, 94, 2), 111, 130)
_WIDTHS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 111}
_BART = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
_BERT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 56}


def _other(auto: Any, family: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(family, **_WIDTHS, **sizes)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


MODELS: dict[str, Any] = {
    "llama": lambda: tiny("llama", num_hidden_layers=1),
    "llama tied": lambda: tiny("llama", num_hidden_layers=1, tie_word_embeddings=True),
    "gpt2": lambda: tiny("gpt2", n_layer=1),
    "gemma3_text": lambda: tiny("gemma3_text", num_hidden_layers=1),
    "gptj": lambda: tiny("gptj", n_layer=1),
    "opt": lambda: tiny("opt", num_hidden_layers=1),
    "t5": lambda: _other(
        AutoModelForSeq2SeqLM, "t5", d_model=48, d_kv=12, num_heads=4, d_ff=56, num_layers=1, decoder_start_token_id=0
    ),
    "bart": lambda: _other(AutoModelForSeq2SeqLM, "bart", **_BART, decoder_start_token_id=2, bos_token_id=1),
    "bert": lambda: _other(AutoModelForMaskedLM, "bert", **_BERT),
}
"""Embeddings tied to heads and apart, heads with biases, and biases of logits."""


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_kept_tokens_are_those_of_the_model(name: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    slim = trimmed_model(model, KEPT)
    ids = torch.randint(len(KEPT), (2, 11), generator=torch.Generator().manual_seed(3))
    kept = torch.tensor(KEPT)
    torch.testing.assert_close(_logits(slim, ids), _logits(model, kept[ids])[..., kept], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert slim.config.vocab_size == len(KEPT) and type(slim) is type(model)
    assert describe_structure(slim).is_stock
    assert slim.config.eos_token_id == KEPT.index(model.config.eos_token_id)
    ours, theirs = ({id(tensor) for tensor in one.parameters()} for one in (slim, model))
    assert not ours & theirs and len(ours) == len(theirs)


def test_other_tensors_may_be_shared() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.n_hooks = 3  # a number of such a name was taken for a table of hooks
    slim = trimmed_model(model, KEPT, share=True)
    shared = [name for name, one in slim.named_parameters() if one is model.get_parameter(name)]
    assert {name for name, _ in slim.named_parameters()} - {*shared} == {*find_rows(model).axes}


def test_generation_uses_the_new_ids() -> None:
    model: Any = tiny("llama", num_hidden_layers=1, eos_token_id=[2, 111])
    model.generation_config.suppress_tokens = [5, 7]
    assert ids_in_settings(model) == {0, 1, 2, 5, 7, 111}
    slim: Any = trimmed_model(model, KEPT)
    assert slim.generation_config.eos_token_id == [2, KEPT.index(111)]
    assert slim.generation_config.suppress_tokens == [3, 4]
    assert slim.generate(torch.tensor([[1, 4]]), max_new_tokens=3).max() < len(KEPT)


def test_a_model_whose_width_is_the_number_of_tokens_is_refused() -> None:
    """A matrix with two such axes would be cut along the wrong one."""
    with pytest.raises(UnsupportedModelError, match="2 of its axes are as long as the vocabulary"):
        trimmed_model(tiny("llama", num_hidden_layers=1, vocab_size=48), (0, 1, 2))


@pytest.mark.parametrize(
    ("family", "size", "name"),
    [
        ("llama", "intermediate_size", "model.layers.0.mlp.up_proj.weight"),
        ("gpt2", "n_positions", "transformer.wpe.weight"),
    ],
)
def test_another_axis_as_long_as_the_vocabulary_stays(family: str, size: str, name: str) -> None:
    """Positions were cut without an error, since a short text has only the first of them."""
    model = tiny(family, **{size: VOCABULARY})
    slim = trimmed_model(model, KEPT)
    assert slim.get_parameter(name).shape == model.get_parameter(name).shape
    assert find_rows(slim).size == len(KEPT) and describe_structure(slim).is_stock


def test_places_are_those_where_both_end_a_token() -> None:
    """Tokens that are bytes of a character are at its place, also those of two characters."""
    ours, theirs = [(0, 2), (2, 3), (2, 3), (3, 5), (5, 9)], [(0, 3), (3, 4), (3, 5), (5, 9)]
    found = align(ours, theirs)
    assert found.ours.tolist() == [0, 3, 4, 5] and found.theirs.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_a_text_is_written_in_other_tokens(kind: str) -> None:
    model, words = model_for(kind), tokenizer(kind)
    _, fewer, _ = fxprune.prune_vocabulary(model, words, [TEXT], ratio=0.25)
    for line in lines(30):
        ids, wanted = (each(line, add_special_tokens=False)["input_ids"] for each in (fewer, words))
        found = retokenised(ids, fewer, words)
        assert found is not None and found[0].tolist() == wanted
        for ours, theirs in zip(found[1].ours.tolist(), found[1].theirs.tolist(), strict=True):
            assert fewer.decode(ids[:ours]) == words.decode(wanted[:theirs])


def test_models_with_other_tokens_are_compared_on_the_same_text() -> None:
    """Each token is predicted once by each model; with all tokens that the text needs, they differ by the others."""
    model, words = model_for("gpt2"), tokenizer("gpt2")
    text = " ".join(lines(20))
    options: dict[str, Any] = {"window": 24, "batch": 3}
    for ratio in (None, 0.25):
        slim, fewer, _ = fxprune.prune_vocabulary(model, words, [text], ratio=ratio)
        found = text_perplexity(slim, fewer, text, reference=model, reference_tokenizer=words, **options)
        alone, dense = text_perplexity(slim, fewer, text, **options), text_perplexity(model, words, text, **options)
        apart = found.divergence
        assert apart is not None
        assert found.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=0.1)
        if ratio is None:
            assert found.predicted == dense.predicted and apart.mean < 1e-6 and apart.agreement == 1
            assert apart.ratio == pytest.approx(found.value / dense.value, rel=1e-4) and apart.ratio < 1
        else:
            assert apart.mean > 0 and found.predicted < alone.predicted


def test_rows_of_no_token_are_left_out_of_comparisons() -> None:
    """Where rows of padding alone had gone, measuring and distillation refused to compare: the tokens were the same."""
    model, words = tiny("llama", num_hidden_layers=1), character_tokenizer()
    ids = torch.tensor(words(ENGLISH_LINE)["input_ids"])[None]
    for tokens in (len(words), VOCABULARY + 9):
        other = tiny("llama", num_hidden_layers=1)
        other.resize_token_embeddings(tokens)
        options: dict[str, Any] = {"window": ids.shape[1], "reference": model}
        found = text_perplexity(other, words, ENGLISH_LINE, reference_tokenizer=character_tokenizer(), **options)
        with torch.no_grad():
            ours, theirs = (each(input_ids=ids).logits[0, :-1] for each in (other, model))
        shared = min(tokens, VOCABULARY)
        losses = [F.cross_entropy(each, ids[0, 1:]) for each in (ours, theirs)]
        q, p = ours[:, :shared].log_softmax(-1), theirs[:, :shared].log_softmax(-1)
        assert found.value == pytest.approx(math.exp(losses[0]), rel=1e-4) and found.divergence is not None
        assert found.divergence.ratio == pytest.approx(math.exp(losses[0] - losses[1]), rel=1e-4)
        assert found.divergence.mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
        teacher = Distillation(model, temperature=1.0, tokenizer=character_tokenizer()).check(other, words)
        batch = {"input_ids": ids, "labels": ids}
        apart = teacher.divergence_sum(batch, other(input_ids=ids).logits).detach()
        assert float(apart) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
        with pytest.raises(EvaluationError, match="its logits are of shape"):
            text_perplexity(other, words, ENGLISH_LINE, **options)


def test_a_prune_of_padding_alone_is_measured() -> None:
    result = fxprune.prune(tiny("llama"), tokenizer=character_tokenizer(), kinds="vocab", ratio=0.04)
    assert result.report.vocabulary == (VOCABULARY, 100) and result.report.quality is not None, result.report.unmeasured
    (text,) = result.report.quality.texts
    assert text.divergence[0] == pytest.approx(0, abs=1e-6) and text.agreement[0] == 1


def test_losses_over_other_tokens_are_those_of_a_brute_force_computation() -> None:
    model, words = model_for("llama"), tokenizer("llama")
    slim, fewer, _ = fxprune.prune_vocabulary(model, words, [TEXT], ratio=0.25)
    line = lines(1, seed=3)[0]
    size = len(opening_tokens(fewer)) + len(fewer(line, add_special_tokens=False)["input_ids"])
    found = text_perplexity(slim, fewer, line, window=size, reference=model, reference_tokenizer=words)
    sums = []
    for each, names in ((slim, fewer), (model, words)):
        ids = torch.tensor([*opening_tokens(names), *names(line, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = each(input_ids=ids[None]).logits[0].log_softmax(-1)
        begin = max(1, len(opening_tokens(names)))
        sums.append(-float(logits[begin - 1 : -1].gather(1, ids[begin:, None]).sum()))
    assert found.losses[0] == pytest.approx(sums[0], rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sums[0] / math.log(2) / len(line.encode()), rel=1e-4)
    assert found.divergence is not None
    assert found.divergence.ratio == pytest.approx(math.exp((sums[0] - sums[1]) / found.predicted), rel=1e-4)


def test_answers_in_other_tokens_are_compared_as_text() -> None:
    model, words = model_for("gpt2"), tokenizer("gpt2")
    slim, fewer, _ = fxprune.prune_vocabulary(model, words, [TEXT])
    found = evaluate(slim, fewer, texts=(), generate=True, reference=Reference(model, tokenizer=words)).generation
    assert found is not None and found.same_start is not None


def test_tokenizers_without_a_common_token_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no token in common"):
        common_ids(*(SimpleNamespace(get_vocab=lambda text=text: {text: 0}) for text in "ab"))


def test_the_dense_model_teaches_in_the_tokens_that_stay() -> None:
    """The probability of a token that went is that of the first token which writes it; inside it the next is known."""
    model, words = model_for("llama"), tokenizer("llama")
    use = measure_use(model, [words(TEXT, add_special_tokens=False)["input_ids"]])
    found = trim(model, words, use, size_after(model, 0.25))
    ids = found.tokenizer(lines(1)[0])["input_ids"]
    logarithms = DenseTeacher.of(model, words, found).log_probabilities(torch.tensor(ids))
    assert logarithms is not None
    likely, (theirs, places) = logarithms.exp(), retokenised(ids, found.tokenizer, words) or (None, None)
    assert theirs is not None and places is not None and len(theirs) < len(ids)
    with torch.no_grad():
        wanted = model(input_ids=theirs[None]).logits[0].softmax(-1)
    moved = torch.zeros(len(theirs), len(found.report.kept))
    for number in words.get_vocab().values():
        moved[:, found.rewritten([[number]])[0][0]] += wanted[:, number]
    both = places.ours > 0
    torch.testing.assert_close(likely[places.ours[both] - 1], moved[places.theirs[both] - 1])
    total = torch.ones(len(ids))  # less what the dense model gives to rows without a token
    total[places.ours[both] - 1] = wanted[:, [*words.get_vocab().values()]].sum(-1)[places.theirs[both] - 1]
    torch.testing.assert_close(likely.sum(-1)[:-1], total[:-1])
    inside = sorted({*range(len(ids) - 1)} - {place - 1 for place in places.ours.tolist()})
    assert inside and likely[inside].argmax(-1).tolist() == [ids[place + 1] for place in inside]


def test_a_vocabulary_is_tuned_with_the_dense_model_as_teacher(tmp_path: Path) -> None:
    """Its quality is measured on other text than that which was counted."""
    model, words, file = model_for("gpt2"), tokenizer("gpt2"), tmp_path / "text.txt"
    file.write_text(" ".join(lines(60)), encoding="utf-8")
    options: dict[str, Any] = {"kinds": "vocab", "ratio": 0.25, "tokenizer": words, "eval_text": str(file)}
    result = fxprune.prune(model, str(file), tune="tune{epochs=4}", **options)
    assert result.report.quality is not None and result.report.quality.texts[0].text == BUILT_IN
    tuned = next(note for note in result.report.notes if note.startswith("tuned:"))
    assert "divergence from the dense model from" in tuned
    assert result.model is not None and result.model.config.vocab_size == len(result.tokenizer)


def test_a_teacher_with_other_tokens_teaches_those_that_both_have() -> None:
    model, words = model_for("gpt2"), tokenizer("gpt2")
    slim, fewer, report = fxprune.prune_vocabulary(model, words, [TEXT])
    teacher = Distillation(model, tokenizer=words).check(slim, fewer)
    with pytest.raises(RecoveryError, match="tokenizer="):
        Distillation(model).check(slim, fewer)
    rows = [fewer(line)["input_ids"] for line in (TEXT, " ".join(ENGLISH[:9]))]
    inputs = collate([Example(tuple(row), tuple(row)) for row in rows], fewer.pad_token_id)
    with torch.no_grad():
        logits = slim(input_ids=inputs["input_ids"]).logits
    assert report.tokens[0] == report.tokens[1] and float(teacher.divergence_sum(inputs, logits)) < 1e-4
    assert float(teacher.divergence_sum(inputs, logits + torch.randn_like(logits))) > 1


@pytest.mark.parametrize("kind", tiers(["gpt2", "qwen", "llama", "gemma"], "qwen", "gemma"))
def test_the_engine_writes_texts_as_the_folder_does(kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model, fewer, _ = fxprune.prune_vocabulary(model_for(kind), words, [TEXT], size=len(words) - 90)
    path = fxprune.export_model(model, tmp_path / "slim.gguf", tokenizer=fewer, quantization="f32")
    server = LlamaServer(path, flash=False)
    for line in lines(60):
        assert server.tokenize(line) == fewer(line)["input_ids"], line
    ids = torch.tensor([fewer(TEXT)["input_ids"][:20]])
    with torch.no_grad():
        want = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert (server.log_probabilities(ids[0].tolist(), len(fewer)) - want).abs().max() < 1e-3
