"""Pruned with weights carried to another device: a second one is made up, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.recipes import read_recipe
from tests import away
from tests.faults import in_child
from tests.models import tiny, token_ids


def require_same(one: Any, other: Any) -> None:
    assert one.plan == other.plan
    assert other.report.verification_error is not None
    for name, value in one.model.state_dict().items():
        found = other.model.state_dict()[name]
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def prune_both(model: Any, ids: torch.Tensor, **options: Any) -> None:
    options = {"recipe": "llm-pruner", "ratio": 0.2, **options}
    require_same(fxprune.prune(model, ids, **options), fxprune.prune(model, ids, device=away.NAME, **options))


def taylor(folder: Path) -> None:
    model = tiny("llama", num_hidden_layers=3)
    for order, memory in (("mix", "low"), ("first", "fast"), ("second", "auto")):
        options = {"importance": f"taylor{{order={order}}}", "memory": memory, "compensate": "least-squares{reach=all}"}
        prune_both(model, token_ids(6), ratio=0.25, **options)


def others(folder: Path) -> None:
    experts, units = tiny("qwen2_moe"), ("mlp", "head")
    prune_both(experts, token_ids(6), importance="reap", kinds="expert", compensate="rotation")
    prune_both(experts, token_ids(6), importance="taylor", memory="low", compensate="least-squares", kinds=units)
    prune_both(experts, token_ids(6), importance="flap", compensate="least-squares", kinds=units)
    default = str(read_recipe("balanced")).replace("weights=auto, ", "")  # which rounding moves more
    for name in ("record-teacher", "tune"):  # some CPUs have bfloat16, and this device has not
        default = default.replace(name + "{", name + "{precision=float32, ")
    default = default.replace("written=384, added=192", "written=24, added=12")
    prune_both(tiny("llama"), token_ids(12), recipe=default)


def folder_by_folder(folder: Path) -> None:
    tiny("llama", num_hidden_layers=3).save_pretrained(folder / "dense", max_shard_size="200KB")
    fit: Any = {"compensate": "least-squares"}
    options = {"recipe": "llm-pruner", "ratio": 0.2, **fit}
    dense = folder / "dense"
    found = [
        fxprune.prune_checkpoint(dense, folder / name, token_ids(6), device=name, **options) for name in ("cpu", "away")
    ]
    require_same(*found)
    model, plan = tiny("llama", num_hidden_layers=3), found[0].plan
    require_same(*(fxprune.apply(model, plan, token_ids(6), device=name, **fit) for name in (None, away.NAME)))


@pytest.mark.slow
@pytest.mark.parametrize("work", [taylor, others, folder_by_folder])
def test_a_prune_there_is_the_same(work: Callable[[Path], None], tmp_path: Path) -> None:
    def act() -> None:
        device = away.register()
        with pytest.raises(RuntimeError):
            torch.ones(2, device=device) + torch.ones(2)
        work(tmp_path)

    assert in_child(act) == ""
