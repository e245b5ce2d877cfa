"""A slim model as data: how it is built from the dense config."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from fxprune.emit.blocks import Numbered, combined_inputs, remove_blocks
from fxprune.emit.epsilons import Places
from fxprune.emit.layout import Layout, Rebuilder, survey
from fxprune.emit.patch import carry_over
from fxprune.emit.snapshot import Shape, on_meta, part_of
from fxprune.graph.context import call_foreign
from fxprune.graph.facts import within
from fxprune.modelling.block_config import put_fields
from fxprune.modelling.overrides import Overrides, apply_overrides, build_blocks
from fxprune.trace.checks import clear_marks

__all__ = ["Blueprint", "EmissionTask", "rebuild"]


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


@dataclass(frozen=True)
class Blueprint(Overrides):
    """How a slim model is built from the dense one's config; JSON values throughout, names those of the dense model.

    Args:
        fields: config fields that the whole model changes.
        epsilons: config fields with what norms add, of those that it changes.
        removed: module paths of the blocks that are gone.
    """

    fields: Mapping[str, int] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {**asdict(self), "removed": list(self.removed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Blueprint:
        """Return the recipe that ``as_dict``, and a trip through JSON, came from."""
        return cls(**{**data, "removed": tuple(data["removed"])})


def rebuild(dense: PreTrainedModel, recipe: Blueprint, layout: Layout | None = None) -> PreTrainedModel:
    """Build a model of the dense one's class on ``meta``, with the recipe's widths and blocks and no weights.

    Args:
        dense: the dense model, or one of the same config on ``meta``; only its structure and scalar attributes
            are read.
        recipe: what differs.
        layout: where its blocks are, if known.

    Raises:
        CannotBuildError: the class of a block does not build what the recipe asks for.
    """
    layout = layout or survey(dense)
    built_at = {path: place for path, place in recipe.built_at.items() if path not in recipe.removed}
    overrides = dataclasses.replace(recipe, built_at=built_at, inputs=combined_inputs(dense, recipe.inputs))
    with on_meta():
        config = copy.deepcopy(dense.config)
        put_fields(part_of(config, layout.part), {**recipe.fields, **recipe.epsilons})
        model = call_foreign(type(dense), config)
        build_blocks(model, part_of(model.config, layout.part), overrides, like=dense)
    carry_over(dense, model)
    apply_overrides(model, overrides)
    remove_blocks(model, recipe.removed, layout)
    put_fields(part_of(config, layout.part), recipe.written_afterwards)
    clear_marks(model)  # what was traced is plain floats, whatever file it came from
    return model
