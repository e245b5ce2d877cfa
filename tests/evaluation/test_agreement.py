"""A slim model beside the dense one, by samples of any kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxprune.errors import EvaluationError
from fxprune.evaluation import agreement

Outputs = dict[str, torch.Tensor]


def says(*scores: float, name: str = "logits") -> Any:
    """A model with one answer."""
    return lambda x, labels=None: {name: torch.tensor([scores])}


X = {"x": torch.zeros(1, 2)}


def test_classes_are_compared_by_what_is_likely_and_by_labels() -> None:
    labelled = [{**X, "labels": torch.tensor([1])}, {**X, "labels": torch.tensor([0])}, X]
    found = agreement(says(0.0, math.log(3)), says(math.log(3), 0.0), labelled)
    assert found.accuracy == (0.5, 0.5) and found.same == 0
    assert found.divergence == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert [row[0] for row in found.rows()][1:] == [
        "accuracy, 3 samples",
        "divergence, nats",
        "same first class",
        "cosine of the outputs",
    ]


def test_vectors_are_compared_by_their_angle() -> None:
    found = agreement(says(0.0, 2.0, name="embeddings"), says(3.0, 3.0, name="embeddings"), [X])
    assert found.cosine == pytest.approx(math.sqrt(0.5))
    assert found.accuracy is found.divergence is found.same is None


def test_labels_that_do_not_count_are_left_out() -> None:
    def written(x: torch.Tensor, labels: torch.Tensor) -> Outputs:
        return {"logits": torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])}

    found = agreement(written, written, [{**X, "labels": torch.tensor([[1, 1, -100]])}])
    assert found.accuracy == (0.5, 0.5) and found.same == 1 and found.cosine == pytest.approx(1)


def test_a_model_that_does_not_run_is_refused_in_a_line() -> None:
    with pytest.raises(EvaluationError, match="no samples"):
        agreement(says(1.0, 2.0), says(1.0, 2.0), [])
    with pytest.raises(EvaluationError, match="unexpected keyword"):
        agreement(says(1.0, 2.0), says(1.0, 2.0), [{"y": torch.zeros(1)}])


def gives(*logits: torch.Tensor, loss: float | None = None) -> Any:
    """A model that gives one of some logits for each sample of a batch, by the number in its input."""
    extra = {} if loss is None else {"loss": torch.tensor(loss)}
    return lambda x, labels=None, attention_mask=None: {**extra, "logits": torch.stack([logits[int(i)] for i in x])}


def test_means_are_over_samples_however_they_are_batched() -> None:
    """A batch of three counted as much as a batch of one, and all four as two samples."""
    torch.manual_seed(0)
    models = [gives(*torch.randn(4, 5, 3)) for _ in range(2)]
    labels = torch.randint(3, (4, 5))
    single = [{"x": torch.tensor([i]), "labels": labels[i : i + 1]} for i in range(4)]
    mixed = [single[0], {"x": torch.tensor([1, 2, 3]), "labels": labels[1:]}]
    alone, batched = (agreement(*models, samples) for samples in (single, mixed))
    assert alone.samples == batched.samples == 4
    for name in ("accuracy", "divergence", "same", "cosine"):
        assert getattr(alone, name) == pytest.approx(getattr(batched, name)), name


def test_a_sample_whose_labels_all_do_not_count_has_no_accuracy() -> None:
    """One such sample made the accuracy of all of them NaN."""
    model = gives(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    samples = [{"x": torch.tensor([0]), "labels": torch.tensor([row])} for row in ([1, 1], [-100, -100])]
    assert agreement(model, model, samples).accuracy == (0.5, 0.5)
    assert agreement(model, model, samples[1:]).accuracy is None


def test_padding_does_not_count() -> None:
    """Positions that an attention mask leaves out counted as much as the others."""
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat((whole[:2], -whole[2:]))
    mask = torch.tensor([[1, 1, 0]])
    found = agreement(gives(whole), gives(spoilt), [{"x": torch.tensor([0]), "attention_mask": mask}])
    assert found.divergence == 0 and found.same == 1 and found.cosine == pytest.approx(1)


def test_classes_of_an_image_are_along_its_second_axis() -> None:
    """Scores (samples, classes, height, width) were taken for distributions over the columns of the image."""
    one, other = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = agreement(gives(one), gives(other), [{"x": torch.tensor([0]), "labels": one.argmax(0)[None]}])
    wanted, given = one.log_softmax(0), other.log_softmax(0)
    assert found.divergence == pytest.approx(float((wanted.exp() * (wanted - given)).sum(0).mean()), rel=1e-5)
    same = float((one.argmax(0) == other.argmax(0)).float().mean())
    assert found.same == pytest.approx(same) and found.accuracy == pytest.approx((1.0, same))


def test_labels_of_a_model_of_next_tokens_are_those_of_the_next_position() -> None:
    """Each label was compared with what the model predicts after it."""
    logits = 9 * torch.eye(4)[torch.tensor([1, 2, 3])]  # it predicts the next number
    labels = torch.tensor([[0, 1, 2]])
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:]))
    model = gives(logits, loss=loss)
    assert agreement(model, model, [{"x": torch.tensor([0]), "labels": labels}]).accuracy == (1.0, 1.0)
