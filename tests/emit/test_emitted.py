"""The slim Hugging Face model of a slim graph, compared with the graph."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import fxprune
from fxprune.axes import Keep
from fxprune.discovery.dependency import Dependencies
from fxprune.emit.emitted import SlimVerifier, check_own_forward, emit_from_graph, inexpressible, outputs_agree
from fxprune.emit.snapshot import attention_implementations
from fxprune.emit.structure import describe_structure
from fxprune.errors import PlanError, VerificationError
from fxprune.graph.facts import Source, facts_of
from fxprune.pipeline.pipeline import Pipeline
from fxprune.removal.removal import Removal
from fxprune.result import Result
from fxprune.trace import trace
from fxprune.trace.inputs import meta_twin
from tests.emit.small import SmallBlock, SmallConfig, SmallModel
from tests.emitted import cut, distance, logits
from tests.models import tiny, token_ids
from tests.oracle import Net, decide, groups_of
from tests.remembered import grouped, model_of, run, traced


def test_a_graph_from_which_nothing_was_removed_gives_the_model_itself() -> None:
    graph_module = grouped("llama", num_hidden_layers=1)
    dense, axes = model_of(graph_module), facts_of(graph_module)[Dependencies].axes
    inputs = {"input_ids": token_ids(2, 9)}
    emission = emit_from_graph(graph_module, facts_of(graph_module)[Source], Removal(axes, (), Keep()), inputs)
    model = emission.model
    assert isinstance(model, type(dense)) and model is not dense, emission.reasons
    assert all(tensor is dict(dense.named_parameters())[name] for name, tensor in model.named_parameters())


LATENT = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 1}
LATENT |= {"num_attention_heads": 6, "num_key_value_heads": 6, "first_k_dense_replace": 1, "kv_lora_rank": 16}
LATENT |= {"q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
LATENT |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def judge() -> SlimVerifier:
    graph = traced("llama", num_hidden_layers=1, hidden_size=24)
    return SlimVerifier(graph, model_of(graph), {"input_ids": token_ids(2, 9)})


@pytest.fixture
def candidate(judge: SlimVerifier) -> Any:
    return copy.deepcopy(judge.dense)


def test_a_model_like_its_graph_is_taken(judge: SlimVerifier, candidate: Any) -> None:
    assert judge(candidate)
    candidate.model.norm.weight.data[0] += 1
    assert not judge(candidate)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set a function of a module and its output that eager attention ends with."""
    plain = modeling_llama.eager_attention_forward

    def replace(act: Any) -> None:
        def attention(module: Any, *args: Any, **more: Any) -> Any:
            return act(module, plain(module, *args, **more)[0]), None

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)

    return replace


def fail_if_broken(module: Any, output: torch.Tensor) -> torch.Tensor:
    if vars(module).get("broken"):
        raise RuntimeError("sizes of a module")
    return output


def test_what_fails_under_another_implementation_alone_is_refused(
    judge: SlimVerifier, candidate: Any, eager: Any
) -> None:
    candidate.model.layers[0].self_attn.broken = True
    eager(fail_if_broken)
    for dense in (judge.dense, meta_twin(judge.dense)):
        judge.dense = dense
        with pytest.raises(VerificationError, match="under eager attention: it does not run: RuntimeError"):
            judge(candidate)


def test_what_differs_under_another_implementation_alone_is_refused(
    judge: SlimVerifier, candidate: Any, eager: Any
) -> None:
    """If the dense model has no values any more, it may differ as well; one that fails too decides nothing."""
    candidate.model.layers[0].self_attn.broken = True
    eager(lambda module, output: output * (2 if vars(module).get("broken") else 1))
    with pytest.raises(VerificationError, match="under eager attention: it computes something else"):
        judge(candidate)
    dense, judge.dense = judge.dense, meta_twin(judge.dense)
    assert judge(candidate)
    judge.dense = dense
    eager(lambda _, output: output * 2)
    assert judge(candidate)
    for judge.dense in (dense, meta_twin(dense)):
        eager(lambda _, output: output.view(7))
        assert judge(candidate)


@pytest.mark.parametrize("fails", [True, False])
def test_what_goes_wrong_with_a_cache_alone_is_refused(judge: SlimVerifier, candidate: Any, fails: bool) -> None:
    """XLNet's slim model computed the same and did not generate. One that goes wrong as the dense one does passes."""

    def forward(self: Any, **given: Any) -> Any:
        found = type(self).__base__.forward(self, **given)
        if given["input_ids"].shape[1] == 1:
            found.logits = found.logits.view(7) if fails else found.logits + 1
        return found

    candidate.__class__ = type("Broken", (type(candidate),), {"forward": forward})
    fault = "it does not run: RuntimeError" if fails else "it computes something else"
    with pytest.raises(VerificationError, match=f"generation with its cache: {fault}"):
        judge(candidate)
    for dense in (meta_twin(judge.dense), candidate):
        judge.dense = dense
        assert judge(candidate)


