"""Rules as text: invalid notations are refused with the reason. The page of all rules shows how they are printed."""

from __future__ import annotations

import pytest
import torch

import fxprune
from fxprune.errors import FxpruneError
from fxprune.rules.registry import moves_values, read_notation

aten = torch.ops.aten

# notation of aten::linear, part of the error
WRONG = {
    "no-arrow": ("input[*b, i]", "no ->"),
    "no-brackets": ("input, weight[o, i] -> out[o]", "'input, weight"),
    "no-axis": ("input[*b, ij] -> out[*b, ij]", "'ij' is not an axis"),
    "unknown-argument": ("x[*b, i], weight[o, i] -> out[*b, o]  sums i", "no argument x"),
    "gone-without-a-clause": ("input[*b, i], weight[o, i] -> out[*b, o]", "no clause determines i"),
    "from-nowhere": ("input[*b, i] -> out[*b, i, o]", "output axes o are not in the inputs"),
    "summed-but-there": ("input[*b, i] -> out[*b, i]  sums i", "a summed or picked axis"),
    "summed-but-nowhere": ("input[*b] -> out[*b]  sums i", "a summed or picked axis"),
    "two-stars": ("input[*a, *b] -> out[*a, *b]", "more than one"),
    "twice-in-one": ("input[i, i] -> out[i]", "an axis twice"),
    "one-and-any": ("input[*b], weight[b] -> out[*b]", "one axis and for any number"),
    "same-tensor-twice": ("input[i], input[j] -> out[i, j]", "a tensor occurs twice"),
    "no-clause": ("input[*b, i] -> out[*b]  sum i", "is not a clause"),
    "by-what": ("input[*b, i] -> out[*b]  i by rows", "a clause names rows"),
    "zero-with-what": ("input[*b, i] -> out[*b, i]  i zero with shift", "a clause names shift"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_notation_is_refused_when_it_is_registered(name: str) -> None:
    text, what = WRONG[name]
    with pytest.raises(FxpruneError, match="notation of aten::linear") as caught:
        fxprune.rule("linear", notation=text)
    assert what in str(caught.value)


def test_an_unknown_word_for_values_is_refused() -> None:
    with pytest.raises(FxpruneError, match="moved"):
        fxprune.rule("mylib::op", values="move")


def test_an_op_that_is_not_loaded_yet_may_have_any_arguments() -> None:
    assert read_notation("x[i] -> out[i]", "mylib::not_there").added == ""


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("input[*b, i], weight[o, i], bias[o]? -> out[*b, o]  sums i", "bias"),
        ("input[*b, i], weight[o, i] -> out[*b, o]  sums i", ""),
    ],
)
def test_the_added_tensor_of_a_product_has_no_summed_letter(text: str, added: str) -> None:
    assert read_notation(text, "aten::linear", multiplies=True).added == added


@pytest.mark.parametrize(
    ("op", "moves"),
    [
        ("aten.view.default", True),
        ("aten.to.dtype", True),
        ("<built-in function getitem>", True),
        ("aten.linear.default", False),
        ("aten.embedding.default", False),
        ("mylib.op.default", False),
        ("a.weight", False),
    ],
)
def test_ops_that_only_move_values_are_known_by_their_text(op: str, moves: bool) -> None:
    assert moves_values(op) is moves
