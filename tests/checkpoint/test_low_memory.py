"""Prunes from folder to folder with weights on disk."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import fxprune
from fxprune.checkpoint import low_memory
from fxprune.checkpoint.low_memory import load_mapped, request_key, resumable_folder, unpack_gguf
from fxprune.checkpoint.read import require_all_weights
from fxprune.errors import CheckpointError
from fxprune.recipes import read_recipe
from tests.export.small import tokenizer
from tests.forked import in_processes
from tests.models import tiny, token_ids

FIT = "least-squares{reach=stream}"
OPTIONS: dict[str, Any] = {"recipe": "llm-pruner", "ratio": 0.2, "compensate": FIT, "protect": ()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny("llama", num_hidden_layers=2, intermediate_size=200).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def in_memory(source: Path) -> fxprune.Result:
    model = type(tiny("llama")).from_pretrained(source)
    return fxprune.prune(model, token_ids(6), memory="fast", **OPTIONS)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(fxprune.from_pretrained(folder).state_dict())


def require_same(found: dict[str, torch.Tensor], want: fxprune.Result) -> None:
    wanted = dict(want.model.state_dict())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    """The model in a file of rounded weights."""
    path = source.with_suffix(".gguf")
    model = type(tiny("llama")).from_pretrained(source)
    fxprune.export_model(model, path, tokenizer=tokenizer(), quantization="f16")
    return path


def test_a_gguf_file_is_unpacked_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_mapped(file, tmp_path).config._name_or_path == str(file), "not the folder that it was unpacked to"
    monkeypatch.setattr(sys.modules[load_gguf_checkpoint.__module__], "load_gguf_checkpoint", None)
    load_mapped(file, tmp_path)
    assert request_key(file, None, "") != request_key(file.parent, None, "")
    assert request_key(file, [{"input_ids": token_ids()}], "") is None, "which rows these are is not known beforehand"


def test_the_first_process_unpacks_a_gguf_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process unpacked it, to float32, into a folder of its own."""
    unpacked = list[Path]()
    monkeypatch.setattr(low_memory, "unpack_gguf", lambda *given: unpacked.append(given[1]) or unpack_gguf(*given))

    def work(rank: int) -> tuple[int, list[float]]:
        model = load_mapped(file, tmp_path)
        return len(unpacked), [float(value.sum()) for value in model.parameters()]

    first, second = in_processes(work, 2, tmp_path)
    assert (first[0], second[0]) == (1, 0) and first[1] == second[1]


class Stopped(BaseException):
    """As when a process is killed: nothing of ours catches it."""


