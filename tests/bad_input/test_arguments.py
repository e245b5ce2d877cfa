"""Arguments of the wrong type or out of range are refused before anything is traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fxprune
from fxprune.errors import RatioError, UnknownNameError
from fxprune.pipeline.arguments import spelled_fields
from fxprune.pipeline.registry import pass_class
from tests.bad_input.refusals import IDS, INPUTS, NO_NUMBERS, NOT_NUMBERS, Net, check_clear, check_table, each

NOT_FLAGS = ("yes", "", 2, 0.0, [], torch.tensor([True, False]))
NOT_WHOLE = (*NOT_NUMBERS, *NO_NUMBERS, 1.5, "3", np.array([1, 2]))


class Stranger:
    """What is no argument of anything."""


OPTIONS = [
    *each(
        "ratio",
        (*NOT_NUMBERS[1:], *NO_NUMBERS, -0.1, 1, 1.0, 2, 10**400, np.array([0.1, 0.2])),
        "ratio is .*Pass a number",
    ),
    *each("group_ratio", (*NOT_NUMBERS[1:], *NO_NUMBERS, -0.1, 1), "group_ratio is .*Pass a number"),
    *each("round_to", (*NOT_WHOLE[1:], 0, -4), "round_to is .*Pass a.* number"),
    *each("seed", (*NOT_WHOLE, -1, 2**64), "seed is .*whole number"),
    *each(
        "protect", ((1, 2, 3), (1,), 4, True, "4", "42", b"42", (-1, 0), (1.5, 2), ("1", "2"), (True, False)), "protect"
    ),
    *each(
        "protect", ((None, None), [float("nan"), 1], {1, 2}, {1: 2, 3: 4}, torch.ones(2, 2), Stranger()), "protect is"
    ),
    *each(
        "kinds",
        ((), "", [], "mpl", "mlp,head", ("mlp", "mpl"), 3, ["mlp", None], [["mlp"]], b"mlp", object()),
        "kind",
    ),
    *each("importance", ("tailor", "", 3, True, [], {}, "taylor}", "l1, l2", "L1", lambda x: x), "importance"),
    *each("importance", ("select-by-ratio", "shrink"), "unknown importance.*Known: .*l1, l2"),
    *each("importance", (pass_class("l1"), pass_class("taylor")), "importance is the class .*load_pass"),
    *each("importance", (fxprune.load_pass("shrink"), fxprune.load_pass("select-by-ratio")), "importance is the pass"),
    *each("importance", ("taylor{", "taylor{order=}", "taylor{=mix}"), "name{key=value"),
    *each(
        "importance",
        (
            "taylor{order}",
            "taylor{order=mixed}",
            "taylor{order=3}",
            "taylor{order=[mix]}",
            "taylor{order=None}",
            "taylor{order=mix}}",
        ),
        "order|no value",
    ),
    *each(
        "importance",
        ("taylor{memory=-1}", "taylor{memory=0}", "taylor{memory=abc}", "taylor{memory=True}"),
        "memory is|unknown memory",
    ),
    *each("memory", ("little", 0.5, True), "memory"),
    *each("importance", ("taylor{ordr=mix}", "l1{order=mix}"), "unknown argument of pass"),
    *each("importance", ("random{seed=-1}", "random{seed=x}"), "seed is"),
    *each("importance", ("l1{kinds=mpl}", "l1{kinds=[]}"), "kind"),
    *each("importance", ("taylor{track=3}", "taylor{track=None}"), "argument of pass taylor 'track'"),
    ({"importance": "tailor"}, "unknown importance 'tailor'.*Did you mean 'taylor'"),
    ({"importance": "taylor{order=secnd}"}, r"unknown order 'secnd'\. Did you mean 'second'"),
    ({"importance": "taylor{ordre=mix}"}, "Did you mean 'order'"),
    ({"importance": "score-in-steps{steps=0}"}, "of 1 or more"),
    ({"kinds": ("heads",)}, "Did you mean 'head'"),
    *each("budget", ("parms", "bytes@q8"), "Did you mean '(params|q8_)"),
    *each("taylor", ("mixed", 3, True, "", ["mix"]), "order"),
    ({"taylor": "mix", "importance": "l1"}, "taylor.*importance=.*Leave taylor out"),
    *each("reduction", ("summ", "", 3, sum, ["sum"]), "reduction"),
    *each("ranking", ("locale", "", 3, ["local"]), "ranking"),
    *each("uniform", NOT_FLAGS, "uniform is .*True or False"),
    ({"uniform": True, "protect": (1, 1)}, "uniform.*protect"),
    ({"uniform": True, "ranking": "global"}, "uniform.*ranking"),
    *each(
        "select",
        ("select-by-ratoi", 3, "l1", [], pass_class("select-by-ratio"), fxprune.load_pass("l1")),
        "selection|select",
    ),
    *each(
        "select", ("select-by-ratio{ratio=2}", "select-by-ratio{ratio=x}", "select-by-ratio{ratio=None}"), "ratio is"
    ),
    *each("select", ("plan-from-json", "plan-from-json{file=''}"), "no plan.*text"),
    *each("compensate", ("least-sqaures", "", 3, True, "l1", [], pass_class("least-squares")), "compensat"),
    *each(
        "compensate",
        ("least-squares{damping=-1}", "least-squares{damping=0}", "least-squares{damping=x}"),
        "damping is",
    ),
    *each(
        "compensate", ("least-squares{batch=0}", "least-squares{batch=1.5}", "least-squares{batch=None}"), "batch is"
    ),
    *each("tune", ("tuna", "", 3, True, "l1", "record-teacher{kept=0}", pass_class("tune")), "tun|kept"),
    *each("tune", ("tune{epochs=0}", "tune{rate=x}"), "epochs is|rate is"),
    *each(
        "recipe",
        ("balance", 3, True, [], "", "no-such-file.txt", "find-groups, l3"),
        "recipe|no-such-file|unknown pass",
    ),
    *each("tokenizer", (3, "gpt2", [], Stranger), "tokenizer is"),
    *each("verify", NOT_FLAGS, "verify is .*True or False"),
    *each("inplace", NOT_FLAGS, "inplace is .*True or False"),
    *each("track", (3, "bar", True, []), "track is"),
]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are refused before anything is traced."""
    monkeypatch.setattr("fxprune.api.trace", lambda *_: pytest.fail("traced before its arguments were checked"))


