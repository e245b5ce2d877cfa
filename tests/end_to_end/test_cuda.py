"""What holds on a CPU holds on a GPU: slim graphs and models, half precision, scores and plans."""

import copy
from typing import Any

import pytest
import torch

import fxprune
from fxprune.offload.prefetch import StreamPrefetcher
from tests.models import tiny, token_ids

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here that CUDA can use"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: dict[str, Any] = {"ratio": 0.25, "kinds": ("mlp", "head"), "protect": ()}


def pruned(dtype: torch.dtype = torch.float32, **options: Any) -> fxprune.Result:
    model = tiny("llama").to("cuda", dtype)
    return fxprune.prune(model, token_ids(8).cuda(), recipe="llm-pruner", **{**OPTIONS, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slim_graph_and_model_stay_on_the_device_and_are_verified(dtype: torch.dtype) -> None:
    result = pruned(dtype, importance="l2")
    assert result.report.verification_error is not None and result.model is not None
    ids = token_ids(3, 7, seed=5).cuda()
    with torch.no_grad():
        graph, model = result.graph_module(input_ids=ids), result.model(input_ids=ids)
    assert model.logits.device.type == "cuda" and model.logits.dtype == dtype
    logits = graph["logits"] if isinstance(graph, dict) else graph[0]
    torch.testing.assert_close(logits, model.logits)
    assert all(parameter.device.type == "cuda" for parameter in result.model.parameters())


@pytest.mark.parametrize("importance", ["l2", "taylor{order=mix}", "taylor{order=second}", "wanda", "flap"])
def test_scores_of_the_device_give_the_plan_of_a_cpu(importance: str) -> None:
    here = fxprune.prune(tiny("llama"), token_ids(8), recipe="llm-pruner", importance=importance, **OPTIONS)
    there = pruned(importance=importance)
    assert there.plan == here.plan


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_recipes_fit_and_tune_on_the_device(recipe: str) -> None:
    model = tiny("llama").cuda()
    before = copy.deepcopy(model.state_dict())
    result = fxprune.prune(model, token_ids(16).cuda(), recipe=recipe, ratio=0.2)
    assert result.model is not None and next(result.model.parameters()).device.type == "cuda"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_slim_compiles_and_says_the_same(dtype: torch.dtype) -> None:
    result = pruned(dtype, importance="l2")
    ids = token_ids(2, 8, seed=3).cuda()
    with torch.no_grad():
        want = result.model(input_ids=ids).logits.float()
        got = torch.compile(result.model, mode="reduce-overhead")(input_ids=ids).logits.float()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_a_slim_model_generates_there_and_loads_there(tmp_path: Any) -> None:
    result = pruned(importance="l2")
    result.save_pretrained(tmp_path)
    loaded = fxprune.from_pretrained(tmp_path).cuda()
    ids = token_ids(2, 5).cuda()
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **asked), result.model.generate(ids, **asked))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_carried_there_by_a_thread_and_a_stream(dtype: torch.dtype) -> None:
    prefetcher = StreamPrefetcher(torch.device("cuda", 0))
    tensors = [torch.randn(300, 200).to(dtype) for _ in range(8)]
    prefetcher.prefetch(tensors[:2])
    for i, tensor in enumerate(tensors):
        (moved,) = prefetcher.fetch([tensor])
        prefetcher.prefetch(tensors[i + 1 : i + 3])
        assert moved.device == prefetcher.device and torch.equal((moved * 1).cpu(), tensor)
    prefetcher.close()


@pytest.mark.parametrize("importance", ["taylor{order=mix}", "taylor{order=first}", "wanda"])
@pytest.mark.parametrize("memory", ["low", "fast"])
def test_a_model_on_the_cpu_is_pruned_there(importance: str, memory: str) -> None:
    options = {**OPTIONS, "importance": importance, "compensate": "least-squares", "recipe": "llm-pruner"}
    options |= {"memory": memory} if importance != "wanda" else {}
    model = tiny("llama")
    here = fxprune.prune(model, token_ids(8), **options)
    there = fxprune.prune(model, token_ids(8), device="cuda", **options)
    assert there.plan == here.plan and next(there.model.parameters()).device.type == "cpu"
    for name, value in here.model.state_dict().items():
        torch.testing.assert_close(there.model.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_a_folder_is_pruned_there(tmp_path: Any) -> None:
    tiny("llama", num_hidden_layers=4).save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    options = {**OPTIONS, "compensate": "least-squares", "recipe": "llm-pruner"}
    here = fxprune.prune_checkpoint(tmp_path / "dense", tmp_path / "here", token_ids(8), **options)
    there = fxprune.prune_checkpoint(tmp_path / "dense", tmp_path / "there", token_ids(8), device="cuda", **options)
    assert there.plan == here.plan
    ids = token_ids(2)
    torch.testing.assert_close(there.model(ids).logits, here.model(ids).logits, rtol=1e-3, atol=1e-3)
