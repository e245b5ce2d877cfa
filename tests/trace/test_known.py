"""Inputs whose values decide the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import GraphInputError, TraceError


class GridNet(nn.Module):
    """Pools as many patches of an image as a grid says, through an MLP, and adds tokens."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 6), nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, input_ids: torch.Tensor, patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Tokens ``(samples, tokens)``, patches ``(patches, 4)`` and rows and columns ``(samples, 2)``."""
        places = (torch.arange(int(grid.prod(-1).sum())) * 0.5).to(patches.dtype)  # a cast to the weights' dtype
        hidden = self.down(self.up(patches + places[:, None]).relu())
        images = torch.stack([part.mean(0) for part in torch.split(hidden, grid.prod(-1).tolist())])
        return self.table(input_ids) + images[:, None]


def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids, patches = torch.randint(11, (2, 3), generator=draw), torch.randn(6, 4, generator=draw)
    return {"input_ids": ids, "patches": patches, "grid": torch.tensor([[2, 2], [1, 2]])}


def test_a_grid_keeps_its_values_and_the_graph_refuses_others() -> None:
    """``grid.tolist()`` was refused: vision-language models of many families read their grids so."""
    net = GridNet().eval()
    traced = fxprune.trace(net, inputs())
    assert "runs at the values of grid that it was traced with" in traced.notes
    torch.testing.assert_close(traced.graph_module(**inputs()), net(**inputs()))
    with pytest.raises(GraphInputError, match="with the values of grid in its example"):
        traced.graph_module(**inputs() | {"grid": torch.tensor([[1, 2], [2, 2]])})


def test_a_model_with_a_grid_is_pruned() -> None:
    result = fxprune.prune(
        GridNet().eval(), example_inputs=inputs(), importance="l2", recipe="llm-pruner", ratio=0.1, protect=()
    )
    assert result.graph_module.get_parameter("up.weight").shape[0] < 8
    assert result.graph_module(**inputs()).shape == (2, 3, 6)


def test_a_graph_with_a_grid_is_cast() -> None:
    """What the grid gives was cast to the dtype of the trace for good, if it was computed outside of the graph."""
    traced = fxprune.trace(GridNet().eval(), inputs()).graph_module
    given = inputs() | {"patches": inputs()["patches"].double()}
    assert traced.double()(**given).dtype == torch.float64


class ListNet(nn.Module):
    """Looks its tokens up by a list of them."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.randn(6) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens ``(samples, tokens)``."""
        return torch.stack([self.rows[token] for token in input_ids[0].tolist()])


def test_tokens_never_keep_their_values() -> None:
    """A graph that holds for one text alone is of no use."""
    with pytest.raises(TraceError):
        fxprune.trace(ListNet().eval(), {"input_ids": torch.tensor([[1, 2, 3]])})
