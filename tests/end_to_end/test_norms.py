"""Whole prunes with norms kept as masking has them: exact, emitted, saved and loaded, and exported where one can be."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxprune
from fxprune.errors import ExportError, RatioError
from fxprune.graph.facts import facts_of
from fxprune.masking.compare import TOLERANCE
from tests.emit.test_emitted import LATENT
from tests.emitted import distance, logits, through_disk
from tests.export.small import tokenizer
from tests.models import tiny, token_ids
from tests.oracle import zeroed
from tests.tiers import tiers

EPS = 0.05
"""Large, so that a norm that adds the wrong number shows in the logits."""

# name: type of model, its changes, the kind that goes, and whether the config alone says what norms add afterwards
CASES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "width": ("llama", {"rms_norm_eps": EPS}, "channel", True),
    "width-one-plus-weight": ("gemma2", {"rms_norm_eps": EPS}, "channel", False),
    "width-beside-norms-in-heads": ("qwen3", {"rms_norm_eps": EPS}, "channel", False),
    "heads-under-one-norm": ("olmo2", {"rms_norm_eps": EPS}, "head", False),
    "latents": ("deepseek_v3", LATENT, "mlp", False),
}


def made(name: str) -> PreTrainedModel:
    family, changes, *_ = CASES[name]
    return tiny(family, **{"num_hidden_layers": 2, **changes})


def prune(model: Any, kind: str, data: Any = None, **options: Any) -> fxprune.Result:
    """The model without a quarter of its units of a kind."""
    given = {"importance": "random", "select": "select-by-group-ratio{group_ratio=0.25}", "protect": ()}
    return fxprune.prune(model, data, kinds=[kind], **{**given, "norm": "masked", **options})


@cache
def slim(name: str) -> fxprune.Result:
    return prune(made(name), CASES[name][2])


@pytest.mark.parametrize("name", tiers(CASES, "width"))
def test_removing_equals_zeroing_and_the_emitted_and_the_saved_model_say_the_same(name: str) -> None:
    """The report counts such groups as exact; the logits are those of the dense model with the same units zeroed."""
    result, dense = slim(name), made(name)
    assert result.report.verification_error is not None and result.report.verification_error < TOLERANCE
    assert result.report.renormalised == {} and result.report.widths, result.report.notes
    assert result.plan.norm == "masked"
    wanted = logits(zeroed(dense, result.plan))
    assert distance(wanted, logits(result.graph_module)) < 1e-3
    assert result.model is not None, result.report.model_reasons
    assert distance(logits(result.model), logits(result.graph_module)) < 1e-5
    read = through_disk(result)
    assert distance(logits(read.model), logits(result.model)) == 0
    assert read.stock or not CASES[name][3], "in the config where one number does, else beside it"
    sliced = prune(made(name), CASES[name][2], norm="sliced")
    assert sliced.report.renormalised and sliced.plan.norm == "sliced"
    assert distance(logits(sliced.graph_module), wanted) > 1e-3, "both are the same, so the comparison says nothing"


def test_one_number_for_all_norms_is_in_the_config_and_in_a_gguf_file(tmp_path: Path) -> None:
    result = slim("width")
    result.save_pretrained(tmp_path / "slim")
    before, after = result.report.widths["model/channel"]
    written = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert written["rms_norm_eps"] == EPS * (before / after) and "fxprune" not in written
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert distance(logits(stock), logits(result.model)) == 0
    gguf = pytest.importorskip("gguf")
    result.export(tmp_path / "slim.gguf", tokenizer=tokenizer())
    field = gguf.GGUFReader(tmp_path / "slim.gguf").fields["llama.attention.layer_norm_rms_epsilon"]
    assert abs(float(field.parts[field.data[0]][0]) - EPS * before / after) < 1e-7
    with pytest.raises(ExportError, match="normalisations differ in epsilon"):
        slim("width-beside-norms-in-heads").export(tmp_path / "other.gguf", tokenizer=tokenizer())


def test_transformers_sets_numbers_that_no_config_field_says(tmp_path: Path) -> None:
    """Norms in heads have the dense number, all others a larger one; the modelling file says so."""
    result = slim("width-beside-norms-in-heads")
    result.save_pretrained(tmp_path / "slim")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert distance(logits(read), logits(result.model)) == 0
    block, (before, after) = read.model.layers[0], result.report.widths["model/channel"]
    assert block.input_layernorm.variance_epsilon == EPS * (before / after)
    assert block.self_attn.q_norm.variance_epsilon == EPS


def test_a_plan_is_applied_with_the_norms_that_it_was_made_with() -> None:
    result = slim("width")
    plan = fxprune.Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    assert distance(logits(fxprune.apply(made("width"), plan).graph_module), logits(result.graph_module)) == 0
    other = fxprune.apply(made("width"), plan, norm="sliced")
    assert other.report.renormalised and distance(logits(other.graph_module), logits(result.graph_module)) > 1e-3


def test_blocks_that_go_leave_the_norms_of_the_others_right() -> None:
    gone = "model.layers.0"
    kept = {name: axes for name, axes in slim("width").plan.kept.items() if not name.startswith(f"{gone}.")}
    result = fxprune.apply(made("width"), fxprune.Plan(kept, (gone,), {}, "masked"))
    assert result.model is not None, result.report.model_reasons
    assert distance(logits(result.model), logits(result.graph_module)) < 1e-5


@pytest.mark.slow
def test_in_half_precision_only_the_rounding_of_weights_is_left() -> None:
    """Multiplied weights are rounded to bfloat16 again: masking is compared with what they would have been."""
    result = prune(made("width").to(torch.bfloat16), "channel")
    assert result.model is not None, result.report.model_reasons
    assert result.report.verification_error is not None and result.report.verification_error < TOLERANCE
    weight = result.model.model.norm.weight
    before, after = result.report.widths["model/channel"]
    kept = result.plan.kept["model.norm.weight"][0]
    wanted = made("width").to(torch.bfloat16).model.norm.weight[kept].float() * (before / after) ** 0.5
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, wanted.to(torch.bfloat16))


def test_what_stays_is_fitted_to_masked_norms() -> None:
    options = {"importance": "l2", "compensate": "least-squares", "recipe": "llm-pruner"}
    result = prune(made("width"), "channel", token_ids(8, 32), **options)
    assert result.report.renormalised == {} and result.report.verification_error is not None


def test_in_place_the_model_becomes_the_slim_one() -> None:
    name = "width-beside-norms-in-heads"
    model = made(name)
    assert prune(model, "channel", inplace=True).model is model
    assert distance(logits(model), logits(slim(name).model)) < 1e-5


class Own(nn.Module):
    """A module of the user's own; its norm has its number as an attribute, or written in its code."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 12, bias=False), nn.Linear(12, 5)
        self.norm = nn.RMSNorm(12, eps=EPS)
        self.written = written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        h = torch.rms_norm(h, (h.shape[-1],), self.norm.weight, 0.05 + 1e-3) if self.written else self.norm(h)
        return self.outer(h)  # type: ignore[no-any-return]


