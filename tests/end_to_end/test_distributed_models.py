"""Models that are sharded, or spread by a ``device_map``, are pruned as the whole ones are, and come back alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

import fxprune
from tests.end_to_end.test_processes import parallel, sharded
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.tiers import SLOW, tiers

OPTIONS: dict[str, Any] = {
    "ratio": 0.3,
    "recipe": "llm-pruner",
    "importance": "taylor{order=first}",
    "protect": (),
    "eval": False,
}
WAYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "FSDP2": ("llama", sharded),
    "tied": ("gpt2", sharded),
    "tensor parallel": ("llama", parallel),
}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()  # type: ignore[no-any-return]


def places(model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """The placements of each parameter, and the modules that FSDP2 shards."""
    placements = {name: str(getattr(value, "placements", None)) for name, value in model.named_parameters()}
    return placements, [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]


@SLOW
@pytest.mark.parametrize("way", WAYS)
def test_sharded_models_are_pruned_and_come_back_sharded_alike(way: str, tmp_path: Path) -> None:
    family, shard = WAYS[way]
    ids = token_ids(2)

    def work(rank: int) -> tuple[str, list[float]]:
        dense = shard(tiny(family))
        before = {name: whole(value) for name, value in dense.named_parameters()}
        result = fxprune.prune(dense, token_ids(6), **OPTIONS)
        assert all(torch.equal(before[name], whole(value)) for name, value in dense.named_parameters())
        slim = result.model
        assert places(slim) == places(dense) and any("gathered" in note for note in result.report.notes)
        logits = slim(ids).logits
        logits.float().square().mean().backward()
        assert all(value.grad is not None for value in slim.parameters())
        assert places(fxprune.apply(shard(tiny(family)), result.plan).model) == places(dense)
        result.save_pretrained(tmp_path / "slim")
        return result.plan.to_json(), whole(logits).flatten().tolist()

    alone = fxprune.prune(tiny(family), token_ids(6), **OPTIONS, tensor_parallel=2 if shard is parallel else 1)
    wanted = alone.model(ids).logits.detach()
    for plan, logits in in_processes(work, 2, tmp_path):
        assert plan == alone.plan.to_json()
        torch.testing.assert_close(torch.tensor(logits), wanted.flatten(), rtol=1e-4, atol=1e-5)
    loaded = fxprune.from_pretrained(tmp_path / "slim")(ids).logits.detach()
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiers(["llama", "gpt2"], "llama"))
def test_a_model_offloaded_by_a_device_map_is_pruned(family: str, tmp_path: Path) -> None:
    """Its weights were there only while their layer ran, and it was refused."""
    tiny(family).save_pretrained(tmp_path / "dense")
    blocks = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    others = [path for path, module in tiny(family).named_modules() if path and not list(module.children())]
    places = {path: "cpu" for path in others if not path.startswith(blocks)} | {blocks: "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    options = {"ratio": 0.3, "importance": "l2", "protect": (), "eval": False}
    ids = token_ids(2)
    before = spread(ids).logits
    result = fxprune.prune(spread, **options)  # type: ignore[arg-type]
    alone = fxprune.prune(tiny(family), **options)  # type: ignore[arg-type]
    assert result.plan.to_json() == alone.plan.to_json()
    torch.testing.assert_close(result.model(ids).logits, alone.model(ids).logits)
    torch.testing.assert_close(spread(ids).logits, before, rtol=0, atol=0)
    assert result.model.hf_device_map.keys() == spread.hf_device_map.keys()
    result.save_pretrained(tmp_path / "slim")
    torch.testing.assert_close(fxprune.from_pretrained(tmp_path / "slim")(ids).logits, alone.model(ids).logits)
