"""Models that cannot be pruned, and inputs that a model does not take, are refused before anything is done to them."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from tests.bad_input.refusals import IDS, INPUTS, VOCABULARY, Net, check_clear, check_table
from tests.models import tiny
from tests.oracle import Net as Module

VALUES = {"x": torch.ones(2, 4)}


class Returning(Net):
    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.make(super().forward(input_ids))


class Thing:
    """What no graph returns."""


class Single:
    """What cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("I am one of a kind")


class Chain(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Unfinished(nn.Module):
    """Its ``__init__`` does not call that of its base."""

    def __init__(self) -> None:
        pass


class Branching(Net):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.sum() > 3:
            return super().forward(input_ids)
        return super().forward(input_ids) * 2


class Positional(Net):
    """Takes no input by its name, so that the arguments cannot be passed by name."""

    def forward(self, input_ids: torch.Tensor, /) -> torch.Tensor:
        return super().forward(input_ids)


def with_attribute(value: Any, path: str = "", name: str = "odd") -> Net:
    model = Net()
    setattr(model.get_submodule(path), name, value)
    return model


def with_weight(name: str, value: torch.Tensor | None) -> Net:
    model = Net()
    path, _, leaf = name.rpartition(".")
    parameter = None if value is None else nn.Parameter(value, requires_grad=value.is_floating_point())
    model.get_submodule(path)._parameters[leaf] = parameter
    return model


def filled(name: str, value: float) -> Net:
    model = Net()
    model.get_parameter(name).data.view(-1)[3] = value
    return model


MODELS: dict[str, tuple[Any, str]] = {
    "None": (None, "model is None.*torch.nn.Module"),
    "class": (Net, "model is the class Net"),
    "text": ("no such folder", "model is 'no|cannot be loaded"),
    "number": (3, "model is 3"),
    "function": (len, "model is a builtin"),
    "dict": ({}, r"model is \{\}"),
    "state dict": (Net().state_dict(), "model is OrderedDict"),
    "tensor": (torch.ones(2), "model is a torch.float32 tensor"),
    "pass": (fxprune.load_pass("l1"), "model is .*L1"),
    "what holds a model": (
        fxprune.trace(Net(), INPUTS, dynamic=False, check=False),
        "is a Traced|its .model",
    ),
    "lazy": (Chain(nn.LazyLinear(6), nn.Linear(6, 3)), "first.weight: it is lazy.*Run the model once"),
    "never initialised": (Unfinished(), r"Unfinished: it was never initialised.*super\(\)"),
    "no parameters": (nn.ReLU(), "ReLU: it has no parameters"),
    "no modules": (nn.Sequential(), "Sequential: it has no parameters"),
    "no forward": (nn.ModuleList([nn.Linear(3, 3)]), "ModuleList: it has no forward"),
    "complex": (
        with_weight("up.weight", torch.ones(12, 6, dtype=torch.complex64)),
        "up.weight: its dtype is .*complex64",
    ),
    "int8": (with_weight("up.weight", torch.ones(12, 6, dtype=torch.int8)), "up.weight: dtype torch.int8 .*Dequantise"),
    "float8": (Net().to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
    "sparse": (
        with_weight("up.weight", torch.ones(12, 6).to_sparse()),
        "up.weight: its layout is torch.sparse_coo.*dense",
    ),
    "empty weight": (with_weight("up.weight", torch.ones(0, 6)), r"up.weight: it is empty, of shape \(0, 6\)"),
    "empty weight aside": (with_weight("more", torch.ones(0)), "more: it is empty"),
    "no weight": (with_weight("up.weight", None), "refusals.py.*cannot be traced"),
    "two devices": (
        with_weight("up.weight", torch.ones(12, 6, device="meta")),
        "up.weight: is on meta while .* on cpu",
    ),
    "NaN": (filled("up.weight", float("nan")), "up.weight: it holds values that are NaN"),
    "infinity": (filled("head.bias", float("inf")), "head.bias: it holds values that are NaN or infinite"),
    "minus infinity": (filled("embed.weight", float("-inf")), "embed.weight: it holds"),
    "scripted": (torch.jit.script(nn.Sequential(nn.Linear(4, 3))), "it is TorchScript"),
    "script inside": (with_attribute(torch.jit.script(nn.Linear(2, 2)), "down"), "down.odd: it is TorchScript"),
    "compiled": (torch.compile(Net(), backend="eager"), "OptimizedModule: it is compiled.*_orig_mod"),
    "compiled inside": (
        with_attribute(torch.compile(nn.Linear(2, 2), backend="eager"), "down"),
        "down.odd: it is compiled",
    ),
    "wrapped": (nn.DataParallel(Net()), "DataParallel: it is wrapped for several devices.*its .module"),
    "lock": (with_attribute(threading.Lock(), "down"), "down.odd: a lock that cannot be copied"),
    "generator": (with_attribute(i for i in range(3)), "^odd: a generator that cannot be copied"),
    "lock in a dict": (
        with_attribute({"a": [threading.Lock()]}, "up"),
        "up.odd: a dict that cannot be copied.*__deepcopy__",
    ),
    "one of a kind": (with_attribute(Single(), "head"), "head.odd: a Single .* RuntimeError: I am one of a kind"),
    "returns None": (Returning(lambda _: None), "forward of Returning: it returns no tensor"),
    "returns a number": (Returning(lambda _: 3), "returns no tensor"),
    "returns text": (Returning(lambda _: "logits"), "returns no tensor"),
    "returns nothing": (Returning(lambda _: []), "returns no tensor"),
    "returns a dict of nothing": (Returning(lambda _: {"a": None}), "returns no tensor"),
    "returns a set": (Returning(lambda logits: {logits}), "cannot be traced: .*set"),
    "returns an object": (Returning(lambda _: Thing()), "cannot be traced: .*Thing"),
    "returns a generator": (Returning(lambda logits: (x for x in logits)), "cannot be traced: .*generator"),
    "raises": (Returning(lambda _: {}["nope"]), "test_models.py.*KeyError: 'nope'"),
    "positional": (Positional(), "input_ids.* positional only.*Pass a module that calls this one"),
    "branches": (Branching(), "test_models.py:.* in forward: if input_ids.sum"),
}


def test_models(capfd: pytest.CaptureFixture[str]) -> None:
    """Those whose attributes can be compared stay as they were."""
    given: dict[str, Any] = {"importance": "l1", "protect": (), "example_inputs": INPUTS}
    compared = (Net, Returning, Branching, Chain)
    check_table(
        lambda model: fxprune.prune(model, **given),
        MODELS.values(),
        capfd,
        model=lambda model: model if type(model) in compared else None,
    )
    to_trace = [MODELS[name] for name in ("None", "class", "text", "lazy", "no parameters", "complex", "scripted")]
    check_table(lambda model: fxprune.trace(model, INPUTS), to_trace, capfd)
    model, rows = Net().to("meta"), [(name, "on meta.*Load the weights") for name in ("l1", "taylor")]
    check_table(lambda name: fxprune.prune(model, IDS, **{**given, "importance": name}), rows, capfd, model=model)


def test_criteria_that_need_a_language_model(capfd: pytest.CaptureFixture[str]) -> None:
    model = Chain(nn.Linear(4, 8), nn.Linear(8, 3))
    labelled = [{"x": torch.ones(1, 4), "labels": torch.tensor([[1, 2]])}]
    options: dict[str, Any] = {"recipe": "llm-pruner", "protect": (), "example_inputs": VALUES}
    check_clear(lambda: fxprune.prune(model, labelled, **options), "pass taylor: .*a language model.*l2", capfd)
    check_clear(lambda: fxprune.prune(model, torch.ones(3, 4), **options), "calibration: a torch.float32", capfd)
    numbers = Returning(lambda logits: logits.argmax(-1))
    options["example_inputs"] = INPUTS
    check_clear(lambda: fxprune.prune(numbers, IDS, **options), "a language model", capfd, model=numbers)


EXAMPLES: list[tuple[Any, str]] = [
    ([IDS], "example_inputs is a list|example_inputs is"),
    (IDS, "example_inputs is a torch.int64 tensor"),
    ({}, "example_inputs is {}"),
    ("x", "example_inputs is 'x'"),
    (3, "example_inputs is 3"),
    (dict, "example_inputs is the class dict"),
    ({1: IDS}, "example_inputs is"),
    ({"ids": IDS}, "missing a required argument: 'input_ids'.*by name"),
    ({**INPUTS, "more": IDS}, "unexpected keyword argument 'more'"),
    ({"input_ids": "text"}, "cannot be traced.*not str.*does not run on these"),
    ({"input_ids": None}, "not NoneType"),
    ({"input_ids": [1, 2]}, "not list"),
    ({"input_ids": object()}, r"example_inputs\['input_ids'\] is an object"),
    ({"input_ids": IDS.numpy()}, r"example_inputs\['input_ids'\] is an int64 array.*Pass a tensor"),
    ({"input_ids": IDS.float()}, "cannot be traced.*does not run on these"),
    ({"input_ids": torch.full((2, 3), float("nan"))}, "is NaN"),
    ({"input_ids": IDS.to("meta")}, "on meta"),
    ({"input_ids": IDS.to_sparse()}, "not a plain tensor"),
    ({"input_ids": IDS[:0]}, "they are empty"),
    ({"input_ids": IDS[:, :0]}, "they are empty"),
    ({"input_ids": IDS + 100}, "Net does not run on them: IndexError"),
]


def test_example_inputs_and_flags_of_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    call = lambda given: fxprune.prune(model, importance="l1", protect=(), example_inputs=given)  # noqa: E731
    check_table(call, EXAMPLES, capfd, model=model)
    flags = [({name: value}, f"{name} is") for name in ("dynamic", "check") for value in ("yes", None, 3)]
    check_table(lambda flag: fxprune.trace(model, INPUTS, **flag), flags, capfd)


@torch.library.custom_op("fxprune_bad_input::twist", mutates_args=())
def twist(x: torch.Tensor) -> torch.Tensor:
    """An op that nobody knows."""
    return x.flip(-1)


@twist.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


ALONE = "the model has groups of kind mlp"
STUCK: list[tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, str], str]] = [
    (lambda m, x: twist(m.up(twist(x))), {}, r"embed.weight\[1\] and \d more axes: no rule for .*twist.*fxprune.rule"),
    (
        lambda m, x: x[..., m.order],
        {"kinds": "mlp"},
        r"0\.0%; all units stay, of .*embed.weight\[1\]: looked up by number \(at index.*Change the code",
    ),
    (lambda m, x: m.norm(x), {"kinds": "expert"}, rf"0\.0%; {ALONE} alone"),
    (lambda m, x: m.norm(x), {"kinds": "exact-mlp"}, rf"0\.0%; {ALONE} \(renormalised\) alone"),
]


