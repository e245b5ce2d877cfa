"""Several processes, and models on several devices."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from fxprune.passes.tune.tune import Progress
from torch import nn
from transformers import AutoModelForCausalLM

import fxprune
from fxprune.checkpoint.low_memory import resumable_folder
from fxprune.errors import ArgumentError, FxpruneError, PassError, RecoveryError, UnsupportedModelError
from fxprune.evaluation import perplexity
from fxprune.offload import ranks
from fxprune.offload.files import cached, offload_to, uncache, write_cached
from fxprune.offload.ranks import (
    all_reduce,
    barrier,
    broadcast,
    broadcast_object,
    check_enough,
    check_one_device,
    check_same,
    check_unsharded,
    deal,
    decide_on_first,
    input_device,
    is_first,
    is_sharded,
    own_elements,
    process_group,
    rank,
    reduce_to_own,
    run_on_first,
    shard_indices,
    start_gather,
)
from tests.forked import in_processes
from tests.models import tiny, token_ids
from tests.tokens import character_tokenizer


def test_small_tensors_of_several_dtypes_are_summed_in_buckets(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[float]]:
        tensors = [
            torch.full((2, 3), rank + 1.0),
            torch.arange(4, dtype=torch.int64)[::2] + rank,
            torch.tensor(rank + 0.5),
            torch.ones(5, 2).T * rank,
            torch.empty(0),
        ]
        all_reduce(iter(tensors))
        return [tensor.flatten().tolist() for tensor in tensors]

    found = in_processes(work, 3, tmp_path)
    assert found[0] == found[1] == found[2] == [[6.0] * 6, [3, 9], [4.5], [3.0] * 10, []]


@pytest.mark.parametrize("at_once", [ranks._AT_ONCE, 24, 1])
def test_each_process_gets_its_share_of_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Of three, the last has fewer of seven elements; of two elements it has none. By one collective, or several."""
    monkeypatch.setattr(ranks, "_AT_ONCE", at_once)

    def work(rank: int) -> list[list[float]]:
        found = [
            reduce_to_own(torch.arange(size).bfloat16().view(1, -1) * (rank + 1), torch.float32) for size in (7, 2)
        ]
        for size in (7, 2):
            mine = torch.full((size,), -1.0)
            mine[own_elements(size)] = float(rank)
            assert start_gather(mine)().tolist() == [i // -(-size // 3) for i in range(size)]
        return [one.tolist() for one in found]

    assert in_processes(work, 3, tmp_path) == [[[0, 6, 12], [0]], [[18, 24, 30], [6]], [[36], []]]
    assert reduce_to_own(torch.ones(2, 3), torch.float32).tolist() == [1] * 6


def test_the_first_writes_for_longer_than_a_collective_may_take(tmp_path: Path) -> None:
    """The others waited in a broadcast of the default group, and gave up after its timeout."""

    def write() -> int:
        time.sleep(1.5)
        check_same(lambda: {"alone": 1}, where="what runs in one process alone")
        return 7

    def work(rank: int) -> list[object]:
        found: list[object] = [run_on_first(write, FxpruneError), decide_on_first(lambda: rank + 3, FxpruneError)]
        barrier()
        try:
            decide_on_first(lambda: 1 // rank, FxpruneError)
        except (ZeroDivisionError, FxpruneError) as error:
            found.append(type(error).__name__)
        return found

    found = in_processes(work, 2, tmp_path, timeout=0.7)
    assert found == [[7, 3, "ZeroDivisionError"], [None, 3, "FxpruneError"]]


def test_the_first_process_says_what_is_done(tmp_path: Path) -> None:
    """Each process looked into a folder of its own, and one that lacked a file waited for the others for ever."""

    def work(rank: int) -> list[object]:
        with offload_to(tmp_path, tmp_path):
            before = cached("scores")
            write_cached("scores", lambda file: file.write_text(str(rank)))
            write_cached(f"parts/{rank}", lambda file: file.write_text(""), own=True)
            barrier()
            seen = cached("scores")
            own = [cached(f"parts/{place}", own=True) is not None for place in range(3)]
            uncache("parts")
            barrier()
            return [before, seen and seen.read_text(), own, (tmp_path / "parts").exists()]

    assert in_processes(work, 2, tmp_path) == [[None, "0", [True, True, False], False]] * 2


def test_a_disk_error_of_the_first_process_is_raised_in_all(tmp_path: Path) -> None:
    """It alone writes; the others waited until the time was up, or said that it had ended."""
    file = tmp_path / "file"
    file.write_text("")

    def cache() -> None:
        with offload_to(tmp_path, file):
            write_cached("scores", lambda path: path.write_text(""))

    def start() -> None:
        with resumable_folder(file / "out"):
            pass

    def save() -> None:
        Progress(0, (1.0,), ()).save(str(file / "run"), "", torch.optim.Adam([torch.zeros(2)]))

    def compare() -> None:
        fxprune.sweep(tiny("llama"), token_ids(2), out=file / "out", tokenizer=character_tokenizer())

    def work(rank: int) -> list[str]:
        found = []
        for step in (cache, start, save, compare):
            with pytest.raises((OSError, FxpruneError)) as raised:
                step()
            found.append(str(raised.value))
            barrier()
        return found

    for mine, other in zip(*in_processes(work, 2, tmp_path, timeout=20), strict=True):
        assert "cannot be written" in mine and "the first process: " in other and str(file) in other


def test_processes_that_end_with_other_weights_all_raise_it(tmp_path: Path) -> None:
    """On several GPUs, or from other files, each went on with weights of its own, and those of the first were saved."""
    models = [tiny("llama"), tiny("llama")]
    with torch.no_grad():
        models[1].lm_head.weight[0, 0] += 1

    def work(rank: int) -> str:
        try:
            fxprune.prune(models[rank], importance="l2", ratio=0.2, kinds="mlp", protect=(), verify=False)
        except FxpruneError as error:
            return str(error)
        return ""

    said = in_processes(work, 2, tmp_path)
    assert said[0] == said[1] and "process 1 and the first process differ in the slim weights" in said[0]


OPTIONS: dict[str, Any] = {"recipe": "llm-pruner", "ratio": 0.2, "protect": ()}
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense"
    tiny("llama", num_hidden_layers=2).save_pretrained(path)
    return path


def mapped(folder: Path, device_map: dict[str, str], tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")


@pytest.mark.slow
def test_a_device_map_to_one_device_changes_nothing(folder: Path, tmp_path: Path) -> None:
    plain = fxprune.prune(AutoModelForCausalLM.from_pretrained(folder), token_ids(4), **OPTIONS)
    model = dispatch_model(mapped(folder, dict.fromkeys(PLACES, "cpu"), tmp_path), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook"), "as when something else was on another device"
    found = fxprune.prune(model, token_ids(4), **OPTIONS)
    assert found.plan == plain.plan and found.report.verification_error is not None
    found.save_pretrained(tmp_path / "slim")
    ids = token_ids(2)
    loaded = fxprune.from_pretrained(tmp_path / "slim")
    torch.testing.assert_close(loaded(ids).logits, plain.model(ids).logits)


@pytest.mark.parametrize("disk", [("model.layers.1",), PLACES], ids=["a layer", "all"])
def test_an_offloaded_model_is_not_traced_or_trained_and_can_be_measured(
    folder: Path, disk: tuple[str, ...], tmp_path: Path
) -> None:
    """Where all was offloaded, it was traced on meta and failed inside accelerate; measuring it failed as well."""
    model = mapped(folder, {place: "disk" if place in disk else "cpu" for place in PLACES}, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"device_map has offloaded it.*prune_checkpoint"):
        fxprune.trace(model)
    with pytest.raises(UnsupportedModelError, match=r"offloaded it.*fsdp"):
        fxprune.recover(model)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert float(perplexity(model, token_ids(4))) == pytest.approx(float(perplexity(whole, token_ids(4))), rel=1e-6)
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        fxprune.trace(cpu_offload(whole))


def test_several_devices_are_refused_by_what_put_them_there() -> None:
    """The remedy was model.to, which accelerate refuses for a model that it has put on several devices."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    check_unsharded(model)
    with pytest.raises(UnsupportedModelError, match=r"is on meta while 0\.weight is on cpu.*model\.to\('cpu'\)"):
        check_one_device(model)
    add_hook_to_module(model[0], SequentialHook(AlignDevicesHook(execution_device="cpu")))
    with pytest.raises(UnsupportedModelError, match="prune_checkpoint"):
        check_one_device(model)


def test_inputs_go_to_the_first_parameter_or_to_where_it_will_be() -> None:
    assert input_device(nn.ReLU()) is None
    assert input_device(nn.Linear(2, 2)) == torch.device("cpu")
    model = nn.Linear(2, 2, device="meta")
    assert input_device(model) == torch.device("meta")
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    assert input_device(model) == torch.device("cpu")


def test_a_plain_model_is_neither_sharded_nor_refused() -> None:
    model = tiny("llama")
    check_unsharded(model)
    check_one_device(model)
    assert not is_sharded(model)
    with pytest.raises(RecoveryError, match="tokenizer is None"):
        fxprune.recover(model)
    with pytest.raises(UnsupportedModelError, match="weights are on meta"):
        fxprune.recover(model.to("meta"))


def test_one_process_does_everything() -> None:
    sums = torch.tensor([1.0, 2.0])
    all_reduce([sums])
    broadcast([sums])
    with process_group():
        check_enough([3, 4, 5])
        assert deal([3, 4, 5]) == (3, 4, 5) and rank() == 0 and is_first() and broadcast_object("x") == "x"
    assert sums.tolist() == [1.0, 2.0] and list(shard_indices(3)) == [0, 1, 2]
    assert run_on_first(lambda: 7, FxpruneError) == 7
    with pytest.raises(KeyError):
        run_on_first(lambda: {}["missing"], FxpruneError)


def test_a_collective_whose_other_side_is_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as a failure of the user's model."""
    monkeypatch.setattr(ranks, "_is_distributed", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    raised = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]: Connection reset by peer")
    monkeypatch.setattr(ranks.dist, "all_reduce", Mock(side_effect=[raised, RuntimeError("out of memory")]))
    with pytest.raises(PassError, match="another process has ended"):
        all_reduce([torch.ones(2)])
    with pytest.raises(RuntimeError, match="out of memory"):
        all_reduce([torch.ones(2)])


def test_a_model_that_hooks_offload_is_pruned() -> None:
    """It has no device map, and its slim model was dispatched by one at the end."""
    model = cpu_offload(tiny("llama"), execution_device="cpu")
    options: dict[str, Any] = {"importance": "l2", "recipe": "llm-pruner", "protect": (), "ratio": 0.2}
    result = fxprune.prune(model, **options)
    assert result.plan == fxprune.prune(tiny("llama"), **options).plan
    assert all(parameter.device.type == "cpu" for parameter in result.model.parameters())
    with pytest.raises(ArgumentError, match="inplace: the weights of a distributed model are gathered in a copy"):
        fxprune.prune(model, inplace=True, **options)
