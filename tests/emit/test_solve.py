"""Layouts, snapshots, patches, and the search for config fields."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import Rebuilder, block_rebuilder, find_layout, model_rebuilder
from fxprune.emit.patch import Resized, by_module, carry_over, leaf_patches, patches_by_hand
from fxprune.emit.snapshot import (
    MISSING_AXIS,
    Reads,
    Shape,
    mismatches,
    record_reads,
    shapes_of,
    slim_name,
    take_snapshot,
)
from fxprune.emit.solve import Choice, Search, SharedWidths, choices_for, shared_widths_for, with_companions
from fxprune.modelling.blocks import put_fields
from tests.emit.small import SmallModel, rebuilder, small
from tests.models import tiny
from tests.zoo_classes import tiny_model_of


def test_a_wrong_value_of_one_field_is_not_tried_with_all_values_of_the_others() -> None:
    """Seven fields fix axes of their own; a value width fixes one that the number of heads must fix."""
    names = [f"inner{i}" for i in range(7)]

    def build(config: PreTrainedConfig) -> nn.Module:
        widths = {name: nn.Linear(2, getattr(config, name)) for name in names}
        heads, value = (getattr(config, name) for name in ("heads", "value"))
        return nn.ModuleDict({**widths, "kv": nn.Linear(2, heads * (10 + value)), "o": nn.Linear(heads * value, 2)})

    def rebuilt(fields: Mapping[str, int]) -> nn.Module:
        config = copy.deepcopy(dense)
        vars(config).update(fields)
        return build(config)

    dense, slim = PreTrainedConfig(), PreTrainedConfig()
    vars(dense).update(dict.fromkeys(names, 16), heads=6, value=14)
    vars(slim).update(dict.fromkeys(names, 15), heads=5, value=14)
    search = Search(Rebuilder(rebuilt, dense, record_reads(dense, build)), {}, shapes_of(build(slim)), limit=150)
    assert dict.fromkeys(names, 15) | {"heads": 5} in search.solutions()


class Config(PreTrainedConfig):
    """Heads, partners that are as many unless it is said otherwise, and numbers that have nothing to do with them."""

    model_type = "companions"

    def __init__(self, heads: int = 6, partners: int | None = None, depth: int = 6, **more: Any) -> None:
        self.heads, self.depth, self.groups = heads, depth, more.pop("groups", 3)
        self.partners = heads if partners is None else partners
        super().__init__(**more)


class Attention(nn.Module):
    """A projection for each head; quotients of the numbers of heads are attributes."""

    def __init__(self, config: Config, *, divides: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.heads * 4, 5))
        self.repeats = config.heads // getattr(config, divides)


def builds(config: Config, divides: str = "heads", reads: tuple[str, ...] = ("heads",)) -> Rebuilder:
    def make(fields: Any) -> nn.Module:
        own = Config(**{**config.to_diff_dict()})
        put_fields(own, {**{name: vars(config)[name] for name in ("heads", "partners", "depth", "groups")}, **fields})
        return Attention(own, divides=divides)

    return Rebuilder(make, config, Reads(reads, ()))


def test_a_field_that_the_config_class_fills_from_another_goes_with_it() -> None:
    """No module looks at the partners, but who reads the config does; the depth has the same value by chance."""
    assert with_companions(builds(Config()), {}, {"heads": 4}) == {"heads": 4, "partners": 4}
    assert with_companions(builds(Config(partners=2)), {}, {"heads": 4}) == {"heads": 4}


@pytest.mark.parametrize(("divides", "wanted"), [("partners", {"partners": 2}), ("groups", {"groups": 2})])
def test_a_quotient_stays_whole(divides: str, wanted: dict[str, int]) -> None:
    """Two heads for each partner: with four heads and three partners there would be one and a third."""
    found = with_companions(builds(Config(partners=3), divides, ("heads", divides)), {}, {"heads": 4})
    assert found == {"heads": 4, **wanted}
    found = with_companions(builds(Config(partners=2), "partners", ("heads", "partners")), {}, {"heads": 4})
    assert found == {"heads": 4}, "a quotient that follows the field needs no other"


def choose(model: SmallModel, wanted: Mapping[str, Shape]) -> list[Choice]:
    """Choices for the first block, with nothing around it."""
    return list(choices_for(model.blocks[0], rebuilder(model), [{}], wanted, lambda _: 0))


def test_a_block_that_stays_needs_nothing_and_fields_come_first() -> None:
    model = small()
    assert choose(model, shapes_of(model.blocks[0]))[0] == Choice({})
    assert [*choices_for(model.blocks[0], None, [{}], shapes_of(model.blocks[0]), lambda _: 0)] == [Choice({})]
    first = choose(small(), shapes_of(small(inner=14).blocks[0]))[0]
    assert (first.fields, first.patches, first.gap) == ({"inner": 14}, {}, ())


def test_attributes_are_set_where_no_field_gives_a_shape() -> None:
    model = small()
    wanted = {**shapes_of(model.blocks[0]), "up.weight": (7, 12), "up.bias": (7,), "down.weight": (12, 7)}
    choices = choose(model, wanted)
    assert all(choice.gap for choice in choices), "the class refuses odd widths"
    assert choices[-1].patches["up", "out_features"] == choices[-1].patches["down", "in_features"] == 7
    wanted |= {"up.weight": (8, 12), "up.bias": (8,), "down.weight": (12, 8)}
    (only,) = choices_for(model.blocks[0], None, [{}], wanted, lambda _: 0)
    assert only.as_dense and only.patches == {("up", "out_features"): 8, ("down", "in_features"): 8}


def around(model: SmallModel, hidden: int) -> dict[str, Shape]:
    return {"embed.weight": (17, hidden), "norm.weight": (hidden,), "norm.bias": (hidden,)}


def test_a_field_that_gives_all_shapes_comes_first() -> None:
    model = small()
    rebuilder = model_rebuilder(model, find_layout(model), {})
    found = shared_widths_for(rebuilder, around(model, 9))
    assert found[0].fields["hidden"] == 9 and found[-1] == SharedWidths({})
    built, dense = rebuilder.build(found[0].fields), rebuilder.build({})
    assert built is not None and leaf_patches(built, around(model, 9), rebuilder.skip) == {}
    wanted = {**around(model, 12), "embed.weight": (15, 12)}
    assert [shared.fields for shared in shared_widths_for(rebuilder, wanted)] == [{}]
    assert dense is not None and leaf_patches(dense, wanted, rebuilder.skip) == {("embed", "num_embeddings"): 15}


def test_blocks_and_what_counts_them_are_found() -> None:
    layout = find_layout(small())
    assert (layout.part, layout.count_field, layout.depth) == ("", "depth", 4)
    assert list(layout.blocks()) == [f"blocks.{index}" for index in range(4)]
    assert [index for index, _ in layout.blocks().values()] == [0, 1, 2, 3]
    assert find_layout(small(heads=4, hidden=16)).count_field == "depth", "not another field of the same value"
    model = small()
    del model.blocks[0]
    assert find_layout(model).count_field is None
    model.blocks = nn.ModuleList()
    layout = find_layout(model)
    assert (layout.stacks, layout.depth, layout.count_field) == ((), 0, None)
    layout = find_layout(tiny("gemma3_text"))  # where lists count blocks
    assert layout.depth == 3 and layout.count_field is not None
    assert layout.stacks[0].path == "model.layers"


def test_each_list_of_blocks_has_its_part_of_the_config() -> None:
    """Vision towers of LLaVA-like models were built from the config of the text."""
    layout = find_layout(tiny_model_of("AutoModelForImageTextToText", "llava"))
    parts = {stack.path: stack.part for stack in layout.stacks}
    assert parts == {
        "model.language_model.layers": "text_config",
        "model.vision_tower.encoder.layers": "vision_config",
    }
    assert layout.part == "text_config" and layout.count_field == "num_hidden_layers"


class Listed(nn.Module):
    """Is as wide as its entry of a list; wider where another list names its index."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.up = nn.Linear(2, config.widths[layer_idx] + (layer_idx in config.wider))


