"""Inputs whose values decide the graph, such as grids of images: they keep the values of the example.

Python code reads such values, as in ``for t, h, w in grid.tolist()``, and a trace has none. These inputs therefore stay
plain tensors while a model is traced: what is computed from them alone is computed at once, and is a constant of the
graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxprune.data.samples import DECODER
from fxprune.graph.compat import SIZE, FakeTensor, disable_modes, tree_leaves
from fxprune.graph.context import disable_torch_function


def deciding_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs of a Hugging Face model that may decide its graph: integers and flags other than tokens."""
    main = getattr(model, "main_input_name", None)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    whole = {name: value for name, value in tensors.items() if not (value.is_floating_point() or value.is_complex())}
    return {name: value.cpu() for name, value in whole.items() if main is not None and name not in (main, DECODER)}


def keep_values(twin: nn.Module, known: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Make the ``forward`` of a copy read ``known`` in place of the inputs of these names.

    Args:
        twin: the copy, whose ``forward`` names its inputs.
        known: the values, by name.
        dtype: the dtype of the weights while they are traced; what is cast to it is part of the graph.
    """
    forward, signature = twin.forward, inspect.signature(twin.forward)

    def with_values(**given: Any) -> Any:
        with _Computed(dtype):
            return forward(**{**given, **known})

    with_values.__signature__ = signature  # type: ignore[attr-defined]
    twin.forward = with_values


_MAKERS = (torch.arange, torch.tensor)


class _Computed(TorchFunctionMode):
    """Computes what depends on plain tensors alone, outside of a trace."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        known = func in _MAKERS or bool(tensors)
        if known and not any(isinstance(leaf, FakeTensor | nn.Parameter | SIZE) for leaf in leaves):
            with disable_modes(), disable_torch_function():
                made = func(*args, **(kwargs or {}))
            if not any(isinstance(leaf, torch.Tensor) and leaf.dtype == self.dtype for leaf in tree_leaves(made)):
                return made
        return func(*args, **(kwargs or {}))
