"""Agreement of a slim model with the dense one on samples of any kind: images, sounds, pairs, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from fxprune.data.calibration import IGNORED
from fxprune.data.samples import LABELS
from fxprune.errors import EvaluationError
from fxprune.graph.context import quiet, wrap_errors
from fxprune.masking.masked_run import output_tensors

_HEAD = ("", "dense", "slim")


@dataclass(frozen=True)
class Agreement:
    """A slim model beside the dense one, as means over samples.

    Args:
        samples: their number.
        accuracy: fractions of labels that the dense and the slim model rank first; None without labels of classes.
        divergence: of the slim model's classes from the dense one's, by Kullback and Leibler, in nats; None if the
            model gives no classes.
        same: fraction of places at which both rank the same class first; None as before.
        cosine: of the angle between the outputs of both.
    """

    samples: int
    accuracy: tuple[float, float] | None
    divergence: float | None
    same: float | None
    cosine: float

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Rows of a table of dense and slim; the first names the columns."""
        yield _HEAD
        if self.accuracy is not None:
            yield f"accuracy, {self.samples:,} samples", *(f"{value:.1%}" for value in self.accuracy)
        if self.divergence is not None and self.same is not None:
            yield "divergence, nats", "", f"{self.divergence:.3f}"
            yield "same first class", "", f"{self.same:.1%}"
        yield "cosine of the outputs", "", f"{self.cosine:.3f}"


@wrap_errors("agreement", "Pass two models of transformers, and samples that both run on", EvaluationError)
def agreement(dense: Any, slim: Any, samples: Sequence[Mapping[str, torch.Tensor]]) -> Agreement:
    """Compare a slim model with the dense one on samples that neither was fitted on.

    Args:
        dense: a model of transformers.
        slim: the same.
        samples: batches by name, as a processor returns them, perhaps with ``labels``.

    Raises:
        EvaluationError: there are no samples, or a model does not run on them.
    """
    if not samples:
        raise EvaluationError("there are no samples", where="samples", remedy="Pass one at least")
    found = []
    with torch.inference_mode(), quiet():
        for sample in samples:
            found.append(_compared(dense(**sample), slim(**sample), sample.get(LABELS)))
    accuracies, divergences, same, cosines = zip(*found, strict=True)
    told = [one for one in accuracies if one is not None]
    accuracy = (fmean(one for one, _ in told), fmean(one for _, one in told)) if told else None
    are_classes = None not in divergences
    return Agreement(
        len(samples),
        accuracy,
        fmean(divergences) if are_classes else None,
        fmean(same) if are_classes else None,
        fmean(cosines),
    )


def _compared(
    dense: Any, slim: Any, labels: torch.Tensor | None
) -> tuple[tuple[float, float] | None, float | None, float | None, float]:
    """Accuracies, divergence, same first class and cosine on one batch."""
    both = [_scores(output) for output in (dense, slim)]
    one, other = (torch.cat([value.float().flatten() for value in values]) for values in both)
    cosine = float(torch.cosine_similarity(one, other, dim=0))
    if "logits" not in dense or both[0][0].shape[-1] < 2:
        return None, None, None, cosine
    first, second = (values[0].float().log_softmax(-1) for values in both)
    divergence = max(0.0, float((first.exp() * (first - second)).sum(-1).mean()))
    chosen = first.argmax(-1), second.argmax(-1)
    same = float((chosen[0] == chosen[1]).float().mean())
    accuracy = None
    if labels is not None and labels.shape == chosen[0].shape and not labels.is_floating_point():
        counted = labels != IGNORED
        right = [float((classes == labels)[counted].float().mean()) for classes in chosen]
        accuracy = right[0], right[1]
    return accuracy, divergence, same, cosine


def _scores(output: Any) -> tuple[torch.Tensor, ...]:
    """The scores of classes if an output has some, else all its numbers."""
    return (output["logits"],) if "logits" in output else output_tensors(dict(output))
