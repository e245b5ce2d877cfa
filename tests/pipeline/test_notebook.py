"""Tests: hTML tables for notebooks."""

from __future__ import annotations

from typing import Any

import pytest

import fxprune
from fxprune.pipeline.notebook import html_table
from fxprune.pipeline.pipeline import Pipeline
from tests.models import tiny


@pytest.fixture(scope="module")
def things() -> dict[str, Any]:
    """One of each."""
    traced = fxprune.trace(tiny("llama"))
    groups = fxprune.find_groups(fxprune.dependency_graph(traced))
    pipeline = fxprune.prune_pipeline(importance="l2", kinds=["mlp", "layer"], ratio=0.3)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    wide = next(group for group in groups if group.kind == "channel")
    return {"traced": traced, "group": wide, "pipeline": pipeline, "result": result, "plan": result.plan}


def test_a_table_shows_what_is_written() -> None:
    text = html_table("<title>", [("a & b", 1)], ("what", "<b>"))
    assert "&lt;title&gt;" in text and "a &amp; b" in text and "&lt;b&gt;" in text and text.count("<tr>") == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("traced", ("LlamaForCausalLM", "71,664", "input_ids")),
        ("group", ("model/channel", "48 units", "self_attn.q_proj.weight[1]", "3")),
        ("pipeline", ("l2", "select-by-ratio", "ratio=0.3")),
        ("result", ("LlamaForCausalLM", "71,664", "parameters")),
        ("plan", ("tensors shrink", "norms masked")),
    ],
)
def test_what_a_person_reads_is_short_and_says_what_it_is(
    things: dict[str, Any], name: str, words: tuple[str, ...]
) -> None:
    thing = things[name]
    assert "\n" not in repr(thing) and len(repr(thing)) < 400 and str(thing).count("\n") < 30
    for word in words:
        assert word in str(thing) and word in thing._repr_html_(), word
    assert words[0] in repr(thing)


def test_a_pipeline_is_read_back_from_its_text(things: dict[str, Any]) -> None:
    pipeline = things["pipeline"]
    assert str(Pipeline(str(pipeline))) == str(pipeline)
    assert str(eval(repr(pipeline))) == str(pipeline)


def test_a_plan_folds_alike_blocks() -> None:
    plan = fxprune.Plan({f"b.{i}.w": {0: list(range(i + 1))} for i in range(3)}, ("b.3",), {"b.0.w": {0: 9}})
    assert str(plan).splitlines() == [
        "3 tensors shrink, 1 block removed, norms sliced",
        "  b.3: 0 kept",
        "  b.*.w[0]: 1 to 3 of 9 kept",
    ]
