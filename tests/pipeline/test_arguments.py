"""Arguments: validation by kind, with errors that name argument and value."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.errors import ArgumentError, FxpruneError, RatioError
from fxprune.pipeline.arguments import (
    argument,
    as_path,
    as_seed,
    flag,
    format_value,
    function,
    instance,
    number,
)


@pytest.mark.parametrize(
    ("value", "bounds", "says"),
    [
        (1, {"least": 0, "below": 1}, r"ratio is 1\. Pass a number in \[0, 1\)"),
        (0, {"above": 0}, r"ratio is 0\. Pass a number above 0"),
        (-1, {"least": 0}, r"a number of 0 or more"),
        (2, {"most": 1}, r"a number of 1 or less"),
        (True, {}, "ratio is True"),
        (10**400, {}, "ratio is 1000"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(value: Any, bounds: dict[str, float], says: str) -> None:
    with pytest.raises(RatioError, match=says):
        number("ratio", value, error=RatioError, **bounds)


def test_flags_seeds_paths_functions_and_instances() -> None:
    assert flag("verify", np.bool_(True)) is True and as_seed("seed", 2**64 - 1) == 2**64 - 1
    assert as_path("file", Path("a/b")) == "a/b" and as_path("file", "~/a") == str(Path.home() / "a")
    assert function("track", len, "one") is len
    assert instance("text", "a", str, "text") == "a"
    for call in (
        lambda: flag("verify", "no"),
        lambda: as_seed("seed", 2**64),
        lambda: as_path("file", "a\0b"),
        lambda: function("track", int, "a function and no class"),
        lambda: instance("text", b"a", str, "text"),
    ):
        with pytest.raises(ArgumentError):
            call()


def test_values_are_formatted_in_few_words() -> None:
    for value, words in (
        (None, "None"),
        (int, "the class int"),
        (object(), "an object"),
        (torch.ones(2, 3), "a torch.float32 tensor of shape (2, 3)"),
        (np.ones(2, dtype=int), "an int64 array of shape (2,)"),
        (torch.tensor(3), "3"),
        ([1, 2], "[1, 2]"),
    ):
        assert format_value(value) == words
    assert len(format_value("x" * 5000)) < 100
    for columns in range(1, 40):  # lines of a tensor, wherever they are cut
        assert format_value(OrderedDict(a=torch.ones(2, columns))).startswith("OrderedDict([('a', tensor([[")
    error = FxpruneError("it is\nbroken.", where="here", remedy="Mend it")
    assert str(error) == "here: it is broken. Mend it", "an error is one line"


def test_a_misspelled_limit_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ArgumentError, match=r"it takes no atleast. Limits are least, most, above and below"):
        argument(1, "A number.", atleast=2)
    with pytest.raises(ArgumentError, match="doc is 5"):
        argument(1, 5)  # type: ignore[arg-type]