@pytest.mark.parametrize(("wider", "solved"), [([9, 9, 9, 9], [{"widths": 3}]), ([1, 0, 3, 2], [])])
def test_a_block_of_a_width_in_a_list_is_built_from_its_entry(wider: list[int], solved: list[dict[str, int]]) -> None:
    """Where it reads more of a list than its entry, lists are left as they are."""
    model = small()
    vars(model.config).update(widths=[4, 5, 6, 7], wider=wider)
    block = Listed(model.config, 1)
    found = block_rebuilder(model, "", find_layout(model).depth, 1, block, {}, {})
    assert found is not None
    seen = found.observe({})
    assert seen is not None and seen.shapes == shapes_of(block)
    wanted = {"up.weight": (3, 2), "up.bias": (3,)}
    assert Search(found, {}, wanted).solutions() == solved
    if solved:
        built = found.build({"widths": 3})
        assert isinstance(built, Listed) and shapes_of(built) == wanted
    assert model.config.widths == [4, 5, 6, 7]


def test_groups_of_a_convolution_are_found_by_the_shape_of_its_weight() -> None:
    """A constructor refuses one width that changes alone; RegNet's blocks lose whole groups and channels of each."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(8, 8, 1, groups=2))
    wanted = {"0.weight": (21, 7, 3, 3), "1.weight": (11, 1, 3, 3), "2.weight": (6, 3, 1, 1)}
    found = by_module(leaf_patches(model, {**wanted, "0.bias": (21,), "1.bias": (11,), "2.bias": (6,)}))
    assert found["0"] == {"in_channels": 21, "out_channels": 21, "groups": 3}
    assert found["1"] == {"in_channels": 11, "out_channels": 11, "groups": 11}
    assert found["2"] == {"in_channels": 6, "out_channels": 6}


class Holding(nn.Module):
    """A module that is none of torch's, with these attributes."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


