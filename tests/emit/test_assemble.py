"""Candidate models: the choices for all blocks combined."""

from __future__ import annotations

from fxprune.emit.emitter import Blueprint, Candidate, EmissionTask, candidates_for, divided_attributes
from fxprune.emit.layout import find_layout, model_rebuilder
from fxprune.emit.snapshot import Shape, shapes_of
from fxprune.emit.solve import SharedWidths
from tests.emit.small import SmallModel, small


def task_for(model: SmallModel, wanted: dict[str, Shape], removed: tuple[str, ...] = ()) -> EmissionTask:
    """What a model of the wanted shapes is emitted from."""
    layout = find_layout(model)
    return EmissionTask(model, layout, model_rebuilder(model, layout), wanted, removed)


def narrowed(model: SmallModel, widths: dict[int, int]) -> dict[str, Shape]:
    """Shapes of a model whose blocks have other inner widths."""
    shapes = shapes_of(model)
    for index, width in widths.items():
        found = shapes_of(small(inner=width).blocks[index])
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in found.items()})
    return shapes


def test_a_field_of_one_block_stays_with_it_and_one_that_all_share_goes_to_the_model() -> None:
    model = small()
    first = next(candidates_for(task_for(model, narrowed(model, {1: 14})), SharedWidths({})))
    assert first.blueprint.block_fields == {"blocks.1": {"inner": 14}} and first.blueprint.fields == {}
    assert first.gaps == () and first.loose == frozenset()
    first = next(candidates_for(task_for(model, narrowed(model, {0: 14, 1: 14, 2: 14})), SharedWidths({})))
    assert first.blueprint.fields == {"inner": 14} and first.blueprint.block_fields == {}, "block 3 has no such width"
    wanted = {name: s for name, s in narrowed(model, {2: 14}).items() if not name.startswith("blocks.1.")}
    first = next(candidates_for(task_for(model, wanted, ("blocks.1",)), SharedWidths({})))
    assert first.blueprint.removed == ("blocks.1",) and first.blueprint.block_fields == {"blocks.2": {"inner": 14}}


def test_a_block_keeps_its_dense_values_under_a_model_that_changes() -> None:
    """What the whole model is built with holds for its surroundings; a block may need the value from before."""
    model = small()
    task = task_for(model, shapes_of(model))
    found = [candidate.blueprint for candidate in candidates_for(task, SharedWidths({"heads": 2, "groups": 5}))]
    kept = [blueprint for blueprint in found if blueprint.block_fields.get("blocks.0", {}).get("heads") == 3]
    assert kept and kept[0].absent["blocks.0"] == ["groups"], "the dense config knows no groups"


def test_what_no_field_reaches_is_told_and_loose() -> None:
    model = small()
    odd = {"up.weight": (7, 12), "up.bias": (7,), "down.weight": (12, 7)}
    wanted = shapes_of(model) | {f"blocks.1.{name}": shape for name, shape in odd.items()}
    first = next(candidates_for(task_for(model, wanted), SharedWidths({})))
    assert "block blocks.1: up.bias: wanted (7,), obtained (20,)" in first.gaps
    assert "blocks.1.up.weight" in first.loose and first.blueprint.attributes["blocks.1.up"]["out_features"] == 7


def test_other_ways_to_build_blocks_are_looked_for_where_the_likeliest_does_not_do() -> None:
    """They were all looked for before the first was tried, which took a quarter of an emission."""
    model = small()
    shapes = narrowed(model, {1: 14})
    parts = ("blocks.0.mix", "blocks.0.back")
    shapes |= {name: shape for name, shape in shapes_of(small(heads=2)).items() if name.startswith(parts)}
    task = task_for(model, shapes)
    candidates = candidates_for(task, SharedWidths({}))
    first = next(candidates)
    tried = len(task.rebuilder._seen)
    others = [candidate.blueprint for candidate in candidates]
    assert others and first.blueprint not in others and len(task.rebuilder._seen) >= tried


def test_small_attributes_around_widths_are_divided() -> None:
    attributes = {"attention": {"groups": 4, "index": 1, "width": 48}, "attention.query": {"out": 16}}
    candidate = Candidate(Blueprint(attributes=attributes), frozenset(), ())
    found = list(divided_attributes(candidate, ["attention.query.weight"]))
    assert [one.blueprint.attributes["attention"]["groups"] for one in found] == [1, 2]
    assert all(one.blueprint.attributes["attention.query"] == {"out": 16} for one in found)
    assert candidate.blueprint.attributes == attributes