def stopping(at: int, seen: list[str]) -> Any:
    """A way to show progress that stops after so many steps of all passes together."""

    def track(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        for item in items:
            if len(seen) == at:
                raise Stopped
            seen.append(what)
            yield item

    return track


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[fxprune.Result, Path, list[str]]:
    """A run that is not stopped, its folder and its steps."""
    seen: list[str] = []
    out = tmp_path_factory.mktemp("whole") / "slim"
    result = fxprune.prune_checkpoint(source, out, token_ids(6), track=stopping(-1, seen), **OPTIONS)
    return result, out, seen


def test_a_folder_becomes_the_slim_folder_that_memory_would_give(in_memory: fxprune.Result, whole: Any) -> None:
    result, out, _ = whole
    assert result.plan == in_memory.plan and result.report.verification_error is not None
    assert [path.name for path in out.parent.iterdir()] == ["slim"], "nothing is left of the way there"
    require_same(weights_of(out), in_memory)


def place(moment: str, whole: list[str]) -> int:
    """Number of steps before a moment."""
    first, count = whole.index("gradients"), whole.count("gradients")
    last = len(whole) - 1 - whole[::-1].index("least-squares")
    return {"begun": 3, "scoring": first + count * 3 // 4, "fitted": last}[moment]


@pytest.mark.parametrize("moment", ["begun", "scoring", "fitted"])
def test_a_killed_run_is_resumed(
    source: Path, in_memory: fxprune.Result, tmp_path: Path, whole: Any, moment: str
) -> None:
    before: list[str] = []
    steps: list[str] = whole[2]
    at = place(moment, steps)
    with pytest.raises(Stopped):
        fxprune.prune_checkpoint(source, tmp_path / "slim", token_ids(6), track=stopping(at, before), **OPTIONS)
    assert not (tmp_path / "slim").exists()
    assert (tmp_path / "slim.unfinished").exists() == (moment != "begun"), "kept if there is a result to resume from"
    again: list[str] = []
    result = fxprune.prune_checkpoint(source, tmp_path / "slim", token_ids(6), track=stopping(-1, again), **OPTIONS)
    if moment != "begun":
        assert again.count("gradients") < steps.count("gradients"), "what was found out is not found out again"
    assert result.plan == in_memory.plan and not (tmp_path / "slim.unfinished").exists()
    require_same(weights_of(tmp_path / "slim"), in_memory)


TUNED: dict[str, Any] = {"recipe": "balanced", "ratio": 0.2, "protect": (), "kinds": ["mlp"]}


@pytest.fixture(scope="module")
def tuned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of the default recipe that is not stopped, and its steps."""
    seen: list[str] = []
    out = tmp_path_factory.mktemp("tuned") / "slim"
    fxprune.prune_checkpoint(source, out, token_ids(24), tokenizer=tokenizer(), track=stopping(-1, seen), **TUNED)
    return out, seen


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["the model writes programs", "dense model", "tuning"])
def test_a_killed_run_neither_writes_nor_asks_the_dense_model_nor_tunes_again(
    source: Path, tmp_path: Path, tuned: tuple[Path, list[str]], moment: str
) -> None:
    """Only scores and fits were taken up; samples, teacher logits and tuning, which take the most time, were not."""
    out, steps = tuned
    again, options = list[str](), {**TUNED, "tokenizer": tokenizer()}
    at = len(steps) - steps[::-1].index(moment)  # once the last of these steps is done
    at -= moment == "tuning"  # or before it: after that of tuning nothing is shown
    with pytest.raises(Stopped):
        fxprune.prune_checkpoint(source, tmp_path / "slim", token_ids(24), track=stopping(at, []), **options)
    fxprune.prune_checkpoint(source, tmp_path / "slim", token_ids(24), track=stopping(-1, again), **options)
    assert again.count(moment) == (steps.count(moment) // 3 if moment == "tuning" else 0), "since it was measured last"
    found, wanted = weights_of(tmp_path / "slim"), weights_of(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("\nleast-squares{reach=stream}", "\nrotation\nleast-squares{damping=0.1}"),
        (
            "\n" + next(line for line in str(read_recipe("fast")).splitlines() if line.startswith("multiply-scores")),
            "\nscore-in-steps{steps=2, importance=wanda, select='select-by-ratio{ratio=0.4}'}",
        ),
    ],
)
def test_passes_that_run_twice_find_out_twice(source: Path, tmp_path: Path, was: str, becomes: str) -> None:
    """The second fit of a weight and the scores of a second step were the first ones again."""
    # none are generated where weights stay in files
    text = str(read_recipe("fast")).replace(", added=32, programs=0.125", "")
    assert text.count(was) == 1
    options: dict[str, Any] = {"recipe": text.replace(was, becomes).replace("protect=[0.07, 0.04], ", ""), "ratio": 0.2}
    model = type(tiny("llama")).from_pretrained(source)
    in_memory = fxprune.prune(model, token_ids(6), memory="low", **options)
    result = fxprune.prune_checkpoint(source, tmp_path / "slim", token_ids(6), **options)
    assert result.plan == in_memory.plan
    require_same(weights_of(tmp_path / "slim"), in_memory)


def test_another_request_starts_from_scratch(tmp_path: Path) -> None:
    for request, resumed in (("a", False), ("a", True), ("b", False), (None, False), (None, False)):
        with pytest.raises(Stopped), resumable_folder(tmp_path / "slim", request) as work:
            assert (work / "found").exists() is resumed
            (work / "found").write_text("")
            raise Stopped
    with resumable_folder(tmp_path / "slim", "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second deleted what the first had found, or took up what it was still writing."""
    with resumable_folder(tmp_path / "slim", "a") as work:
        (work / "found").write_text("")
        for request in ("a", "b", None):
            with pytest.raises(CheckpointError, match="another run uses"), resumable_folder(tmp_path / "slim", request):
                raise AssertionError("it began")
        with resumable_folder(tmp_path / "other", "a"):
            pass
        assert (work / "found").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_or_read_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an fxprune checkpoint"):
        fxprune.prune_checkpoint(tmp_path / "nothing", tmp_path / "mine")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        fxprune.prune_checkpoint(tmp_path / "nothing", tmp_path / "slim", importance="l2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_gguf_file_that_is_refused_leaves_nothing_behind(file: Path, tmp_path: Path) -> None:
    """A folder to resume from stayed, with nothing in it to resume from."""
    broken = tmp_path / "broken.gguf"
    for raw in (b"GGUF" + bytes(40), file.read_bytes()[:3000]):
        broken.write_bytes(raw)
        with pytest.raises(fxprune.FxpruneError):
            fxprune.prune_checkpoint(broken, tmp_path / "new" / "slim", token_ids(6), **OPTIONS)
        with pytest.raises(fxprune.FxpruneError):
            fxprune.prune(broken, token_ids(6), offload=tmp_path / "offload", **OPTIONS)
        assert list(tmp_path.iterdir()) == [broken]


def test_half_of_an_unpacked_file_is_unpacked_anew(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise SafetensorError("no room")

    with resumable_folder(tmp_path / "slim", "run") as work, monkeypatch.context() as patch:
        patch.setattr(low_memory, "save_file", stop)
        with pytest.raises(CheckpointError, match="no room"):
            load_mapped(file, work)
        assert not (work / "dense").exists()
        patch.undo()
        assert load_mapped(file, work).config.num_hidden_layers == 2


def test_a_folder_that_lacks_weights_is_refused(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "less", state_dict=weights)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        load_mapped(tmp_path / "less", tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: model.norm.weight and 1 more are missing"):
        require_all_weights("there", {"missing_keys": {"model.norm.weight", "x"}}, model)


def test_a_model_is_loaded_by_the_class_that_its_config_names(tmp_path: Path) -> None:
    """A classifier was taken for a causal language model without an output layer, unlike in memory."""
    config = tiny("llama", num_labels=3).config
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    assert type(load_mapped(tmp_path / "dense", tmp_path)) is LlamaForSequenceClassification


@pytest.mark.slow
def test_a_slim_folder_is_pruned_again(source: Path, tmp_path: Path) -> None:
    options = {"recipe": "llm-pruner", "importance": "l2", "ratio": 0.2}
    first = fxprune.prune_checkpoint(source, tmp_path / "once", **options)
    second = fxprune.prune_checkpoint(tmp_path / "once", tmp_path / "twice", **options)
    assert second.report.parameters[0] == first.report.parameters[1]
    ids = token_ids(2)
    twice = fxprune.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(twice(ids).logits, second.model(ids).logits)


def test_a_gguf_file_is_read_a_block_at_a_time(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[int]()

    def load(*given: Any, **options: Any) -> Any:
        found = load_gguf_checkpoint(*given, **options)
        read.extend([len(found["tensors"])] if "tensors" in found else [])
        return found

    true_reader = gguf.GGUFReader
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[load_gguf_checkpoint.__module__], "load_gguf_checkpoint", load)
        unpack_gguf(file, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    assert sum(read) == len(whole) and max(read) == 9, "a block has nine weights"
    assert gguf.GGUFReader is true_reader
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, type(tiny("llama")))
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole[name])
    with pytest.raises(SafetensorError):
        unpack_gguf(file, tmp_path / "none")
    assert gguf.GGUFReader is true_reader


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 56, "num_hidden_layers": 2}


def test_experts_that_lie_one_by_one_in_files_are_put_together_in_files(tmp_path: Path) -> None:
    """They were held in memory whole."""
    model = tiny("qwen3_moe", **EXPERTS)
    model.save_pretrained(tmp_path / "dense", max_shard_size="200KB")
    with resumable_folder(tmp_path / "slim") as work:
        mapped = load_mapped(tmp_path / "dense", work)
        large = {name: p for name, p in mapped.named_parameters() if p.nbytes > 1 << 16}
        assert {name.rpartition(".")[2] for name in large} >= {"gate_up_proj", "down_proj"}
        assert not any(parameter.untyped_storage().resizable() for parameter in large.values()), "memory of a process"
        for (_, found), (_, wanted) in zip(mapped.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(found, wanted)


def test_processes_compare_requests_part_by_part(tmp_path: Path) -> None:
    """A copy of a folder on another machine has other times."""
    (tmp_path / "config.json").write_text("{}")
    before = low_memory._parts(request_key(tmp_path, token_ids(), "l2"))
    os.utime(tmp_path / "config.json", (1, 1))
    assert low_memory._parts(request_key(tmp_path, token_ids(), "l2")) == before
    (tmp_path / "config.json").write_text("[]")
    after = low_memory._parts(request_key(tmp_path, token_ids(), "l1"))
    assert [name for name in after if after[name] != before[name]] == ["the files of the model", "the passes"]
    assert low_memory._parts(None) != before
