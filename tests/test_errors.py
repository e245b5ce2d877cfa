"""Nonsense in, a clear error out, and nothing changed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import errors
from fxprune.errors import (
    CalibrationError,
    PlanError,
    RatioError,
    TraceError,
    UnknownNameError,
    UnsupportedModelError,
    VerificationError,
)
from fxprune.masking.compare import require_equal
from fxprune.pipeline.contract import PassResult
from tests.models import tiny, token_ids

IDS = token_ids(4, 12)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ratio": 1.0}, RatioError, r"ratio is 1.0.*\[0, 1\)"),
        ({"ratio": -0.1}, RatioError, "ratio is -0.1"),
        ({"ratio": float("nan")}, RatioError, "ratio is nan"),
        ({"group_ratio": 1.5}, RatioError, "group_ratio is 1.5"),
        ({"ratio": 0.97}, RatioError, r"largest reachable ratio is \d+\.\d%"),
        ({"kinds": ("mpl",)}, UnknownNameError, "unknown kind 'mpl'. Did you mean 'mlp'"),
        ({"importance": "tailor"}, UnknownNameError, "Did you mean 'taylor'"),
        ({"importance": "slice-parameters"}, UnknownNameError, "unknown importance"),
        ({"taylor": "mixed"}, UnknownNameError, "Did you mean 'mix'"),
        ({"reduction": "summ"}, UnknownNameError, "Did you mean 'sum'"),
        ({"ranking": "locale"}, UnknownNameError, "Did you mean 'local'"),
        ({"round_to": 0}, fxprune.FxpruneError, "round_to is 0"),
        ({"protect": (1, 2, 3)}, fxprune.FxpruneError, "protect is"),
        ({"kinds": ()}, fxprune.FxpruneError, "kinds is empty"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    check_refused(
        lambda model: fxprune.prune(model, IDS, **({"recipe": "llm-pruner", "protect": ()} | options)), error, says
    )


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (None, "the fact Calibration is not known.*Pass token ids"),
        (torch.empty(0, 8, dtype=torch.long), "calibration data is empty"),
        ([], "calibration data is empty"),
        (torch.full((2, 8), 131), "calibration sample 0: input_ids holds 131, the model knows 0 to 130"),
        (torch.full((2, 8), -1), "input_ids holds -1"),
        (torch.full((2, 8), float("nan")), "torch.float32 tensor"),
        (IDS[0], "of shape"),
        (IDS[:, :1], "fewer than two tokens"),
        ("text", "cannot read str"),
        ([{"tokens": IDS[0]}], "without 'input_ids'"),
    ],
)
def test_bad_calibration(calibration: Any, says: str) -> None:
    check_refused(lambda model: fxprune.prune(model, calibration), CalibrationError, says)


def test_nan_weights_are_named_as_the_cause() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight: it holds values that are NaN"):
        fxprune.prune(model, IDS)


def test_quantised_and_split_models() -> None:
    model = tiny("llama")
    model.is_quantized = True
    model.lm_head.register_buffer("packed", torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match=r"lm_head.packed: torch.int32 .* marked as quantised.*dequantize"):
        fxprune.prune(model, IDS)
    model = tiny("llama")
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"lm_head.weight: is on meta while .* is on cpu"):
        fxprune.prune(model, IDS)
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"lm_head.weight: dtype torch.int8"):
        fxprune.prune(model, IDS)
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        fxprune.trace(nn.ReLU(), {"input": torch.ones(2)})


def test_weights_on_meta_need_a_criterion_without_data() -> None:
    with pytest.raises(fxprune.FxpruneError, match="on meta"):
        fxprune.prune(tiny("llama").to("meta"), IDS)


class Branching(nn.Module):
    """Branches on data, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.linear(x)
        return x


def test_untraceable_modules_name_op_and_line() -> None:
    with pytest.raises(TraceError) as caught:
        fxprune.trace(Branching(), {"x": torch.randn(3, 4)})
    assert "test_errors.py" in str(caught.value) and "x.sum() > 0" in str(caught.value)
    with pytest.raises(TraceError, match="Pass example_inputs"):
        fxprune.trace(nn.Linear(2, 2))


def test_plans_of_other_models_are_refused() -> None:
    plan = fxprune.prune(tiny("llama"), None, importance="l2", protect=()).plan
    check_refused(lambda model: fxprune.apply(model, plan), PlanError, "model has no such axis|do not fit", "gpt2")
    name, axes = next(iter(plan.kept.items()))
    axis, kept = next(iter(axes.items()))
    broken = [
        {**plan.kept, name: {axis: kept[:-1]}},
        {**plan.kept, name: {axis: [*kept[:-1], 10_000]}},
        {**plan.kept, name: {axis: []}},
        {key: value for key, value in plan.kept.items() if key != name},
    ]
    for kept_by_name in broken:
        check_refused(lambda model, k=kept_by_name: fxprune.apply(model, fxprune.Plan(k)), PlanError, r"\[\d\]")
    check_refused(
        lambda model: fxprune.apply(model, fxprune.Plan({}, ("model.layers.9",))), PlanError, "no removable block"
    )
    for text in ("", "{}", '{"version": 99, "kept": {}, "removed_blocks": []}', "[1]"):
        with pytest.raises(PlanError):
            fxprune.Plan.from_json(text)


def test_a_wrong_slim_module_is_caught_and_located(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.passes.shrink import RewriteLiteralsPass

    original = RewriteLiteralsPass.call

    def sabotage(self: RewriteLiteralsPass, graph_module: Any) -> Any:
        original(self, graph_module)
        node = next(n for n in graph_module.graph.nodes if "silu" in str(n.target))
        node.target = torch.ops.aten.gelu.default
        return PassResult(graph_module, True)

    monkeypatch.setattr(RewriteLiteralsPass, "call", sabotage)
    with pytest.raises(VerificationError, match=r"silu.*in model.layers.0.mlp"):
        fxprune.prune(tiny("llama"), IDS, recipe="llm-pruner", protect=())
    with pytest.raises(VerificationError):
        require_equal(float("nan"), "nowhere")


@pytest.mark.parametrize("room", ["fxprune", "passes"])
def test_every_error_says_where_and_what_to_do(room: str) -> None:
    """Other errors than those of the axis algebra, which become reasons, reach a user."""
    kinds = {name for name in dir(errors) if name.endswith("Error")} - {"UnknownNameError"}
    found = []
    for file in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
                said = {keyword.arg for keyword in node.keywords}
                found += [] if {"where", "remedy"} <= said else [f"{file.name}:{node.lineno} {node.func.id}"]
    assert found == []


def check_refused(call: Callable[[Any], Any], error: type[Exception], says: str, family: str = "llama") -> None:
    """``call`` raises ``error`` and leaves the model as it was."""
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=says):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
