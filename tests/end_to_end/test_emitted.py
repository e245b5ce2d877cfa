"""Slim models of every family: right, the same from disk, generating under every cache and kernel, and trained."""

import copy
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import fxprune
from fxprune.emit.structure import stock_class
from fxprune.recipes import read_recipe
from tests.emitted import (
    EVERY_FAMILY,
    cut,
    distance,
    greedy,
    logits,
    padding_error,
    reloaded,
    shallow,
    through_disk,
    uneven,
    widths,
)
from tests.models import tiny, token_ids
from tests.tiers import tiers
from tests.zoo import tiny_model

WHOLE = {"mixtral": {"mlp"}}
"""Kinds that a family has, but that nothing is removed of yet."""

LISTS_BY_LAYER = ("mixtral", "qwen2_moe", "gemma2", "smollm3", "mpt")
"""Families that are told something about each layer, or whose layers are of two kinds."""


@pytest.fixture(scope="module", params=tiers(EVERY_FAMILY, "llama", "gpt2", "mixtral", "gemma3_text"))
def family(request: pytest.FixtureRequest) -> str:
    """Every family; what is asked of one is asked in a row, so that it is pruned once."""
    name: str = request.param
    return name


def test_channels_and_heads_go_and_the_class_stays(family: str) -> None:
    result = uneven(family)
    assert isinstance(result.model, type(tiny(family))), result.report.model_reasons
    assert {kind for kind in ("mlp", "head") if not widths(result, kind)} <= WHOLE.get(family, set())
    assert result.report.verification_error is not None and result.report.verification_error < 1e-5
    held = {parameter.data_ptr() for parameter in result.model.parameters()}
    assert held == {parameter.data_ptr() for parameter in result.graph_module.parameters()}


def test_the_slim_model_computes_what_the_graph_does(family: str) -> None:
    result = uneven(family)
    for ids in (token_ids(), token_ids(3, 17, seed=5), token_ids(1, 1, seed=6), token_ids(4, 9, seed=7)):
        assert distance(logits(result.model, ids), logits(result, ids)) < 1e-4
    assert distance(logits(result.model), logits(tiny(family))) > 1e-2, "nothing was removed"


def test_tokens_are_the_same_with_and_without_cache(family: str) -> None:
    model = uneven(family).model
    said = greedy(model)
    assert said.shape == (2, 14)
    assert torch.equal(said, greedy(model, use_cache=False))


def test_padding_on_the_left_changes_nothing(family: str) -> None:
    assert padding_error(uneven(family).model) < 1e-4


def what_it_builds(config: dict[str, Any]) -> dict[str, Any]:
    """A config without where it was loaded from, and in which dtype; its parts likewise."""
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "dtype")}
    return {name: what_it_builds(value) if isinstance(value, dict) else value for name, value in kept.items()}


def test_a_model_that_went_to_disk_says_the_same(family: str) -> None:
    before, after = uneven(family).model, reloaded(family).model
    assert type(after) is type(before)
    assert what_it_builds(before.config.to_dict()) == what_it_builds(after.config.to_dict())
    assert distance(logits(before), logits(after)) < 1e-5
    assert torch.equal(greedy(before), greedy(after))
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", tiers(LISTS_BY_LAYER, "smollm3"))
def test_layers_go_where_a_config_lists_them(family: str) -> None:
    result = shallow(family)
    assert len(result.report.removed_blocks) == 1
    assert result.model is not None, result.report.model_reasons
    assert distance(logits(result.model), logits(result)) < 1e-4
    assert torch.equal(greedy(result.model), greedy(result.model, use_cache=False))
    assert torch.equal(greedy(result.model), greedy(through_disk(result).model))


@pytest.mark.parametrize("family", tiers(["llama", "gpt2", "gemma3_text"], "gpt2"))
def test_a_model_pruned_in_place_becomes_the_slim_one(family: str) -> None:
    apart, model = uneven(family), tiny(family)
    result = cut(model, ("mlp", "head"), inplace=True)
    assert result.model is model
    assert result.plan == apart.plan
    assert distance(logits(model), logits(apart.model)) < 1e-6
    assert torch.equal(greedy(through_disk(result).model), greedy(model))