@pytest.mark.slow
def test_heads_without_key_heads_of_their_own_go_under_every_implementation() -> None:
    """The config said six key/value heads beside four heads: their quotient was zero, and eager attention broke."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **LATENT)).eval()
    result = cut(model, ("head",))
    slim, config = result.model, result.model.config
    assert config.num_attention_heads == config.num_key_value_heads == 4, result.report.model_reasons
    wanted = result.graph_module(token_ids())[0]
    for name in attention_implementations(slim):
        slim.set_attn_implementation(name)
        with torch.compiler.set_stance("force_eager"):
            assert distance(logits(slim), wanted) < 1e-5, name
    stock = cut(model, ("head",), ranking="local", uniform=True)
    assert describe_structure(stock.model).is_stock, "what a stock checkpoint says has to fit as well"
    assert stock.model.config.num_attention_heads == stock.model.config.num_key_value_heads < 6


class AttendingBlock(SmallBlock):
    """Attends with one projection for all; its number of heads is an attribute, and so is their width if ``free``."""

    free = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.head_dim if self.free else x.shape[2] // self.num_heads
        one = self.mix(x).view(*x.shape[:2], self.num_heads, wide).transpose(1, 2)
        mixed = (one @ one.transpose(2, 3)).softmax(-1) @ one
        return x + self.back(mixed.transpose(1, 2).flatten(2)) + self.down(torch.relu(self.up(x)))


class FixedBlock(AttendingBlock):
    """Divides the width of its input among the heads."""

    free = False


class FixedModel(SmallModel):
    """Does not run without storage if it is given lengths, which it reads as numbers, or if it is ``real``."""

    real = False

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList([AttendingBlock(config, 0), FixedBlock(config, 1)])

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if self.real and input_ids.is_meta:
            raise RuntimeError("no values")
        x = super().forward(input_ids)
        return x if lengths is None else torch.cat(torch.split(x, lengths.tolist(), dim=1)[::-1], dim=1)


@pytest.mark.parametrize("how", ["plain", "lengths", "real"])
def test_groups_that_the_code_of_a_block_holds_stay_whole(how: str) -> None:
    """Blocks that are built from a config were taken to express all groups, and then there was no slim model."""
    model = FixedModel(SmallConfig(depth=2))
    model.real = how == "real"
    tokens = {"input_ids": torch.arange(10).view(2, 5)}
    inputs = {"plain": tokens, "lengths": tokens | {"lengths": torch.tensor([2, 3])}}.get(how)
    graph_module = run(trace(model.eval(), inputs).graph_module, "find-groups")
    groups = [group for group in groups_of(graph_module) if group.kind in ("mlp", "head")]
    removal = decide(graph_module, Keep({group.factor: np.arange(group.size) > 0 for group in groups}))
    heads = [group.name for group in groups if group.kind == "head"]
    assert len(heads) == 2 and len(groups) == 4
    assert list(inexpressible(graph_module, removal, ("mlp", "head"))) == heads[1:]


class ShiftingBlock(AttendingBlock):
    """Shifts tokens by as many places as there are heads."""

    def __init__(self, config: SmallConfig, layer_idx: int, shift: int) -> None:
        super().__init__(config, layer_idx)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).roll(self.shift, 1)


class CountingBlock(ShiftingBlock):
    """Has the number of its heads by that name instead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_heads = self.shift
        return AttendingBlock.forward(self, x)


class StagedModel(SmallModel):
    """Blocks that a config alone does not build."""

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        kinds = ShiftingBlock, CountingBlock
        self.blocks = nn.ModuleList([kind(config, i, config.heads) for i, kind in enumerate(kinds)])


