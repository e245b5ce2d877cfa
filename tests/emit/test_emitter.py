"""Emission as a whole, on a small model: refusals of foreign code are reasons, defects of ours are raised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune.emit.emitter as emitter
from fxprune.emit.emitter import Blueprint, rebuild
from fxprune.modelling.blocks import BUILT_AT, CannotBuildError
from tests.emit.small import SmallModel, small
from tests.models import all_tensors


def narrow(model: SmallModel, width: int = 8) -> dict[str, torch.Tensor]:
    """Tensors of a model whose second block has fewer channels."""
    tensors = all_tensors(model)
    tensors["blocks.1.up.weight"] = tensors["blocks.1.up.weight"].detach()[:width]
    tensors["blocks.1.up.bias"] = tensors["blocks.1.up.bias"].detach()[:width]
    tensors["blocks.1.down.weight"] = tensors["blocks.1.down.weight"].detach()[:, :width]
    return tensors


def test_modules_that_the_user_added_are_a_reason() -> None:
    class Stubborn:
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copy of me")

    model = small()
    model.probe = nn.Identity()
    emission = emitter.emit(model, all_tensors(model))
    assert emission.model is None and "probe: the class builds no such module" in emission.reasons
    model = small()
    model.stubborn = Stubborn()
    assert emitter.emit(model, all_tensors(model)).model is not None, "no copy is needed"
    emission = emitter.emit(model, all_tensors(model), inputs={})
    why = "the dense model cannot be copied: RuntimeError: no copy of me"
    assert emission.reasons == (f"a candidate does not run: {why}",)


def test_what_a_constructor_or_the_caller_raises_is_a_reason() -> None:
    class Demanding(SmallModel):
        def __init__(self, config: Any, other: int) -> None:
            super().__init__(config)

    model = Demanding(small().config, 1)
    emission = emitter.emit(model, narrow(model))
    assert emission.model is None and emission.reasons

    def refuse(_: nn.Module) -> bool:
        raise RuntimeError("not on this machine")

    model = small()
    emission = emitter.emit(model, narrow(model), agrees=refuse)
    assert "a candidate does not run: RuntimeError: not on this machine" in emission.reasons


@pytest.mark.parametrize("place", ["rebuild", "assign_tensors", "find_layout"])
def test_a_defect_of_ours_is_raised(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {"__name__": "fxprune.emit.somewhere"}
    exec("def broken(*args, **kwargs): return None + 1", space)
    monkeypatch.setattr(emitter, place, space["broken"])
    model = small()
    with pytest.raises(TypeError, match="NoneType"):
        emitter.emit(model, narrow(model))


def test_a_block_lacks_what_is_absent_and_is_built_where_its_kind_is() -> None:
    blueprint = Blueprint(fields={"head_dim": 2}, absent={"blocks.1": ["head_dim"]}, block_fields={"blocks.1": {}})
    assert [block.head_dim for block in rebuild(small(depth=2), blueprint).blocks] == [2, 4]
    blueprint = Blueprint(built_at={"blocks.1": {"index": 3, "fields": {"depth": 4}}})
    slim = rebuild(small(depth=2), blueprint)
    assert isinstance(slim.blocks[1].up, nn.Identity) and slim.blocks[1].layer_idx == 1
    assert vars(slim.blocks[1])[BUILT_AT]["index"] == 3 and slim.config.depth == 2
    with pytest.raises(CannotBuildError, match="norm"):
        rebuild(small(), Blueprint(block_fields={"norm": {"inner": 4}}))
