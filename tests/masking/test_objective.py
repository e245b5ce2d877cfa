"""Runs with masked units, what is minimised there, and logits of a teacher."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import fxprune
from fxprune.axes import Keep
from fxprune.data.calibration import IGNORED, Sample, next_token_loss
from fxprune.data.samples import read_calibration
from fxprune.discovery.groups import consumers_of, find_consumers, units_at
from fxprune.errors import FxpruneError, PassError
from fxprune.graph.facts import facts_of, fork
from fxprune.graph.tensors import weights
from fxprune.masking import teacher as masking_teacher
from fxprune.masking.compare import compare
from fxprune.masking.masked_run import GatedRun, MaskedRun, PreciseRun, UntouchedRun, spread_gates
from fxprune.masking.objective import (
    Objective,
    drawn_divergence,
    gives_classes,
    own_loss,
    predicts_next,
    reads_no_later_tokens,
    sample_loss,
)
from fxprune.masking.teacher import (
    TeacherBatch,
    TeacherBatches,
    divergence,
    record_teacher_logits,
    rejection,
    run_logits,
)
from fxprune.offload.files import offload_to
from fxprune.pipeline.pipeline import Pipeline
from fxprune.rules import picked
from fxprune.trace import trace
from tests.architectures.library import LIBRARY, stirred
from tests.models import tiny, token_ids
from tests.oracle import Net, axes_of, decide, discover, groups_of, masked_outputs, removal_of
from tests.remembered import grouped
from tests.zoo import tiny_model

IDS = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bert() -> fx.GraphModule:
    model, inputs = LIBRARY["bert"]()
    return trace(stirred(model), inputs, check=False).graph_module


def test_a_model_predicts_next_tokens_if_no_output_reads_later_ones(bert: fx.GraphModule) -> None:
    """A masked language model was scored on the next token, which it sees."""
    assert predicts_next(grouped("llama")) and not predicts_next(bert)
    assert gives_classes(bert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.002])
def test_a_fresh_model_that_reads_later_tokens_does_not_predict(dtype: torch.dtype, spread: float) -> None:
    """With random weights a token moves the outputs of others by a thousandth or less, which passed for rounding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 1, "num_attention_heads": 4}
    named = {"vocab_size": 131, "initializer_range": spread, **sizes}
    masked = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **named)).eval().to(dtype)
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **named)).eval().to(dtype)
    assert not predicts_next(trace(masked, check=False).graph_module)
    assert predicts_next(trace(causal, check=False).graph_module)


def test_rounding_by_a_later_token_is_no_influence() -> None:
    def run(before: float, after: float) -> bool:
        def output(given: Any) -> torch.Tensor:
            ids = given["ids"][..., None].float()
            return 1 + before * ids.flip(1).cumsum(1).flip(1) + after * ids.cumsum(1)

        return reads_no_later_tokens(output, {"ids": IDS}, ("ids",))

    assert run(0, 0) and run(0, 1e-3) and run(1e-8, 1e-3) and run(1e-8, 0)
    assert not run(1e-4, 1e-3) and not run(1e-4, 0)


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


UNITS = np.array([True, False, True, True, False, True])


def test_narrow_weights_are_run_in_float32() -> None:
    net = Net(lambda net, x: net.a(x), a=nn.Linear(3, 4))
    graph_module = discover(net, {"x": torch.randn(2, 3)}).bfloat16()
    x = torch.randn(2, 3)
    found = PreciseRun(graph_module).run(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, F.linear(x, net.a.weight.float(), net.a.bias.float()))
    assert graph_module.a.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_matrices_of_experts_are_not_copied_for_each_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values and gradients are those of products with copies; GPT-OSS's weights are the second factor."""
    dense, runs = discover(tiny_model(family), {"input_ids": token_ids(2, 5)}), []
    weight = next(tensor for name, tensor in weights(dense) if name.endswith("experts.down_proj"))
    for least, count in ((1 << 40, 0), (0, 4)):
        monkeypatch.setattr(picked, "_LARGE", least)
        run, values = UntouchedRun(dense), []
        value = run.run_nodes((token_ids(3, 7),), lambda _, value, kept=values: (kept.append(value), value)[1])
        (found,) = torch.autograd.grad(value.logits.square().sum(), weight)
        runs.append((value.logits, found))
        assert sum(isinstance(value, tuple) and picks_size(value) for value in values) == count
    for plain, other in zip(*runs, strict=True):
        assert compare([plain], [other]) < 1e-5


