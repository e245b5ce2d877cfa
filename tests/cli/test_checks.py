"""Options of a prune that are fine, and that checking them needs no torch; `wrong_uses.txt` has those that are not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fxprune.cli.checks import check_dtype_and_device, check_pass, check_printing
from fxprune.errors import ArgumentError, UnknownNameError


@pytest.mark.parametrize(
    ("stage", "spelled"),
    [("importance", "taylor{order=second}"), ("importance", None), ("compensate", "least-squares"), ("tune", "none")],
)
def test_passes_of_a_stage_are_fine(stage: str, spelled: str | None) -> None:
    check_pass(stage, spelled, optional=stage != "importance")


def test_a_pass_of_another_stage_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown tune 'taylor'"):
        check_pass("tune", "taylor", optional=True)
    with pytest.raises(UnknownNameError, match="unknown importance 'none'"):
        check_pass("importance", "none")


@pytest.mark.parametrize("given", [(None, None), ("float16", "cpu"), ("bfloat16", "cuda:1"), ("float32", "mps")])
def test_dtypes_and_devices_are_told_by_their_names(given: tuple[Any, Any]) -> None:
    check_dtype_and_device(*given)


def test_less_and_more_cannot_be_printed() -> None:
    check_printing(quiet=True, verbose=False)
    with pytest.raises(ArgumentError, match="--quiet and --verbose"):
        check_printing(quiet=True, verbose=True)


def test_checks_need_no_torch() -> None:
    code = "import sys, fxprune.cli.checks, fxprune.cli.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
