"""How a slim model is built from a dense one's config: plain data, and the function that follows it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from fxprune.emit.carry import carry_over
from fxprune.emit.fields import part_of
from fxprune.emit.layout import Layout, survey
from fxprune.emit.meta import on_meta
from fxprune.emit.remove_blocks import remove_blocks
from fxprune.emit.tables import combined_inputs
from fxprune.graph.attempts import call_foreign
from fxprune.modelling.block_config import put_fields
from fxprune.modelling.overrides import Overrides, apply_overrides, build_blocks
from fxprune.trace.checks import clear_marks

__all__ = ["Recipe", "rebuild"]


@dataclass(frozen=True)
class Recipe(Overrides):
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
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that ``as_dict``, and a trip through JSON, came from."""
        return cls(**{**data, "removed": tuple(data["removed"])})


def rebuild(dense: PreTrainedModel, recipe: Recipe, layout: Layout | None = None) -> PreTrainedModel:
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
