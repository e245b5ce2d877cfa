"""Rules as text: invalid notations are refused with the reason, and applied rules are printed."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import fxprune
from fxprune.errors import FxpruneError
from fxprune.rules import describe_rule
from fxprune.rules.notation import read_notation
from fxprune.rules.registry import moves_values

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


def node_of(target: object, *arguments: object, weights: int = 0) -> fx.Node:
    """A call of `target`, the last `weights` tensors being weights."""
    graph = fx.Graph()
    count = sum(isinstance(argument, torch.Tensor) for argument in arguments)
    nodes: list[object] = []
    for argument in arguments:
        if not isinstance(argument, torch.Tensor):
            nodes.append(argument)
            continue
        read = len(nodes) >= count - weights
        node = graph.create_node("get_attr" if read else "placeholder", f"t{len(nodes)}")
        node.meta["val"] = argument
        nodes.append(node)
    call = graph.call_function(target, tuple(nodes))  # type: ignore[arg-type]
    call.meta["val"] = target(*arguments)  # type: ignore[operator]
    return call


def x(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


# name: (call, its rule)
PRINTED: dict[str, tuple[fx.Node, str]] = {
    "linear": (
        node_of(aten.linear.default, x(2, 3, 4), x(5, 4), weights=1),
        "linear  input[b, s, i], weight[o, i] -> out[b, s, o]  sums i",
    ),
    "vector": (node_of(aten.linear.default, x(4), x(4), weights=1), "linear  input[i], weight[i] -> out[]  sums i"),
    "outer": (node_of(aten.outer.default, x(2), x(3)), "outer  self[i], vec2[j] -> out[i, j]"),
    "with-itself": (node_of(aten.reshape.default, x(2, 12), [2, 3, 4]), "reshape  self[a, (b * c)] -> out[a, b, c]"),
    "diagonal": (node_of(aten.diagonal.default, x(2, 4, 4), 0, -2, -1), "diagonal  self[a, b, b] -> out[a, b]"),
    "diagonal beside the main one": (
        node_of(aten.diagonal.default, x(2, 4, 4), 1, -2, -1),
        "diagonal  self[a, b, c] -> out[a, d]  keeps b, c, d: read along a diagonal beside the main one",
    ),
    "cut": (node_of(aten.slice.Tensor, x(2, 9), 1, 2, 6), "slice  self[a, [b | c | d]] -> out[a, c]"),
    "broadcast": (node_of(aten.add.Tensor, x(2, 3), x(3)), "add  self[a, b], other[b] -> out[a, b]"),
    "statistic": (node_of(aten.mean.dim, x(2, 3), [1]), "mean  self[a, b] -> out[a]  statistic over b"),
    "picked": (
        node_of(aten.embedding.default, x(5, 4), torch.ones(2, 3, dtype=torch.int64)),
        "embedding  weight[r, w], indices[i, s] -> out[i, s, w]  r by indices  keeps r: rows are looked up by number",
    ),
    "unknown": (
        node_of(aten.cummax.default, x(2, 3), 1),
        "cummax  self[a, b] -> out#0[c, d], out#1[e, f]  keeps a, b, c, d, e, f: no rule for aten.cummax.default",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_every_op_prints_its_rule(name: str) -> None:
    node, text = PRINTED[name]
    assert describe_rule(node) == text


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
