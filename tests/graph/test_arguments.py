"""Values inside the arguments of a node."""

from __future__ import annotations

import torch
from torch import fx

from fxprune.graph.tensors import read_argument, set_argument, with_argument


def test_values_are_read_and_written_where_they_stand() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.add, (x, [1, (2, 3)]), {"sizes": [4, 5]})
    assert read_argument(node, ("args", 1, 1, 0)) == 2
    assert read_argument(node, ("kwargs", "absent")) is None
    set_argument(node, ("args", 1, 1, 0), 7)
    set_argument(node, ("kwargs", "sizes", 1), 8)
    set_argument(node, ("kwargs", "end"), 9)
    assert node.args == (x, [1, (7, 3)])
    assert node.kwargs == {"sizes": [4, 8], "end": 9}
    assert with_argument((node.args, {}), ("args", 1, 0), 5)[0] == (x, [5, (7, 3)])
    assert node.args == (x, [1, (7, 3)])
