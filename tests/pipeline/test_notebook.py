"""HTML tables for notebooks."""

from __future__ import annotations

from typing import Any

import fxprune
from fxprune.pipeline.pipeline import Pipeline, html_table
from tests.models import tiny


def test_texts_and_tables_of_objects_are_short() -> None:
    traced = fxprune.trace(tiny("llama"))
    groups = fxprune.find_groups(fxprune.dependency_graph(traced))
    pipeline = fxprune.prune_pipeline(importance="l2", kinds=["mlp", "layer"], ratio=0.3)
    result = fxprune.Result.of(pipeline(traced.graph_module).graph_module)
    wide = next(group for group in groups if group.kind == "channel")
    things: list[tuple[Any, tuple[str, ...]]] = [
        (traced, ("LlamaForCausalLM", "71,664", "input_ids")),
        (wide, ("model/channel", "48 units", "self_attn.q_proj.weight[1]", "3")),
        (pipeline, ("l2", "select-by-ratio", "ratio=0.3")),
        (result, ("LlamaForCausalLM", "71,664", "parameters")),
        (result.plan, ("tensors shrink", "norms masked")),
    ]
    for thing, words in things:
        assert "\n" not in repr(thing) and len(repr(thing)) < 400 and str(thing).count("\n") < 30
        assert words[0] in repr(thing) and all(word in str(thing) and word in thing._repr_html_() for word in words)
    assert str(Pipeline(str(pipeline))) == str(eval(repr(pipeline))) == str(pipeline)
    text = html_table("<title>", [("a & b", 1)], ("what", "<b>"))
    assert "&lt;title&gt;" in text and "a &amp; b" in text and "&lt;b&gt;" in text and text.count("<tr>") == 2


def test_a_plan_folds_alike_blocks() -> None:
    plan = fxprune.Plan({f"b.{i}.w": {0: list(range(i + 1))} for i in range(3)}, ("b.3",), {"b.0.w": {0: 9}})
    assert str(plan).splitlines() == [
        "3 tensors shrink, 1 block removed, norms sliced",
        "  b.3: 0 kept",
        "  b.*.w[0]: 1 to 3 of 9 kept",
    ]
