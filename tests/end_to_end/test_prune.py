"""What a user relies on: the public surface on a small model, and recipes from the call to the slim model."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fxprune
from fxprune.recipes import read_recipe
from tests.faults import Snapshot
from tests.models import tiny, token_ids
from tests.remembered import pruned
from tests.tiers import tiers
from tests.tokens import character_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def result(model: PreTrainedModel) -> fxprune.Result:
    return fxprune.prune(model, token_ids(4, 12), recipe="llm-pruner", protect=())


def test_inplace_depth_pruning(model: PreTrainedModel) -> None:
    own, select = copy.deepcopy(model), "select-by-group-ratio{group_ratio=0.34}"
    slim = fxprune.prune(own, importance="l2", kinds=("layer",), select=select, protect=(), inplace=True)
    assert slim.model is own and len(own.model.layers) == 2
    assert own.generate(token_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape[0] == 2


def test_graph_trains_moves_and_changes_dtype(result: fxprune.Result) -> None:
    slim = copy.deepcopy(result.graph_module).train()
    logits = slim(input_ids=token_ids()).logits
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())
    half = copy.deepcopy(result.graph_module).to(torch.bfloat16)
    assert half(input_ids=token_ids()).logits.dtype == torch.bfloat16
    twin = copy.deepcopy(result.model).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(half(input_ids=token_ids()).logits, twin(token_ids()).logits)
    on_meta = copy.deepcopy(result.graph_module).to("meta")
    assert on_meta(input_ids=token_ids().to("meta")).logits.is_meta


@pytest.mark.slow
def test_graph_compiles(result: fxprune.Result) -> None:
    compiled = torch.compile(copy.deepcopy(result.graph_module), backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 9), (3, 5)):
            want = result(input_ids=token_ids(*shape)).logits
            assert torch.allclose(compiled(input_ids=token_ids(*shape)).logits, want, atol=1e-5)


def test_samples_of_a_loader_give_the_plan_of_their_rows(result: fxprune.Result) -> None:
    loader = torch.utils.data.DataLoader(token_ids(4, 12), batch_size=3)
    assert pruned("llama", loader, recipe="llm-pruner", protect=()).plan == result.plan


@pytest.mark.slow
def test_paper_table_for_the_7b_shape() -> None:
    """LLM-Pruner, table 3: parameters and MACs at 64 tokens after 20% and 50%."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    traced = fxprune.trace(model).graph_module
    published = ((0.25, (4, 2), 5.42, 340), (0.6, (3, 1), 3.35, 207))
    for group_ratio, protect, billions, giga in published:
        select = f"select-by-group-ratio{{group_ratio={group_ratio}}}"
        pipeline = fxprune.prune_pipeline(None, importance="random", select=select, protect=protect)
        result = fxprune.Result.of(pipeline(traced).graph_module)
        assert result.report.parameters[0] / 1e9 == pytest.approx(6.74, abs=0.005)
        assert result.report.parameters[1] / 1e9 == pytest.approx(billions, abs=0.005)
        assert result.report.macs[0] / 1e9 == pytest.approx(424, abs=0.5)
        assert result.report.macs[1] / 1e9 == pytest.approx(giga, abs=0.6)


SMALL = {
    r"^calibrate.*$": "calibrate{tokens=16, samples=24, written=24}",
    r"record-teacher.*$": "record-teacher{samples=16}",
    r"epochs=[12]": "epochs=4",
}


def small(name: str) -> str:
    """An installed recipe with fewer and shorter samples."""
    text = str(read_recipe(name))
    for old, new in SMALL.items():
        text = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    return text