def picks_size(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and all(isinstance(one, torch.Tensor) for one in value) and value[0].dim() == 3


def test_a_statistic_is_taken_at_other_sizes_than_the_traced_ones() -> None:
    """A mean over tokens and units joined to one axis was taken over the units of as many tokens as were traced."""
    net = Net(lambda m, x: m.b(m.a(x).flatten(1).mean(1, keepdim=True).exp()), a=nn.Linear(3, 6), b=nn.Linear(1, 2))
    dense = discover(net, {"x": torch.randn(2, 5, 3)})
    (group,) = (group for group in groups_of(dense) if group.size == 6)
    assert group.factor is not None and group.renormalised
    x = torch.randn(3, 4, 3)
    by_hand = net.b(net.a(x)[..., torch.from_numpy(UNITS)].mean((1, 2))[:, None].exp())
    found = MaskedRun(dense, removal_of(dense, Keep({group.factor: UNITS}))).run(x)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_an_axis_of_which_code_took_the_first_entries_has_the_size_of_the_run() -> None:
    """The tokens were one and a rest of unknown size; more of them were taken for units than there are."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.a(x)
        first, second = h[..., :3], h[..., 3:]
        both = torch.cat((second, first), -1).flatten(1).std(1, keepdim=True)
        return m.b(both.exp()) + h[:, :1].mean() + m.c(second).mean()

    net = Net(body, a=nn.Linear(3, 6), b=nn.Linear(1, 2), c=nn.Linear(3, 2))
    dense = discover(net, {"x": torch.randn(2, 3, 3)})
    halves = [group for group in groups_of(dense) if group.size == 3 and group.renormalised]
    for group in halves:
        assert group.factor is not None
        keep = Keep({group.factor: np.array([True, True, False])})
        x = torch.randn(3, 4, 3)
        work = fork(dense)
        decide(work, keep)
        slim = Pipeline("shrink")(work).graph_module
        assert torch.allclose(MaskedRun(dense, removal_of(dense, keep)).run(x), slim(x), atol=1e-6)
    assert halves


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_gates_mask_units_and_take_the_gradients() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu()) + m.c(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    net.c = nn.Linear(4, 2)
    dense = discover(net, {"x": X})
    (group,) = groups_of(dense)
    assert group.factor is not None
    consumers = consumers_of(group, find_consumers(dense.graph, axes_of(dense)))
    assert [c.name for c in consumers] == ["b.weight", "c.weight"]
    units = np.array([True, False, True, False])
    gates = torch.from_numpy(units).float().requires_grad_()
    spread = {c: spread_gates(gates, units_at(group, c, axes_of(dense))) for c in consumers}
    found = GatedRun(dense, spread).run(X)
    assert compare(masked_outputs(dense, removal_of(dense, Keep({group.factor: units})), {"x": X}), [found]) < 1e-6
    found.sum().backward()
    hidden = net.a(X).relu()
    slope = (hidden * (net.b.weight.sum(0) + net.c.weight.sum(0))).sum(0)
    torch.testing.assert_close(gates.grad, slope.detach())
    assert all(p.grad is None for p in net.parameters())
    ones = {c: torch.ones(4) for c in consumers}
    assert torch.equal(GatedRun(dense, ones).run(X), net(X))
    spread = spread_gates(torch.tensor([0.5, 0.25]), np.array([1, -1, 0, 0]))
    assert spread.tolist() == [0.25, 1, 0.5, 0.5]


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
