"""Calibration samples: of every form, of images and sounds, and those that a model writes."""

import json
import math
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import fx, nn

from fxprune.data import built_in
from fxprune.data.built_in import (
    _Draw,
    built_in_samples,
    built_in_text,
    can_generate,
    chat_start,
    general_chats,
    general_text,
    generate_samples,
    generated_samples,
    offline_docstrings,
    offline_text,
    opening_rows,
    opening_texts,
    program_texts,
    rows_at_once,
)
from fxprune.data.calibration import (
    IGNORED,
    Sample,
    batch_indices,
    batched,
    embedding_rows,
    make_inputs,
    next_token_loss,
    noised,
    plain_tokens,
    token_input,
)
from fxprune.data.processed import needs_processor, processed_samples
from fxprune.data.samples import read_calibration
from fxprune.data.text import token_windows
from fxprune.errors import CalibrationError, FxpruneError
from fxprune.offload.files import offload_to
from fxprune.trace.capture import trace
from tests import remembered
from tests.models import tiny, token_ids
from tests.oracle import Net
from tests.tokens import character_tokenizer

ROWS = 11


def parts() -> dict[str, nn.Module]:
    return {"table": nn.Embedding(ROWS, 4), "out": nn.Linear(4, ROWS)}


@pytest.fixture(scope="module")
def graph_module() -> fx.GraphModule:
    net = Net(lambda net, x: net.out(net.table(x)), **parts())
    return trace(net, {"x": torch.zeros(2, 5, dtype=torch.long)}).graph_module


class Masked(Net):
    """A model that takes the mask of padding as well."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # type: ignore[override]
        return self.out(self.table(x) * attention_mask[..., None])


class Flattens(Net):
    """A model that lays out its token ids otherwise before it looks them up, in two tables."""

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> Any:  # type: ignore[override]
        flat = x.view(-1, x.shape[-1])[:, 1:].unsqueeze(1).transpose(1, 2).long()
        found = self.table(flat).squeeze(2) + self.small(x[:, 0][:, None])
        return self.out(found * mask[:, 1:, None])


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(ROWS, shape)


def test_every_form_of_data_gives_the_same_samples(graph_module: fx.GraphModule) -> None:
    tokens = ids(3, 6)
    forms: list[Any] = [
        tokens,
        [{"x": row.tolist(), "text": "as it was"} for row in tokens],
        [{"x": tokens[:2]}, {"x": tokens[2:]}],
        [(tokens, "label")],
        [tokens[:2].tolist(), tokens[2:].tolist()],
    ]
    for data in forms:
        samples = read_calibration(data, graph_module)
        assert torch.equal(torch.cat([sample.inputs["x"] for sample in samples]), tokens)
        assert all(torch.equal(sample.labels, sample.inputs["x"]) for sample in samples)


def test_padding_is_cut_off_or_does_not_count(graph_module: fx.GraphModule) -> None:
    row = {"x": [0, 0, 3, 4, 5], "attention_mask": [0, 0, 1, 1, 1], "labels": [0, 0, IGNORED, 4, 5]}
    (sample,) = read_calibration([row], graph_module)
    assert sample.inputs["x"].tolist() == [[3, 4, 5]] and sample.labels.tolist() == [[IGNORED, 4, 5]]
    example = {"x": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    row = {"x": [4, 5, 6, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}
    for free, rest in ((True, []), (False, [0, 0])):
        (sample,) = read_calibration([row], trace(Masked(None, **parts()), example, dynamic=free).graph_module)
        assert sample.inputs["x"].tolist() == [[4, 5, 6, *rest]]
        assert sample.inputs["attention_mask"].tolist() == [[1, 1, 1, *rest]]
        assert sample.labels.tolist() == [[4, 5, 6, *([IGNORED] if rest else []) * 2]]


def test_loss_is_that_of_the_next_token_and_skips_what_is_ignored() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 50.0
    assert next_token_loss(logits, torch.tensor([[0, 2, IGNORED]])).item() == pytest.approx(0.0, abs=1e-6)
    assert next_token_loss(logits, torch.tensor([[0, IGNORED, 1]])).item() == pytest.approx(math.log(4))


def test_samples_of_one_shape_are_stacked(graph_module: fx.GraphModule) -> None:
    samples = [sample for tokens in (ids(3, 6), ids(1, 4)) for sample in read_calibration(tokens, graph_module)]
    numbers = list(batch_indices(samples, graph_module, 2))
    shapes = [tuple(batched([samples[i] for i in each], graph_module)["x"].shape) for each in numbers]
    assert shapes == [(2, 6), (1, 6), (1, 4)]
    assert embedding_rows(graph_module) == {"x": ROWS} and token_input(graph_module) == "x"


def test_ids_that_are_laid_out_otherwise_before_they_are_looked_up_are_token_ids() -> None:
    """GPT-2 flattens its batch, models of several codebooks take one row for each; the smallest table counts."""
    inputs = {"mask": torch.ones(2, 5, dtype=torch.long), "x": torch.zeros(2, 5, dtype=torch.int32)}
    graph_module = trace(Flattens(None, **parts(), small=nn.Embedding(7, 4)), inputs).graph_module
    assert embedding_rows(graph_module) == {"x": 7} and token_input(graph_module) == "x"
    bare = trace(Net(lambda net, x: net.out(x), out=nn.Linear(4, 4)), {"x": torch.zeros(2, 4)}).graph_module
    assert token_input(bare) is None


class Takes(nn.Module):
    """A language model with an input that is not a tensor, and one that may be a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(ROWS, 4), nn.Linear(4, ROWS)

    def forward(self, scale: float, ids: Any) -> torch.Tensor:
        total = self.embed(ids) if isinstance(ids, torch.Tensor) else sum(self.embed(part) for part in ids)
        return self.head(total * scale)  # type: ignore[no-any-return]