@pytest.mark.slow
def test_the_default_recipe_needs_a_tokenizer_alone(model: PreTrainedModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fxprune.prune(model, tokenizer=character_tokenizer(), recipe=small("balanced"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert abs(result.report.achieved - 0.2) < 0.005
    assert result.report.verification_error is not None and result.report.verification_error < 1e-4
    notes = "\n".join(result.report.notes)
    assert (
        "calibrated on 8 samples that the model generated, and 16 of built-in text" in notes
        and "passed as calibration, do better" in notes
    )
    assert "weights were fitted by least squares" in notes and "on built-in text of another kind" in notes
    assert {name.rpartition("/")[2] for name in result.report.widths} == {"mlp"}, "MLP channels go before heads"
    with torch.no_grad():
        ids = token_ids(2, 9)
        assert torch.allclose(result.graph_module(ids).logits, result.model(ids).logits, atol=1e-4)


def test_a_model_without_mlp_channels_loses_heads(model: PreTrainedModel) -> None:
    """The kinds that come first are no more than that."""
    result = fxprune.prune(model, token_ids(6, 12), recipe=small("balanced"), kinds="head", ratio=0.05)
    assert {name.rpartition("/")[2] for name in result.report.widths} == {"head"}


def test_an_importance_without_data_fits_nothing_and_with_data_what_the_recipe_fits(model: PreTrainedModel) -> None:
    plain = fxprune.prune(model, importance="l2")
    whole = model.state_dict()
    for name, value in plain.model.state_dict().items():
        kept = whole[name]
        for axis, units in plain.plan.kept.get(name, {}).items():
            kept = kept.index_select(axis, torch.tensor(units))
        assert torch.equal(value, kept)
    fitted = fxprune.prune(model, importance="l2", tokenizer=character_tokenizer(), recipe=small("fast"))
    found = [any("fitted" in note for note in result.report.notes) for result in (plain, fitted)]
    assert found == [False, True]


STEPS = """
calibrate{{file='{rows}'}}
find-groups
{importance}
select-by-ratio{{ratio=0.25, protect=[]}}
{compensate}
shrink{{verify}}
emit-model
make-report
"""


class Plain(nn.Module):
    """A language model that is not one of transformers': an embedding, two networks and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(131, 12), nn.Linear(12, 131)
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for part in self.body:
            x = x + part(x)
        return self.head(x)  # type: ignore[no-any-return]


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def model_and_inputs(family: str) -> tuple[Any, dict[str, torch.Tensor] | None]:
    torch.manual_seed(0)
    return (Plain().eval(), {"ids": token_ids()}) if family == "plain" else (tiny(family), None)


SCORED, FITTED = ("taylor{order=second}", ""), ("l2", "least-squares")


CASES = [(family, *steps) for family in ("llama", "gpt2", "mixtral", "plain") for steps in (SCORED, FITTED)]


@pytest.mark.parametrize("case", tiers(CASES, ("gpt2", *SCORED), ("plain", *FITTED)), ids="-".join)
def test_a_pipeline_of_names_equals_prune(case: tuple[str, str, str], tmp_path: Path) -> None:
    family, importance, compensate = case
    model, inputs = model_and_inputs(family)
    before, ids = Snapshot(model), token_ids(4, 12)
    rows = tmp_path / "rows.jsonl"
    name = "input_ids" if inputs is None else "ids"
    rows.write_text("\n".join(json.dumps({name: row}) for row in ids.tolist()))
    text = STEPS.format(rows=rows, importance=importance, compensate=compensate)
    if family != "plain":
        text += f"save-checkpoint{{folder='{tmp_path / 'by_name'}'}}"
    pipeline = fxprune.Pipeline(text)
    assert str(fxprune.Pipeline(str(pipeline))) == str(pipeline)
    slim = pipeline(fxprune.trace(model, inputs).graph_module).graph_module
    facts = fxprune.facts_of(slim)
    options: dict[str, Any] = {"compensate": compensate} if compensate else {}
    options |= {
        "recipe": "llm-pruner",
        "importance": importance,
        "ratio": 0.25,
        "protect": (),
        "example_inputs": inputs,
    }
    result = fxprune.prune(model, ids, **options)
    assert str(slim.graph) == str(result.graph_module.graph) and slim.code == result.graph_module.code
    assert same(dict(slim.state_dict()), dict(result.graph_module.state_dict()))
    assert facts[fxprune.Removed].removal.plan == result.plan
    assert without_source(facts[fxprune.Report]) == without_source(result.report)
    assert result.report.verification_error is not None
    before.check()
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert own.isdisjoint(id(tensor) for tensor in (*slim.parameters(), *slim.buffers()))
    emitted = facts[fxprune.Emitted].model
    if family == "plain":
        assert emitted is None and result.model is None
        return
    assert emitted is not None and same(emitted.state_dict(), result.model.state_dict())
    assert own.isdisjoint(id(tensor) for tensor in (*emitted.parameters(), *emitted.buffers()))
    result.save_pretrained(tmp_path / "by_call")
    assert saved(tmp_path / "by_call") == saved(tmp_path / "by_name")


def without_source(report: fxprune.Report) -> fxprune.Report:
    """A report without the source of the samples and the quality, which a pipeline does not measure."""
    assert report.calibration is not None
    return replace(report, calibration=replace(report.calibration, source=""), quality=None, unmeasured="")


def saved(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint, without the seconds that passes took, how these were spelled, and the quality."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files.pop("fxprune.json"))
    assert manifest.pop("digest")
    report = json.loads(files["report.json"])
    assert report["calibration"].pop("source")
    assert {report.pop("quality"), report.pop("unmeasured")} <= {None, "", "there was no tokenizer"}
    assert {stage for stage, *_ in report.pop("passes")} > {"discover", "select"}
    for name in ("README.md", "report.html", "report.json"):
        assert files.pop(name) and manifest["files"].pop(name)
    return {**files, "fxprune.json": manifest, "report.json": report}


@pytest.mark.parametrize("inplace", tiers([False, True], True))
def test_prune_runs_the_pipeline_it_prints(inplace: bool) -> None:
    options: dict[str, Any] = {"recipe": "llm-pruner", "importance": "l1{reduction=max}", "inplace": inplace}
    options |= {"ratio": 0.3, "protect": (1, 0)}
    pipeline = fxprune.prune_pipeline(**options)
    assert str(pipeline).splitlines() == [
        "find-groups",
        "l1{reduction=max}",
        "select-by-ratio{protect=[1, 0], ratio=0.3}",
        "shrink{verify}",
        "emit-model",
        "make-report",
    ]
    read = fxprune.Pipeline(str(pipeline))
    mine, theirs = tiny("llama"), tiny("llama")
    slim = read(fxprune.trace(mine).graph_module, inplace=inplace).graph_module
    result = fxprune.prune(theirs, **options)
    assert same(dict(slim.state_dict()), dict(result.graph_module.state_dict()))
    assert fxprune.facts_of(slim)[fxprune.Report] == replace(result.report, unmeasured="")
    assert (result.model is theirs) is inplace
    assert (fxprune.facts_of(slim)[fxprune.Emitted].model is mine) is inplace
