"""What a model is emitted from, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from fxprune.emit.epsilons import Places
from fxprune.emit.layout import Layout
from fxprune.emit.rebuilders import Rebuilder
from fxprune.emit.snapshot import Shape
from fxprune.emit.tables import Numbered
from fxprune.graph.blocks import within

__all__ = ["EmissionTask"]


@dataclass(frozen=True)
class EmissionTask:
    """A dense model and the shapes that a slim one is to have: what every candidate is made from.

    Args:
        model: the dense model.
        layout: where its blocks are.
        rebuilder: builds it again around its blocks.
        wanted: shape by dense name of every tensor that remains.
        removed: module paths of the blocks that are gone.
        numbered: which units remain of those that the model knows by number.
        epsilons: where it holds the numbers that norms add, of those that change.
    """

    model: PreTrainedModel
    layout: Layout
    rebuilder: Rebuilder
    wanted: Mapping[str, Shape]
    removed: tuple[str, ...] = ()
    numbered: Numbered = field(default_factory=dict)
    epsilons: Places = field(default_factory=Places)

    def outside(self) -> dict[str, Shape]:
        """Return the wanted shapes outside the blocks."""
        return {name: shape for name, shape in self.wanted.items() if not within(name, self.rebuilder.skip)}
