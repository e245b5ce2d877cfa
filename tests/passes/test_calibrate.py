"""Calibration, sizes and verification inputs as passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.passes.calibrate import CalibratePass
from fxprune.passes.emit import CountWorkPass
from fxprune.passes.verify import MakeVerificationInputsPass
from torch import fx, nn

from fxprune.data.built_in import general_samples
from fxprune.data.calibration import Calibration
from fxprune.data.verification import VerificationInputs
from fxprune.errors import CalibrationError
from fxprune.graph.facts import Notes, facts_of
from fxprune.offload.files import shelved
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.removal import Removal
from fxprune.report.report import Work
from fxprune.trace import trace
from tests.models import tiny, token_ids
from tests.oracle import Net
from tests.tokens import character_tokenizer


def test_calibrate_reads_rows_from_a_call_or_a_file(tmp_path: Path) -> None:
    dense = trace(tiny("llama")).graph_module
    ids = token_ids(3, 5)
    CalibratePass(data=ids)(dense)
    given = facts_of(dense)[Calibration].samples
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(f'{{"input_ids": {row}}}' for row in ids.tolist()) + "\n\n")
    CalibratePass(file=str(file))(dense)
    read = facts_of(dense)[Calibration].samples
    assert len(read) == len(given) == 3
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(given, read, strict=True))


@pytest.mark.parametrize(
    "text", ["", "no json", '{"input_ids": "text"}', "[1, 2]", '{"input_ids": [1]}', '{"ids": [1, 2]}']
)
def test_calibrate_refuses_files_of_another_form(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    dense = trace(tiny("llama")).graph_module
    for step in (CalibratePass(file=str(file)), CalibratePass(file=str(tmp_path / "absent")), CalibratePass()):
        with pytest.raises(CalibrationError):
            step(dense)
    assert Calibration not in facts_of(dense)


@pytest.mark.parametrize(("arguments", "count"), [({"built_in": 3}, 3), ({"built_in": 5, "samples": 2}, 2)])
def test_of_the_built_in_text_a_recipe_may_take_less(arguments: dict[str, int], count: int) -> None:
    graph_module = trace(tiny("llama", vocab_size=300), {"input_ids": token_ids(2, 8)}).graph_module
    found = CalibratePass(tokenizer=character_tokenizer(), tokens=16, **arguments)(graph_module).graph_module
    assert len(facts_of(found)[Calibration].samples) == count
    given = CalibratePass(data=token_ids(9, 8), tokenizer=character_tokenizer(), built_in=3)(graph_module).graph_module
    assert len(facts_of(given)[Calibration].samples) == 9


def _written(graph_module: fx.GraphModule, **arguments: Any) -> tuple[torch.Tensor, str]:
    """The samples that came of a call without any, and what the report says of them."""
    step = CalibratePass(tokenizer=character_tokenizer(), tokens=16, **arguments)
    facts = facts_of(step(graph_module).graph_module)
    ids = torch.cat([sample.inputs["input_ids"] for sample in facts[Calibration].samples])
    return ids, "; ".join(facts[Notes].lines)


def test_for_want_of_samples_the_model_writes_them_itself() -> None:
    graph_module = trace(tiny("llama", vocab_size=300), {"input_ids": token_ids(2, 8)}).graph_module
    text = {tuple(row) for row in _written(graph_module)[0].tolist()}
    ids, note = _written(graph_module, written=5)
    assert ids.shape == (5, 16) and sum(tuple(row) in text for row in ids.tolist()) == 3, "two in three"
    assert "2 samples that the model wrote itself, and 3 of built-in text, for want of other samples" in note
    assert torch.equal(ids, _written(graph_module, written=5)[0])
    assert not torch.equal(ids, _written(graph_module, written=5, seed=1)[0])
    assert len(_written(graph_module, written=5, samples=2)[0]) == 2
    assert CalibratePass(data=token_ids(9, 8), written=5).stand_ins == 0, "there are others"


def test_more_is_written_where_there_is_too_little_built_in_text() -> None:
    general = general_samples(128)
    counts = [(written, CalibratePass(written=written).to_write) for written in (3, 288, 1024)]
    assert counts == [(3, 1), (288, 96), (1024, 1024 - general)] and 240 < general < 270
    assert CalibratePass(written=288, samples=9).to_write == 3
    assert CalibratePass(data=token_ids(9, 8), written=288).to_write == 0


def test_what_cannot_write_gets_the_built_in_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=300)
    graph_module = trace(model, {"input_ids": token_ids(2, 8)}).graph_module
    plain = _written(graph_module)[0]
    with shelved(tmp_path):
        ids, note = _written(graph_module, written=5)
    assert len(ids) == 5 and all(any(torch.equal(row, other) for other in plain) for row in ids)
    assert "calibrated on built-in text" in note and "each token that is written would read them all" in note
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: torch.empty(0, -1))
    assert "the model wrote none: RuntimeError" in _written(graph_module, written=5)[1]
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda _: False))
    assert "the model writes no text" in _written(graph_module, written=5)[1]


def test_count_work_counts_parameters_and_macs() -> None:
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(10, 12), b=nn.Linear(12, 5, bias=False))
    dense = trace(net, {"x": torch.randn(1, 10)}).graph_module
    CountWorkPass()(dense)
    parameters = 10 * 12 + 12 + 12 * 5
    assert facts_of(dense)[Work] == Work(parameters, 10 * 12 + 12 * 5, 64, memory=4 * parameters, model="Net")


def test_count_work_counts_the_cache_before_and_after_what_is_decided() -> None:
    """Keys and values of a token: two bytes a number, for the key/value heads of each layer."""
    dense = trace(tiny("llama")).graph_module
    Pipeline("find-groups, l2{kinds=[head]}, count-work")(dense)
    assert facts_of(dense)[Work].cache is None
    Pipeline("select-by-group-ratio{kinds=[head], group_ratio=0.34, protect=[1, 0]}, count-work")(dense)
    removal = facts_of(dense)[Removal]
    left = sum(removal.keep.count(g.factor) for g in removal.groups if g.name.endswith("/head") and g.factor)
    assert left == 3 + 2 + 2
    assert facts_of(dense)[Work].cache == (2 * 2 * 8 * 9, 2 * 2 * 8 * left)


def test_verification_inputs_are_those_of_the_trace_or_random_by_seed() -> None:
    x = torch.randn(3, 10)
    dense = trace(Net(lambda m, x: m.a(x), a=nn.Linear(10, 2)), {"x": x}).graph_module
    MakeVerificationInputsPass()(dense)
    assert facts_of(dense)[VerificationInputs].values["x"] is x
    MakeVerificationInputsPass(example_inputs={"x": x + 1})(dense)
    assert torch.equal(facts_of(dense)[VerificationInputs].values["x"], x + 1)
    model = trace(tiny("llama")).graph_module
    made = []
    for seed in (0, 0, 1):
        MakeVerificationInputsPass(seed=seed)(model)
        made.append(facts_of(model)[VerificationInputs].values["input_ids"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
