"""Fields that move along with others although no shape shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from fxprune.emit.layout import Rebuilder
from fxprune.emit.snapshot import Reads
from fxprune.emit.solve import with_companions
from fxprune.modelling.block_config import put_fields


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


def test_a_field_with_a_value_of_its_own_stays() -> None:
    assert with_companions(builds(Config(partners=2)), {}, {"heads": 4}) == {"heads": 4}


@pytest.mark.parametrize(("divides", "wanted"), [("partners", {"partners": 2}), ("groups", {"groups": 2})])
def test_a_quotient_stays_whole(divides: str, wanted: dict[str, int]) -> None:
    """Two heads for each partner: with four heads and three partners there would be one and a third."""
    found = with_companions(builds(Config(partners=3), divides, ("heads", divides)), {}, {"heads": 4})
    assert found == {"heads": 4, **wanted}


def test_a_quotient_that_follows_a_field_needs_no_other() -> None:
    """Two heads of three for each partner: the quotient is what the field is."""
    found = with_companions(builds(Config(partners=2), "partners", ("heads", "partners")), {}, {"heads": 4})
    assert found == {"heads": 4}


def test_a_field_that_moves_shapes_is_left_alone() -> None:
    rebuilder = builds(Config(), "groups", ("heads", "groups"))
    make = rebuilder.make

    def other(fields: Any) -> nn.Module:
        module = make(fields)
        module.table = nn.Parameter(torch.empty(fields.get("partners", 6)))
        return module

    rebuilder.make = other
    assert "partners" not in with_companions(rebuilder, {}, {"heads": 4})
