"""The loss of a sample where a model predicts no next tokens: its own on labels, or the divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxprune.data.calibration import IGNORED, Sample
from fxprune.data.samples import read_calibration
from fxprune.errors import FxpruneError, PassError
from fxprune.graph.facts import facts_of
from fxprune.masking.objective import Objective, drawn_divergence, gives_classes, own_loss, predicts_next, sample_loss
from fxprune.trace import trace
from tests.architectures.library import LIBRARY, stirred
from tests.models import tiny
from tests.remembered import grouped

IDS = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bert() -> fx.GraphModule:
    model, inputs = LIBRARY["bert"]()
    return trace(stirred(model), inputs, check=False).graph_module


def test_a_model_predicts_next_tokens_if_no_output_reads_later_ones(bert: fx.GraphModule) -> None:
    """A masked language model was scored on the next token, which it sees."""
    assert predicts_next(grouped("llama")) and not predicts_next(bert)
    assert gives_classes(bert)


def test_vectors_are_no_predictions() -> None:
    """A model without a head, as encoders for search are, was scored on its hidden states as if they were logits."""
    headless = tiny("llama").base_model
    assert not predicts_next(trace(headless, check=False).graph_module)


def test_labels_of_another_form_stay_as_they_are(bert: fx.GraphModule) -> None:
    labels = IDS.masked_fill(torch.arange(6) % 2 == 0, IGNORED)
    rows = read_calibration({"input_ids": IDS, "labels": labels}, bert, next_token=False)
    assert all(torch.equal(row.own["labels"], label[None]) for row, label in zip(rows, labels, strict=True) if row.own)
    assert all(row.own is not None and bool((row.labels == IGNORED).all()) for row in rows)
    (row,) = read_calibration([{"input_ids": IDS[0], "labels": 1}], bert, next_token=False)
    assert row.own is not None and row.own["labels"].tolist() == [1]
    named = ("start_positions", "end_positions")
    (row,) = read_calibration([{"input_ids": IDS[0], named[0]: 1, "offsets": [4]}], bert, next_token=False, named=named)
    assert row.own is not None and {key: value.tolist() for key, value in row.own.items()} == {named[0]: [1]}
    assert read_calibration(IDS, bert, next_token=False)[0].own is None


def test_the_loss_on_labels_is_the_models_own(bert: fx.GraphModule) -> None:
    model, _ = LIBRARY["bert"]()
    labels = IDS[:1].masked_fill(torch.arange(6) % 2 == 0, IGNORED)
    sample = Sample({"input_ids": IDS[:1]}, torch.full_like(labels, IGNORED), {"labels": labels})
    wanted: Any = stirred(model)(input_ids=IDS[:1], labels=labels)
    facts_of(bert).put(Objective(False, own_loss(model, sample)))
    found = sample_loss(bert, bert(IDS[:1]), sample, 0, "taylor")
    facts_of(bert).drop(Objective, "test")
    assert float(found) == pytest.approx(float(wanted.loss), rel=1e-5)


def test_a_model_without_a_loss_on_labels_is_told() -> None:
    model, inputs = LIBRARY["clip"]()
    sample = Sample({name: value[:1] for name, value in inputs.items()}, torch.zeros(1, 0), {"labels": torch.ones(1)})
    with pytest.raises(FxpruneError, match="labels"):
        own_loss(model, sample)


@pytest.mark.parametrize("classes", [True, False])
def test_squared_gradients_are_the_curvature_of_the_divergence(classes: bool) -> None:
    """The divergence itself has no gradient at the dense model, and no unit had a score."""
    torch.manual_seed(0)
    dense = torch.randn(1, 4, dtype=torch.float64)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for number in range(4000):
        at = dense.clone().requires_grad_()
        output = {"logits": at} if classes else at
        loss = drawn_divergence(output, classes, number, "taylor")
        (gradient,) = torch.autograd.grad(loss, at)
        total += gradient.T @ gradient / 4000
    if classes:
        p = dense.softmax(-1)[0]
        wanted = torch.diag(p) - torch.outer(p, p)
    else:
        wanted = 2 * torch.eye(4, dtype=torch.float64) / dense.square().sum()
    assert float((total - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


def test_a_graph_without_a_float_output_has_no_divergence() -> None:
    with pytest.raises(PassError, match="no float tensor"):
        drawn_divergence(torch.ones(2, dtype=torch.long), True, 0, "taylor")
