"""Targets in words."""

from __future__ import annotations

import pytest

from fxprune.errors import ArgumentError
from fxprune.removal.target import Reached, parse_target


@pytest.mark.parametrize(
    ("text", "budget", "amount", "part"),
    [
        ("100M", "params", 100e6, 0),
        ("1.5b", "params", 1.5e9, 0),
        (90_000, "params", 90_000, 0),
        ("5G macs", "macs", 5e9, 0),
        ("80MB", "bytes", 80e6, 0),
        ("80 MiB@Q4_K_M", "bytes@q4_k_m", 80 * 2**20, 0),
        ("12KB kv", "kv", 12e3, 0),
        ("0.8x params", "params", 0, 0.8),
        ("0.5x  kv", "kv", 0, 0.5),
        ("0.5x bytes@q8_0", "bytes@q8_0", 0, 0.5),
        ("2x decode", "decode", 0, 0.5),
        ("2x prefill@a b.json:llama.cpp", "prefill@a b.json:llama.cpp", 0, 0.5),
    ],
)
def test_a_target_states_a_quantity_and_an_amount(text: str | int, budget: str, amount: float, part: float) -> None:
    target = parse_target(text)
    assert (target.budget, target.amount, target.part) == (budget, amount, part)
    assert target.of(200.0) == (amount or part * 200)


def test_bytes_with_a_context_are_memory() -> None:
    assert parse_target("6GB", 8192).budget == "memory@8192"
    assert parse_target("0.5x bytes@q4_k_m", 10).budget == "memory@10:q4_k_m"
    with pytest.raises(ArgumentError, match="no amount of memory"):
        parse_target("100M", 8192)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "target is ''"),
        ("small", "Pass a size as in"),
        ("5 apples", "Pass a size as in"),
        ("-5M", "Pass a size as in"),
        ("1.2.3M", "Pass a size as in"),
        ("0M", "a target above 0"),
        (True, "Pass a size as in"),
        (0.5, "Pass a size as in"),
        ("0.5x", "Pass a size as in"),
        ("0.5x speed", "Pass a size as in"),
        ("80MB of weights", "Pass a size as in"),
        ("100M tokens", "Pass a size as in"),
        ("80MB@q9", "'q9' is no format of GGUF files"),
        ("1x params", "nothing to remove"),
        ("1.3x kv", "a speed is above 1"),
        ("0.8x decode", "is no gain"),
    ],
)
def test_what_is_no_target_is_refused(value: object, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        parse_target(value)


def test_what_was_reached_is_a_line() -> None:
    line = str(Reached("80MB", "bytes of weights", 80e6, 538e6, 80.4e6))
    assert line == "Target 80MB: 538,000,000 to 80,400,000 bytes of weights, 80,000,000 asked for (+0.5%)"