def test_numbers_that_the_code_holds_are_found_for_each_group_alone() -> None:
    """The heads of each block could go, and there was no slim model without both: a name was a number in one alone."""
    model = StagedModel(SmallConfig(depth=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    graph_module = run(trace(model).graph_module, "find-groups")
    groups = [group for group in groups_of(graph_module) if group.kind in ("mlp", "head")]
    assert sorted(group.size for group in groups) == [3, 3, 20, 20]
    decide(graph_module, Keep({group.factor: np.arange(group.size) > 0 for group in groups}))
    result = Result.of(Pipeline("shrink, emit-model, make-report")(graph_module).graph_module)
    assert result.model is not None, result.report.model_reasons
    assert [block.shift for block in result.model.blocks] == [3, 2]


def test_outputs_agree_but_for_rounding() -> None:
    want = torch.randn(1, 8, 5)
    assert outputs_agree(want, want + 1e-5) and not outputs_agree(want, want + 1e-2)
    assert not outputs_agree(want, want[:, :4])
    half, off = want.bfloat16(), want.bfloat16()
    off[:, 0] += 1
    assert outputs_agree(half, off), "a router sent one token elsewhere"
    assert not outputs_agree(half, half + 1)


def test_a_model_in_training_gets_its_slim_model() -> None:
    """Dropout made every candidate fail, and the reasons spoke of shapes; each module's mode is kept."""
    model = tiny("llama", num_hidden_layers=1, hidden_size=24, attention_dropout=0.5).train()
    model.model.norm.eval()
    result = cut(model, ("mlp",))
    assert result.model is not None, result.report.model_reasons
    modes = {path: module.training for path, module in result.model.named_modules()}
    assert modes == {path: module.training for path, module in model.named_modules()}
    assert not modes["model.norm"] and modes["model.layers.0.self_attn"]
    assert distance(logits(result.model.eval()), logits(result.graph_module)) < 1e-5


class Attending(nn.Module):
    """Two residual blocks with heads, of which the code holds the number or the width, whichever is ``fixed``."""

    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.fixed = fixed
        self.into, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = (3, -1) if self.fixed == "heads" else (-1, 4)
        apart = self.into(x).view(*x.shape[:2], 3, *sizes)
        q, k, v = (part.transpose(1, 2) for part in apart.unbind(2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def prune(model: nn.Module, kinds: tuple[str, ...], **more: Any) -> fxprune.Result:
    select = "select-by-group-ratio{group_ratio=0.34}"
    options = {"importance": "l2", "select": select, "protect": (), "inplace": True, "kinds": kinds, **more}
    return fxprune.prune(model, None, **{"example_inputs": {"x": torch.randn(2, 5, 12)}, **options})


def test_a_module_is_compared_with_its_graph_and_left_alone() -> None:
    model, inputs = Attending("width").train(), {"x": torch.randn(2, 5, 12)}
    graph = trace(model, inputs).graph_module
    source = facts_of(graph)[Source]
    check_own_forward(graph, source, inputs)
    assert model.training
    model.down.bias = nn.Parameter(model.down.bias.detach() + 1)
    with pytest.raises(PlanError, match="computes something else"):
        check_own_forward(graph, source, inputs)


@pytest.mark.parametrize(("fixed", "kinds"), [("width", ("head", "mlp")), ("heads", ("mlp",))])
def test_code_that_asks_its_tensors_runs_on(fixed: str, kinds: tuple[str, ...]) -> None:
    model = Attending(fixed).eval()
    result = prune(model, kinds)
    assert model.up.out_features == 16 and model.up.weight.shape[0] < 16
    x = torch.randn(1, 7, 12)
    assert torch.allclose(model(x), result(x), atol=1e-5)


def test_code_that_holds_a_number_of_heads_is_refused_and_made_whole() -> None:
    """With two of three heads the module was left broken: its view has three."""
    model = Attending("heads").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for verify in (True, False):
        words = r"inplace: the module's own code .*what is left.*result.graph_mod"
        with pytest.raises(fxprune.FxpruneError, match=words):
            prune(model, ("head", "mlp"), verify=verify)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) and model.training


def test_code_that_still_runs_the_blocks_that_went_is_refused() -> None:
    def block() -> Net:
        return Net(lambda m, x: x + m.down(m.up(x).relu()), up=nn.Linear(8, 16), down=nn.Linear(16, 8))

    stack = Net(lambda m, x: m.layers(x), layers=nn.Sequential(block(), block(), block()))
    given = {"x": torch.randn(2, 8)}
    assert prune(stack, ("layer",), example_inputs=given, inplace=False).report.removed_blocks
    with pytest.raises(fxprune.FxpruneError, match="computes something else"):
        prune(stack, ("layer",), example_inputs=given)


def test_half_precision_is_rounding_also_in_generation() -> None:
    """Logits of generation are in float32 whatever they were computed in, and were compared as such."""
    options: dict[str, Any] = {"importance": "fisher", "recipe": "llm-pruner", "protect": (), "ratio": 0.2}
    assert fxprune.prune(tiny("llama").half(), token_ids(8, 16), **options).model is not None


def test_a_model_that_its_class_no_longer_builds_is_pruned_as_a_graph() -> None:
    """All its groups stayed whole, and ratios were refused as out of reach."""
    model = tiny("llama")
    parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)
    result = fxprune.prune(model, importance="l2", recipe="llm-pruner", protect=(), ratio=0.2)
    assert result.model is None and any("no attribute `parametrizations`" in why for why in result.report.model_reasons)
    assert result.report.achieved == pytest.approx(0.2, abs=0.02)
