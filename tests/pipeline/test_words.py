"""Words that need no torch, and the passes that log."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import fxprune
import fxprune.pipeline.arguments
from fxprune.discovery.groups import KINDS
from tests.models import tiny


def test_words_need_no_torch() -> None:
    code = "import sys, fxprune.pipeline.arguments; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert fxprune.pipeline.words.KINDS is KINDS


def test_each_pass_is_logged_with_its_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fxprune"):
        fxprune.prune(tiny("llama"), importance="l2", ratio=0.1)
    told = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert told[:3] == ["trace", "find-groups", "l2"] and told[-1] == "make-report"
