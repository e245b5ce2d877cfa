"""The search for config fields."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import Rebuilder
from fxprune.emit.snapshot import Reads, record_reads, shapes_of
from fxprune.emit.solve import Search, with_companions
from fxprune.modelling.blocks import put_fields


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
