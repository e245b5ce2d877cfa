"""A dependency graph small enough to check by hand."""

import networkx as nx
import pytest
import torch
from torch import nn

from tests.oracle import Net, discover, graph_of


@pytest.fixture(scope="package")
def small() -> nx.Graph:
    """Two linear maps with four units between them."""
    net = Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    return graph_of(discover(net, {"x": torch.randn(2, 3)}))
