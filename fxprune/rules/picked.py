"""Products with matrices that rows pick from a stack by number, as tokens do experts, without a copy for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from fxprune.graph.compat import FakeTensor
from fxprune.rules.products import StackedProduct, stacked_product
from fxprune.rules.registry import Values, values_of

_LARGE = 1 << 26
"""Bytes of picked matrices from which on they are not copied; below, a batched product is faster."""


def picks_matrices(node: fx.Node) -> bool:
    """Whether an op picks matrices from a weight of three axes by number, for one other op."""
    inputs = node.all_input_nodes if len(node.users) == 1 and values_of(node) is Values.PICKED else ()
    return len(inputs) == 2 and inputs[0].op == "get_attr" and getattr(node.meta.get("val"), "ndim", 0) == 3


def _is_large(weight: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether a copy of a matrix of ``weight`` for each of the rows would be large."""
    has_values = weight.device.type != "meta" and not isinstance(weight, FakeTensor)
    return has_values and index.numel() * weight[0].nbytes >= _LARGE


class PickingRun(fx.Interpreter):
    """An interpreter that multiplies with picked matrices one by one where copies of them would be large."""

    def __init__(self, graph_module: fx.GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(graph_module, garbage_collect_values=garbage_collect_values)
        self._picking: dict[fx.Node, StackedProduct] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of ``n``; of many matrices that rows pick from a weight, the weight and the numbers."""
        found = self._picking.pop(n, None)
        if found is not None and found.picked is not None:
            weight, index = self.env[found.picked.node]
            source = self.env[found.source].permute(found.source_order)
            value: torch.Tensor = _PickedProduct.apply(source, weight.permute(found.order), index)  # type: ignore[no-untyped-call]
            return value.permute([found.out_order.index(axis) for axis in range(value.dim())])
        if picks_matrices(n):
            weight, index = (self.env[source] for source in n.all_input_nodes)
            (user,) = n.users
            product = stacked_product(user) if _is_large(weight, index) else None
            if product is not None and product.picked is not None:
                self._picking[user] = product
                return weight, index
        return super().run_node(n)


class _PickedProduct(torch.autograd.Function):
    """Rows times one matrix each of a stack: ``out[b, .., o] = sum over i of x[b, .., i] * weight[index[b], o, i]``.

    It runs matrix by matrix: none is copied for each row, and the gradient of the stack is one tensor of its size.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, index)
        numbers, rows = _rows_by_number(index)
        found = [x[r] @ weight[number].T for number, r in zip(numbers, rows, strict=True)]
        return torch.cat(found)[torch.cat(rows).argsort()]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, index = ctx.saved_tensors
        numbers, rows = _rows_by_number(index)
        by_x, by_weight = torch.empty_like(x), torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for number, r in zip(numbers, rows, strict=True):
            by_x[r] = (gradient[r] @ weight[number].to(gradient.dtype)).to(x.dtype)
            if by_weight is not None:
                flat = gradient[r].flatten(0, -2), x[r].flatten(0, -2).to(gradient.dtype)
                by_weight[number] = (flat[0].T @ flat[1]).to(weight.dtype)
        return by_x, by_weight, None


def _rows_by_number(index: torch.Tensor) -> tuple[list[int], tuple[torch.Tensor, ...]]:
    """The numbers that occur in ``index``, and the places of each."""
    order = index.argsort(stable=True)
    numbers, counts = index[order].unique_consecutive(return_counts=True)
    return numbers.tolist(), order.split(counts.tolist())