def test_the_sides_of_a_window_are_no_units() -> None:
    """Swin's table of biases by head lay in a module with a window of as many sides as there were heads."""
    biases = Holding(window=(2, 2), heads=2, table=nn.Parameter(torch.zeros(9, 2)))
    assert leaf_patches(biases, {"table": (9, 1)}) == {("", "heads"): 1}


def test_attributes_are_found_by_the_numbers_that_change() -> None:
    """At first all that hold one within its scope, then all but one of a name."""

    def attention() -> Holding:
        numbers = {"heads": 4, "width": 12, "hidden": 12, "flag": True}
        return Holding(**numbers, query=nn.Linear(12, 12), out=nn.Linear(12, 12))

    model = nn.ModuleDict({"left": attention(), "right": attention()})
    wanted = {"left.query.weight": (9, 12), "left.query.bias": (9,), "left.out.weight": (12, 9), "left.out.bias": (12,)}
    first, second, *_ = map(by_module, patches_by_hand(model, wanted, [Resized("left", {4: 3, 12: 9})]))
    inside = {"left.query": {"out_features": 9}, "left.out": {"in_features": 9}}
    assert first == {"left": {"heads": 3, "width": 9, "hidden": 9}, **inside}
    assert second == {"left": {"width": 9, "hidden": 9}, **inside}


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """Two modules of one structure."""
    return nn.Sequential(nn.LayerNorm(4)), nn.Sequential(nn.LayerNorm(4))


