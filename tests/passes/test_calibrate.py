"""The passes that read samples, and those that emit models, reports and checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.passes.emit import EmitModelPass, MakeReportPass, SaveCheckpointPass
from fxprune.passes.prepare import CalibratePass
from tokenizers import processors
from torch import fx, nn

import fxprune
from fxprune.api import trace_for
from fxprune.data.built_in import general_samples
from fxprune.data.calibration import Calibration, fixed_tokens
from fxprune.data.samples import FileSamples
from fxprune.emit.emitted import Emitted
from fxprune.errors import CalibrationError, CheckpointError, PassError
from fxprune.evaluation.comparison import window_of
from fxprune.graph.facts import Notes, Source, facts_of, fork
from fxprune.offload.files import offload_to
from fxprune.pipeline.pipeline import Pipeline
from fxprune.report.report import Report, SamplesUsed
from fxprune.trace import trace
from tests.models import tiny, token_ids
from tests.oracle import Net
from tests.tokens import character_tokenizer


@pytest.fixture(scope="module")
def graph_module() -> fx.GraphModule:
    """A model whose vocabulary has all characters of the built-in text."""
    return trace(tiny("llama", vocab_size=300, num_hidden_layers=1), {"input_ids": token_ids(2, 8)}).graph_module


@pytest.fixture(scope="module")
def built_in_text(graph_module: fx.GraphModule) -> torch.Tensor:
    return _calibrated(graph_module)[0]


def test_calibrate_reads_rows_from_a_call_or_a_file(graph_module: fx.GraphModule, tmp_path: Path) -> None:
    dense = fork(graph_module)
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
def test_calibrate_refuses_files_of_another_form(graph_module: fx.GraphModule, text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    dense = fork(graph_module)
    for step in (CalibratePass(file=str(file)), CalibratePass(file=str(tmp_path / "absent")), CalibratePass()):
        with pytest.raises(CalibrationError):
            step(dense)
    assert Calibration not in facts_of(dense)


def _calibrated(graph_module: fx.GraphModule, **arguments: Any) -> tuple[torch.Tensor, str]:
    """The samples of a call without data, and the notes about them."""
    step = CalibratePass(tokenizer=character_tokenizer(), tokens=16, **arguments)
    facts = facts_of(step(fork(graph_module)).graph_module)
    ids = torch.cat([sample.inputs["input_ids"] for sample in facts[Calibration].samples])
    return ids, "; ".join(facts[Notes].lines)


def test_the_number_of_samples_of_built_in_text(graph_module: fx.GraphModule) -> None:
    assert len(_calibrated(graph_module, built_in=3)[0]) == 3
    assert len(_calibrated(graph_module, built_in=5, samples=2)[0]) == 2
    given = CalibratePass(data=token_ids(9, 8), tokenizer=character_tokenizer(), built_in=3)(fork(graph_module))
    assert len(facts_of(given.graph_module)[Calibration].samples) == 9


def test_the_model_generates_a_third_of_the_substitutes(
    graph_module: fx.GraphModule, built_in_text: torch.Tensor
) -> None:
    text = {tuple(row) for row in built_in_text.tolist()}
    ids, note = _calibrated(graph_module, written=5)
    assert ids.shape == (5, 16) and sum(tuple(row) in text for row in ids.tolist()) == 3, "two in three"
    assert "2 samples that the model generated, and 3 of built-in text, for want of other samples" in note
    assert torch.equal(ids, _calibrated(graph_module, written=5)[0])
    assert not torch.equal(ids, _calibrated(graph_module, written=5, seed=1)[0])
    assert len(_calibrated(graph_module, written=5, samples=2)[0]) == 2
    assert CalibratePass(data=token_ids(9, 8), written=5).substitutes == 0, "there are others"


def test_generated_samples_are_added_to_those_given(graph_module: fx.GraphModule, tmp_path: Path) -> None:
    """Half as many as are taken, as long as those, and shuffled; the same with the same seed."""
    given = token_ids(9, 8)
    step = CalibratePass(data=given, tokenizer=character_tokenizer(), added=4)
    facts = facts_of(step(fork(graph_module)).graph_module)
    found = facts[Calibration]
    assert (len(found.samples), found.written, found.source) == (12, 4, "the samples passed")
    ids = torch.cat([sample.inputs["input_ids"] for sample in found.samples])
    assert ids.shape == (12, 8) and not torch.equal(ids[:9], given)
    assert sum(row in given.tolist() for row in ids.tolist()) == 8
    assert step.cost(9).given == 12 and step.cost(5).given == 7
    assert "4 samples that the model generated were added to 8 given" in facts[Notes].lines
    again = facts_of(step(fork(graph_module)).graph_module)[Calibration].samples
    assert all(
        torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        for one, other in zip(found.samples, again, strict=True)
    )
    many = CalibratePass(data=given, tokenizer=character_tokenizer(), added=99, samples=6)
    assert facts_of(many(fork(graph_module)).graph_module)[Calibration].written == 3
    assert many.cost(6).runs == 9 and CalibratePass(added=4, written=9).cost(0).runs == 9
    shares = [CalibratePass(added=8, per_given=2.0, written=9, data=given).cost(n) for n in (1, 3, 9)]
    assert [(cost.given, cost.runs) for cost in shares] == [(3, 6), (9, 18), (12, 24)], "two for each, of four"
    few = CalibratePass(data=given, tokenizer=character_tokenizer(), added=4, per_given=0.1)
    assert few.cost(9).given == 9 and facts_of(few(fork(graph_module)).graph_module)[Calibration].written == 0
    with offload_to(tmp_path):
        there = facts_of(step(fork(graph_module)).graph_module)[Calibration]
    assert there.written == 4, "weights in files generate too"
    assert torch.equal(torch.cat([sample.inputs["input_ids"] for sample in there.samples]), ids)


def test_more_is_generated_if_there_is_too_little_built_in_text() -> None:
    general = general_samples(128)
    counts = [(written, CalibratePass(written=written).generated) for written in (3, 288, 1024)]
    assert counts == [(3, 1), (288, 96), (1024, 1024 - general)] and 240 < general < 270
    assert CalibratePass(written=288, samples=9).generated == 3
    assert CalibratePass(data=token_ids(9, 8), written=288).generated == 0


def test_a_model_that_cannot_generate_gets_the_built_in_text(
    graph_module: fx.GraphModule, built_in_text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(facts_of(graph_module)[Source].model)
    monkeypatch.setattr(kind, "generate", lambda *_, **__: torch.empty(0, -1))
    ids, note = _calibrated(graph_module, written=5)
    assert len(ids) == 5 and all(bool((row == built_in_text).all(1).any()) for row in ids)
    assert "calibrated on built-in text" in note and "the model generated none: RuntimeError" in note
    monkeypatch.setattr(kind, "can_generate", classmethod(lambda _: False))
    assert "the model cannot generate text" in _calibrated(graph_module, written=5)[1]


def _short(positions: int = 32) -> fx.GraphModule:
    """A model of few positions, which raises an index error beyond them."""
    short = tiny("gpt2", vocab_size=300, n_layer=1, n_positions=positions)
    return trace(short, {"input_ids": token_ids(2, 8)}).graph_module


def _read(step: CalibratePass, graph_module: fx.GraphModule) -> tuple[set[tuple[int, ...]], tuple[str, ...]]:
    facts = facts_of(step(fork(graph_module)).graph_module)
    shapes = {tuple(sample.inputs["input_ids"].shape) for sample in facts[Calibration].samples}
    return shapes, (facts.get(Notes) or Notes()).lines


def test_samples_have_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    """Each recipe that reads samples ended in an index error of torch."""
    dense, letters = _short(), character_tokenizer()
    note = "samples have at most 32 tokens, as many as the model has positions"
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"input_ids": {row}}}' for row in token_ids(3, 40).tolist()))
    for step in (
        CalibratePass(data=token_ids(3, 40)),
        CalibratePass(data=[{"input_ids": token_ids(1, 40), "labels": token_ids(1, 40)}]),
        CalibratePass(file=str(tmp_path / "rows.jsonl")),
        CalibratePass(tokenizer=letters, written=3),
        CalibratePass(data=["So it goes, and so it went. " * 9], tokenizer=letters),
    ):
        shapes, notes = _read(step, dense)
        assert shapes == {(1, 32)} and note in notes, step
    assert _read(CalibratePass(data=["So it goes, once. " * 2], tokenizer=letters), dense)[0] == {(1, 32)}
    for step in (
        CalibratePass(data=token_ids(3, 32)),
        CalibratePass(data=["So it goes. " * 9], tokenizer=letters, tokens=32),
    ):
        shapes, notes = _read(step, dense)
        assert shapes == {(1, 32)} and note not in notes, step


def test_labels_that_all_lie_beyond_the_positions_are_refused() -> None:
    labels = torch.full((1, 40), -100)
    labels[:, 36:] = 5
    with pytest.raises(CalibrationError, match="all labels are -100"):
        CalibratePass(data=[{"input_ids": token_ids(1, 40), "labels": labels}])(_short())


@pytest.mark.parametrize("importance", ["wanda", "taylor"])
def test_samples_that_a_model_has_no_positions_for_are_refused_where_its_config_does_not_say(importance: str) -> None:
    def forward(net: Net, ids: torch.Tensor) -> torch.Tensor:
        x = net.table(ids) + net.places(torch.arange(ids.shape[1]))
        return net.head(net.down(net.up(x).relu()))

    parts: dict[str, nn.Module] = {"table": nn.Embedding(131, 8), "places": nn.Embedding(16, 8)}
    parts |= {"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "head": nn.Linear(8, 131)}
    net, example = Net(forward, **parts).eval(), {"x": token_ids(2, 8)}
    options: dict[str, Any] = {"recipe": "llm-pruner", "importance": importance, "kinds": "mlp", "ratio": 0.05}
    fxprune.prune(net, token_ids(3, 16), example_inputs=example, **options)
    remedy = "no longer than its positions: of text, fewer tokens"
    with pytest.raises(CalibrationError, match=rf"cannot compute a sample of x \(1, 20\).*{remedy}"):
        fxprune.prune(net, token_ids(3, 20), example_inputs=example, **options)


def test_a_model_that_runs_at_one_length_alone_is_traced_at_that_of_the_samples() -> None:
    """It was traced at seven tokens, and all samples were refused, with a remedy that no shell has."""
    model = tiny("mamba", hidden_size=16, num_hidden_layers=1, state_size=2, time_step_rank=2)
    texts = ["So it goes, and so it went on."]
    pipeline = fxprune.prune_pipeline(texts, tokenizer=character_tokenizer(), recipe=FIVE_TOKENS)
    dense = trace_for(model, None, pipeline)
    assert fixed_tokens(dense) == 5 == window_of(model, dense) and window_of(model) == 256
    slim = pipeline(dense).graph_module
    assert fixed_tokens(slim) == 5 and len(facts_of(slim)[Calibration].samples) == 2
    with pytest.raises(CalibrationError, match="Pass samples of that shape alone"):
        CalibratePass(data=token_ids(2, 6))(fork(dense))


FIVE_TOKENS = "calibrate{tokens=5, samples=2}, find-groups, wanda, select-by-ratio{ratio=0.05}, shrink, make-report"


def test_calibration_tells_its_source(graph_module: fx.GraphModule, tmp_path: Path) -> None:
    """And how many samples the model wrote, of those that were used."""
    file, tokenizer = tmp_path / "rows.jsonl", character_tokenizer()
    file.write_text(f'{{"input_ids": {list(range(9))}}}')
    rows: list[tuple[dict[str, Any], str, int, int]] = [
        ({"data": token_ids(5, 9), "samples": 3}, "the samples passed", 3, 0),
        ({"data": FileSamples(token_ids(5, 9), "a.txt"), "written": 9}, "a.txt", 5, 0),
        ({"file": str(file)}, "rows.jsonl", 1, 0),
        ({"tokenizer": tokenizer, "built_in": 2, "tokens": 9}, "built-in text", 2, 0),
        ({"tokenizer": tokenizer, "written": 3, "tokens": 9}, "built-in text and text that the model wrote", 3, 1),
    ]
    for arguments, source, samples, written in rows:
        CalibratePass(**arguments)(dense := fork(graph_module))
        found = facts_of(dense)[Calibration]
        assert (found.source, len(found.samples), found.written) == (source, samples, written)
        assert SamplesUsed.of(found).lengths == (9, 9)


def test_samples_without_the_opening_of_the_tokenizer_are_noted(graph_module: fx.GraphModule) -> None:
    """A model trained with a token before each text was calibrated without it, and nothing said so."""
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    for given, noted in ((token_ids(3, 5) + 4, True), (None, False)):
        dense = fork(graph_module)
        CalibratePass(data=given, tokenizer=tokenizer, samples=4, tokens=16)(dense)
        notes = facts_of(dense).get(Notes)
        assert any("no sample begins with <s>" in note for note in (notes.lines if notes else ())) == noted
    assert all(int(sample.inputs["input_ids"][0, 0]) == 1 for sample in facts_of(dense)[Calibration].samples)


SHRINK = "find-groups, l2, select-by-ratio{ratio=0.25, protect=()}, shrink"


def test_model_report_and_checkpoint_come_one_after_the_other(tmp_path: Path) -> None:
    slim = Pipeline(SHRINK)(trace(tiny("llama")).graph_module).graph_module
    with pytest.raises(PassError, match=r"the fact Emitted is not known. Run emit-model first"):
        SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    EmitModelPass()(slim)
    facts = facts_of(slim)
    assert Source not in facts
    model = facts[Emitted].require_model()
    assert {id(p) for p in model.parameters()} == {id(p) for p in slim.parameters()}
    MakeReportPass()(slim)
    report = facts[Report]
    assert report.ratio == 0.25 and report.verification_error is None
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    with pytest.raises(CheckpointError, match=r"save-checkpoint\{folder=slim\}"):
        SaveCheckpointPass()(slim)
    SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    assert json.loads((tmp_path / "slim/report.json").read_text())["ratio"] == 0.25


def test_what_is_no_hugging_face_model_gets_none_and_the_report_says_what_applies(tmp_path: Path) -> None:
    """What no example input reaches was left out of the ratio without a word, and images had tokens and a cache."""
    net = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(10, 12), b=nn.Linear(12, 5), other=nn.Linear(3, 3))
    slim = Pipeline(SHRINK)(trace(net, {"x": torch.randn(2, 10)}).graph_module).graph_module
    Pipeline([EmitModelPass(), MakeReportPass()])(slim)
    report = facts_of(slim)[Report]
    assert report.model_reasons == ("the model passed is not a Hugging Face model",)
    assert any(note.startswith("12 parameters of the model (5.7%)") for note in report.notes)
    assert [size.name for size in report.headlines()] == ["parameters", "MACs of a sample", "bytes of weights"]
    with pytest.raises(CheckpointError, match="not a Hugging Face model"):
        SaveCheckpointPass(str(tmp_path / "slim"))(slim)
    assert list(tmp_path.iterdir()) == []


def test_groups_under_a_norm_are_named_and_can_be_left_out() -> None:
    """They were taken like others, and called exact: the norm runs over fewer units afterwards."""
    parts = {"a": nn.Linear(10, 16), "b": nn.Linear(16, 10), "c": nn.Linear(10, 16), "d": nn.Linear(16, 10)}
    net = Net(lambda m, x: m.b(m.norm(m.a(x))) + m.d(m.c(x).relu()), norm=nn.LayerNorm(16), **parts)
    graph = trace(net, {"x": torch.randn(2, 10)}).graph_module
    shrink = "find-groups, l2{kinds=[%s]}, select-by-group-ratio{%s, group_ratio=%s, protect=()}"
    shrink += ", shrink{verify}, make-report"
    reports = []
    for scored, shrunk, ratio in (
        ("mlp", "mlp", "0.25"),
        ("exact-mlp", "exact-mlp", "0.25"),
        ("exact-mlp", "mlp", "[[exact-mlp, 0.25]]"),
    ):
        slim = Pipeline(shrink % (scored, f"kinds=[{shrunk}]", ratio))(graph).graph_module
        reports.append(facts_of(slim)[Report])
    assert [len(report.widths) for report in reports] == [2, 1, 1]
    (nodes,) = reports[0].renormalised.values()
    assert any("norm" in node for node in nodes) and set(reports[0].renormalised) < set(reports[0].widths)
    assert reports[1].renormalised == reports[2].renormalised == {} and reports[1].widths == reports[2].widths
    assert max(report.verification_error or 0 for report in reports) < 1e-5
