"""Sizes of a Hugging Face model that are known without its graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxprune.discovery.groups import bare_kind
from fxprune.graph.context import attempt
from fxprune.removal.formats import least_each

__all__ = ["dense_and_least"]

_INSIDE_BLOCKS = frozenset({"mlp", "head", "head_dim", "expert", "layer"})
"""Kinds of structures that embedding and output have no part in."""


def dense_and_least(model: Any, kinds: Iterable[str], quantity: str, file_format: str = "") -> tuple[float, float]:
    """The size of a model, and of its embedding and output, which is all that may stay.

    Args:
        model: a Hugging Face model.
        kinds: of structures that may go; the second size is 0 if some are part of the embedding.
        quantity: ``params`` or ``bytes``.
        file_format: of the bytes of a GGUF file; the first size is then an upper bound, and the second a lower one.
    """
    ends = [attempt(model.get_input_embeddings), attempt(model.get_output_embeddings)]
    inside = {bare_kind(kind) for kind in kinds} <= _INSIDE_BLOCKS
    stay = {parameter for end in ends if inside and isinstance(end, nn.Module) for parameter in end.parameters()}

    def size(parameters: Iterable[nn.Parameter], each: float) -> float:
        sizes = ((p.numel(), p.element_size()) for p in parameters)
        return float(sum(number * (1 if quantity == "params" else each or width) for number, width in sizes))

    least = least_each(file_format) if file_format else 0.0
    dense = float("inf") if file_format else size(model.parameters(), 0.0)
    return dense, size(stay, least)
