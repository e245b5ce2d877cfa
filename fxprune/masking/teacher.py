"""Teacher logits: top-k log-probabilities of the dense model, and the divergence from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from fxprune.data.calibration import Sample, alike, batched
from fxprune.errors import PassError
from fxprune.masking.masked_run import UntouchedRun, output_tensors
from fxprune.offload.prefetch import narrowed, place_of

__all__ = ["Lesson", "LessonBatch", "divergence", "learn", "lesson_batches", "logits_of", "narrowed_by"]

_LEAST = 1e-7
"""No probability counts as less: a step of float32 at 1, below which a sum of probabilities cannot tell."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A sample and what the dense model says of it.

    Args:
        sample: the sample.
        classes: the likeliest classes at each position, ``(positions, kept)``.
        likelihoods: the logarithms of their probabilities, and in the last column that of all other classes
            together, ``(positions, kept + 1)``, in half precision.
    """

    sample: Sample
    classes: torch.Tensor
    likelihoods: torch.Tensor


@dataclass(frozen=True)
class LessonBatch:
    """Lessons of the same shape, side by side.

    Args:
        inputs: keyword inputs of the graph: tensors, and what else it was traced with.
        classes: ``(batch, positions, kept)``.
        likelihoods: ``(batch, positions, kept + 1)``.
        labels: what each position of the input is, as in the samples: ``(batch, tokens)``.
    """

    inputs: Mapping[str, Any]
    classes: torch.Tensor
    likelihoods: torch.Tensor
    labels: torch.Tensor


def narrowed_by(precision: str, graph_module: fx.GraphModule, sample: Sample, where: str) -> bool:
    """Whether a graph is to be run in bfloat16: :func:`fxprune.offload.prefetch.narrowed`, tried on a sample.

    Raises:
        PassError: ``bf16`` was asked for, and an op of the graph refuses it.
    """

    def trial() -> torch.Tensor:
        return logits_of(UntouchedRun(graph_module), batched([sample], graph_module))

    return narrowed(precision, graph_module, trial, where)


def learn(
    graph_module: fx.GraphModule,
    samples: Sequence[Sample],
    kept: int,
    batch: int,
    track: Callable[[Iterable[Any], int], Iterable[Any]],
) -> tuple[Lesson, ...]:
    """Run the dense graph over ``samples``; the lessons come in their order.

    Args:
        graph_module: the dense graph.
        samples: single samples.
        kept: classes to keep at each position.
        batch: samples that run at once.
        track: shows progress over the batches.
    """
    lessons: dict[int, Lesson] = {}
    batches = list(alike(samples, graph_module, batch))
    with torch.no_grad():
        for numbers in track(batches, len(batches)):
            inputs = batched([samples[i] for i in numbers], graph_module)
            said = logits_of(UntouchedRun(graph_module), inputs).float().log_softmax(-1)
            likely, classes = said.topk(min(kept, said.shape[-1]), dim=-1)
            others = (1 - likely.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
            likelihoods = torch.cat((likely, others), dim=-1).half().cpu()
            for row, i in enumerate(numbers):
                lessons[i] = Lesson(samples[i], classes[row].int().cpu(), likelihoods[row].clone())
    return tuple(lessons[i] for i in range(len(samples)))


def lesson_batches(lessons: Sequence[Lesson], graph_module: fx.GraphModule, most: int) -> Iterator[LessonBatch]:
    """Yield the lessons, up to ``most`` of the same shape at a time."""
    for numbers in alike([lesson.sample for lesson in lessons], graph_module, most):
        part = [lessons[i] for i in numbers]
        inputs = batched([lesson.sample for lesson in part], graph_module)
        device = place_of(graph_module)
        classes = torch.stack([lesson.classes for lesson in part]).long().to(device)
        likelihoods = torch.stack([lesson.likelihoods for lesson in part]).float().to(device)
        yield LessonBatch(inputs, classes, likelihoods, torch.cat([lesson.sample.labels for lesson in part]).to(device))


def divergence(logits: torch.Tensor, batch: LessonBatch) -> torch.Tensor:
    """Return by how much what is said differs from what the dense model said, in nats a position.

    It is the Kullback-Leibler divergence of the dense model's distribution over its likeliest classes, all others
    taken as one more; never more than that over all classes.

    Args:
        logits: ``(batch, positions, classes)``.
        batch: what the dense model said there.
    """
    found: torch.Tensor = _Divergence.apply(logits.float(), batch.classes, batch.likelihoods)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """With its gradient written down: a step of learning reads the logits of all classes a third as often as autograd.

    With probabilities ``p`` and ``q`` of the model and the dense one, ``S`` and ``Q`` their sums over the kept classes,
    and ``c = (1 - Q) / (1 - S)`` for the others as one class, the gradient by logit ``j`` is ``p_j (Q - c S)``, and
    ``p_j c - q_j`` more for a kept class.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, classes: torch.Tensor, likelihoods: torch.Tensor) -> torch.Tensor:
        said = logits.log_softmax(-1)
        likely = said.gather(-1, classes)
        left = 1 - likely.exp().sum(-1, keepdim=True)
        ctx.save_for_backward(said, classes, likelihoods, left)
        missed = likelihoods - torch.cat((likely, left.clamp_min(_LEAST).log()), dim=-1)
        return (likelihoods.exp() * missed).sum(-1).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        said, classes, likelihoods, left = ctx.saved_tensors
        wanted = likelihoods.exp() * (gradient / left.numel())
        kept, others = wanted[..., :-1], wanted[..., -1:]
        c = torch.where(left > _LEAST, others / left, 0)
        likely = said.gather(-1, classes).exp()
        every = kept.sum(-1, keepdim=True) - c * (1 - left)
        return said.exp().mul_(every).scatter_add_(-1, classes, likely * c - kept), None, None


def logits_of(run: fx.Interpreter, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a run gives first, as ``(batch, positions, classes)``.

    Raises:
        PassError: it gives no numbers for each position.
    """
    outputs = output_tensors(run.run(*inputs.values()))
    if not outputs or outputs[0].dim() < 2:
        raise PassError(
            "the model gives no logits to learn from", where="model", remedy="Leave tuning out of the pipeline"
        )
    return outputs[0].flatten(1, -2) if outputs[0].dim() > 2 else outputs[0][:, None]
