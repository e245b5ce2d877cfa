"""Recipes, and options of a prune, applied to them stage by stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

import fxprune
from fxprune.api import prune_pipeline
from fxprune.errors import ArgumentError, FxpruneError, PassError, UnknownNameError
from fxprune.pipeline.contract import STAGES, Pass
from fxprune.pipeline.registry import load_pass, parse_pass
from fxprune.recipes import read_recipe, resolve
from fxprune.recipes.recipe import Recipe, as_recipe, changed, made_for
from fxprune.removal.plan import Plan
from tests.models import tiny, token_ids

IDS = token_ids(4, 12)


class DoesNothing(Pass):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


@dataclass(frozen=True, eq=False)
class MySelection(DoesNothing):
    name: ClassVar[str] = "mine"
    stage: ClassVar[str] = "select"


@dataclass(frozen=True, eq=False)
class MyTuning(DoesNothing):
    name: ClassVar[str] = "my-tuning"
    stage: ClassVar[str] = "tune"


def lines(**options: Any) -> list[str]:
    return str(prune_pipeline(**options)).splitlines()


def names(**options: Any) -> list[str]:
    return [step.name for step in prune_pipeline(**options).passes]


@pytest.mark.parametrize(
    "ignored",
    [
        *({"target": "0.8x params"}, {"ratio": 0.2}, {"budget": "macs"}, {"uniform": True}, {"ranking": "global"}),
        *({"protect": (1, 1)}, {"part": "model.layers"}, {"round_to": 8}, {"tensor_parallel": 2}),
    ],
    ids=str,
)
def test_options_that_a_selection_of_ones_own_does_not_take_are_refused(ignored: dict[str, Any]) -> None:
    assert "mine" in names(calibration=IDS, select=MySelection(), protect=())
    ((name, value),) = ignored.items()
    with pytest.raises(ArgumentError, match="beside select: mine takes none") as caught:
        prune_pipeline(IDS, select=MySelection(), **ignored)
    assert (caught.value.argument, caught.value.value) == (name, value)
    with pytest.raises(ArgumentError, match=r"the recipe has no selection\. Leave .* out, or name a selection"):
        prune_pipeline(IDS, recipe="find-groups, l2, shrink", **ignored)


@pytest.mark.parametrize(
    "wrong",
    [{"verify": "no"}, {"seed": -1}, {"tokenizer": 3}, {"track": 3}, {"norm": "maskt"}, {"rati": 0.2}, {"memory": 3}],
    ids=str,
)
def test_invalid_options_are_refused_with_argument_and_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(FxpruneError) as caught:
        resolve(wrong)
    ((name, value),) = wrong.items()
    assert caught.value.argument == name and (caught.value.value == value or name == "rati")
    if name != "rati":
        assert f"--{name}" in caught.value.render(lambda argument: f"--{argument}")


@pytest.mark.parametrize("name", ["fast", "balanced", "best", "llm-pruner"])
def test_a_recipe_runs_as_it_is_printed(name: str) -> None:
    """With samples given the model writes none."""
    first, *others = read_recipe(name).passes
    assert lines(calibration=IDS, recipe=name) == [str(changed(first, {"written": 0})), *map(str, others)]


def test_naming_an_importance_replaces_the_scores_and_nothing_else() -> None:
    balanced = lines(calibration=IDS)
    assert balanced == lines(calibration=IDS, recipe="balanced")
    kinds = "kinds=[mlp, head, conv, exact-channel]"
    inherited = {  # of the criterion of its name, if there is one, else of the first
        "taylor{order=second}": f"taylor{{{kinds}, order=second, samples=128, channel_samples=24}}",
        "wanda": f"wanda{{{kinds}, samples=192}}",
        "flap": f"flap{{{kinds}, samples=192}}",
    }
    for spelled, expected in inherited.items():
        other = lines(calibration=IDS, importance=spelled)
        (found,) = (new for old, new in zip(balanced, other, strict=True) if old != new)
        assert found == expected


def test_width_goes_where_it_is_measured_alone() -> None:
    """Replaced as text, a selection by the units of each group took a fourth of the width."""
    select = "select-by-ratio{kinds=[mlp, head, conv, exact-channel], ranking=auto, protect=[0.07, 0.04], first=[mlp]"
    measured = f"{select}, width=[0.2, 0.35, 0.5, 0.65], "
    measured += "compensate=least-squares{samples=64, reach=stream}}"
    assert measured in lines(calibration=IDS) and measured in lines(calibration=IDS, select="select-by-ratio")
    by_group = "select-by-group-ratio{ranking=auto, protect=[0.07, 0.04]}"
    assert by_group in lines(calibration=IDS, select="select-by-group-ratio")
    without = lines(importance="l2")
    assert without[1:3] == ["l2", "select-by-ratio{ranking=auto, protect=[0.07, 0.04], first=[mlp]}"], "no samples"
    assert "l2{kinds=[mlp]}" in lines(importance="l2{kinds=mlp}")
    named = lines(importance="l2", kinds=("mlp", "channel"))
    assert named[1] == "l2{kinds=[mlp, channel]}" and "kinds=[mlp, channel]" in named[2] and "width" not in named[2]


def test_without_data_nothing_is_fitted_or_tuned() -> None:
    plain = names(importance="l2")
    assert plain == ["find-groups", "l2", "select-by-ratio", "shrink", "emit-model", "make-report"]
    assert names(importance="l2", recipe="best") == plain
    assert "least-squares" in names(importance="l2", calibration=IDS)
    assert {"calibrate", "least-squares", "tune"} <= set(names(importance="l2", tokenizer=len))
    assert "calibrate" not in names(importance="l2", compensate="least-squares"), "the fit reports its need"
    assert "calibrate" not in names(importance="l2", tokenizer=len, compensate="none", tune="none")


def test_a_tokenizer_stands_in_for_samples() -> None:
    pipeline = prune_pipeline(tokenizer=len)
    assert pipeline.passes[0].name == "calibrate" and pipeline.passes[0].tokenizer is len  # type: ignore[attr-defined]
    teacher = next(step for step in pipeline.passes if step.name == "record-teacher")
    assert teacher.tokenizer is len  # type: ignore[attr-defined]


def test_options_win_over_the_recipe() -> None:
    found = lines(calibration=IDS, kinds="head", ratio=0.3, protect=(1, 1), seed=7, reduction="max")
    assert any("wanda{kinds=[head], reduction=max, " in line for line in found)
    assert any("kinds=[head]" in line and "protect=[1, 1]" in line and "ratio=0.3" in line for line in found)
    assert "shrink{verify, seed=7}" in found and any("tune{" in line and "seed=7" in line for line in found)
    own = "calibrate, find-groups, l1, select-by-ratio{ratio=0.4, protect=[1, 0]}, shrink"
    assert lines(recipe=own, calibration=IDS)[2:4] == ["l1", "select-by-ratio{protect=[1, 0], ratio=0.4}"]
    uniform = lines(recipe=own, calibration=IDS, uniform=True)
    assert uniform[3] == "select-by-ratio{protect=[], uniform, ratio=0.4}"
    assert lines(calibration=IDS, uniform=True)[1] == "find-groups" and "norm=masked" in lines(calibration=IDS)[1]
    group = lines(recipe=own, select="select-by-group-ratio{group_ratio=0.5}")[2]
    assert group.startswith("select-by-group-ratio{protect=[1, 0], group_ratio=0.5")
    assert "kinds=[mlp]" in lines(recipe=own, ratio={"mlp": 0.1})[1]
    paper = {"recipe": "llm-pruner", "calibration": IDS}
    for more, spelled in (
        ({"inplace": True}, "taylor{memory=low}"),
        ({"inplace": True, "memory": "fast"}, "taylor{memory=fast}"),
        ({"inplace": True, "importance": "taylor{memory=0.5}"}, "taylor{memory=0.5}"),
        ({"importance": "random", "seed": 3}, "random{seed=3}"),
        ({"select": "select-by-ratio{ratio=0.1}", "ratio": 0.5}, "select-by-ratio{ratio=0.1}"),
        ({"importance": load_pass("l2", kinds=("mlp",))}, "l2{kinds=[mlp]}"),
    ):
        assert spelled in lines(**paper, **more)
    assert "shrink{verify, by_block}" in lines(calibration=IDS, memory="low")


def test_stages_are_replaced_left_out_and_added() -> None:
    balanced = names(calibration=IDS)
    without = names(calibration=IDS, compensate="none", tune="none")
    assert [name for name in balanced if name not in ("least-squares", "record-teacher", "tune")] == without
    other = names(calibration=IDS, compensate="rotation")
    assert other == [{"least-squares": "rotation"}.get(name, name) for name in balanced]
    longer = lines(calibration=IDS, tune="tune{epochs=9}")
    assert "tune{epochs=9.0}" in longer and len(longer) == len(balanced)
    assert names(calibration=IDS, recipe="llm-pruner", compensate="least-squares", tune="tune") == [
        {"multiply-scores": "taylor"}.get(name, name) for name in balanced
    ]
    assert "shrink" in lines(calibration=IDS, verify=False)
    untaught = [{"tune": "my-tuning"}.get(name, name) for name in balanced if name != "record-teacher"]
    assert names(calibration=IDS, tune=MyTuning()) == untaught, "logits were recorded that nothing reads"


def test_candidates_of_width_are_fitted_as_the_recipe_fits() -> None:
    recipe = read_recipe("balanced")
    recipe["select"] = "select-by-ratio{width=[0.2, 0.5], compensate=least-squares{samples=64}}"

    def fit(calibration: Any = IDS, recipe: Any = recipe, **options: Any) -> str:
        (select,) = (
            step for step in prune_pipeline(calibration, recipe=recipe, **options).passes if step.stage == "select"
        )
        return str(getattr(select, "compensate", "no such argument"))

    assert fit() == fit(select="select-by-ratio{ranking=local}") == "least-squares{samples=64}"
    assert fit(compensate="none") == "None" and fit(compensate="rotation").startswith("rotation")
    assert fit(recipe="llm-pruner", compensate="rotation") == "None", "of which none are fitted"
    assert fit(select="select-by-group-ratio", compensate="rotation") == "no such argument"
    assert fit(None, importance="l2") == "None", "no samples"


def test_samples_come_from_the_call_before_the_recipe() -> None:
    own = "calibrate{file='rows.jsonl', samples=3}, find-groups, taylor, select-by-ratio, least-squares, shrink"
    assert lines(recipe=own)[0] == lines(recipe=own, tokenizer=len)[0] == "calibrate{file=rows.jsonl, samples=3}"
    assert "least-squares" in names(recipe=own, importance="l2")
    given = prune_pipeline(IDS, recipe=own).passes[0]
    assert given.data is IDS and str(given) == "calibrate{samples=3}"  # type: ignore[attr-defined]
    assert names(recipe="find-groups, taylor, select-by-ratio", calibration=IDS)[0] == "calibrate"


def test_scoring_in_steps_uses_selection_and_fit_of_the_recipe() -> None:
    pipeline = prune_pipeline(IDS, recipe="fast", importance="score-in-steps{steps=3}", budget="bytes@q8_0")
    scoring, selecting = pipeline.passes[2:4]
    assert str(scoring.importance) == lines(calibration=IDS, recipe="fast")[2] and scoring.steps == 3  # type: ignore[attr-defined]
    assert str(scoring.select) == str(selecting) and "budget='bytes@q8_0'" in str(selecting)  # type: ignore[attr-defined]
    assert str(scoring.compensate).startswith("least-squares")  # type: ignore[attr-defined]
    assert str(parse_pass(str(scoring))) == str(scoring)


def test_a_plan_takes_the_place_of_scores_and_selection() -> None:
    found = names(plan=Plan())
    assert found == ["find-groups", "plan-from-json", "shrink", "emit-model", "make-report"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"taylor": "second"}, {"importance": "taylor{order=second}"}),
        ({"group_ratio": 0.3}, {"select": "select-by-group-ratio{group_ratio=0.3}"}),
        ({"scores": "kept.safetensors"}, {"importance": "load-scores{file=kept.safetensors}"}),
        ({"steps": 3}, {"importance": "score-in-steps{steps=3}"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_deprecated_words_warn_and_still_work(old: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(DeprecationWarning, match=f"{next(iter(old))}= is deprecated.*write {next(iter(new))}="):
        found = lines(calibration=IDS, **old)
    assert found == lines(calibration=IDS, **new)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="a ratio by kind names the kinds"):
        prune_pipeline(ratio={"head": 0.5}, kinds=("mlp",), importance="l2")
    with pytest.raises(ArgumentError, match="both name the fraction"):
        prune_pipeline(ratio=0.5, group_ratio=0.2, importance="l2")
    with pytest.raises(UnknownNameError, match=r"unknown argument 'ration'\. Did you mean 'ratio'"):
        prune_pipeline(IDS, ration=0.2)  # type: ignore[call-arg]


def test_replacing_a_stage_is_an_assignment() -> None:
    recipe = read_recipe("balanced")
    recipe["importance"] = "taylor{order=second}"
    recipe["tune"] = None
    del recipe["teach"]
    recipe["compensate"] = load_pass("rotation")
    expected = "calibrate{written=384, added=200, programs=0.25, languages=0.5}\nfind-groups{norm=masked}\n"
    expected += "taylor{order=second}\nselect-by-ratio{kinds=[mlp, head, conv, exact-channel], ranking=auto, "
    expected += "protect=[0.07, 0.04], first=[mlp], width=[0.2, 0.35, 0.5, 0.65], "
    expected += "compensate=least-squares{samples=64, reach=stream}}\nrotation\n"
    expected += "shrink{verify}\nemit-model\nmake-report"
    assert str(recipe) == str(recipe.pipeline) == expected
    assert "wanda" in str(read_recipe("balanced")), "the installed one stays as it is"
    with pytest.raises(UnknownNameError, match=r"unknown stage 'import'.*Did you mean 'importance'"):
        recipe["import"] = "taylor"
    recipe["compensate"] = ["least-squares{samples=3}", load_pass("rotation")]  # refused, with advice to pass several
    assert [str(step) for step in recipe["compensate"]] == ["least-squares{samples=3}", "rotation"]
    with pytest.raises(ArgumentError, match="compensate is the pass l2, of the stage 'importance'"):
        recipe["compensate"] = ["rotation", load_pass("l2")]
    with pytest.raises(ArgumentError, match="compensate is 3"):
        recipe["compensate"] = [3]
    assert len(recipe["compensate"]) == 2


def test_a_recipe_is_a_file_or_a_text(tmp_path: Path) -> None:
    text = "# Mine, for\n# a test.\n# Costs: nothing.\nfind-groups\n(l2{kinds=[mlp]}, select-by-ratio)\n"
    path = tmp_path / "mine.txt"
    path.write_text(text)
    for value in (path, str(path)):
        recipe = as_recipe(value)
        assert (recipe.name, recipe.summary, recipe.costs) == ("mine", "Mine, for a test.", "nothing.")
        assert [str(step) for step in recipe.passes] == ["find-groups", "l2{kinds=[mlp]}", "select-by-ratio"]
        assert str(recipe) == text
    copy = as_recipe(recipe)
    copy["importance"] = "l1"
    assert recipe["importance"][0].name == "l2"
    assert str(as_recipe("find-groups, l2")) == "find-groups, l2" and not as_recipe("find-groups, l2").costs
    assert list(recipe) == list(STAGES) and len(recipe) == len(STAGES)


def test_invalid_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'balance'. Did you mean 'balanced'"):
        as_recipe("balance")
    with pytest.raises(FxpruneError, match=r"cannot be read.*Pass the name of a recipe"):
        as_recipe(tmp_path / "none.txt")
    with pytest.raises(FxpruneError, match="recipe is 3"):
        as_recipe(3)
    with pytest.raises(PassError, match=r"pass l2: stands behind select-by-ratio.*Order the passes by stage"):
        Recipe("mine", "find-groups, select-by-ratio, l2")


def test_a_spelling_wins_over_arguments_and_these_over_the_replaced_pass() -> None:
    recipe = Recipe("", "find-groups, taylor{kinds=[layer], samples=3}, select-by-ratio")
    recipe.replace_stage("importance", "taylor{kinds=[mlp]}", {"kinds": ("head",), "reduction": "max"})
    assert str(recipe["importance"][0]) == "taylor{kinds=[mlp], reduction=max, samples=3}"
    mine = load_pass("l1")
    recipe.replace_stage("importance", mine, {"reduction": "max"})
    assert recipe["importance"] == (mine,)


def test_a_combinator_runs_the_pass_whose_place_it_takes() -> None:
    recipe = Recipe("", "find-groups, taylor{order=second}, select-by-ratio")
    recipe.replace_stage("importance", "score-in-steps{steps=3}", {})
    recipe.set_arguments("importance", {"reduction": "max"})
    assert str(recipe["importance"][0]) == "score-in-steps{importance=taylor{reduction=max, order=second}, steps=3}"


def test_a_prune_makes_a_report_though_its_recipe_leaves_it_out() -> None:
    """It was missed after all the work."""
    result = fxprune.prune(tiny("llama"), recipe="find-groups\nl2\nselect-by-ratio\nshrink", protect=(), ratio=0.2)
    assert result.report.achieved == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ArgumentError, match=r"importance is 5.*a pass, its spelling, several of these, or None"):
        read_recipe("balanced")["importance"] = 5  # type: ignore[assignment]


def test_only_optional_stages_can_be_left_out() -> None:
    assert made_for("compensate", "none") is made_for("tune", None) is None
    with pytest.raises(UnknownNameError, match="unknown importance 'none'"):
        made_for("importance", "none")
    with pytest.raises(ArgumentError, match="importance is the pass shrink, of the stage 'shrink'"):
        made_for("importance", load_pass("shrink"))