def test_a_module_of_ones_own_is_told_in_place_what_its_norms_add() -> None:
    x = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}
    whole = Own(written=False)
    result = prune(whole, "mlp", importance="l2", example_inputs=x)
    assert result.report.renormalised == {} and whole.norm.eps == EPS
    with pytest.raises(fxprune.FxpruneError, match=r"no attribute is 0\.051"):
        code = Own(written=True)
        before = {name: p.clone() for name, p in code.named_parameters()}
        prune(code, "mlp", example_inputs=x, inplace=True)
    assert all(torch.equal(p, before[name]) for name, p in code.named_parameters()), "it is whole again"


def test_exact_kinds_take_in_what_masked_norms_make_exact() -> None:
    options = {"importance": "l2", "select": "select-by-ratio{ratio=0.2}"}
    assert set(prune(made("width"), "exact-channel", **options).report.widths) == {"model/channel"}
    with pytest.raises(RatioError):
        prune(made("width"), "exact-channel", norm="sliced", **options)


def test_the_notes_say_which_norm_has_no_such_form() -> None:
    result = prune(tiny("gpt2", n_layer=1), "channel")
    assert list(result.report.renormalised) == ["model/channel"]
    assert facts_of(result.graph_module)[fxprune.Removed].removal.axes.norms == ()


@pytest.mark.slow
def test_equal_layers_are_such_that_the_config_says_what_norms_add() -> None:
    """Where it cannot, as beside norms in heads that lose nothing, no width is taken; norms are sliced unless asked."""
    result = prune(made("width"), "channel", uniform=True)
    assert through_disk(result).stock and result.report.renormalised == {} and result.report.widths
    result = prune(made("width-beside-norms-in-heads"), "channel", uniform=True)
    assert result.report.widths == {} and "channel stays whole" in result.report.notes[0]
    result = prune(made("width-beside-norms-in-heads"), "channel", uniform=True, norm=None, recipe="balanced")
    assert through_disk(result).stock and result.report.renormalised and result.plan.norm == "sliced"
