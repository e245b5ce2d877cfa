"""What is installed, listed."""

from __future__ import annotations

import fxprune
from tests.cli.running import run


def test_passes_are_listed_in_the_order_of_a_pipeline() -> None:
    code, output, _ = run("passes")
    assert code == 0 and "``" not in output
    for name in fxprune.pass_names():
        assert f"│ {name} │ {fxprune.load_pass(name).stage} │" in output
    for first, then in (
        ("calibrate", "find-groups"),
        ("slice-parameters", "propagate-shapes"),
        ("shrink", "emit-model"),
    ):
        assert output.index(f"│ {first} │") < output.index(f"│ {then} │")


def test_a_pass_is_described() -> None:
    code, output, _ = run("passes", "select-by-ratio")
    assert code == 0 and "│ ratio │ 0.2 │" in output, "an argument of its own"
    assert "│ ranking │ local │ `local`: the same fraction" in output, "one of its base class"
    assert (
        "stage: select changes: nothing needs: Dependencies, Groups, Scores " in output and "gives: Removal" in output
    )
    example = output.partition("in a pipeline: ")[2]
    assert str(fxprune.Pipeline(example)) == "select-by-ratio"


def test_every_pass_is_described() -> None:
    """A sequence of passes ended in a traceback: it knows what it needs by its steps, and not as a class."""
    for name in fxprune.pass_names():
        code, output, error = run("passes", name)
        assert code == 0 and f"stage: {fxprune.load_pass(name).stage}" in output, (name, error)
    _, output, _ = run("passes", "shrink")
    assert "changes: graph needs: Dependencies, Removal wants: Source gives: Removed, " in output


def test_recipes_are_listed_with_their_costs() -> None:
    code, output, _ = run("recipes")
    assert code == 0 and all(name in output for name in ("balanced", "fast", "best", "llm-pruner", "what it costs"))
