"""Warnings and logs are hidden for a while, up to a level, and no longer."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from fxprune.graph.context import quiet, unprinted


def test_warnings_and_logs_are_hidden_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("hidden", stacklevel=1)
            log.error("hidden")
        warnings.warn("heard", stacklevel=1)
        log.error("heard")
    assert [str(warning.message) for warning in told] == ["heard"]
    assert caplog.messages == ["heard"]


def test_errors_are_heard_where_only_warnings_are_to_be_hidden(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with quiet(logging.WARNING):
        log.warning("hidden")
        log.error("heard")
    assert caplog.messages == ["heard"]


def test_inside_another_the_stricter_one_holds_and_an_error_ends_both(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("someone.else")
    with pytest.raises(KeyError), quiet():
        with quiet(logging.WARNING):
            log.error("hidden")
        raise KeyError
    log.warning("heard")
    assert caplog.messages == ["heard"]


def test_what_is_printed_about_errors_is_hidden_with_them(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet(), unprinted():
        print("hidden", file=sys.stderr)
    with quiet(logging.WARNING):
        print("heard", file=sys.stderr)
    assert capfd.readouterr().err == "heard\n"
