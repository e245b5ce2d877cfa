"""The training loop, with distillation and early stopping."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxprune.recovery.train as distil
from fxprune.errors import RecoveryError
from fxprune.recovery.data import TrainingData, read_training_data
from fxprune.recovery.settings import RecoverySettings
from fxprune.recovery.train import Distillation, _EarlyStopping, _Progress, distillation_sum, divide_batch, make_trainer
from tests.models import tiny
from tests.tokens import character_tokenizer


def watched(entries: list[dict[str, float]], **settings: Any) -> bool:
    """Whether training stops after these log entries."""
    state = SimpleNamespace(log_history=entries, global_step=len(entries), max_steps=99)
    control = SimpleNamespace(should_training_stop=False)
    watch = _EarlyStopping(RecoverySettings(**settings), 100)
    watch.on_log(None, state, control)
    watch.on_evaluate(None, state, control)
    return control.should_training_stop


def test_training_ends_when_the_held_out_loss_has_not_fallen_for_a_while() -> None:
    falling = [{"eval_loss": value} for value in (4.0, 3.0, 2.0, 2.1, 2.2)]
    assert not watched(falling, patience=3)
    assert watched(falling, patience=2)
    assert not watched([*falling, {"eval_loss": 1.9}], patience=2)


def test_a_loss_that_diverges_is_an_error_and_one_that_starts_high_is_not() -> None:
    start = [{"loss": 2.0}, {"loss": 2.1}]
    for entry, name in (({"loss": math.nan}, "training"), ({"eval_loss": math.inf}, "held-out")):
        with pytest.raises(RecoveryError, match=f"the {name} loss became"):
            watched([*start, entry])
    with pytest.raises(RecoveryError, match=r"rose from 2\.00 to 9\.00"):
        watched([*start, {"loss": 8.0}, {"loss": 7.0}, {"loss": 9.0}])
    assert not watched([*start, {"loss": 8.0}, {"loss": 3.0}, {"loss": 9.0}])
    assert not watched([{"loss": value} for value in (11.0, 12.0, 11.5, 11.0, 10.0)])


@pytest.mark.parametrize(
    ("batch", "most", "devices", "parts"),
    [(8, 4, 1, (4, 2)), (6, 4, 1, (3, 2)), (8, 16, 2, (4, 1)), (7, 4, 1, (1, 7))],
)
def test_the_batch_comes_out_exactly(
    monkeypatch: pytest.MonkeyPatch, batch: int, most: int, devices: int, parts: tuple[int, int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    assert divide_batch(RecoverySettings(batch=batch, micro_batch=most), use_cpu=True) == parts
    monkeypatch.setenv("WORLD_SIZE", str(batch + 1))
    with pytest.raises(RecoveryError, match="samples do not divide over"):
        divide_batch(RecoverySettings(batch=batch), use_cpu=True)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    rows = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(9)]
    return read_training_data(rows, character_tokenizer(), RecoverySettings(held_out=2))


def test_the_recipe_reaches_the_trainer(data: TrainingData, tmp_path: Any) -> None:
    settings = RecoverySettings(batch=2, micro_batch=1, epochs=2, warmup=0.25, seed=7, precision="float32")
    model = tiny("llama", num_hidden_layers=1)
    trainer = make_trainer(model, data, settings, tmp_path, padding=0, arguments={"use_cpu": True})
    made = trainer.args
    steps = -(-len(data.train) // 2) * 2
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (1, 2)
    assert made.warmup_steps == -(-steps // 4) and made.seed == made.data_seed == 7
    assert made.report_to == [] and made.load_best_model_at_end
    with pytest.raises(RecoveryError, match="fp16 loses small updates"):
        make_trainer(model, data, settings, tmp_path, padding=0, arguments={"use_cpu": True, "fp16": True})
    with pytest.raises(RecoveryError, match=r"arguments: .*no_such"):
        make_trainer(model, data, settings, tmp_path, padding=0, arguments={"no_such": 1})


def test_progress_counts_the_steps_that_are_left_and_ends_early() -> None:
    seen: list[Any] = []

    def track(items: range, what: str, total: int) -> Any:
        seen.append((what, total))
        for item in items:
            yield item
            seen.append(item)

    shown, state = _Progress(track), SimpleNamespace(global_step=2, max_steps=6)
    shown.on_train_begin(None, state, None)
    assert seen == [("training", 4)]
    shown.on_step_end(None, state, None)
    assert seen[1:] == [2]
    shown.on_train_end(None, state, None)
    assert seen[1:] == [2, 3, 4, 5]


def test_divergence_is_that_of_a_computation_by_hand_also_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    soft = [(logits / 2.0).double().softmax(-1) for logits in (student, teacher)]
    expected = 4.0 * sum(float(p * math.log(p / q)) for p, q in zip(soft[1].flatten(), soft[0].flatten(), strict=True))
    for size in (distil._CPU_SLICE, 3, 7):
        monkeypatch.setattr(distil, "_CPU_SLICE", size)
        assert float(distillation_sum(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-4)
        assert float(distillation_sum(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(9, 11)).to(dtype).requires_grad_() for _ in range(2))
    before = student.detach().clone(), teacher.detach().clone()
    (0.3 * distillation_sum(student, teacher, temperature)).backward()
    assert student.grad is not None and student.grad.dtype == dtype and teacher.grad is None
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    plain = before[0].clone().requires_grad_()
    student_log, wanted = ((logits.double() / temperature).log_softmax(-1) for logits in (plain, before[1]))
    (
        0.3 * temperature**2 * torch.nn.functional.kl_div(student_log, wanted, reduction="sum", log_target=True)
    ).backward()
    assert plain.grad is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert torch.allclose(student.grad.double(), plain.grad.double(), **tolerance)


def test_a_teacher_knows_the_same_tokens_and_is_another_model() -> None:
    dense = tiny("llama", num_hidden_layers=1)
    Distillation(dense).check(tiny("llama", num_hidden_layers=1))
    with pytest.raises(RecoveryError, match="the teacher is the student"):
        Distillation(dense).check(dense)
    with pytest.raises(RecoveryError, match="knows 131 tokens, the student 50"):
        Distillation(dense).check(tiny("llama", num_hidden_layers=1, vocab_size=50))
    for numbers in ({"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}):
        with pytest.raises(RecoveryError, match=next(iter(numbers))):
            Distillation(dense, **numbers)
