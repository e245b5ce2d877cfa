"""The blueprint of a slim model: how it is built from the dense config, as plain data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel

from fxprune.emit.blocks import KeptUnits, combined_inputs, remove_blocks
from fxprune.emit.epsilons import NormEpsilons
from fxprune.emit.layout import Layout, Rebuilder, find_layout
from fxprune.emit.patch import carry_over
from fxprune.emit.snapshot import Shape, part_of, without_storage
from fxprune.graph.context import call_foreign
from fxprune.graph.facts import within
from fxprune.modelling.block_config import put_fields
from fxprune.modelling.overrides import Overrides, apply_overrides, build_blocks
from fxprune.trace.checks import clear_quantisation_marks

__all__ = ["Blueprint", "EmissionTask", "rebuild"]


@dataclass(frozen=True)
class EmissionTask:
    """A dense model and the shapes wanted of the slim one: the input of the search for a blueprint.

    Args:
        rebuilder: builds the model again around its blocks.
        wanted: shape by dense name of every tensor that remains.
        removed: module paths of the removed blocks.
        kept_units: which units remain in the tables that the model's code makes for all units.
    """

    model: PreTrainedModel
    layout: Layout
    rebuilder: Rebuilder
    wanted: Mapping[str, Shape]
    removed: tuple[str, ...] = ()
    kept_units: KeptUnits = field(default_factory=dict)
    epsilons: NormEpsilons = field(default_factory=NormEpsilons)

    def outside(self) -> dict[str, Shape]:
        return {name: shape for name, shape in self.wanted.items() if not within(name, self.rebuilder.skip)}


@dataclass(frozen=True)
class Blueprint(Overrides):
    """How a slim model is built from the dense config; JSON values throughout, names are those of the dense model.

    Args:
        fields: config fields that change for the whole model.
        epsilons: config fields with norm epsilons, of those that change.
        removed: module paths of the removed blocks.
    """

    fields: Mapping[str, int] = field(default_factory=dict)
    epsilons: Mapping[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "removed": list(self.removed)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Blueprint:
        """Return the blueprint from the values of ``as_dict``, also after a trip through JSON."""
        return cls(**{**data, "removed": tuple(data["removed"])})


def rebuild(dense: PreTrainedModel, blueprint: Blueprint, layout: Layout | None = None) -> PreTrainedModel:
    """Build a model of the dense model's class on ``meta`` with the widths and blocks of a blueprint, without weights.

    Of the dense model, which may be on ``meta``, only the structure and scalar attributes are read.

    Raises:
        CannotBuildError: the class of a block does not build what the blueprint asks for.
    """
    layout = layout or find_layout(dense)
    built_at = {path: place for path, place in blueprint.built_at.items() if path not in blueprint.removed}
    overrides = dataclasses.replace(blueprint, built_at=built_at, inputs=combined_inputs(dense, blueprint.inputs))
    with without_storage():
        config = copy.deepcopy(dense.config)
        put_fields(part_of(config, layout.part), {**blueprint.fields, **blueprint.epsilons})
        model = call_foreign(type(dense), config)
        build_blocks(model, part_of(model.config, layout.part), overrides, like=dense)
    carry_over(dense, model)
    apply_overrides(model, overrides)
    remove_blocks(model, blueprint.removed, layout)
    put_fields(part_of(config, layout.part), blueprint.written_afterwards)
    clear_quantisation_marks(model)  # a traced model holds plain floats, whatever file it came from
    return model