@pytest.mark.parametrize("family", tiers(["llama", "gpt2", "gpt_neox", "falcon", "mixtral"], "gpt2"))
def test_a_model_of_half_precision_stays_one(family: str) -> None:
    model = tiny(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # as loaders do: buffers keep their precision
    result = cut(model, ("mlp", "head"))
    assert result.model is not None, result.report.model_reasons
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    read = through_disk(result, dtype="auto").model
    assert read.dtype == torch.bfloat16
    assert distance(logits(read), logits(result.model)) < 1e-5
    assert torch.equal(greedy(read), greedy(result.model))


@pytest.mark.parametrize(
    "case",
    tiers(["llama", "llama loaded", "gpt_neox", "gemma3_text loaded", "mixtral loaded"], "llama loaded"),
)
def test_a_slim_model_is_pruned_again(case: str) -> None:
    family, _, loaded = case.partition(" ")
    first = reloaded(family).model if loaded else uneven(family).model
    before, shapes = logits(first), {name: value.shape for name, value in first.state_dict().items()}
    second = cut(first, ("mlp", "head", "layer"), seed=3)
    assert second.model is not None and stock_class(second.model) is stock_class(first), second.report.model_reasons
    assert second.report.parameters[0] == sum(p.numel() for p in first.parameters())
    assert second.report.parameters[1] == sum(p.numel() for p in second.model.parameters())
    assert len(second.report.removed_blocks) == 1 and widths(second, "mlp")
    assert distance(logits(second.model), logits(second)) < 1e-4
    assert torch.equal(greedy(second.model), greedy(second.model, use_cache=False))
    again = through_disk(second).model
    assert torch.equal(logits(again), logits(second.model))
    assert torch.equal(logits(first), before)
    assert {name: value.shape for name, value in first.state_dict().items()} == shapes


@pytest.mark.slow
def test_a_plan_applied_to_a_slim_model_is_read_from_its_widths() -> None:
    first = uneven("llama").model
    second = cut(first, ("mlp",), seed=3)
    again = fxprune.apply(first, fxprune.Plan.from_json(second.plan.to_json()))
    assert torch.equal(logits(again.model), logits(second.model))


FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma3_text", "falcon", "bloom")

RENAMED = ("gpt_neox",)
"""Trainer looks for the head by its name in memory, and files have another: dense models do not resume either."""

Made = Callable[[str], fxprune.Result]


@pytest.fixture(scope="module", params=tiers(FAMILIES, "gpt2"))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=tiers([uneven, shallow], uneven), ids=["uneven", "shallow"])
def made(request: pytest.FixtureRequest) -> Made:
    way: Made = request.param
    return way


def fresh(made: Made, kind: str) -> Any:
    return copy.deepcopy(made(kind).model)


def test_a_cache_grows_by_any_number_of_tokens(kind: str, made: Made) -> None:
    model, ids = made(kind).model, token_ids(2, 12)
    with torch.no_grad():
        start = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=start.past_key_values, use_cache=True)
    assert rest.past_key_values.get_seq_length() == 12
    assert len(rest.past_key_values) == model.config.get_text_config().num_hidden_layers
    assert distance(torch.cat([start.logits, rest.logits], dim=1), logits(model, ids)) < 1e-4
    assert made is uneven or padding_error(model) < 1e-4, "on the left"


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_of_attention_agree_in_memory_and_from_disk(kind: str, made: Made, kernel: str) -> None:
    model, dense = fresh(made, kind), tiny(kind)
    model.set_attn_implementation(kernel)
    dense.set_attn_implementation(kernel)
    assert kernels(model) == kernels(dense)
    assert distance(logits(model), logits(made(kind).model)) < 1e-4
    assert torch.equal(greedy(model), greedy(made(kind).model))
    if made is uneven and kernel == "sdpa" and not dense._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            through_disk(uneven(kind), attn_implementation=kernel)
    elif made is uneven:
        read = through_disk(uneven(kind), attn_implementation=kernel).model
        assert kernels(read) == {kernel}
        assert distance(logits(read), logits(uneven(kind).model)) < 1e-4


def kernels(model: Any) -> set[str]:
    """The kernels that a model and its parts use: some classes leave them as they are, and say so."""
    return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    """Two rows a step, a checkpoint every other step."""
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 12, seed=9)]
    options = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(model=model, args=options, train_dataset=rows)  # type: ignore[arg-type]


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(kind: str, made: Made, tmp_path: Path) -> None:
    whole = fresh(made, kind)
    done = trainer(whole, tmp_path / "whole", 4).train()
    start, trained = made(kind).model.state_dict(), whole.state_dict()
    assert 0 < done.training_loss < float("inf")
    assert all(not torch.equal(start[name], trained[name]) for name, _ in whole.named_parameters())
    fxprune.save_pretrained(whole, tmp_path / "slim")
    assert distance(logits(fxprune.from_pretrained(tmp_path / "slim")), logits(whole.eval())) < 1e-5
    if kind in RENAMED:
        return
    resumed = fresh(made, kind)
    run = trainer(resumed, tmp_path / "again", 4)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert run.state.global_step == 4
    assert max(distance(trained[name], value) for name, value in resumed.state_dict().items()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "stays"), [("gemma3_text", ""), ("gemma4_text", "channel.2"), ("gemma3n_text", "channel.2")]
)
def test_width_that_is_measured_leaves_a_model_of_its_class(
    model_type: str, stays: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less width gave a graph alone where a class makes tables for each layer, or views of a fixed width."""
    numbers = count()
    monkeypatch.setattr("fxprune.passes.select.ratio.divergence_by_removal", lambda *_: lambda *_: -next(numbers))
    recipe = read_recipe("fast")
    recipe["compensate"], recipe["importance"] = None, "l2{kinds=[mlp, head, exact-channel]}"
    recipe.set_arguments("select", {"kinds": ("mlp", "head", "exact-channel"), "width": (0.5,), "compensate": None})
    result = fxprune.prune(
        tiny_model(model_type), token_ids(), recipe=recipe, ratio=0.1, protect=(), round_to={"channel": 1}, eval=False
    )
    notes = [note for note in result.report.notes if "left whole" in note]
    assert result.model is not None and any(f"model/{stays}" in note for note in notes) == bool(stays), notes
    if not stays:
        assert any("residual width is" in note for note in result.report.notes)
