"""Teacher logits: top-k log-probabilities of the dense model, and the divergence from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.data.calibration import IGNORED, Sample, next_token_loss
from fxprune.errors import PassError
from fxprune.graph.tensors import weights
from fxprune.masking import teacher as masking_teacher
from fxprune.masking.masked_run import UntouchedRun
from fxprune.masking.teacher import (
    TeacherBatch,
    TeacherBatches,
    divergence,
    record_teacher_logits,
    rejection,
    run_logits,
)
from fxprune.offload.files import offload_to
from tests.models import tiny, token_ids
from tests.oracle import Net, discover

SAMPLES = [Sample({"x": torch.randn(1, n, 3)}, torch.zeros(1, n)) for n in (4, 5, 4)]


def test_all_classes_kept_give_the_divergence_and_few_give_less() -> None:
    net = Net(lambda m, x: m.a(x), a=nn.Linear(3, 9))
    dense = discover(net, {"x": torch.randn(2, 4, 3)})
    other = nn.Linear(3, 9)
    found = []
    for kept in (9, 3):
        teacher = record_teacher_logits(dense, SAMPLES, kept, 2, lambda batches, _: batches)
        assert [one.sample for one in teacher] == SAMPLES
        total = sum(
            float(divergence(other(batch.inputs["x"]), batch)) * batch.classes.shape[0] * batch.classes.shape[1]
            for batch in TeacherBatches(teacher, dense, 2)
        )
        found.append(total / 13)
    x = torch.cat([sample.inputs["x"][0] for sample in SAMPLES])
    said, wanted = other(x).log_softmax(-1), net.a(x).log_softmax(-1)
    whole = float((wanted.exp() * (wanted - said)).sum(-1).mean())
    assert found[0] == pytest.approx(whole, rel=0.01)
    assert 0 < found[1] < whole


@pytest.mark.parametrize("truth", [0.0, 0.3])
@pytest.mark.parametrize("sure", [False, True])
def test_the_gradient_is_that_of_the_formula(sure: bool, truth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all probability is on kept classes, so that what is left for the others counts as the least."""
    torch.manual_seed(0)
    monkeypatch.setattr(masking_teacher, "_CHUNK", 4 * 9)  # the six rows in two chunks
    wanted = torch.randn(2, 3, 9, dtype=torch.float64).log_softmax(-1)
    likely, classes = wanted.topk(4, dim=-1)
    likelihoods = torch.cat((likely, (1 - likely.exp().sum(-1, keepdim=True)).log()), dim=-1)
    logits = torch.randn(2, 3, 9)
    if sure:
        logits.scatter_add_(-1, classes, torch.full(classes.shape, 40.0))
    logits.requires_grad_()
    labels = torch.tensor([[1, 2, 8], [0, IGNORED, 4]])
    batch = TeacherBatch({}, classes, likelihoods.float(), labels)
    found = divergence(logits, batch, truth)
    (gradient,) = torch.autograd.grad(3 * found, logits)

    said = logits.log_softmax(-1).gather(-1, classes)
    others = (1 - said.exp().sum(-1, keepdim=True)).clamp_min(1e-7).log()
    by_formula = (batch.likelihoods.exp() * (batch.likelihoods - torch.cat((said, others), dim=-1))).sum(-1).mean()
    by_formula = by_formula + truth * next_token_loss(logits, labels)
    torch.testing.assert_close(found, by_formula)
    wanted_gradient = torch.autograd.grad(3 * by_formula, logits)[0]
    torch.testing.assert_close(gradient, wanted_gradient)
    narrow = logits.detach().bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(narrow, batch, truth), narrow)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(3 * gradient.float(), wanted_gradient, atol=0.02, rtol=0.05)


def test_rejection_is_what_two_distributions_do_not_share() -> None:
    """All classes kept, it is half of the sum of absolute differences; few kept, it is less."""
    torch.manual_seed(0)
    wanted, logits = torch.randn(2, 3, 9).log_softmax(-1), torch.randn(2, 3, 9)
    found = []
    for kept in (9, 3):
        likely, classes = wanted.topk(kept, dim=-1)
        others = (1 - likely.exp().sum(-1, keepdim=True)).clamp_min(0).log()
        batch = TeacherBatch({}, classes, torch.cat((likely, others), dim=-1), classes[..., 0])
        assert rejection(wanted, batch) == pytest.approx(0, abs=1e-6)
        found.append(float(rejection(logits, batch)))
    apart = (wanted.exp() - logits.softmax(-1)).abs().sum(-1).mean() / 2
    assert found[0] == pytest.approx(float(apart), rel=1e-5)
    assert 0 < found[1] < found[0]


def test_outputs_that_are_no_classes_draft_nothing() -> None:
    batch = TeacherBatch({}, torch.empty(2, 1, 0, dtype=torch.long), torch.randn(2, 1, 4), torch.zeros(2, 1))
    with pytest.raises(PassError, match="drafts no tokens"):
        rejection(torch.randn(2, 1, 4), batch)


def test_a_model_without_logits_for_each_position_is_refused() -> None:
    dense = discover(Net(lambda m, x: m.a(x).sum(), a=nn.Linear(3, 2)), {"x": torch.randn(2, 3)})
    with pytest.raises(PassError, match="no logits to learn from"):
        run_logits(UntouchedRun(dense), {"x": torch.randn(2, 3)})


def test_few_logits_at_once_where_weights_are_in_files(tmp_path: Path) -> None:
    """Those in a named output were not counted, and samples ran four at a time."""
    model = tiny("llama")
    dense = fxprune.trace(model).graph_module
    samples = [Sample({"input_ids": token_ids(1, 8)}, token_ids(1, 8)) for _ in range(4)]
    logits = 4 * 8 * model.config.vocab_size
    for share, size in ((2.5, 2), (0.5, 1), (99.0, 4)):
        monkeypatch = pytest.MonkeyPatch()
        whole = sum(tensor.nbytes for _, tensor in weights(dense))
        monkeypatch.setattr(masking_teacher, "_LARGEST_LOGITS", share * logits / whole)
        with offload_to(tmp_path):
            assert masking_teacher.batch_size(dense, samples, 4) == size
        monkeypatch.undo()
    assert masking_teacher.batch_size(dense, samples, 4) == 4, "in memory"