def test_scales_stay_and_sizes_do_not() -> None:
    dense, slim = pair()
    vars(dense[0]).update(scale=0.5, heads=6, mode="wide", _private=1.5, nothing=None, _hooked=True)
    vars(slim[0]).update(scale=0.7, heads=4, mode="narrow", _private=2.5, nothing=0.1)
    carry_over(dense, slim)
    held = vars(slim[0])
    assert (held["scale"], held["heads"], held["mode"], held["_private"]) == (0.5, 4, "wide", 2.5)
    assert held["nothing"] is None and "_hooked" not in held, "a mark of hooks that the slim model lacks"
    dense, slim = pair()  # what the user put on a module comes along where it is safe
    apply, bound = functools.partial(pair, 2.0), functools.partial(pair, by=nn.Identity())
    vars(dense[0]).update(note="mine", apply=apply, bound=bound, count=3, table=torch.ones(2))
    carry_over(dense.eval(), slim)
    held = vars(slim[0])
    assert held["note"] == "mine" and held["apply"] is apply and torch.equal(held["table"], torch.ones(2))
    assert "bound" not in held and "count" not in held and slim[0].training


def test_buffers_that_the_model_added_are_added() -> None:
    dense, slim = pair()
    dense[0].register_buffer("kept", torch.ones(3))
    dense[0].register_buffer("made", torch.ones(2), persistent=False)
    carry_over(dense, slim)
    assert slim[0].kept.is_meta and slim[0].kept.shape == (3,)
    assert slim[0]._non_persistent_buffers_set == {"made"}


def test_a_number_that_equals_a_size_of_a_table_may_be_another() -> None:
    """Heads of a window attention, as many as a window has places: its class took the number of places for heads."""
    attention = Holding(num_heads=4, bias=Holding(window_area=4, table=nn.Parameter(torch.zeros(9, 4))))
    found = list(patches_by_hand(attention, {"bias.table": (9, 3)}, [Resized("", {4: 3})]))
    assert {("", "num_heads"): 3, ("bias", "window_area"): 3} in found
    assert {("", "num_heads"): 3} in found


def test_shapes_and_attributes_of_modules_and_the_axes_on_which_they_differ() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    shapes = shapes_of(model)
    assert shapes["0.weight"] == shapes["1.weight"] == (2, 3)
    assert shapes["2.running_mean"] == (2,) and shapes["2.num_batches_tracked"] == ()
    snapshot = take_snapshot(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(5)), skip=("1",))
    assert snapshot.shapes == {"0.weight": (4,), "0.bias": (4,)}
    assert snapshot.numbers == {("0", "normalized_shape"): (4,)}
    assert snapshot.scalars == {("0", "eps"): 1e-5, ("0", "elementwise_affine"): True}, "what is skipped is left out"
    have = {"a": (2, 3), "b": (4,), "c": (1,), "d": (5,)}
    want = {"a": (2, 4), "b": (4,), "c": (1, 1), "e": (5,)}
    assert mismatches(have, want) == {("a", 1), ("c", MISSING_AXIS), ("d", MISSING_AXIS), ("e", MISSING_AXIS)}


@pytest.mark.parametrize(
    ("name", "slim"),
    [
        ("a.blocks.0.up.weight", "a.blocks.0.up.weight"),
        ("a.blocks.1.up.weight", None),
        ("a.blocks.1", None),
        ("a.blocks.2.up.weight", "a.blocks.1.up.weight"),
        ("a.blocks.12", "a.blocks.10"),
        ("a.blocks.10.up", None),
        ("a.blocks", "a.blocks"),
        ("a.blocks_more.2", "a.blocks_more.2"),
        ("b.blocks.2", "b.blocks.2"),
        ("norm.weight", "norm.weight"),
    ],
)
def test_blocks_after_a_removed_one_move_up(name: str, slim: str | None) -> None:
    assert slim_name(name, ("a.blocks.1", "a.blocks.10")) == slim
    assert slim_name(name, ()) == name
    assert slim_name("a.last.weight", ("a.last",)) is None
    assert slim_name("a.2.weight", ("a.last",)) == "a.2.weight", "a block without a number moves nothing"
