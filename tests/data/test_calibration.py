"""Calibration samples, the loss on them, and samples with replaced tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxprune.data.calibration import (
    IGNORED,
    Sample,
    embedding_rows,
    make_inputs,
    next_token_loss,
    noised,
    plain_tokens,
    stacked,
    token_input,
)
from fxprune.data.samples import read_calibration
from fxprune.errors import CalibrationError
from fxprune.trace.capture import trace
from tests import remembered
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
    shapes = [tuple(batch["x"].shape) for batch in stacked(samples, graph_module, 2)]
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
    (batch,) = stacked(samples, graph_module, 8)
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
