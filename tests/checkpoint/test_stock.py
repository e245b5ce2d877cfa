"""Whether stock classes can say what a plan leaves, asked before anything is removed."""

from __future__ import annotations

from torch import nn

from fxprune.checkpoint.stock import stock_test
from fxprune.graph.facts import Source
from fxprune.removal.plan import Plan
from tests.models import tiny

LAYERS = 2


def plan(*widths: int, removed: tuple[str, ...] = ()) -> Plan:
    """A plan that leaves the first channels of each layer."""
    kept = {}
    for layer, width in enumerate(widths):
        for name, axis in {"gate": 0, "up": 0, "down": 1}.items():
            kept[f"model.layers.{layer}.mlp.{name}_proj.weight"] = {axis: list(range(width))}
    return Plan(kept, removed)


def test_widths_that_all_layers_share_can_be_said() -> None:
    model = tiny("llama", num_hidden_layers=LAYERS)
    before = model.model.layers[0].mlp.up_proj.weight
    accepts = stock_test(Source(model))
    assert accepts(plan(24, 24)) and not accepts(plan(24, 32))
    assert accepts(Plan({}, ("model.layers.1",))), "one layer fewer"
    assert model.model.layers[0].mlp.up_proj.weight is before and not before.is_meta


def test_every_plan_passes_where_there_is_no_stock_class() -> None:
    assert stock_test(None)(plan(1, 2)) and stock_test(Source(nn.Linear(2, 2)))(plan(1, 2))
