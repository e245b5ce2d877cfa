"""Several processes come to the plan of one, of whole, sharded and offloaded models, and one of them writes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.errors import CheckpointError, UnsupportedModelError
from fxprune.evaluation import perplexity
from tests.cli.running import refused
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.tiers import SLOW, tiers
from tests.tokens import character_tokenizer

ROOT = Path(__file__).parents[2]

_DYING = """
import os, sys, torch, torch.distributed as dist, fxprune
from tests.models import tiny, token_ids

dist.init_process_group("gloo")
torch.set_num_threads(1)
result = fxprune.prune(tiny("llama"), token_ids(6), ratio=0.3, importance="l2", recipe="llm-pruner")
if dist.get_rank() == 1:
    os._exit(7)
result.save_pretrained(f"{sys.argv[1]}/slim")
open(f"{sys.argv[1]}/done", "w")
dist.destroy_process_group()
"""


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=paths)


@SLOW
def test_processes_share_the_windows_of_a_text(tmp_path: Path) -> None:
    """As many calls in each, so that a model may be spread over them."""

    def measure(rank: int = 0) -> tuple[list[float], int]:
        torch.manual_seed(rank)
        calls: list[int] = []
        model = tiny("llama")
        model.register_forward_hook(lambda *_: calls.append(1))
        return [float(perplexity(model, token_ids(count, 12), batch=2)) for count in (5, 1)], len(calls)

    alone, _ = measure()
    for found, calls in in_processes(measure, 2, tmp_path):
        assert found == pytest.approx(alone, rel=1e-6) and calls == 2 + 1


@SLOW
def test_the_command_line_in_two_processes(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    command = ["-m", "fxprune", "prune", str(tmp_path / "dense"), "--out", str(tmp_path / "slim"), "--importance", "l2"]
    done = torchrun(2, *command, "--ratio", "0.2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("parameters removed") == 1
    alone = fxprune.prune(tiny("llama"), importance="l2", ratio=0.2)
    assert fxprune.Plan.from_json((tmp_path / "slim/plan.json").read_text()) == alone.plan
    assert fxprune.from_pretrained(tmp_path / "slim", verify=True) is not None
    lines = in_processes(lambda _: refused(*command[2:], "--ratio", "1.5"), 2, tmp_path / "meeting")
    assert all("ratio" in line for line in lines)


@SLOW
def test_a_process_that_dies_ends_all_and_nothing_is_half_written(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_DYING)
    done = torchrun(2, str(script), str(tmp_path))
    assert done.returncode != 0 and "exitcode" in done.stderr
    assert not (tmp_path / "done").exists()


def sharded(model: Any) -> Any:
    """A model whose layers and whose rest are sharded over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in getattr(model.base_model, "layers", None) or model.base_model.h:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def slim() -> fxprune.Result:
    return fxprune.prune(tiny("llama"), importance="l2", kinds="mlp", ratio=0.2, ranking="global", protect=())


@SLOW
@pytest.mark.parametrize("count", [1, 2])
def test_a_model_that_is_sharded_is_measured_and_neither_traced_nor_copied(count: int, tmp_path: Path) -> None:
    """The refusal was of an attribute that could not be copied; in one process perplexity failed."""

    def work(rank: int) -> list[float]:
        with pytest.raises(UnsupportedModelError, match=r"sharded over processes \(a DTensor\).*prune_checkpoint"):
            fxprune.trace(sharded(tiny("llama")))
        with pytest.raises(UnsupportedModelError, match=r"it is sharded.*inplace=True"):
            fxprune.recover(sharded(tiny("llama")), "text", None)
        whole = slim().model
        return [float(perplexity(model, token_ids(5, 12), batch=2)) for model in (whole, sharded(whole))]

    for before, after in in_processes(work, count, tmp_path):
        assert after == pytest.approx(before, rel=1e-5)


def parallel(model: Any) -> Any:
    """A model whose MLPs are split over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in model.base_model.layers:
        parallelize_module(layer.mlp, mesh, plan)
    return model


@SLOW
def test_a_sharded_model_that_computes_something_else_is_not_saved(tmp_path: Path) -> None:
    """The first process ended in an error of torch about tensors of two kinds, the other one waited."""

    def work(rank: int) -> None:
        model = slim().model
        model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
        with pytest.raises(CheckpointError, match="outputs differ"):
            fxprune.save_pretrained(sharded(model), tmp_path / "changed")

    in_processes(work, 2, tmp_path)
    assert not (tmp_path / "changed").exists()


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
        assert places(slim) == places(dense), "it stays as it was"
        return result.plan.to_json(), whole(logits).flatten().tolist()

    alone = fxprune.prune(tiny(family), token_ids(6), **OPTIONS, tensor_parallel=2 if shard is parallel else 1)
    wanted = alone.model(ids).logits.detach()
    found = in_processes(work, 2, tmp_path)
    loaded = fxprune.from_pretrained(tmp_path / "slim", verify=True)(ids).logits.detach()
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    for plan, logits in found:
        assert plan == alone.plan.to_json()
        torch.testing.assert_close(torch.tensor(logits), wanted.flatten(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(logits), loaded.flatten(), rtol=0, atol=1e-5)


def test_a_sharded_model_generates_samples_in_one_process(tmp_path: Path) -> None:
    """Its copy still counted as sharded, and the process that generated waited for the other one for ever."""
    options: dict[str, Any] = {
        "ratio": 0.3,
        "recipe": "calibrate{added=2}\nfind-groups\nwanda\nselect-by-ratio\nshrink\nemit-model\nmake-report",
        "eval": False,
    }

    def work(rank: int) -> str:
        return fxprune.prune(sharded(tiny("llama")), token_ids(6), **options).plan.to_json()

    alone = fxprune.prune(tiny("llama"), token_ids(6), **options)
    assert any("generated were added" in note for note in alone.report.notes)
    assert in_processes(work, 2, tmp_path) == [alone.plan.to_json()] * 2


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
    with pytest.raises(UnsupportedModelError, match="a device_map has offloaded it"):
        fxprune.sweep(spread, ids, out=tmp_path / "sweep", tokenizer=character_tokenizer())
