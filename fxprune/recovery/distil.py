"""Distillation: a loss that draws the student's next-token distribution towards that of a teacher, the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from fxprune.data.calibration import IGNORED
from fxprune.errors import RecoveryError
from fxprune.graph.spread import input_device
from fxprune.graph.surroundings import evaluating
from fxprune.pipeline.arguments import instance, number

__all__ = ["Distillation", "distillation_sum", "vocabulary_of"]

_SLICE = 512
"""Positions compared at once: two float32 distributions over 128,000 tokens take half a gigabyte then."""

_CPU_SLICE = 4
"""The same on a CPU, whose caches hold distributions of so few."""


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much it counts.

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

    with both distributions softened by the temperature, over the tokens that count in the loss.
    Source: Hinton, Vinyals, Dean (arXiv 1503.02531).

    Args:
        teacher: usually the dense model. It is used where it is and as it is, on another device or in lower precision
            as well; it is not trained and not changed.
        weight: of the teacher, in (0, 1]; by default both count alike.
        temperature: above 0; higher ones show more of what the teacher holds possible. 1 softens nothing,
            and the default does so mildly.
    """

    teacher: Any
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            RecoveryError: a number makes no sense.
        """
        weight = number("weight", self.weight, above=0, most=1, error=RecoveryError)
        object.__setattr__(self, "weight", weight)
        temperature = number("temperature", self.temperature, above=0, error=RecoveryError)
        object.__setattr__(self, "temperature", temperature)

    def check(self, student: Any) -> None:
        """Refuse a student that the teacher cannot teach.

        Args:
            student: the model to train.

        Raises:
            RecoveryError: the teacher is no Hugging Face model, or the student itself; or the vocabularies of both
                differ in size.
        """
        instance("teacher", self.teacher, PreTrainedModel, "the dense model, one of transformers'", RecoveryError)
        sizes = [vocabulary_of(model) for model in (self.teacher, student)]
        if sizes[0] != sizes[1]:
            raise RecoveryError(
                f"the teacher knows {sizes[0]} tokens, the student {sizes[1]}",
                where="teacher",
                remedy="Distil from the dense model that was pruned, or from one with the same tokenizer",
            )
        if self.teacher is student:
            raise RecoveryError("the teacher is the student", where="teacher", remedy="Pass the dense model")

    def divergence_sum(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``temperature^2 * KL`` over the counted tokens.

        Args:
            inputs: the student's: ids, mask and labels ``(samples, tokens)``.
            logits: the student's ``(samples, tokens, vocabulary)``.
        """
        device, mask = input_device(self.teacher), inputs.get("attention_mask")
        with torch.no_grad(), evaluating(self.teacher):
            theirs = self.teacher(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=None if mask is None else mask.to(device),
                use_cache=False,
            ).logits
        counted = inputs["labels"][:, 1:] != IGNORED
        ours, theirs = logits[:, :-1][counted], theirs[:, :-1][counted.to(device)].to(logits.device)
        return distillation_sum(ours, theirs, self.temperature)


def distillation_sum(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``temperature^2`` times the sum of KL(teacher || student) over positions, in float32.

    Args:
        student: logits ``(positions, vocabulary)``.
        teacher: likewise; no gradient flows into it.
        temperature: divides both.
    """
    found: torch.Tensor = _DivergenceSum.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return found


class _DivergenceSum(torch.autograd.Function):
    """With its gradient written down, slice by slice: no distribution is kept, and each is read while it is at hand.

    With the softened probabilities ``p`` of the student and ``q`` of the teacher, the gradient of
    ``temperature^2 * KL`` by the student's logits is ``temperature * (p - q)``.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        size = _CPU_SLICE if student.device.type == "cpu" else _SLICE
        total, gradient = student.new_zeros((), dtype=torch.float32), torch.empty_like(student)
        parts = (tensor.split(size) for tensor in (student, teacher, gradient))
        for ours, theirs, change in zip(*parts, strict=True):
            said, wanted = _softened(ours, temperature), _softened(theirs, temperature)
            likely = wanted.exp()
            total += wanted.sub_(said).mul_(likely).sum()
            change.copy_(said.exp_().sub_(likely).mul_(temperature))
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (change,) = ctx.saved_tensors
        return change * gradient, None, None


def _softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithms of probabilities, in float32."""
    return logits.to(torch.float32, copy=True).div_(temperature).log_softmax(-1)


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a language model can say."""
    output = model.get_output_embeddings()
    if output is not None and getattr(output, "weight", None) is not None:
        return int(output.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)
