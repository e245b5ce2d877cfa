"""The check whether stock classes can express a plan."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.discovery.dependency import Dependencies
from fxprune.discovery.groups import Groups
from fxprune.emit import stock_check
from fxprune.graph.facts import facts_of
from fxprune.removal.plan import Plan
from fxprune.trace import trace
from tests.remembered import grouped, model_of


def plan(*widths: int, removed: tuple[str, ...] = ()) -> Plan:
    """A plan that leaves the first channels of each layer."""
    kept = {}
    for layer, width in enumerate(widths):
        for name, axis in {"gate": 0, "up": 0, "down": 1}.items():
            kept[f"model.layers.{layer}.mlp.{name}_proj.weight"] = {axis: list(range(width))}
    return Plan(kept, removed)


def test_widths_that_all_layers_share_are_expressed() -> None:
    graph_module = grouped("llama", num_hidden_layers=2)
    before = model_of(graph_module).model.layers[0].mlp.up_proj.weight
    facts = facts_of(graph_module)
    accepts = stock_check(graph_module, facts[Dependencies].axes, facts[Groups].all)
    assert accepts(plan(24, 24)) and not accepts(plan(24, 32))
    assert accepts(Plan({}, ("model.layers.1",))), "one layer fewer"
    assert model_of(graph_module).model.layers[0].mlp.up_proj.weight is before and not before.is_meta


def test_every_plan_passes_without_a_stock_class() -> None:
    graph_module = trace(nn.Linear(2, 2), {"input": torch.ones(1, 2)}).graph_module
    axes = facts_of(grouped("llama", num_hidden_layers=2))[Dependencies].axes
    assert stock_check(graph_module, axes, ())(plan(1, 2))