@pytest.mark.parametrize(("middle", "kinds", "said"), STUCK, ids=["rule", "order", "kind", "norm"])
def test_the_ratio_error_says_why_nothing_can_go(
    middle: Callable[..., torch.Tensor], kinds: dict[str, str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It said that 0.0% can go, and no more, where no op without a rule was in the way."""
    ends = {"embed": nn.Embedding(VOCABULARY, 6), "down": nn.Linear(6, VOCABULARY), "up": nn.Linear(6, 6)}
    parts = {"norm": nn.LayerNorm(6), "order": torch.randperm(6)}
    model = Module(lambda m, x: m.down(middle(m, m.embed(x))), **ends, **parts)
    options: dict[str, Any] = {"protect": (), "example_inputs": {"x": IDS[:2]}, "recipe": "llm-pruner", **kinds}
    call = partial(fxprune.prune, model, importance="l1", **options)
    check_clear(call, f"^ratio: .*{said}", capfd, model=model)


def test_weights_made_in_inference_mode_have_no_gradients(capfd: pytest.CaptureFixture[str]) -> None:
    """The samples were blamed for it; criteria without gradients prune such a model."""
    with torch.inference_mode():
        model = Net()
    options: Mapping[str, Any] = {"recipe": "llm-pruner", "protect": (), "example_inputs": INPUTS}
    for criterion in ("taylor", "fisher"):
        call = partial(fxprune.prune, model, IDS, importance=criterion, **options)
        check_clear(call, f"pass {criterion}: embed.weight was made in inference mode.*Load the model outside", capfd)
    assert fxprune.prune(model, IDS, importance="wanda", **options).report.achieved > 0


def test_what_is_set_around_a_prune_changes_nothing() -> None:
    model = Net()
    options: Mapping[str, Any] = {"recipe": "llm-pruner", "protect": (), "example_inputs": INPUTS}
    plain = fxprune.prune(model, IDS, **options)
    contexts = torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")
    for context in contexts:
        with context:
            found = fxprune.prune(model, IDS, **options)
        assert found.plan == plain.plan, context
        assert found.report.verification_error == plain.report.verification_error, context


def test_what_is_set_around_a_prune_of_a_folder_changes_nothing(tmp_path: Path) -> None:
    """Weights were loaded without gradients, samples read on meta, and the default device of the caller was lost."""
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    options: Mapping[str, Any] = {"recipe": "llm-pruner", "protect": ()}
    plain = fxprune.prune(tmp_path, IDS, **options)
    for context in torch.inference_mode(), torch.device("meta"):
        with context:
            assert fxprune.prune(tmp_path, IDS, **options).plan == plain.plan, context
            assert torch.ones(1).is_meta == isinstance(context, torch.device)
