"""Passes by name alone, from the traced model to the checkpoint, do what `prune` does, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from tests.models import tiny, token_ids
from tests.tiers import tiers

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
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = token_ids(4, 12)
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
    assert same(before, model.state_dict())
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


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"importance": "taylor{order=second}"}, "taylor{order=second}"),
        ({"inplace": True}, "taylor{memory=low}"),
        ({"inplace": True, "memory": "fast"}, "taylor{memory=fast}"),
        ({"inplace": True, "importance": "taylor{memory=0.5}"}, "taylor{memory=0.5}"),
        ({"kinds": "mlp", "reduction": "max"}, "taylor{kinds=[mlp], reduction=max}"),
        ({"importance": "random", "seed": 3}, "random{seed=3}"),
        ({"seed": 3}, "shrink{verify, seed=3}"),
        (
            {"select": "select-by-group-ratio{group_ratio=0.5}", "round_to": 8},
            "select-by-group-ratio{round_to=8, group_ratio=0.5}",
        ),
        ({"select": "select-by-ratio{ratio=0.1}", "ratio": 0.5}, "select-by-ratio{ratio=0.1}"),
        ({"compensate": "least-squares{damping=0.1}"}, "least-squares{damping=0.1}"),
        ({"importance": fxprune.load_pass("l2", kinds=("mlp",))}, "l2{kinds=[mlp]}"),
    ],
)
def test_every_stage_is_spelled_with_its_own_arguments(options: dict[str, Any], line: str) -> None:
    assert line in str(fxprune.prune_pipeline(recipe="llm-pruner", **options)).splitlines()
