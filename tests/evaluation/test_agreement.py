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
