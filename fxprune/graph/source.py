"""Where a graph came from: the model it was traced from, and the tensors that no model holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxprune.graph.facts import Fact

__all__ = ["Constants", "Source"]


@dataclass(frozen=True, eq=False)
class Source(Fact):
    """The model that a graph was traced from.

    Args:
        model: the model.
        names: for each tensor the graph reads, all its names in the model; none for what the model's code makes.
        example_inputs: the keyword inputs the caller traced with; None where they were made.
        shares: whether the graph still reads the model's own tensors, so that writing to one writes to the other. A
            copy of the graph does not count as sharing: its tensors are replaced before they are written to.
        dense: a copy of the model without storage, as it was before its own tensors were cut; None while it is whole.
    """

    model: nn.Module
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example_inputs: Mapping[str, Any] | None = None
    shares: bool = True
    dense: nn.Module | None = None


@dataclass(frozen=True)
class Constants(Fact):
    """The tensors a graph reads that are no parameter or buffer of the model: its code makes them.

    Args:
        names: in order of first use.
    """

    names: tuple[str, ...] = ()
