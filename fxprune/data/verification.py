"""Verification inputs: the caller's, or random ones that fit a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import embedding_rows
from fxprune.errors import ArgumentError
from fxprune.graph.compat import is_free, size_hint, tree_leaves, tree_map
from fxprune.graph.facts import Fact
from fxprune.graph.shapes import failed_check
from fxprune.graph.tensors import device_of, map_tensors
from fxprune.pipeline.arguments import refuse

__all__ = ["VerificationInputs", "check_names", "make_inputs", "resize_inputs"]

BATCH, TOKENS = 2, 16
"""Large enough that batch size and position matter, and cheap."""


@dataclass(frozen=True, eq=False)
class VerificationInputs(Fact):
    """Keyword inputs that the dense and the slim graph are compared on, in the order of the graph."""

    values: Mapping[str, Any]


def check_names(example_inputs: Any, *, on_meta: bool = True) -> None:
    """Refuse example inputs that are not a mapping from names to tensors and plain values; None is accepted."""
    if example_inputs is None:
        return
    named = isinstance(example_inputs, Mapping) and example_inputs and all(isinstance(n, str) for n in example_inputs)
    if not named:
        wanted = "the keyword arguments of forward, {'name': tensor, ...}, or None"
        raise refuse("example_inputs", example_inputs, wanted)
    leaves = {name: tree_leaves(value) for name, value in example_inputs.items()}
    for name, values in leaves.items():
        for value in values:
            _check_value(f"example_inputs[{name!r}]", value, on_meta)
    sizes = [value.numel() for values in leaves.values() for value in values if isinstance(value, torch.Tensor)]
    if sizes and not any(sizes):
        raise ArgumentError("they are empty", where="example_inputs", remedy="Pass at least one sample")


def _check_value(name: str, value: Any, on_meta: bool) -> None:
    if not isinstance(value, torch.Tensor):
        if value is not None and not isinstance(value, bool | int | float | str | torch.dtype | torch.device):
            raise refuse(name, value, "a tensor, or lists, tuples and dicts of tensors")
        return
    if value.is_meta:
        wrong = "" if on_meta else "on meta, without values, and the model is not"
    elif value.layout != torch.strided or value.is_nested or value.is_quantized:
        wrong = "not a plain tensor"
    else:
        wrong = "NaN in places" if value.is_floating_point() and bool(value.isnan().any()) else ""
    if wrong:
        raise ArgumentError(f"it is {wrong}", where=name, remedy="Pass a tensor of numbers")


def make_inputs(graph_module: fx.GraphModule, given: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """Keyword inputs for a graph: the caller's, else random token ids ``(2, 16)`` or random floats.

    Args:
        given: the caller's example inputs.
    """
    inputs = _make(graph_module, given or {}, seed, (BATCH, TOKENS))
    return _make(graph_module, given or {}, seed, None) if failed_check(graph_module, inputs) else inputs


def resize_inputs(graph_module: fx.GraphModule, inputs: Mapping[str, Any], sizes: tuple[int, int]) -> dict[str, Any]:
    """Inputs of other batch size and length: cut, or repeated from the start, along dynamic axes."""

    def resize(traced: Any, value: Any) -> Any:
        for axis, size in enumerate(sizes[: traced.dim()] if isinstance(traced, torch.Tensor) else ()):
            if is_free(traced.shape[axis]):
                value = value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
        return value

    placeholders = {str(node.target): node for node in graph_module.graph.nodes if node.op == "placeholder"}
    return {name: tree_map(resize, placeholders[name].meta["val"], value) for name, value in inputs.items()}


def _make(
    graph_module: fx.GraphModule, given: Mapping[str, Any], seed: int, sizes: tuple[int, int] | None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = embedding_rows(graph_module)
    device = device_of(graph_module)
    inputs: dict[str, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name in given:
            inputs[name] = map_tensors(given[name], lambda tensor: tensor.to(device))
            continue

        def random(value: torch.Tensor, most: int = rows.get(name, 2)) -> torch.Tensor:
            shape = [size_hint(size) for size in value.shape]
            for axis, size in enumerate((sizes or ())[: value.dim()]):
                if is_free(value.shape[axis]):
                    shape[axis] = size
            if value.dtype.is_floating_point:
                return torch.randn(shape, generator=generator).to(device, value.dtype)
            return torch.randint(most, shape, generator=generator).to(device, value.dtype)

        inputs[name] = map_tensors(node.meta["val"], random)
    return inputs
