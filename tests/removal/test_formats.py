"""Types of the tensors of a GGUF file."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest

from fxprune.errors import UnknownNameError
from fxprune.removal.budget import FileBudget, make_budget
from fxprune.removal.target import FORMATS, Place, check_format, least_each, type_of
from tests.oracle import axes_of
from tests.remembered import grouped

FAVOURED = (0, 1, 4, 7, 10, 13, 15, 16, 17)
"""Blocks of Gemma 3 270M in whose file by llama.cpp in Q4_K_M some tensors have more bits."""


def test_types_are_those_of_a_file_that_llama_cpp_wrote() -> None:
    """Those of Gemma 3 270M: 18 blocks, 640 channels, queries of 1,024, MLPs of 2,048, and tied ends."""
    for block in range(18):
        found = {
            part: type_of("q4_k_m", Place(part, -1, block, 18), row).name
            for part, row in (("other", 640), ("value", 640), ("output", 1024), ("down", 2048))
        }
        more = block in FAVOURED
        assert found["other"] == "Q5_0" and found["output"] == "Q4_K"
        assert (found["value"], found["down"]) == (("Q8_0", "Q6_K") if more else ("Q5_0", "Q4_K"))
    assert type_of("q4_k_m", Place("head"), 640).name == "Q8_0"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_type_for_every_row(name: str) -> None:
    for part in ("other", "value", "fused", "output", "down", "embedding", "head"):
        for block in range(9):
            for row in (256, 96, 77):
                kind = type_of(name, Place(part, -1, block, 9), row)
                size, stored = gguf.GGML_QUANT_SIZES[kind]
                assert stored / size >= least_each(name)
                assert name[1:2].isdigit() is False or name[2:4] != "_k" or row % size == 0


def test_a_name_that_is_no_format_is_refused() -> None:
    assert check_format("Q4_K_M") == "q4_k_m"
    with pytest.raises(UnknownNameError, match="Did you mean 'q4_k_m'"):
        check_format("q4km")


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", {"other": 12, "value": 3, "output": 3, "down": 3, "embedding": 1, "head": 1}),
        ("phi3", {"other": 3, "fused": 3, "output": 3, "down": 3, "embedding": 1, "head": 1}),
    ],
)
def test_places_of_matrices_are_found_in_the_graph(family: str, parts: dict[str, int]) -> None:
    graph = grouped(family)
    budget = make_budget("bytes@q4_k_m", graph, axes_of(graph))
    assert isinstance(budget, FileBudget)
    assert Counter(place.part for place in budget.places.values()) == parts