def test_inputs_other_than_tensors_are_as_traced_and_lists_of_tensors_are_refused() -> None:
    ids, data = torch.zeros(2, 5, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    graph_module = trace(Takes(), {"scale": 2.0, "ids": ids}).graph_module
    samples = read_calibration(data, graph_module)
    assert [list(sample.inputs) for sample in samples] == [["scale", "ids"]] * 3
    assert list(batch_indices(samples, graph_module, 8)) == [(0, 1, 2)]
    batch = batched(samples, graph_module)
    assert batch["scale"] == 2.0 and graph_module(**batch).shape == (3, 4, ROWS)
    with pytest.raises(CalibrationError, match="takes a list for ids"):
        read_calibration(data, trace(Takes(), {"scale": 2.0, "ids": [ids, ids]}).graph_module)


NONE = torch.empty(0, dtype=torch.long)


def _samples(count: int, tokens: int, first: int = 1000) -> list[Sample]:
    """Samples in which no token is there twice."""
    ids = torch.arange(first, first + count * tokens).view(count, 1, tokens)
    return [Sample({"input_ids": one, "use_cache": False}, one) for one in ids]


def _ids(samples: tuple[Sample, ...]) -> torch.Tensor:
    return torch.cat([sample.inputs["input_ids"] for sample in samples])


def test_samples_are_copied_in_turn_with_replaced_tokens_that_are_not_labels() -> None:
    samples, mask = _samples(5, 40), torch.ones(1, 40, dtype=torch.long)
    samples = [Sample({"mask": mask, **sample.inputs}, sample.labels) for sample in samples]
    made, same, other = (noised(samples, "input_ids", 3, 0.5, torch.tensor([3]), seed) for seed in (0, 0, 1))
    assert len(made) == 15
    assert torch.equal(_ids(made)[:, 0], _ids(tuple(samples))[:, 0].repeat(3)), "the first token stays"
    assert all(one.inputs.keys() == {"mask", "input_ids", "use_cache"} for one in made)
    assert all(one.inputs["mask"] is mask for one in made)
    assert torch.equal(_ids(tuple(samples)), torch.arange(1000, 1200).view(5, 40)), "the samples stay as they are"
    assert torch.equal(_ids(made), _ids(same)) and not torch.equal(_ids(made), _ids(other))
    for sample in made:
        kept = sample.labels != IGNORED
        assert torch.equal(sample.inputs["input_ids"][kept], sample.labels[kept])
        assert not bool((sample.inputs["input_ids"] == 3)[kept].any())


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


def test_tokens_that_stand_for_text_are_told_from_special_ones() -> None:
    tokenizer = character_tokenizer()
    found = plain_tokens(tokenizer, 1000)
    assert sorted(found.tolist()) == sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    assert int(plain_tokens(tokenizer, 50).max()) == 49, "what the model has no embedding for is left out"
    assert len(plain_tokens(None, 1000)) == len(plain_tokens(nn.Identity(), 1000)) == 0


def test_random_ids_are_of_the_embedding_and_depend_on_the_seed() -> None:
    net = Net(lambda net, x: net.out(net.table(x)), table=nn.Embedding(3, 4), out=nn.Linear(4, 3))
    graph_module = trace(net, {"x": torch.zeros(2, 5, dtype=torch.long)}).graph_module
    made = make_inputs(graph_module, None, seed=0)["x"]
    assert made.shape == (2, 16) and made.dtype == torch.long
    assert set(made.flatten().tolist()) == {0, 1, 2}
    assert torch.equal(made, make_inputs(graph_module, None, seed=0)["x"])
    assert not torch.equal(made, make_inputs(graph_module, None, seed=1)["x"])
    flattened = make_inputs(remembered.traced("gpt2"), None, seed=0)["input_ids"]
    assert len(flattened.unique()) > 10, "of the embedding also if the model flattens its ids first"


def test_the_callers_inputs_are_taken_and_fixed_sizes_kept() -> None:
    net = Net(lambda net, x: net.out(x), out=nn.Linear(4, 3))
    graph_module = trace(net, {"x": torch.zeros(2, 5, 4)}).graph_module
    given = torch.randn(1, 3, 4)
    assert make_inputs(graph_module, {"x": given, "other": 1}, seed=0)["x"] is given
    made = make_inputs(graph_module, {"other": 1}, seed=0)["x"]
    assert made.shape == (2, 16, 4) and made.dtype == torch.float32 and made.std() > 0.5


Made = dict[str, torch.Tensor]


def write_image(path: Path, shade: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(path)


def write_sound(path: Path, width: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes(np.array([[2**14, 0], [-(2**14), 0]], dtype=f"<i{width}").tobytes())


def see(image: Any, return_tensors: str) -> Made:
    return {"pixel_values": torch.tensor(np.asarray(image))[None].float()}


def hear(sound: Any, return_tensors: str, sampling_rate: int) -> Made:
    return {"input_values": torch.tensor(sound)[None] * sampling_rate}


class Both:
    attributes = ("image_processor", "tokenizer")
    image_token = "<image>"

    def __call__(self, images: Any, text: str, return_tensors: str) -> Made:
        ids = torch.tensor([[len(text)]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **see(images, return_tensors)}

    def tokenizer(self, text_target: str, return_tensors: str) -> Any:
        return type("Encoding", (), {"input_ids": torch.tensor([[len(text_target)]])})


def test_a_folder_gives_images_with_the_classes_that_folders_name(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/a.png", "cat/b.JPG", "c.png", "others/d.png")):
        write_image(tmp_path / name, shade=i)
    (tmp_path / "notes").write_text("")
    found = processed_samples(str(tmp_path), see, {"cat": 0, "dog": 1})
    assert [one.get("labels", torch.tensor([-1])).item() for one in found] == [-1, 0, 1, -1]
    assert all(one["pixel_values"].shape == (1, 3, 4, 3) for one in found)
    assert len(processed_samples(str(tmp_path), see, {}, most=2)) == 2


def test_sounds_are_read_from_minus_one_to_one(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    (found,) = processed_samples(str(tmp_path), hear, {})
    assert found["input_values"].tolist() == [[4000.0, -4000.0]]
    write_sound(tmp_path / "b.wav", width=4)
    with pytest.raises(CalibrationError, match=r"b\.wav: ValueError: it has 32 bits a sample"):
        processed_samples(str(tmp_path), hear, {})


def test_rows_name_what_a_processor_reads_or_hold_what_a_model_takes(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": "what", "target": "red"}, {"image": "a.png", "text": "<image>", "label": "cat"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = processed_samples(str(file), Both(), {"cat": 5})
    assert first["input_ids"].item() == len("<image>what") and second["input_ids"].item() == len("<image>")
    assert first["labels"].tolist() == [[3]] and second["labels"].tolist() == [5]
    assert "attention_mask" not in first, "it has nothing to say"
    file.write_text('{"input_ids": [3, 4], "start_positions": 1}')
    (plain,) = processed_samples(str(file), None, {})
    assert plain["input_ids"].tolist() == [[3, 4]] and plain["start_positions"].tolist() == [1]


def test_text_alone_needs_no_processor(tmp_path: Path) -> None:
    texts = ['{"text": "red"}', '{"messages": []}', '{"instruction": "a", "output": "b"}']
    texts += ['{"conversations": [{"from": "human", "value": "a"}]}', '{"prompt": [{}], "completion": [{}]}', "[{}]"]
    others = ['{"image": "a.png"}', '{"text": "a", "label": 1}', '{"input_ids": [1]}']
    for lines, wanted in ((texts, False), (others, True)):
        for i, line in enumerate(lines):
            (tmp_path / f"{i}.jsonl").write_text(line)
            assert needs_processor(str(tmp_path / f"{i}.jsonl")) == wanted, line
    assert needs_processor(str(tmp_path)) and not needs_processor(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"image": "none.png"}', "line 1: FileNotFoundError"),
        ("rows.jsonl", '{"label": "cow"}', "line 1: KeyError: 'cow'"),
        ("rows.jsonl", "[1]", "line 1 is no object"),
        ("empty/notes", "", "it holds no samples"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(CalibrationError, match=words):
        processed_samples(str(path if path.suffix else path.parent), see, {"cat": 0})


TOKENS = 600


@pytest.mark.slow
def test_texts_are_long_and_repeat_no_paragraph() -> None:
    parts: list[str] = []
    for text, least in ((general_text, 120_000), (offline_text, 300_000), (offline_docstrings, 100_000)):
        first = text()
        assert len(first) > least and text() == first == first.strip()
        parts += first.split("\n\n")
    assert len(set(parts)) == len(parts)


@pytest.mark.slow
def test_samples_are_of_general_text_as_far_as_it_goes() -> None:
    tokenizer = character_tokenizer()
    general, windows = (token_windows(tokenizer, text, TOKENS) for text in (general_text(), built_in_text()))
    rest = windows[len(general) :]
    few = built_in_samples(tokenizer, TOKENS, 4)
    assert torch.equal(few, general[[i * len(general) // 4 for i in range(4)]])
    more = built_in_samples(tokenizer, TOKENS, len(general) + 2)
    assert torch.equal(more, torch.cat([general, rest[[0, len(rest) // 2]]]))
    assert torch.equal(built_in_samples(tokenizer, TOKENS), windows)
    assert built_in_samples(tokenizer, TOKENS, 0).shape == (0, TOKENS)
    assert torch.equal(built_in_samples(tokenizer, TOKENS, 10**9), windows)
    assert torch.equal(built_in_samples(tokenizer, TOKENS, 10**9, beyond=False), general)


def test_a_model_that_chats_gets_chats_in_its_own_template() -> None:
    tokenizer = character_tokenizer(chat=True)
    chats = general_chats(tokenizer)
    first = [{"role": "user", "content": "What is the largest planet in the solar system?"}]
    assert chats.startswith(tokenizer.apply_chat_template(first, tokenize=False)) and len(chats) > 50_000
    assert chats == general_chats(tokenizer) and general_chats(character_tokenizer()) == ""
    plain, more = (built_in_samples(character_tokenizer(chat), TOKENS, 10**9, beyond=False) for chat in (False, True))
    ids = tokenizer(f"{general_text()}\n\n{chats}", add_special_tokens=False)["input_ids"]
    assert torch.equal(more[: len(plain)], plain) and len(more) == len(ids) // TOKENS > len(plain) + 100
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert general_chats(tokenizer) == "", "samples are there all the same"


STARTS = token_ids(3, 2)


def test_generated_samples_depend_on_starts_and_seed_alone() -> None:
    """Not on the model's own settings, which transformers applies to every option that a call leaves open."""
    model = tiny("llama").train()
    state = torch.random.get_rng_state()
    written, again, other = (generate_samples(model, STARTS, 5, 7, seed) for seed in (0, 0, 1))
    assert written.shape == (5, 7) and written.dtype == torch.int64
    assert torch.equal(written[:, :2], STARTS[[0, 1, 2, 0, 1]])
    assert torch.equal(written, again) and not torch.equal(written, other)
    assert torch.equal(state, torch.random.get_rng_state()) and all(module.training for module in model.modules())
    own = model.generation_config
    own.update(return_dict_in_generate=True, num_return_sequences=2, max_time=0.0, num_beams=2, suppress_tokens=[3])
    assert torch.equal(generate_samples(model, STARTS, 5, 7, 0), written)
    assert torch.equal(generate_samples(model, STARTS, 5, 7, 0, rows=2), written), "fewer at once, and less cache"
    each = 3 * 2 * 4 * 24  # three layers, keys and values, float32, three heads of 8
    fitting = [rows_at_once(model, STARTS[:1], 7, most) for most in (0, 7 * each * 3, 7 * each * 3 - 1, 1e9)]
    assert fitting == [1, 3, 2, 96]
    assert model.generation_config is own and own.num_beams == 2


def test_interrupted_generation_resumes_after_the_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began anew, and with weights on disk each token of a batch reads all of them."""
    model, asked = tiny("llama"), list[int]()
    whole, generate = generate_samples(model, STARTS, 6, 7, 0, rows=2), model.generate

    def stop_at_the_third(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        asked.append(len(ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(ids, **settings)

    monkeypatch.setattr(model, "generate", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt), offload_to(tmp_path, tmp_path):
        generate_samples(model, STARTS, 6, 7, 0, rows=2)
    with offload_to(tmp_path, tmp_path):
        assert torch.equal(generate_samples(model, STARTS, 6, 7, 0, rows=2), whole)
    assert asked == [2, 2, 2, 2], "the third batch, which was interrupted, again"
    kept = sorted(tmp_path.glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    with offload_to(tmp_path, tmp_path), pytest.raises(FxpruneError, match="cannot be read"):
        generate_samples(model, STARTS, 6, 7, 0, rows=2)  # the prune would take another text in their place


def test_tokens_are_drawn_by_what_the_model_says() -> None:
    """With a readout of zeros all tokens are as likely."""
    model = tiny("llama", tie_word_embeddings=False)
    readout = model.get_output_embeddings().weight
    with torch.no_grad():
        readout.zero_()
    written = generate_samples(model, STARTS, 64, 34, 0)[:, 2:]
    assert len(written.unique()) > len(readout) // 2


def test_tokens_are_drawn_by_their_probabilities_and_no_text_ends() -> None:
    """At a temperature of 0.8; the last token ends a text."""
    said = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.9]).log()
    wanted = (said[:4] / 0.8).softmax(-1)
    numbers = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    chosen = _Draw([4], numbers)(torch.zeros(20_000, 1, dtype=torch.long), said.repeat(20_000, 1)).argmax(-1)
    found = chosen.bincount(minlength=5) / len(chosen)
    assert found[3] == found[4] == 0 and (found[:4] - wanted).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_only_what_continues_token_ids_can_write() -> None:
    assert can_generate(tiny("llama"))
    assert not can_generate(nn.Linear(2, 2))
    encodes = tiny("llama")
    encodes.config.is_encoder_decoder = True
    assert not can_generate(encodes)


def test_a_chat_begins_with_what_stands_before_the_user() -> None:
    chats = character_tokenizer(chat=True)
    assert chats.decode(chat_start(chats)) == "<u>"
    assert chat_start(character_tokenizer()) == chat_start(None) == []
    chats.chat_template = "{{ raise_exception('no') }}"
    assert chat_start(chats) == []
    chats.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert chat_start(chats) == [], "it leaves out what the user says"


def _own(
    tokenizer: Any, samples: int = 8, tokens: int = 16, seed: int = 0, **shares: float
) -> tuple[torch.Tensor, list[str]]:
    shown: list[str] = []

    def track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        shown.append(f"{what} {total}")
        return items

    model, words = tiny("llama"), torch.tensor([7, 9])
    return generated_samples(model, tokenizer, words, samples, tokens, seed, track, **shares), shown


def test_without_a_chat_each_sample_begins_with_a_token_of_the_vocabulary() -> None:
    written, shown = _own(None)
    assert written.shape == (8, 16) and set(written[:, 0].tolist()) == {7, 9} and shown == ["the model writes 1"]
    assert torch.equal(written, _own(None)[0]) and not torch.equal(written, _own(None, seed=1)[0])


def test_a_fraction_of_the_samples_begins_with_a_language_that_the_tokenizer_can_write() -> None:
    tokenizer = character_tokenizer()
    assert len(opening_texts()) == len(set(opening_texts())) == 30 and min(map(len, opening_texts())) > 50
    rows = opening_rows(tokenizer, 4, opening_texts())
    assert 0 < len(rows) < 30 and rows.shape[1] == 4 and tokenizer.unk_token_id not in rows
    assert {tokenizer.decode(row) for row in rows} <= {text[:4] for text in opening_texts()}
    assert opening_rows(None, 4, opening_texts()).numel() == opening_rows(tokenizer, 0, opening_texts()).numel() == 0
    for shares, count in (({}, 2), ({"languages": 0.5}, 4), ({"languages": 0.8}, 6)):
        written, shown = _own(tokenizer, **shares)
        begun = [any(torch.equal(sample[:4], row) for row in rows) for sample in written]
        assert sum(begun) == count and shown == ["the model writes 1", "the model writes in other languages 1"]
    assert _own(tokenizer, languages=0.0)[1] == ["the model writes 1"]


def test_a_fraction_of_the_samples_begins_as_programs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is shared among the other kinds as without them."""
    texts = program_texts()
    assert len(set(texts)) == 10 and min(map(len, texts)) > 100 and all(text.endswith("\n") for text in texts)
    chats = character_tokenizer(chat=True)
    monkeypatch.setattr(built_in, "program_texts", lambda: ("dcdcdc", "ddcc", "\u2603 unknown"))
    written, shown = _own(chats, samples=16, programs=0.25)
    begun = [any(chats.decode(sample[:4]) == start for start in ("dcdc", "ddcc")) for sample in written]
    assert sum(begun) == 4 and shown[-2:] == ["the model writes programs 1", "the model chats 1"]
    start = torch.tensor(chat_start(chats))
    assert int((written[:, : len(start)] == start).all(-1).sum()) == 6
    assert torch.equal(_own(None, programs=0.5)[0], _own(None)[0]), "a tokenizer that can write none"


def test_half_of_the_samples_of_a_model_that_chats_are_chats() -> None:
    chats = character_tokenizer(chat=True)
    start = torch.tensor(chat_start(chats))
    written, shown = _own(chats)
    begun = (written[:, : len(start)] == start).all(-1)
    assert int(begun.sum()) == 4 and sum(first in (7, 9) for first in written[~begun, 0].tolist()) == 3
    assert not bool(begun[:4].all()) and not bool(begun[4:].all()), "they take turns, so that a part has both"
    assert shown == [f"the model {what} 1" for what in ("writes", "writes in other languages", "chats")]
    short, _ = _own(chats, samples=3, tokens=4)
    assert short.shape == (3, 4) and int((short[:, 0] == start[-1]).sum()) == 1, "a long start loses its own"
    assert _own(chats, samples=1)[1] == ["the model writes 1"]
