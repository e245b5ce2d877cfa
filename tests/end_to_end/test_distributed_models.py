"""Models that are sharded, or spread by a ``device_map``, are pruned as the whole ones are, and come back alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxprune
from tests.end_to_end.test_processes import by_rank
from tests.models import tiny, token_ids
from tests.tiers import SLOW

_SHARDED = """
import json, sys, torch, torch.distributed as dist, fxprune
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tests.models import tiny, token_ids

dist.init_process_group("gloo")
torch.set_num_threads(1)
out, found = sys.argv[1], {}
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
options = dict(ratio=0.3, recipe="llm-pruner", importance="taylor{order=first}", protect=(), eval=False)


def sharded(how):
    model = tiny("gpt2" if how == "tied" else "llama")
    for layer in model.base_model.h if how == "tied" else model.base_model.layers:
        if how == "tensor parallel":
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(layer.mlp, mesh, plan)
        else:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
    return model if how == "tensor parallel" else fully_shard(model, mesh=mesh)


def placed(model):
    return {
        name: str(getattr(value, "placements", None)) for name, value in model.named_parameters()
    }, [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]


for how in ("fully_shard", "tied", "tensor parallel"):
    dense = sharded(how)
    before = {name: value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
              for name, value in dense.named_parameters()}
    result = fxprune.prune(dense, token_ids(6), **options)
    slim = result.model
    same = all(torch.equal(before[name], value.full_tensor() if hasattr(value, "full_tensor") else value)
               for name, value in dense.named_parameters())
    logits = slim(token_ids(2)).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    logits.float().square().mean().backward()
    trains = all(value.grad is not None for value in slim.parameters())
    result.save_pretrained(f"{out}/{how}")
    if dist.get_rank() == 0:
        torch.save(logits.detach(), f"{out}/{how}.pt")
        open(f"{out}/{how}.json", "w").write(result.plan.to_json())
    again = fxprune.apply(sharded(how), result.plan).model
    found[how] = {"untouched": same, "alike": placed(slim) == placed(dense), "trains": trains,
                  "applied": placed(again) == placed(slim), "notes": result.report.notes}
open(f"{out}/{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@SLOW
def test_sharded_models_are_pruned_and_come_back_sharded_alike(tmp_path: Path) -> None:
    for found in by_rank(_SHARDED, 2, tmp_path):
        for how, told in found.items():
            assert told["untouched"] and told["alike"] and told["trains"] and told["applied"], (how, told)
            assert any("gathered" in note for note in told["notes"])
    for how in ("fully_shard", "tied", "tensor parallel"):
        alone = fxprune.prune(
            tiny("gpt2" if how == "tied" else "llama"),
            token_ids(6),
            ratio=0.3,
            recipe="llm-pruner",
            importance="taylor{order=first}",
            protect=(),
            eval=False,
            tensor_parallel=2 if how == "tensor parallel" else 1,
        )
        assert (tmp_path / f"{how}.json").read_text() == alone.plan.to_json()
        wanted = alone.model(token_ids(2)).logits
        torch.testing.assert_close(torch.load(tmp_path / f"{how}.pt"), wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            loaded = fxprune.from_pretrained(tmp_path / how)(token_ids(2)).logits
        torch.testing.assert_close(loaded, wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
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