def test_options_of_a_prune(untraced: None, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    check_table(lambda options: fxprune.prune(model, IDS, **options), OPTIONS, capfd, model=model)


def test_options_of_a_pipeline(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        ({"ratio": "0.2"}, "ratio"),
        ({"kinds": "mpl"}, "kind"),
        ({"verify": "no"}, "verify"),
        ({"plan": "{}"}, "plan"),
    ]
    check_table(lambda options: fxprune.prune_pipeline(IDS, **options), rows, capfd)


def test_every_argument_of_every_pass(capfd: pytest.CaptureFixture[str]) -> None:
    """A bad value is refused as the pass is made, or before a pipeline runs its first pass; so is an unknown name."""
    known = [(name, field.name) for name in fxprune.pass_names() for field in spelled_fields(pass_class(name))]
    rows = [((name, at), rf"\b{at}|{at.removesuffix('s')} is|cannot read a Stranger") for name, at in known]
    rows += [((name, "nonsense"), f"argument of pass {name} 'nonsense'") for name in fxprune.pass_names()]
    check_table(lambda row: fxprune.load_pass(row[0], **{row[1]: Stranger()}).check_arguments(), rows, capfd)


def test_scalars_of_other_libraries_are_numbers() -> None:
    """They are taken where they say exactly what a number of Python would."""
    given = {
        "ratio": np.float32(0.25),
        "round_to": torch.tensor(8),
        "protect": np.array([1, 2]),
        "uniform": np.bool_(0),
    }
    made = fxprune.load_pass("select-by-ratio", **given)
    assert str(made) == "select-by-ratio{protect=[1, 2], round_to=8, ratio=0.25}"


def test_errors_keep_their_kind() -> None:
    with pytest.raises(RatioError):
        fxprune.prune_pipeline(ratio="0.2")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        fxprune.prune_pipeline(ranking="locale")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is -1"):
        fxprune.prune_pipeline(seed=-1)


APPLY = [
    *each("plan", (None, "plan.json", "{}", {}, 3, fxprune.Plan, Stranger()), "plan is .*Plan"),
    *each("compensate", ("least-sqaures", 3), "compensat", plan=fxprune.Plan()),
    *each("verify", ("yes", 3), "verify is", plan=fxprune.Plan()),
    *each("inplace", ("yes", 3), "inplace is", plan=fxprune.Plan()),
]


def test_options_of_applying(untraced: None, capfd: pytest.CaptureFixture[str]) -> None:
    model = Net()
    check_table(lambda options: fxprune.apply(model, example_inputs=INPUTS, **options), APPLY, capfd, model=model)


PIPELINES = [
    ("", "no pass"),
    ("# nothing", "no pass"),
    ([], "no pass"),
    (None, "passes is None"),
    (3, "passes is 3"),
    ([3], "3"),
    ([None], "None"),
    ([pass_class("l1")], "the class L1ImportancePass"),
    (pass_class("l1"), "the class L1ImportancePass"),
    ("find-groups, l3", "unknown pass 'l3'.*l1"),
    ("find-groups l1", "unknown pass|key=value"),
    ("find-groups, l1{reduction=summ}", "Did you mean 'sum'"),
    ("find-groups, l1{reduction}", "reduction is True"),
    ("find-groups, l1{", "closing brace"),
    ("find-groups, (l1", "not closed"),
    ("find-groups, l1{kinds=[mlp}", "not closed|no closing"),
    ("find-groups, l1{kinds='mlp}", "not closed|no closing"),
    ("find-groups, l1{kinds=mlp} x", "behind the closing brace"),
    ("find-groups, select-by-ratio{ratio=1+}", "no value"),
    ("find-groups, select-by-ratio{ratio=__import__('os')}", "no value"),
    ("find-groups, select-by-ratio{ratio=" + "[" * 5000 + "]" * 5000 + "}", "ratio|deep"),
    ("find-groups, select-by-ratio{ratio=1e999}", "ratio is inf"),
    ("(find-groups, l1), (select-by-ratoi)", "Did you mean 'select-by-ratio'"),
    ("()", "no pass"),
]


def test_texts_of_pipelines_and_names_of_passes(capfd: pytest.CaptureFixture[str]) -> None:
    check_table(fxprune.Pipeline, PIPELINES, capfd)
    check_table(fxprune.load_pass, [(name, "pass") for name in (None, 3, "", "l3", ["l1"], b"l1", "l1{}")], capfd)
    check_clear(lambda: fxprune.Pipeline("l1", on_pass=3), "on_pass is 3", capfd)  # type: ignore[arg-type]
