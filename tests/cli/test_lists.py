"""What is installed, listed."""

from __future__ import annotations

import fxprune
import fxprune.cli.lists
from tests.cli.running import refused, run


def test_passes_are_listed_in_the_order_of_a_pipeline() -> None:
    code, output, _ = run("passes")
    assert code == 0
    for first, then in (
        ("calibrate", "find-groups"),
        ("slice-parameters", "propagate-shapes"),
        ("shrink", "emit-model"),
    ):
        assert output.index(f"│ {first} │") < output.index(f"│ {then} │")
    assert "``" not in output


def test_all_about_one_pass() -> None:
    code, output, _ = run("passes", "select-by-ratio")
    assert code == 0 and output.startswith("The fraction `ratio` of the model's parameters goes.")
    assert "│ ratio │ 0.2 │ fraction of all parameters" in output, "an argument of its own"
    assert "│ ranking │ local │ `local`: the same fraction" in output, "one of the class above it"
    assert "stage: select changes: nothing needs: Dependencies, Groups, Scores gives: Removal" in output
    example = output.partition("in a pipeline: ")[2]
    assert str(fxprune.Pipeline(example)) == "select-by-ratio"


def test_an_unknown_pass_is_told() -> None:
    assert "Did you mean 'select-by-ratio'" in refused("passes", "select-by-ration")
