"""A module that is no Hugging Face model, cut in place: its own code runs on, or is refused and made whole again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.emit.emitted import check_own_forward
from fxprune.errors import PlanError
from fxprune.graph.facts import Source, facts_of
from fxprune.trace import trace


class Attending(nn.Module):
    """Two residual blocks with heads; ``fixed`` is how its code knows their number."""

    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.fixed = fixed
        self.into, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sums of ``(samples, tokens, 12)``."""
        heads = 3 if self.fixed == "heads" else self.into.weight.shape[0] // 12
        apart = self.into(x).view(*x.shape[:2], 3, heads, -1) if self.fixed != "width" else self._by_width(x)
        q, k, v = (part.transpose(1, 2) for part in apart.unbind(2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())

    def _by_width(self, x: torch.Tensor) -> torch.Tensor:
        return self.into(x).view(*x.shape[:2], 3, -1, 4)


def prune(model: nn.Module, kinds: tuple[str, ...], **more: Any) -> fxprune.Result:
    given = {"x": torch.randn(2, 5, 12)}
    return fxprune.prune(
        model,
        None,
        importance="l2",
        kinds=kinds,
        group_ratio=0.34,
        protect=(),
        inplace=True,
        example_inputs=given,
        **more,
    )


def test_a_module_is_compared_with_its_graph_and_left_alone() -> None:
    model, inputs = Attending("width").train(), {"x": torch.randn(2, 5, 12)}
    graph = trace(model, inputs).graph_module
    source = facts_of(graph)[Source]
    check_own_forward(graph, source, inputs)
    assert model.training
    model.down.bias = nn.Parameter(model.down.bias.detach() + 1)
    with pytest.raises(PlanError, match="computes something else"):
        check_own_forward(graph, source, inputs)


@pytest.mark.parametrize(("fixed", "kinds"), [("width", ("head", "mlp")), ("heads", ("mlp",))])
def test_code_that_asks_its_tensors_runs_on(fixed: str, kinds: tuple[str, ...]) -> None:
    model = Attending(fixed).eval()
    result = prune(model, kinds)
    assert model.up.out_features == 16 and model.up.weight.shape[0] < 16
    x = torch.randn(1, 7, 12)
    assert torch.allclose(model(x), result(x), atol=1e-5)


def test_code_that_holds_a_number_of_heads_is_refused_and_made_whole() -> None:
    """With two of three heads the module was left broken: its view has three."""
    model = Attending("heads").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for verify in (True, False):
        with pytest.raises(
            fxprune.FxpruneError, match=r"inplace: the module's own code .*what is left.*result.graph_mod"
        ):
            prune(model, ("head", "mlp"), verify=verify)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) and model.training


def test_code_that_still_runs_the_blocks_that_went_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    options: dict[str, Any] = {"importance": "l2", "group_ratio": 0.34, "protect": (), "kinds": ("layer",)}
    given = {"x": torch.randn(2, 8)}
    with pytest.raises(fxprune.FxpruneError, match="computes something else"):
        fxprune.prune(Stack(), None, inplace=True, example_inputs=given, **options)
    assert fxprune.prune(Stack(), None, example_inputs=given, **options).report.removed_blocks
