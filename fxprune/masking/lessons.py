"""What the dense model says of some samples, kept small: its likeliest classes at each position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.data.calibration import Sample, alike, batched
from fxprune.errors import PassError
from fxprune.masking.masked_run import UntouchedRun, output_tensors

__all__ = ["Lesson", "LessonBatch", "divergence", "learn", "lesson_batches", "logits_of"]

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
        inputs: keyword inputs of the graph.
        classes: ``(batch, positions, kept)``.
        likelihoods: ``(batch, positions, kept + 1)``.
    """

    inputs: Mapping[str, torch.Tensor]
    classes: torch.Tensor
    likelihoods: torch.Tensor


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
        device = next(iter(inputs.values())).device
        classes = torch.stack([lesson.classes for lesson in part]).long().to(device)
        yield LessonBatch(inputs, classes, torch.stack([lesson.likelihoods for lesson in part]).float().to(device))


def divergence(logits: torch.Tensor, batch: LessonBatch) -> torch.Tensor:
    """Return by how much what is said differs from what the dense model said, in nats a position.

    It is the Kullback-Leibler divergence of the dense model's distribution over its likeliest classes, all others
    taken as one more; never more than that over all classes.

    Args:
        logits: ``(batch, positions, classes)``.
        batch: what the dense model said there.
    """
    logits = logits.float()
    likely = logits.gather(-1, batch.classes) - logits.logsumexp(-1, keepdim=True)
    others = (1 - likely.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
    said = torch.cat((likely, others), dim=-1)
    return (batch.likelihoods.exp() * (batch.likelihoods - said)).sum(-1).mean()


def logits_of(run: fx.Interpreter, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
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
