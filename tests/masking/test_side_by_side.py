"""Two runs in step: what the dense one shows may change what the masked one reads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx, nn

from fxprune.axes import Keep
from fxprune.masking.compare import SideBySide, compare, masked_outputs, slim_outputs
from fxprune.offload.prefetch import Carrier, at_place, carrying
from tests.oracle import Net, axes_of, discover, groups_of


def beside(batches: list[dict[str, torch.Tensor]]) -> tuple[fx.GraphModule, Keep, SideBySide]:
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    dense = discover(net, batches[0])
    (group,) = groups_of(dense)
    assert group.factor is not None
    keep = Keep({group.factor: np.array([True, False, True, True])})
    return dense, keep, SideBySide(dense, axes_of(dense), keep, (), batches)


def test_each_run_computes_what_it_would_alone() -> None:
    batches = [{"x": torch.randn(2, 3)} for _ in range(2)]
    dense, keep, both = beside(batches)
    before: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    with torch.no_grad():
        for node in both:
            if node.op == "output":
                assert both.has(node.args[0])
                before["out"] = list(both.values(node.args[0]))
            else:
                assert node in both.dense[0].env and node not in both.masked[0].env
    for batch, (whole, masked) in zip(batches, before["out"], strict=True):
        assert compare(slim_outputs(dense, batch), [whole]) == 0
        assert compare(masked_outputs(dense, axes_of(dense), keep, (), batch), [masked]) == 0
    assert not any(value.op == "call_function" for value in both.dense[0].env if value is not node)


def test_a_weight_that_changed_is_read_again() -> None:
    batches = [{"x": torch.randn(2, 3)}]
    dense, _, both = beside(batches)
    seen = None
    with torch.no_grad():
        for node in both:
            weight = next((used for used in node.all_input_nodes if used.target == "b.weight"), None)
            if weight is not None:
                dense.get_parameter("b.weight").zero_()
                both.read_again(weight)
            if node.op == "output":
                ((_, seen),) = both.values(node.args[0])
    assert seen is not None
    assert torch.allclose(seen, dense.get_parameter("b.bias").expand(2, 2))


class Counting(Carrier):
    """Carries by copies, and counts them."""

    copies = 0

    def begin(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Copy a weight."""
        self.copies += 1
        return super().begin(tensor.clone())


def test_a_weight_is_carried_once_for_all_batches_of_both_runs_and_again_where_it_changed() -> None:
    batches = [{"x": torch.randn(2, 3)} for _ in range(3)]
    carrier = Counting(torch.device("cpu"))
    with carrying(carrier), at_place(True), torch.no_grad():
        dense, keep, both = beside(batches)
        weight = dense.get_parameter("b.weight")
        for node in both:
            if "b.weight" in [str(used.target) for used in node.all_input_nodes]:
                weight.zero_()
                both.read_again(*[used for used in node.all_input_nodes if used.target == "b.weight"])
            if node.op == "output":
                found = list(both.values(node.args[0]))
    assert carrier.copies == 4 + 1, "four tensors, and one anew"
    for batch, (whole, masked) in zip(batches, found, strict=True):
        assert compare(masked_outputs(dense, axes_of(dense), keep, (), batch), [masked]) == 0
        assert not torch.equal(whole, masked)


def test_a_value_is_held_until_a_later_node_has_run() -> None:
    _, _, both = beside([{"x": torch.randn(2, 3)}])
    by_name = {str(node.target): node for node in both.graph.nodes}
    weight = by_name["a.weight"]
    (product,) = weight.users
    behind = next(iter(product.users))
    both.hold(weight, behind)
    with torch.no_grad():
        for node in both:
            assert both.has(weight) == (weight < node < behind or node is behind)
