"""A teacher draws the student to it, by hand and in slices, and has to speak of the same tokens."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

import fxprune.recovery.train as distil
from fxprune.errors import RecoveryError
from fxprune.recovery.train import Distillation, distillation_sum
from tests.models import tiny


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=1)


def test_divergence_is_that_of_a_computation_by_hand() -> None:
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    soft = [(logits / 2.0).double().softmax(-1) for logits in (student, teacher)]
    expected = 4.0 * sum(float(p * math.log(p / q)) for p, q in zip(soft[1].flatten(), soft[0].flatten(), strict=True))
    assert float(distillation_sum(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-4)
    assert float(distillation_sum(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("numbers", [{"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}])
def test_distillation_refuses_numbers_out_of_range(dense: PreTrainedModel, numbers: dict[str, float]) -> None:
    with pytest.raises(RecoveryError, match=next(iter(numbers))):
        Distillation(dense, **numbers)


def test_slices_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    whole = distillation_sum(student, teacher, 2.0)
    monkeypatch.setattr(distil, "_CPU_SLICE", 3)
    assert torch.allclose(distillation_sum(student, teacher, 2.0), whole)
    assert distillation_sum(teacher, teacher, 2.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(9, 11)).to(dtype).requires_grad_() for _ in range(2))
    before = student.detach().clone(), teacher.detach().clone()
    (0.3 * distillation_sum(student, teacher, temperature)).backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert teacher.grad is None
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    plain = before[0].clone().requires_grad_()
    said, wanted = ((logits.double() / temperature).log_softmax(-1) for logits in (plain, before[1]))
    (0.3 * temperature**2 * torch.nn.functional.kl_div(said, wanted, reduction="sum", log_target=True)).backward()
    assert plain.grad is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert torch.allclose(student.grad.double(), plain.grad.double(), **tolerance)


def test_a_teacher_has_to_know_the_same_tokens_and_be_another(dense: PreTrainedModel) -> None:
    Distillation(dense).check(tiny("llama", num_hidden_layers=1))
    with pytest.raises(RecoveryError, match="the teacher is the student"):
        Distillation(dense).check(dense)
    with pytest.raises(RecoveryError, match="knows 131 tokens, the student 50"):
        Distillation(dense).check(tiny("llama", num_hidden_layers=1, vocab_size=50))
