"""Agreement of a slim model with the dense one on samples of any kind: images, sounds, pairs, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from fxprune.data.calibration import IGNORED, next_token_loss
from fxprune.data.samples import LABELS
from fxprune.errors import EvaluationError
from fxprune.graph.context import quiet, wrap_errors
from fxprune.masking.masked_run import output_tensors
from fxprune.masking.objective import class_scores


@dataclass(frozen=True)
class Agreement:
    """A slim model beside the dense one, as means over samples.

    Positions that an attention mask leaves out do not count.

    Args:
        samples: their number.
        accuracy: fractions of labels that the dense and the slim model rank first, of the samples that have some; None
            without labels of classes. Where the model's own loss is that of next tokens, labels are these.
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
        yield "", "dense", "slim"
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
        dense: a model of transformers, as is ``slim``.
        samples: batches of one or more by name, as a processor returns them, perhaps with ``labels``.

    Raises:
        EvaluationError: there are no samples, or a model does not run on them.
    """
    if not samples:
        raise EvaluationError("there are no samples", where="samples", remedy="Pass one at least")
    columns: list[list[Any]] = [[], [], [], []]
    with torch.inference_mode(), quiet():
        for sample in samples:
            for column, values in zip(columns, _compared(dense(**sample), slim(**sample), sample), strict=True):
                column += values
    cosines, divergences, same, right = columns
    told = [one for one in right if one is not None]
    are_classes = None not in divergences
    return Agreement(
        len(cosines),
        (fmean(one for one, _ in told), fmean(one for _, one in told)) if told else None,
        fmean(divergences) if are_classes else None,
        fmean(same) if are_classes else None,
        fmean(cosines),
    )


def _compared(dense: Any, slim: Any, sample: Mapping[str, torch.Tensor]) -> tuple[Sequence[Any], ...]:
    """Cosine, divergence, equality and accuracies of each sample of a batch; None where there is no such figure."""
    mask = sample.get("attention_mask")
    cosines = torch.cosine_similarity(_numbers(dense, mask), _numbers(slim, mask), dim=1).tolist()
    classes = class_scores(dense) if "logits" in dense else None
    none = [None] * len(cosines)
    if classes is None or classes.shape[-1] < 2:
        return cosines, none, none, none
    first, second = (class_scores(output).float().log_softmax(-1) for output in (dense, slim))
    chosen = first.argmax(-1), second.argmax(-1)
    read = torch.ones_like(chosen[0], dtype=torch.bool)
    if mask is not None and mask.shape == read.shape:
        read = mask.bool()
    apart = _row_means((first.exp() * (first - second)).sum(-1), read)
    divergences = [None if one is None else max(0.0, one) for one in apart]
    same = _row_means(chosen[0] == chosen[1], read)
    labels, loss = sample.get(LABELS), dense.get("loss")
    if labels is None or labels.shape != read.shape or labels.is_floating_point():
        return cosines, divergences, same, none
    if loss is not None and loss.numel() == 1 and labels.dim() == 2 and labels.shape[1] > 1:
        flat = classes.flatten(0, 1).float()
        own = torch.nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED)
        if (next_token_loss(classes, labels) - loss).abs() < (own - loss).abs():  # the model's labels are next tokens
            labels, chosen = labels[:, 1:], (chosen[0][:, :-1], chosen[1][:, :-1])
    pairs = zip(*(_row_means(found == labels, labels != IGNORED) for found in chosen), strict=True)
    right = [None if one is None or other is None else (one, other) for one, other in pairs]
    return cosines, divergences, same, right


def _row_means(values: torch.Tensor, counted: torch.Tensor) -> list[float | None]:
    """The mean of the values of each row that count; None for a row without any."""
    size = len(values)
    rows = zip(values.float().reshape(size, -1), counted.reshape(size, -1), strict=True)
    return [float(row[there].mean()) if bool(there.any()) else None for row, there in rows]


def _numbers(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The scores of classes of each sample in a row, or all its numbers; zero at positions that a mask leaves out."""
    rows = []
    for value in (output["logits"],) if "logits" in output else output_tensors(dict(output)):
        value = value.float()
        if mask is not None and value.shape[:2] == mask.shape:
            value = value * mask.bool().view(*mask.shape, *[1] * (value.dim() - 2))
        rows.append(value)
    alike = all(value.dim() > 1 and len(value) == len(rows[0]) for value in rows)
    return torch.cat([value.flatten(1) if alike else value.reshape(1, -1) for value in rows], dim=1)
