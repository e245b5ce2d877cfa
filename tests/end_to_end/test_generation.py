"""What people do with a model, done with slim ones: generate under every cache and kernel, and train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import fxprune
from tests.emitted import distance, greedy, logits, padding_error, shallow, through_disk, uneven
from tests.models import tiny, token_ids
from tests.tiers import tiers

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma3_text", "falcon", "bloom")

RENAMED = ("gpt_neox",)
"""Trainer looks for the head by its name in memory, and files have another: dense models do not resume either."""

Made = Callable[[str], fxprune.Result]


@pytest.fixture(scope="module", params=tiers(FAMILIES, "gpt2"))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=tiers([uneven, shallow], uneven), ids=["uneven", "shallow"])
def made(request: pytest.FixtureRequest) -> Made:
    way: Made = request.param
    return way


def fresh(made: Made, family: str) -> Any:
    return copy.deepcopy(made(family).model)


def test_a_cache_grows_by_any_number_of_tokens(family: str, made: Made) -> None:
    model, ids = made(family).model, token_ids(2, 12)
    with torch.no_grad():
        start = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=start.past_key_values, use_cache=True)
    assert rest.past_key_values.get_seq_length() == 12
    assert len(rest.past_key_values) == model.config.get_text_config().num_hidden_layers
    assert distance(torch.cat([start.logits, rest.logits], dim=1), logits(model, ids)) < 1e-4
    assert made is uneven or padding_error(model) < 1e-4, "on the left"


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_of_attention_agree_in_memory_and_from_disk(family: str, made: Made, kernel: str) -> None:
    model, dense = fresh(made, family), tiny(family)
    model.set_attn_implementation(kernel)
    dense.set_attn_implementation(kernel)
    assert kernels(model) == kernels(dense)
    assert distance(logits(model), logits(made(family).model)) < 1e-4
    assert torch.equal(greedy(model), greedy(made(family).model))
    if made is uneven and kernel == "sdpa" and not dense._supports_sdpa:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            through_disk(uneven(family), attn_implementation=kernel)
    elif made is uneven:
        read = through_disk(uneven(family), attn_implementation=kernel).model
        assert kernels(read) == {kernel}
        assert distance(logits(read), logits(uneven(family).model)) < 1e-4


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
def test_trainer_trains_saves_and_resumes(family: str, made: Made, tmp_path: Path) -> None:
    whole = fresh(made, family)
    done = trainer(whole, tmp_path / "whole", 4).train()
    start, trained = made(family).model.state_dict(), whole.state_dict()
    assert 0 < done.training_loss < float("inf")
    assert all(not torch.equal(start[name], trained[name]) for name, _ in whole.named_parameters())
    fxprune.save_pretrained(whole, tmp_path / "slim")
    assert distance(logits(fxprune.from_pretrained(tmp_path / "slim")), logits(whole.eval())) < 1e-5
    if family in RENAMED:
        return
    resumed = fresh(made, family)
    run = trainer(resumed, tmp_path / "again", 4)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert run.state.global_step == 4
    assert max(distance(trained[name], value) for name, value in resumed.state_dict().items()) < 1e-6
